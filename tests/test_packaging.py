"""What is installed, what importing it costs, and which room may import which (docs/architecture.md)."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = {
    "imprompt": ROOT / "client",
    "imprompt_export": ROOT / "export",
    "imprompt_serving": ROOT / "model_repository",
    "imprompt_bench": ROOT / "benchmarks",
    "imprompt_demo": ROOT / "demo",
}
SPECS = ("specs", "parameters", "tensor_names", "wire", "config", "capabilities")
"""Modules of `imprompt_serving` that say what a bundle is; the exporter goes by them, and runs its denoiser."""
MAY_IMPORT: dict[str, tuple[str, ...]] = {
    "imprompt": (),
    "imprompt_export": tuple(
        f"imprompt_serving.{name}" for name in (*SPECS, "backends", "families", "denoiser", "job_request")
    ),
    "imprompt_serving": (),
    "imprompt_bench": ("imprompt", "imprompt_export", "imprompt_serving"),
    "imprompt_demo": ("imprompt", "imprompt_export", "imprompt_serving"),
}
PRIVATE: dict[str, set[str]] = {
    "diffusers==0.42.1": {"diffusers.loaders.unet_loader_utils._maybe_expand_lora_scales_for_one_adapter"},
    "torch==2.13.0": {
        "torch._inductor.config",
        "torch.onnx._internal.exporter._fx_passes",
        "torch.onnx._internal.exporter._registration",
    },
}
"""Names with an underscore that the code imports, by the version in which they are what it takes them for."""
LIGHT = (
    "pipeline",
    "backends",
    "families",
    "specs",
    "wire",
    "config",
    "capabilities",
    "parameters",
    "tensor_names",
    "job_request",
    "errors",
)


def modules(room: str) -> list[Path]:
    return sorted((ROOMS[room] / room).rglob("*.py"))


def imports(file: Path) -> Iterator[str]:
    """Absolute names that a file imports, at any depth."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def within(name: str, packages: tuple[str, ...]) -> bool:
    return any(f"{name}.".startswith(f"{package}.") for package in packages)


def loaded_by(*names: str) -> set[str]:
    """The modules in memory after an import in a fresh interpreter."""
    code = f"import {', '.join(names)}, sys; print('\\n'.join(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    return set(done.stdout.split())


@pytest.mark.parametrize("room", ROOMS)
def test_rooms_import_what_they_may(room: str) -> None:
    allowed = (room, *MAY_IMPORT[room])
    broken = [
        f"{file.relative_to(ROOT)} imports {name}"
        for file in modules(room)
        for name in imports(file)
        if within(name, tuple(ROOMS)) and not within(name, allowed)
    ]
    assert modules(room)
    assert not broken


def test_private_names_of_libraries_are_those_of_the_pinned_versions() -> None:
    """Such a name may change with any release: who moves a pin looks at what the code takes from there."""
    private = {
        name
        for room in ROOMS
        for file in modules(room)
        for name in imports(file)
        if "._" in name and not within(name, tuple(ROOMS))
    }
    assert private == {name for names in PRIVATE.values() for name in names}
    pins = set((ROOT / "constraints.txt").read_text().splitlines())
    assert PRIVATE.keys() <= pins


def test_only_the_models_know_tritons_module() -> None:
    knowing = [
        file.relative_to(ROOT).as_posix()
        for room in ROOMS
        for file in modules(room)
        if any(within(name, ("triton_python_backend_utils",)) for name in imports(file))
    ]
    assert knowing
    assert all("/triton/" in file for file in knowing), knowing


@pytest.mark.parametrize(
    ("module", "besides"),
    [("policy", ()), ("admission", ()), ("loop", ()), ("batch", ("specs.Bundle", "tensor_names", "image_prompts"))],
)
def test_the_loop_knows_jobs_by_their_protocol_alone(module: str, besides: tuple[str, ...]) -> None:
    neighbors = ("policy", "admission", "batch", "protocol", "answers", "meter")
    allowed = {f"imprompt_serving.{name}" for name in ("errors", "specs.Limits", "specs.CallRows", *besides)}
    allowed |= {f"imprompt_serving.denoiser.{name}" for name in (*neighbors, *besides)}
    file = ROOMS["imprompt_serving"] / f"imprompt_serving/denoiser/{module}.py"
    ours = [name for name in imports(file) if within(name, tuple(ROOMS))]
    assert not [name for name in ours if not within(name, tuple(allowed))]


def test_the_client_is_light() -> None:
    heavy = ("torch", "diffusers", "transformers", "onnxruntime", "scipy", "msgspec", *set(ROOMS) - {"imprompt"})
    assert not {name for name in loaded_by("imprompt", "imprompt.cli") if within(name, heavy)}


def test_measuring_a_server_that_runs_is_light() -> None:
    heavy = ("torch", "diffusers", "transformers", "onnxruntime", "imprompt_export", "imprompt_serving")
    assert not {name for name in loaded_by("imprompt_bench.cli") if within(name, heavy)}


def test_processes_beside_the_denoiser_are_light() -> None:
    """Each Python model is a process; all but the denoiser do without torch."""
    light = [
        ".".join(file.relative_to(ROOMS["imprompt_serving"]).with_suffix("").parts).removesuffix(".__init__")
        for file in modules("imprompt_serving")
    ]
    light = [name for name in light if within(name, tuple(f"imprompt_serving.{part}" for part in LIGHT))]
    assert len(light) > 10
    loaded = loaded_by(*light)
    assert not {name for name in loaded if within(name, ("torch", "diffusers", "transformers", "scipy"))}


def test_the_server_needs_no_package_of_the_export() -> None:
    """diffusers, which the denoiser takes schedulers from, loads these packages where they are installed."""
    blocked = ("accelerate", "onnxscript", "peft", "transformers")
    names = [
        ".".join(file.relative_to(ROOMS["imprompt_serving"]).with_suffix("").parts).removesuffix(".__init__")
        for file in modules("imprompt_serving")
    ]
    needed = {"imprompt_serving.triton.denoiser", "imprompt_serving.triton.pipeline", "imprompt_serving.launcher"}
    assert needed < set(names)
    code = f"""
import importlib, sys, types
sys.modules.update(dict.fromkeys({blocked!r}))
sys.modules["triton_python_backend_utils"] = types.ModuleType("triton_python_backend_utils")
for name in {names!r}:
    importlib.import_module(name)
import diffusers
from imprompt_serving.capabilities import SCHEDULERS
print(*(type(getattr(diffusers, name).from_config({{}})).__name__ for name in SCHEDULERS))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.split()) == 16


@pytest.mark.parametrize("command", ["", "export", "serve", "generate", "models", "bench"])
def test_help(command: str) -> None:
    done = subprocess.run(
        [Path(sys.executable).with_name("imprompt"), *filter(None, [command]), "--help"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert "Usage" in done.stdout


def wheel(root: Path, folder: Path) -> set[str]:
    """The files in the wheel of the distribution at `root`."""
    code = (
        "import sys; from hatchling.builders.wheel import WheelBuilder; "
        "[print(p) for p in WheelBuilder(sys.argv[1]).build(directory=sys.argv[2])]"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(root), str(folder)], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    with zipfile.ZipFile(done.stdout.split()[-1]) as archive:
        return set(archive.namelist())


def packed(room: str) -> set[str]:
    """Python files of a room as a wheel names them."""
    files = [file for file in modules(room) if "__pycache__" not in file.parts]
    return {file.relative_to(ROOMS[room]).as_posix() for file in files}


def test_the_wheel(tmp_path: Path) -> None:
    names = wheel(ROOT, tmp_path)
    for room in ROOMS.keys() - {"imprompt_demo"}:
        assert packed(room) <= names
    assert "imprompt/py.typed" in names
    assert not [name for name in names if name.startswith(("imprompt_demo/", "tests/", "docs/"))]
    assert any(name.endswith("LICENSE") for name in names)
    assert sum(file.stat().st_size for file in tmp_path.iterdir()) < 2**20  # a caller installs no weights


def test_the_wheel_of_the_demo(tmp_path: Path) -> None:
    """With the embedded bundle, for the same version of imprompt."""
    names = wheel(ROOMS["imprompt_demo"], tmp_path)
    bundle = ROOMS["imprompt_demo"] / "imprompt_demo/bundle"
    files = {file.relative_to(ROOMS["imprompt_demo"]).as_posix() for file in bundle.rglob("*") if file.is_file()}
    assert any(file.endswith(".safetensors") for file in files)
    assert packed("imprompt_demo") | files <= names
    own, main = (tomllib.loads((root / "pyproject.toml").read_text()) for root in (ROOMS["imprompt_demo"], ROOT))
    version = main["project"]["version"]
    assert own["project"]["version"] == version
    assert own["project"]["dependencies"] == [f"imprompt[export,server]=={version}"]
