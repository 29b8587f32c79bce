"""The report of an export: saved in the repository as JSON, and printed as a table."""

from __future__ import annotations

import contextlib
import platform
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import msgspec
from rich.console import Group
from rich.table import Table

from imprompt_export import parity
from imprompt_export.backends import export_backend
from imprompt_export.quality import Quality
from imprompt_serving import specs
from imprompt_serving.backends import MODULES

FILE_NAME = "export.json"
_VERSIONS = (
    *("imprompt", "torch", "diffusers", "transformers", "onnx"),
    *(distribution for name in MODULES for distribution in export_backend(name).distributions),
)


class EngineRow(parity.Comparison, frozen=True, kw_only=True):
    """A comparison with PyTorch, and the seconds that the export of the engine took."""

    export_seconds: float

    @classmethod
    def of(cls, row: parity.Comparison, *, export_seconds: float) -> EngineRow:
        return cls(**msgspec.structs.asdict(row), export_seconds=export_seconds)


class Report(msgspec.Struct, kw_only=True):
    """The comparison of all engines with PyTorch, and of quantized engines with fp32."""

    engines: list[EngineRow] = []
    quality: list[Quality] = []


def save(report: Report, folder: Path, spec: specs.Bundle, *, run_by: str | None) -> None:
    """Write `report` to the folder of the pipeline model, with the versions of the packages that built the engines.

    Args:
        report: the report.
        folder: the folder of the pipeline model.
        spec: the exported bundle.
        run_by: the backend that ran the engines for the comparison; None if none could.
    """
    content = {
        "bundle": spec.name,
        "backend": spec.backend,
        "precision": spec.precision,
        "run_by": run_by,
        "python": platform.python_version(),
        "versions": dict(_versions()),
        **msgspec.structs.asdict(report),
    }
    (folder / FILE_NAME).write_bytes(msgspec.json.format(msgspec.json.encode(content)) + b"\n")


def _versions() -> Iterator[tuple[str, str]]:
    """Yield the version of each package in `_VERSIONS` that is installed."""
    for name in _VERSIONS:
        with contextlib.suppress(PackageNotFoundError):
            yield name, version(name)


def table(report: Report) -> Group:
    """Render `report` for the terminal."""
    return Group(_engines(report.engines), *([_quality(report.quality)] if report.quality else []))


def _quality(rows: list[Quality]) -> Table:
    table = Table("quantized", "to", "calls", "SNR, dB", "worst call, dB", "minimum, dB", "pictures differ by")
    for row in rows:
        table.add_row(
            row.engine,
            row.precision,
            str(row.calls),
            f"{row.snr_db:.1f}",
            f"{row.worst_snr_db:.1f}",
            f"{row.min_snr_db:g}" if row.used else f"{row.min_snr_db:g}: stays in fp32",
            f"{row.picture_distance:.1f} levels",
        )
    return table


def _engines(rows: list[EngineRow]) -> Table:
    table = Table("engine", "sizes", "export, s", "call, s", "max abs difference", "allowed")
    for row in rows:
        sizes = " ".join(f"{axis}={size}" for axis, size in row.sizes.items() if not axis.startswith("q"))
        table.add_row(
            row.engine,
            sizes,
            f"{row.export_seconds:.1f}",
            f"{row.seconds:.3f}",
            f"{row.difference:.1e}",
            f"{row.allowed:.1e}",
        )
    return table
