"""The table of an export: kept in the repository as JSON, printed for the user."""

from __future__ import annotations

import contextlib
import platform
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import msgspec
from rich.table import Table

from imprompt_export import parity
from imprompt_serving import specs

FILE_NAME = "export.json"
_VERSIONS = ("imprompt", "torch", "diffusers", "transformers", "onnx", "onnxruntime", "onnxruntime-gpu")


class Row(parity.Row, frozen=True, kw_only=True):
    """A comparison and the time that the export of its engine took, in seconds."""

    export_seconds: float

    @classmethod
    def of(cls, row: parity.Row, *, export_seconds: float) -> Row:
        return cls(**msgspec.structs.asdict(row), export_seconds=export_seconds)


def save(rows: list[Row], folder: Path, spec: specs.Bundle, *, run_by: str | None) -> None:
    """Write ``rows`` beside the pipeline model, with the versions that made the engines.

    ``run_by``: the backend that ran the engines for the comparison; None if nothing could.
    """
    content = {
        "bundle": spec.name,
        "backend": spec.backend,
        "precision": spec.precision,
        "run_by": run_by,
        "python": platform.python_version(),
        "versions": dict(_versions()),
        "engines": rows,
    }
    (folder / FILE_NAME).write_bytes(msgspec.json.format(msgspec.json.encode(content)) + b"\n")


def _versions() -> Iterator[tuple[str, str]]:
    """Those that are installed: there is one ONNX Runtime or the other."""
    for name in _VERSIONS:
        with contextlib.suppress(PackageNotFoundError):
            yield name, version(name)


def table(rows: list[Row]) -> Table:
    """``rows`` for the terminal."""
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
