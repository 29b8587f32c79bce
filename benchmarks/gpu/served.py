"""Stage `served`: a preset exported and served by Triton, called through the SDK, against the bare call of its UNet."""

from __future__ import annotations

import dataclasses
import importlib.util
import shutil
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from torch import Tensor

from gpu.plan import ROWS, Options, Task, engines_task, tasks
from gpu.record import callers_measurement, measurement
from gpu.timing import device_seconds, fewer
from imprompt import Client
from imprompt_bench import checkpoints
from imprompt_bench.presets import PRESETS
from imprompt_bench.results import BenchError, Measurement
from imprompt_bench.workload import Workload
from imprompt_export import export
from imprompt_serving.backends import get_backend
from imprompt_serving.launcher import Server
from imprompt_serving.specs import Bundle

CALLERS = (1, 8)
POLL_S = 0.5


@dataclass(frozen=True, kw_only=True, slots=True)
class Exported:
    """An exported preset, not served yet: a server would use the device while others are timed."""

    repository: Path
    model: str
    workload: Workload
    rows: int
    """Most rows of a UNet call."""
    log: Path


def prepare(task: Task, options: Options) -> Exported:
    """Write the checkpoints of a preset, wait until its UNet is built by the other task, and export them.

    Raises:
        BenchError: there is no Triton here.
    """
    if importlib.util.find_spec("pytriton") is None:
        raise BenchError("nvidia-pytriton, which brings Triton, is not installed")
    work, preset = Path(options.work, task.name), dataclasses.replace(PRESETS[task.preset], motion=False)
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    on_gpu = options.device == "cuda"
    backend = "inductor" if on_gpu else "onnxruntime"  # which exports in less time on a CPU
    checkpoints.silence_libraries()
    written = checkpoints.write(
        work,
        task.preset,
        preset,
        backend=backend,
        precision=options.precisions[0],
        sizes=(preset.size,) * 3,
        rows=max(ROWS[task.preset]),
    )
    if on_gpu:
        _wait_for_packages(task, options)
    log = work / "export.log"
    with log.open("w") as file:
        export(written.bundle, work / "repository", Console(file=file))
    workload = Workload(
        model=task.preset, adapter=checkpoints.ADAPTER, size=preset.size, steps=options.steps, smallest=preset.size
    )
    return Exported(
        repository=work / "repository",
        model=task.preset,
        workload=workload,
        rows=max(ROWS[task.preset]),
        log=log,
    )


def _wait_for_packages(task: Task, options: Options) -> None:
    """Wait for the task that builds the same packages: this one then takes them from the cache."""
    builder = engines_task(task.preset, options.precisions[0])
    if builder in (other.name for other in tasks(options)):
        while not any(Path(options.work, f"{builder}.{end}").exists() for end in ("ready", "over")):
            time.sleep(POLL_S)


def served(found: Exported, options: Options) -> Iterator[Measurement]:
    """Pictures by callers through the SDK, and their seconds of a step next to those of a bare call."""
    (line, *_) = found.log.read_text().splitlines()[-1:] or [""]
    print(f"export of {found.model}: {line}", file=sys.stderr)
    began = time.perf_counter()
    with Server(found.repository) as server:
        yield measurement("served", "start of the server", [time.perf_counter() - began])
        with ExitStack() as stack:
            clients = [stack.enter_context(Client(server.grpc_address)) for _ in range(max(CALLERS))]
            with ThreadPoolExecutor(len(clients)) as threads:
                runs = {callers: _pictures(threads, clients[:callers], found, options) for callers in CALLERS}
    bare = _bare_calls(found, options)
    for callers, (seconds, steps) in runs.items():
        rows = min(2 * callers, found.rows)
        yield callers_measurement("served", callers, seconds, step=median(steps), bare=bare[rows])


def _pictures(
    threads: ThreadPoolExecutor, clients: list[Client], found: Exported, options: Options
) -> tuple[list[float], list[float]]:
    """Seconds until all callers have their picture, in each round, and of each picture's denoising step."""
    rounds, steps = [], []
    for index in range(1 + fewer(options.repeats)):

        def call(number: int, client: Client, index: int = index) -> float:
            arguments: dict[str, Any] = found.workload.request(100 * index + number)
            return client.generate(**arguments).timings["denoise"]

        began = time.perf_counter()
        denoise = list(threads.map(call, range(len(clients)), clients))
        if index:  # the first round is the warm-up
            rounds.append(time.perf_counter() - began)
            steps += [seconds / found.workload.steps for seconds in denoise]
    return rounds, steps


def _bare_calls(found: Exported, options: Options) -> dict[int, float]:
    """Median seconds of a call of the exported UNet in this process, by rows; the server is gone by then."""
    folder = found.repository / f"{found.model}_denoiser" / "1"
    bundle = Bundle.load(folder)
    device = "cuda:0" if options.device == "cuda" else ""
    unet: Any = get_backend(bundle.backend).load(folder / "unet", threads=bundle.threads, device=device)
    seconds = {}
    for rows in dict.fromkeys(min(2 * callers, found.rows) for callers in CALLERS):
        tensors = _inputs(bundle, rows, options.device)
        if device:
            call = partial(unet.run_tensors, tensors)
        else:
            call = partial(unet.run, {name: tensor.numpy() for name, tensor in tensors.items()})
        seconds[rows] = median(device_seconds(call, options.device, options.repeats))
    return seconds


def _inputs(bundle: Bundle, rows: int, device: str) -> dict[str, Tensor]:
    """Inputs of the exported UNet, as the conditioner lays them out."""
    from imprompt_bench.rig import Rig

    rig = Rig(bundle, None)  # type: ignore[arg-type]  # nothing is run
    try:
        job = rig.job("inputs", steps=1, size=bundle.default_height)
        sample, timestep = job.model_input()
        tensors = {"sample": sample, "timestep": timestep, **job.conditioning()}
        return {
            name: tensor.repeat(rows // len(tensor), *(1,) * (tensor.ndim - 1)).to(device)
            for name, tensor in tensors.items()
        }
    finally:
        rig.denoiser.stop()
