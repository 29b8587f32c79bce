"""Backends: each is whole, light until it is used, and told from the others by nothing but its own modules."""

from __future__ import annotations

import ast
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from imprompt_export.backends import export_backend
from imprompt_serving.backends import MODULES, get_backend
from test_packaging import ROOMS, ROOT, loaded_by, modules, within

HEAVY = ("torch", "onnx", "onnxruntime", "openvino", "nncf", "tensorrt", "tensorrt_rtx", "tensorrt_rtx_bindings")


@pytest.mark.parametrize("name", MODULES)
def test_a_backend_is_there_in_both_rooms(name: str) -> None:
    backend = get_backend(name)
    assert backend.name == export_backend(name).name == name
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert backend.extra in extras
    assert f'`"{name}"`' in (ROOT / "docs/bundle.md").read_text()


@pytest.mark.parametrize("room", ["imprompt_serving", "imprompt_export"])
def test_describing_a_backend_loads_nothing_heavy(room: str) -> None:
    loaded = loaded_by(*(f"{room}.backends.{module}" for module in set(MODULES.values())))
    assert not {name for name in loaded if within(name, HEAVY)}


def test_nothing_else_asks_for_the_name_of_a_backend() -> None:
    """What differs between backends is asked of the backend."""
    files = [file for room in ROOMS for file in modules(room) if file.parent.name != "backends"]
    asking = [f"{file.relative_to(ROOT)}:{line}" for file in files for line in _decisions(file)]
    assert not asking


def _decisions(file: Path) -> Iterator[int]:
    """Lines that compare with the name of a backend, or look something up by it."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        asked: list[ast.AST | None] = []
        if isinstance(node, ast.Compare | ast.MatchValue):
            asked = [*ast.walk(node)]
        elif isinstance(node, ast.Subscript):
            asked = [*ast.walk(node.slice)]
        elif isinstance(node, ast.Dict):
            asked = [*node.keys]
        yield from (part.lineno for part in asked if isinstance(part, ast.Constant) and part.value in MODULES)
