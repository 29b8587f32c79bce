"""Backends are complete, light to import, and no code outside their modules depends on their names."""

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
from imprompt_export.sections import EngineSection
from imprompt_serving.backends import MODULES, EngineError, get_backend, onnxruntime
from imprompt_serving.launcher.install import LaunchError, find_triton
from test_packaging import ROOMS, ROOT, loaded_by, modules, within

HEAVY = ("torch", "onnx", "onnxruntime", "openvino", "nncf", "tensorrt", "tensorrt_rtx", "tensorrt_rtx_bindings")


@pytest.mark.parametrize("name", MODULES)
def test_backend_exists_in_export_and_server(name: str) -> None:
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
def test_export_names_missing_packages(monkeypatch: pytest.MonkeyPatch, precision: str, message: str) -> None:
    monkeypatch.setattr(openvino, "find_spec", lambda name: None)
    with pytest.raises(BundleError, match=message):
        export_backend("openvino").check_installed(EngineSection(backend="openvino", precision=precision))


@pytest.mark.parametrize(("name", "package", "extra"), [("onnxruntime", "onnxruntime", "cpu"), ("openvino",) * 3])
def test_loading_an_engine_names_the_missing_package(
    monkeypatch: pytest.MonkeyPatch, name: str, package: str, extra: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(EngineError, match=rf"install imprompt\[{extra}\] where the engines run"):
        get_backend(name).load(Path("unet"))


def test_export_without_onnxruntime_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(BundleError, match=r'pip install "imprompt\[export,cpu\]", or "imprompt\[export,gpu\]"'):
        export_backend("onnxruntime").check_installed(EngineSection(backend="onnxruntime"))


@pytest.mark.parametrize("backend", MODULES)
def test_two_onnxruntimes_are_refused_before_anything_starts(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, backend: str
) -> None:
    """pip cannot express the conflict, and with both installed the files of one overwrite those of the other."""
    monkeypatch.setattr(importlib.metadata, "distribution", lambda name: None)
    (tmp_path / "base").mkdir()
    (tmp_path / "bundle.toml").write_text(f'name = "a"\nbase = "base"\n[engine]\nbackend = "{backend}"')
    with pytest.raises(EngineError, match="onnxruntime and onnxruntime-gpu are both installed"):
        export(tmp_path / "bundle.toml", tmp_path / "repository")
    with pytest.raises(LaunchError, match="onnxruntime and onnxruntime-gpu are both installed"):
        find_triton()


def test_triton_can_host_backends_with_a_platform() -> None:
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
    """Processes without torch ask ONNX Runtime and pass no device."""
    monkeypatch.setattr(onnxruntime, "has_gpu", lambda: False)
    expected = {"onnxruntime": False, "openvino": False, "tensorrt": True, "tensorrt_rtx": True}
    assert {name: get_backend(name).buckets_rows("") for name in expected} == expected
    monkeypatch.setattr(onnxruntime, "built_for_cuda", lambda: True)
    monkeypatch.setattr(onnxruntime, "has_gpu", lambda: True)
    assert get_backend("onnxruntime").buckets_rows("")


@pytest.mark.parametrize("room", ["imprompt_serving", "imprompt_export"])
def test_importing_a_backend_loads_nothing_heavy(room: str) -> None:
    loaded = loaded_by(*(f"{room}.backends.{module}" for module in set(MODULES.values())))
    assert not {name for name in loaded if within(name, HEAVY)}


def test_no_other_code_depends_on_the_name_of_a_backend() -> None:
    """Code asks the backend object for everything that differs between backends."""
    files = [file for room in ROOMS for file in modules(room) if file.parent.name != "backends"]
    asking = [f"{file.relative_to(ROOT)}:{line}" for file in files for line in _decisions(file)]
    assert not asking


def _decisions(file: Path) -> Iterator[int]:
    """Yield the lines that compare something with the name of a backend, or use it as a key."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        asked: list[ast.AST | None] = []
        if isinstance(node, ast.Compare | ast.MatchValue):
            asked = [*ast.walk(node)]
        elif isinstance(node, ast.Subscript):
            asked = [*ast.walk(node.slice)]
        elif isinstance(node, ast.Dict):
            asked = [*node.keys]
        yield from (part.lineno for part in asked if isinstance(part, ast.Constant) and part.value in MODULES)
