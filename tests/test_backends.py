"""Backends: each is whole, light until it is used, and told from the others by nothing but its own modules."""

from __future__ import annotations

import ast
import importlib.metadata
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from imprompt_export import BundleError, export
from imprompt_export.backends import export_backend, openvino
from imprompt_export.bundle import EngineSection
from imprompt_serving._triton_install import LaunchError, find_triton
from imprompt_serving.backends import MODULES, EngineError, get_backend, onnxruntime
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


@pytest.mark.parametrize(("name", "package", "extra"), [("onnxruntime", "onnxruntime", "cpu"), ("openvino",) * 3])
def test_an_engine_without_its_package(monkeypatch: pytest.MonkeyPatch, name: str, package: str, extra: str) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(EngineError, match=rf"install imprompt\[{extra}\] where the engines run"):
        get_backend(name).load(Path("unet"))


def test_an_export_without_onnxruntime(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(BundleError, match=r'pip install "imprompt\[export,cpu\]", or "imprompt\[export,gpu\]"'):
        export_backend("onnxruntime").check_installed(EngineSection(backend="onnxruntime"))


@pytest.mark.parametrize("backend", MODULES)
def test_two_onnxruntimes_are_refused_before_anything_starts(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, backend: str
) -> None:
    """Nothing that pip knows keeps them apart: with both, the files of one lie over those of the other."""
    monkeypatch.setattr(importlib.metadata, "distribution", lambda name: None)
    (tmp_path / "base").mkdir()
    (tmp_path / "bundle.toml").write_text(f'name = "a"\nbase = "base"\n[engine]\nbackend = "{backend}"')
    with pytest.raises(EngineError, match="onnxruntime and onnxruntime-gpu are both installed"):
        export(tmp_path / "bundle.toml", tmp_path / "repository")
    with pytest.raises(LaunchError, match="onnxruntime and onnxruntime-gpu are both installed"):
        find_triton()


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


def test_rows_are_bucketed_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """ONNX Runtime is asked in processes without torch, which give no device."""
    monkeypatch.setattr(onnxruntime, "has_gpu", lambda: False)
    expected = {"onnxruntime": False, "openvino": False, "tensorrt": True, "tensorrt_rtx": True}
    assert {name: get_backend(name).buckets_rows("") for name in expected} == expected
    monkeypatch.setattr(onnxruntime, "built_for_cuda", lambda: True)
    monkeypatch.setattr(onnxruntime, "has_gpu", lambda: True)
    assert get_backend("onnxruntime").buckets_rows("")


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
