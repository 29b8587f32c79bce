"""Backends: each is whole, light until it is used, and told from the others by nothing but its own modules."""

from __future__ import annotations

import ast
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from imprompt_export import BundleError
from imprompt_export.backends import export_backend, openvino
from imprompt_export.bundle import EngineSection
from imprompt_serving.backends import MODULES, EngineError, get_backend
from test_packaging import ROOMS, ROOT, loaded_by, modules, within

HEAVY = ("torch", "onnx", "onnxruntime", "openvino", "nncf", "tensorrt", "tensorrt_rtx", "tensorrt_rtx_bindings")


@pytest.mark.parametrize("name", MODULES)
def test_a_backend_is_there_in_both_rooms(name: str) -> None:
    backend = get_backend(name)
    assert backend.name == export_backend(name).name == name
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert backend.extra in extras
    assert f'`"{name}"`' in (ROOT / "docs/bundle.md").read_text()


@pytest.mark.parametrize(
    ("precision", "message"),
    [
        ("fp32", r'openvino is not installed: pip install "imprompt\[export,openvino\]"'),
        ("int8", r'openvino, nncf is not installed: pip install "imprompt\[export,openvino,int8\]"'),
    ],
)
def test_an_export_without_its_packages(monkeypatch: pytest.MonkeyPatch, precision: str, message: str) -> None:
    monkeypatch.setattr(openvino, "find_spec", lambda name: None)
    with pytest.raises(BundleError, match=message):
        export_backend("openvino").check_installed(EngineSection(backend="openvino", precision=precision))


@pytest.mark.parametrize(("name", "package", "extra"), [("onnxruntime", "onnxruntime", "server"), ("openvino",) * 3])
def test_an_engine_without_its_package(monkeypatch: pytest.MonkeyPatch, name: str, package: str, extra: str) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(EngineError, match=rf"install imprompt\[{extra}\] where the engines run"):
        get_backend(name).load(Path("unet"))


def test_triton_hosts_what_it_has_a_platform_for() -> None:
    hosts = {name: get_backend(name).hosts for name in MODULES}
    both = ("python", "native")
    alone = ("python",)
    assert hosts == {
        "inductor": alone,
        "onnxruntime": both,
        "openvino": alone,
        "tensorrt": both,
        "tensorrt_rtx": alone,
    }


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
