"""The table of an export: kept in the repository as JSON, printed for the user."""

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


class Row(parity.Row, frozen=True, kw_only=True):
    """A comparison and the time that the export of its engine took, in seconds."""

    export_seconds: float

    @classmethod
    def of(cls, row: parity.Row, *, export_seconds: float) -> Row:
        return cls(**msgspec.structs.asdict(row), export_seconds=export_seconds)


class Report(msgspec.Struct, kw_only=True):
    """What an export found out of its engines: all of them against PyTorch, and quantized ones against fp32."""

    engines: list[Row] = []
    quality: list[Quality] = []


def save(made: Report, folder: Path, spec: specs.Bundle, *, run_by: str | None) -> None:
    """Write ``made`` beside the pipeline model, with the versions that made the engines.

    ``run_by``: the backend that ran the engines for the comparison; None if nothing could.
    """
    content = {
        "bundle": spec.name,
        "backend": spec.backend,
        "precision": spec.precision,
        "run_by": run_by,
        "python": platform.python_version(),
        "versions": dict(_versions()),
        **msgspec.structs.asdict(made),
    }
    (folder / FILE_NAME).write_bytes(msgspec.json.format(msgspec.json.encode(content)) + b"\n")


def _versions() -> Iterator[tuple[str, str]]:
    """Those that are installed."""
    for name in _VERSIONS:
        with contextlib.suppress(PackageNotFoundError):
            yield name, version(name)


def table(made: Report) -> Group:
    """``made`` for the terminal."""
    return Group(_engines(made.engines), *([_quality(made.quality)] if made.quality else []))


def _quality(rows: list[Quality]) -> Table:
    made = Table("quantized", "to", "calls", "signal to noise, dB", "in the worst call", "wanted", "pictures differ by")
    for row in rows:
        made.add_row(
            row.engine,
            row.precision,
            str(row.calls),
            f"{row.snr_db:.1f}",
            f"{row.worst_snr_db:.1f}",
            f"{row.min_snr_db:g}",
            f"{row.picture_distance:.1f} levels",
        )
    return made


def _engines(rows: list[Row]) -> Table:
    made = Table("engine", "size", "export s", "call s", "max abs difference", "allowed")
    for row in rows:
        sizes = " ".join(f"{axis}={size}" for axis, size in row.sizes.items() if not axis.startswith("q"))
        made.add_row(
            row.engine,
            sizes,
            f"{row.export_seconds:.1f}",
            f"{row.seconds:.3f}",
            f"{row.difference:.1e}",
            f"{row.allowed:.1e}",
        )
    return made
