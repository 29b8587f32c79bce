"""The results of a run: raw samples, a description of the machine, and the JSON file that stores them."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import platform
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec

INSTRUCTION_SETS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "avx_vnni", "amx_bf16", "amx_int8")
VERSIONS = (
    *(
        "imprompt",
        "torch",
        "triton",
        "diffusers",
        "transformers",
        "onnxruntime",
        "onnxruntime-gpu",
        "openvino",
        "numpy",
    ),
    "nvidia-pytriton",
)


class BenchError(RuntimeError):
    """A measurement is not possible; the message says why."""


class Sample(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One request. Times are seconds since the start of its scenario; latency counts from `intended`."""

    index: int
    intended: float
    sent: float
    ended: float
    status: str = "ok"
    """`ok`, `refused` (the queue was full), `left` (the caller canceled it), or the name of an exception."""
    kind: str = ""
    pictures: int = 1
    timings: dict[str, float] = {}
    """Seconds per stage on the server."""

    @property
    def latency(self) -> float:
        return self.ended - self.intended


class ServerUse(msgspec.Struct, frozen=True, kw_only=True):
    """Changes of the server's counters during one measurement, and the resources that its processes used."""

    unet_calls: float
    rows_per_call: float
    cache_hits: float
    cache_misses: float
    refused: float
    cores: float | None = None
    """CPU seconds per second, over all processes of the server."""
    memory_mib: dict[str, float] = {}
    """Resident memory per process, at the end."""


class Measurement(msgspec.Struct, frozen=True, kw_only=True):
    """One measurement of a scenario: the samples at one value of what it varies."""

    scenario: str
    label: str
    """The system (such as `imprompt` or `eager`), or the kind of traffic."""
    value: float | None = None
    """The value of what the scenario varies: callers, fraction of capacity, steps or pixels."""
    seconds: float
    """Time from the first request to the last result."""
    stable: bool
    """Whether `spread` is within the limit."""
    spread: float | None
    """Largest median of a window over the smallest, minus one; None if there are too few samples."""
    server: ServerUse | None = None
    notes: dict[str, float] = {}
    samples: list[Sample]

    def latencies(self, status: str = "ok") -> list[float]:
        return [sample.latency for sample in self.samples if sample.status == status]

    @property
    def pictures_per_second(self) -> float:
        return sum(sample.pictures for sample in self.samples if sample.status == "ok") / self.seconds


class Run(msgspec.Struct, frozen=True, kw_only=True):
    """All measurements of one command."""

    command: str
    environment: dict[str, Any]
    bundle: dict[str, Any]
    """Name, backend and precision of the bundle; size and steps of the requests."""
    setup: dict[str, Any]
    """Seconds and peak memory of the export, engine sizes, seconds until ready. Empty for a server already running."""
    arithmetic: dict[str, float]
    """FLOP of a UNet call for one guided picture, and FLOP/s of a matrix product. Empty if `setup` is."""
    parity: dict[str, list[float]]
    """Largest and mean difference between each baseline's picture and the server's, in levels of 255."""
    measurements: list[Measurement]
    skipped: dict[str, str] = {}
    """What was not measured, and why."""

    def of(self, scenario: str) -> list[Measurement]:
        return [measurement for measurement in self.measurements if measurement.scenario == scenario]

    def save(self, path: Path) -> None:
        """Write JSON with one line per measurement; a reader sees the whole file or the one before."""
        path.parent.mkdir(parents=True, exist_ok=True)
        fields = msgspec.structs.asdict(self)
        measurements = fields.pop("measurements")
        head = [f"{_text(key)}: {_text(value)}" for key, value in fields.items()]
        rows = ",\n  ".join(map(_text, measurements))
        text = "{\n" + ",\n".join([*head, f'"measurements": [\n  {rows}\n]']) + "\n}\n"
        draft = path.with_name(f".{path.name}.{os.getpid()}")
        draft.write_text(text)
        draft.replace(path)  # a reader sees all of it or the one before, also if this process is killed

    @classmethod
    def load(cls, path: Path) -> Run:
        return msgspec.json.decode(path.read_bytes(), type=cls)


def _text(value: Any) -> str:
    return msgspec.json.encode(_rounded(msgspec.to_builtins(value))).decode()


def _rounded(value: Any) -> Any:
    """Round floats to six significant digits, more than the accuracy of any clock involved."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {key: _rounded(entry) for key, entry in value.items()}
    return [_rounded(entry) for entry in value] if isinstance(value, list | tuple) else value


def environment() -> dict[str, Any]:
    """Describe the machine and the package versions. Only numbers of the same `machine` can be compared."""
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "machine": _machine_id(),
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30),
        "load_average": [round(value, 1) for value in os.getloadavg()],
        **_gpu(),
        "python": platform.python_version(),
        "versions": {name: version for name in VERSIONS if (version := _version(name))},
    }


def _gpu() -> dict[str, str]:
    """Return the model and driver of the first NVIDIA GPU; empty if there is none."""
    query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=30, check=True).stdout
        name, driver = answer.splitlines()[0].split(", ")
    except (OSError, subprocess.SubprocessError, IndexError, ValueError):
        return {}
    return {"gpu": name, "driver": driver}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _machine_id() -> str:
    """Return an ID that does not reveal the machine: a hash of its own ID and of its hardware.

    Copies of a virtual machine have one ID in common, but may run on different CPUs.
    """
    system = Path("/etc/machine-id")
    fields, gpu = _cpu_fields(), _gpu().get("gpu")
    parts = (
        system.read_text() if system.exists() else platform.node(),
        *(fields.get(name) for name in ("vendor_id", "cpu family", "model", "model name", "stepping", "flags")),
        os.cpu_count(),
        gpu,
    )
    return hashlib.sha256(repr(("imprompt", *parts)).encode()).hexdigest()[:8]


def _cpu_fields() -> dict[str, str]:
    """Return what Linux says about the last CPU; empty on other systems."""
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    return {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in info.splitlines())}


def _cpu() -> str:
    """Return the CPU model and its relevant instruction sets."""
    fields = _cpu_fields()
    sets = [name.upper() for name in INSTRUCTION_SETS if name in fields.get("flags", "").split()]
    model = fields.get("model name") or platform.processor() or platform.machine()
    return f"{model} ({', '.join(sets)})" if sets else model
