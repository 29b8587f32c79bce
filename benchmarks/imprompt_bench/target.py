"""The measurement target: a running server, or a preset that is exported and served for the measurement."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import msgspec

from imprompt import Capabilities, Client
from imprompt_bench.observe import Observer
from imprompt_bench.presets import PRESETS
from imprompt_bench.results import BenchError

METRICS_PORT = 8002
_EXPORT = "import sys; from imprompt.cli import app; app(sys.argv[1:])"


@dataclass(frozen=True, kw_only=True, slots=True)
class Target:
    """A served bundle. For a preset, `folder` holds its checkpoints and model repository."""

    url: str
    model: str
    capabilities: Capabilities
    observer: Observer
    folder: Path | None = None
    setup: dict[str, Any] = field(default_factory=dict)

    @property
    def adapter(self) -> str | None:
        """The first adapter that accepts pictures."""
        names = [adapter["name"] for adapter in self.capabilities["ip_adapters"] if adapter["takes_images"]]
        return names[0] if names else None


def connect(url: str, model: str, metrics_address: str | None = None) -> Target:
    """Connect to the bundle `model` on a running server.

    Its metrics are read from `metrics_address`, or else from the default port, if they are available there.

    Raises:
        BenchError: there are no metrics at `metrics_address`.
    """
    with Client(url) as client:
        capabilities = client.describe(model)
    metrics = metrics_address or f"{url.rpartition(':')[0] or url}:{METRICS_PORT}"
    observer = Observer(bundle=model, metrics_address=metrics.removeprefix("http://").removesuffix("/metrics"))
    try:
        observer.check()
    except BenchError:
        if metrics_address is not None:
            raise
        observer = replace(observer, metrics_address=None)
    return Target(url=url, model=model, capabilities=capabilities, observer=observer)


@contextmanager
def exported_preset(
    preset: str, *, backend: str, precision: str, work: Path | None
) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Write and export `preset`, reusing a previous export in `work`; yield its folder, and what the export cost.

    Raises:
        BenchError: it does not fit into memory, or the export fails.
    """
    from imprompt_bench.checkpoints import silence_libraries

    silence_libraries()
    with tempfile.TemporaryDirectory(prefix="imprompt-bench-") as scratch:
        name = f"{preset}-{backend}-{precision}-{_sources()}"
        folder = (work or Path(scratch)).resolve() / name
        setup_file = folder / "setup.json"
        if not setup_file.exists():
            setup = _export(preset, folder, backend, precision)
            setup_file.write_bytes(msgspec.json.encode(setup))
        yield folder, msgspec.json.decode(setup_file.read_bytes())


@contextmanager
def serve_preset(preset: str, *, backend: str, precision: str, work: Path | None) -> Iterator[Target]:
    """Serve an exported preset; see `exported_preset`."""
    from imprompt_serving.launcher import Server

    with exported_preset(preset, backend=backend, precision=precision, work=work) as (folder, setup):
        server = Server(folder / "repository")
        began = time.perf_counter()
        with server:
            setup["ready_s"] = time.perf_counter() - began
            observer = Observer(
                bundle=preset,
                metrics_address=server.metrics_address,
                pids={"tritonserver": server.pid, **server.stub_pids},
            )
            setup["memory_mib"] = observer.snapshot().memory_mib
            with Client(server.grpc_address) as client:
                capabilities = client.describe(preset)
            yield Target(
                url=server.grpc_address,
                model=preset,
                capabilities=capabilities,
                observer=observer,
                folder=folder,
                setup=setup,
            )


def _export(preset: str, folder: Path, backend: str, precision: str) -> dict[str, Any]:
    """Write checkpoints and export them, in a separate process to measure peak memory; return the cost of it."""
    from imprompt_bench import checkpoints

    checkpoints.check_memory(PRESETS[preset])
    folder.mkdir(parents=True, exist_ok=True)
    written = checkpoints.write(folder, preset, PRESETS[preset], backend=backend, precision=precision)
    repository, began = folder / "repository", time.perf_counter()
    arguments = [sys.executable, "-c", _EXPORT, "export", str(written.bundle), "-o", str(repository)]
    with (folder / "export.log").open("w+") as log:
        process = subprocess.Popen(arguments, stdout=log, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)  # Popen cannot know, because wait4 reaped the process
        if process.returncode:
            log.seek(0)
            raise BenchError(f"the export failed ({process.returncode}): {log.read()[-2000:]}")
    return {
        "parameters": checkpoints.parameters(PRESETS[preset]),
        "export_s": time.perf_counter() - began,
        "export_peak_mib": usage.ru_maxrss / 1024,
        "engines_mib": engine_sizes(repository),
    }


def engine_sizes(repository: Path) -> dict[str, float]:
    """Return the size in MiB of each engine, including external weights, by Triton model (and file, in denoisers)."""
    sizes: dict[str, float] = {}
    for file in repository.glob("*/1/*"):
        if file.suffix not in (".py", ".json", "") and file.is_file():
            model, part = file.parts[-3], file.name.partition(".")[0]
            name = f"{model}/{part}" if model.endswith("_denoiser") else model
            sizes[name] = sizes.get(name, 0.0) + file.stat().st_size / 2**20
    return sizes


def _sources() -> str:
    """Hash the code that writes and exports a preset."""
    digest = hashlib.sha256()
    for package in ("imprompt_bench.checkpoints", "imprompt_bench.presets", "imprompt_export", "imprompt_serving"):
        spec = find_spec(package)
        assert spec is not None  # for mypy; these packages are installed if this runs
        folders = [Path(folder) for folder in spec.submodule_search_locations or ()]
        files = [file for folder in folders for file in folder.rglob("*.py")] or [Path(spec.origin or "")]
        for file in sorted(files):
            digest.update(file.read_bytes())
    return digest.hexdigest()[:12]
