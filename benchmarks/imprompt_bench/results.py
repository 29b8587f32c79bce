"""What a run leaves behind: raw samples, what they were measured on, and the JSON they are kept in."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec

INSTRUCTION_SETS = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "amx_int8")
VERSIONS = ("imprompt", "torch", "diffusers", "onnxruntime", "openvino", "numpy", "nvidia-pytriton")


class BenchError(RuntimeError):
    """Something cannot be measured; the message says what and why."""


class Sample(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One request. Times are seconds since the beginning of its scenario; latency counts from ``intended``."""

    index: int
    intended: float
    sent: float
    ended: float
    status: str = "ok"
    """`ok`, `refused` (the waiting line is full), `left` (its caller cancelled it), or the name of an error."""
    kind: str = ""
    pictures: int = 1
    timings: dict[str, float] = {}
    """Seconds of each stage on the server."""

    @property
    def latency(self) -> float:
        return self.ended - self.intended


class ServerUse(msgspec.Struct, frozen=True, kw_only=True):
    """What the server's counters and processes say of one measurement."""

    unet_calls: float
    rows_per_call: float
    cache_hits: float
    cache_misses: float
    refused: float
    cores: float | None = None
    """CPU seconds of all processes of the server for each second."""
    memory_mib: dict[str, float] = {}
    """Resident memory by process, at the end."""


class Measurement(msgspec.Struct, frozen=True, kw_only=True):
    """One point of one scenario."""

    scenario: str
    label: str
    """The system (`imprompt`, `eager`), or the traffic."""
    value: float | None = None
    """What the scenario varies: callers, share of capacity, steps, pixels."""
    seconds: float
    """From the first request to the last answer."""
    stable: bool
    spread: float | None
    """Largest median of a window over the smallest, less one; None when there are too few samples."""
    server: ServerUse | None = None
    notes: dict[str, float] = {}
    samples: list[Sample]

    def latencies(self, status: str = "ok") -> list[float]:
        return [sample.latency for sample in self.samples if sample.status == status]

    @property
    def pictures_per_second(self) -> float:
        return sum(sample.pictures for sample in self.samples if sample.status == "ok") / self.seconds


class Run(msgspec.Struct, frozen=True, kw_only=True):
    """All that one command measured."""

    command: str
    environment: dict[str, Any]
    bundle: dict[str, Any]
    """Name, backend, precision, size and steps of the requests."""
    setup: dict[str, Any]
    """Seconds and peak memory of the export, sizes of engines, seconds until ready. Empty for a server that ran."""
    arithmetic: dict[str, float]
    """FLOP of a UNet call of one guided picture, and FLOP per second of a matrix product. Empty as `setup`."""
    parity: dict[str, list[float]]
    """Largest and mean difference of each baseline's picture to the server's, in levels of 255."""
    measurements: list[Measurement]

    def of(self, scenario: str) -> list[Measurement]:
        return [measurement for measurement in self.measurements if measurement.scenario == scenario]

    def save(self, path: Path) -> None:
        """Write JSON with a line for each measurement."""
        path.parent.mkdir(parents=True, exist_ok=True)
        fields = msgspec.structs.asdict(self)
        measurements = fields.pop("measurements")
        head = [f"{_text(key)}: {_text(value)}" for key, value in fields.items()]
        rows = ",\n  ".join(map(_text, measurements))
        path.write_text("{\n" + ",\n".join([*head, f'"measurements": [\n  {rows}\n]']) + "\n}\n")

    @classmethod
    def load(cls, path: Path) -> Run:
        return msgspec.json.decode(path.read_bytes(), type=cls)


def _text(value: Any) -> str:
    return msgspec.json.encode(_rounded(msgspec.to_builtins(value))).decode()


def _rounded(value: Any) -> Any:
    """Floats with six significant digits, which is more than any clock here is good for."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {key: _rounded(entry) for key, entry in value.items()}
    return [_rounded(entry) for entry in value] if isinstance(value, list | tuple) else value


def environment() -> dict[str, Any]:
    """What the numbers were measured on, and with."""
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30),
        "load_average": [round(value, 1) for value in os.getloadavg()],
        "python": platform.python_version(),
        "versions": {name: version for name in VERSIONS if (version := _version(name))},
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu() -> str:
    """The model, and which of the instruction sets that matter here it has."""
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    fields = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in info.splitlines())}
    sets = [name.upper() for name in INSTRUCTION_SETS if name in fields.get("flags", "").split()]
    model = fields.get("model name") or platform.processor() or platform.machine()
    return f"{model} ({', '.join(sets)})" if sets else model
