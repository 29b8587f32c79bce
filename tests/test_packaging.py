"""What the wheels contain, what an import costs, and which package may import which (docs/architecture.md)."""

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
    "imprompt_gateway": ROOT / "gateway",
    "imprompt_demo": ROOT / "demo",
}
SPECS = ("specs", "parameters", "tensor_names", "wire", "config", "capabilities", "scheduler_names")
"""Modules of `imprompt_serving` that describe a bundle; the export uses them, and the denoiser for calibration."""
MAY_IMPORT: dict[str, tuple[str, ...]] = {
    "imprompt": (),
    "imprompt_export": tuple(
        f"imprompt_serving.{name}" for name in (*SPECS, "backends", "families", "denoiser", "job_request")
    ),
    "imprompt_serving": (),
    "imprompt_bench": ("imprompt", "imprompt_export", "imprompt_serving"),
    "imprompt_gateway": ("imprompt",),
    "imprompt_demo": ("imprompt", "imprompt_export", "imprompt_serving"),
}
PRIVATE: dict[str, set[str]] = {
    "diffusers==0.42.1": {"diffusers.loaders.unet_loader_utils._maybe_expand_lora_scales_for_one_adapter"},
    "torch==2.13.0": {
        "torch._dynamo.config",
        "torch._inductor.config",
        "torch._prims_common.infer_size",
        "torch._prims_common.is_contiguous_or_false",
        "torch._prims_common.make_contiguous_strides_for",
        "torch._subclasses.fake_impls",
        "torch.onnx._internal.exporter._fx_passes",
        "torch.onnx._internal.exporter._registration",
    },
}
"""Private names of libraries that the code imports, by the version in which they were checked."""
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
    """Yield the absolute names that a file imports, at any depth."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def within(name: str, packages: tuple[str, ...]) -> bool:
    return any(f"{name}.".startswith(f"{package}.") for package in packages)


def loaded_by(*names: str) -> set[str]:
    """Return the modules that are loaded after importing `names` in a fresh interpreter."""
    code = f"import {', '.join(names)}, sys; print('\\n'.join(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    return set(done.stdout.split())


@pytest.mark.parametrize("room", ROOMS)
def test_packages_only_import_allowed_packages(room: str) -> None:
    allowed = (room, *MAY_IMPORT[room])
    broken = [
        f"{file.relative_to(ROOT)} imports {name}"
        for file in modules(room)
        for name in imports(file)
        if within(name, tuple(ROOMS)) and not within(name, allowed)
    ]
    assert modules(room)
    assert not broken


def test_private_names_of_libraries_belong_to_pinned_versions() -> None:
    """A private name may change in any release, so changing a pin must also update this list."""
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


def test_only_triton_models_import_tritons_module() -> None:
    importers = [
        file.relative_to(ROOT).as_posix()
        for room in ROOMS
        for file in modules(room)
        if any(within(name, ("triton_python_backend_utils",)) for name in imports(file))
    ]
    assert importers
    assert all("/triton/" in file for file in importers), importers


@pytest.mark.parametrize(
    ("module", "besides"),
    [("policy", ()), ("admission", ()), ("loop", ()), ("batch", ("specs.Bundle", "tensor_names", "image_prompts"))],
)
def test_loop_depends_only_on_the_protocol_of_jobs(module: str, besides: tuple[str, ...]) -> None:
    neighbors = ("policy", "admission", "batch", "protocol", "answers", "meter")
    allowed = {f"imprompt_serving.{name}" for name in ("errors", "specs.Limits", "specs.CallRows", *besides)}
    allowed |= {f"imprompt_serving.denoiser.{name}" for name in (*neighbors, *besides)}
    file = ROOMS["imprompt_serving"] / f"imprompt_serving/denoiser/{module}.py"
    ours = [name for name in imports(file) if within(name, tuple(ROOMS))]
    assert not [name for name in ours if not within(name, tuple(allowed))]


def test_client_is_light() -> None:
    heavy = ("torch", "diffusers", "transformers", "onnxruntime", "scipy", "msgspec", *set(ROOMS) - {"imprompt"})
    assert not {name for name in loaded_by("imprompt", "imprompt.cli") if within(name, heavy)}


def test_gateway_is_light() -> None:
    heavy = ("torch", "diffusers", "transformers", "onnxruntime", "scipy", "msgspec", "openai")
    others = set(ROOMS) - {"imprompt", "imprompt_gateway"}
    assert not {name for name in loaded_by("imprompt_gateway.server") if within(name, (*heavy, *others))}


def test_benchmark_of_a_running_server_is_light() -> None:
    heavy = ("torch", "diffusers", "transformers", "onnxruntime", "imprompt_export", "imprompt_serving")
    assert not {name for name in loaded_by("imprompt_bench.cli") if within(name, heavy)}


def test_processes_besides_the_denoiser_are_light() -> None:
    """Each Python model is a process, and only the denoiser may load torch."""
    light = [
        ".".join(file.relative_to(ROOMS["imprompt_serving"]).with_suffix("").parts).removesuffix(".__init__")
        for file in modules("imprompt_serving")
    ]
    light = [name for name in light if within(name, tuple(f"imprompt_serving.{part}" for part in LIGHT))]
    assert len(light) > 10
    loaded = loaded_by(*light)
    assert not {name for name in loaded if within(name, ("torch", "diffusers", "transformers", "scipy"))}


def test_server_needs_no_package_of_the_export() -> None:
    """The denoiser uses schedulers of diffusers, which loads these packages if they are installed."""
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
from imprompt_serving.scheduler_names import SCHEDULERS
print(*(type(getattr(diffusers, name).from_config({{}})).__name__ for name in SCHEDULERS))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.split()) == 16


def test_denoiser_starts_without_what_no_request_needs_at_first() -> None:
    """That is the compiler of torch, and statistics for beta sigmas. Both can still be imported later."""
    code = """
import sys, types
sys.modules["triton_python_backend_utils"] = types.ModuleType("triton_python_backend_utils")
import imprompt_serving.triton.denoiser
import diffusers, torch
from imprompt_serving.scheduler_names import SCHEDULERS
for name in SCHEDULERS:
    scheduler = getattr(diffusers, name)()
    scheduler.set_timesteps(10)
    scheduler.step(torch.zeros(1, 4, 8, 8), scheduler.timesteps[0], torch.zeros(1, 4, 8, 8))
unneeded = ("torch._dynamo", "torch._inductor", "sympy", "scipy.stats.")
print(*(name for name in sys.modules if name.startswith(unneeded)))
import torch._dynamo
torch._dynamo.allow_in_graph
scheduler = diffusers.EulerDiscreteScheduler(use_beta_sigmas=True)
scheduler.set_timesteps(4)
assert scheduler.sigmas[0] > scheduler.sigmas[1] > scheduler.sigmas[3] > 0, scheduler.sigmas
import scipy.stats
assert scipy.stats.norm.cdf(0) == 0.5
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert not done.stdout.split()


@pytest.mark.parametrize("command", ["", "export", "serve", "doctor", "gateway", "generate", "models", "bench"])
def test_commands_have_help(command: str) -> None:
    done = subprocess.run(
        [Path(sys.executable).with_name("imprompt"), *filter(None, [command]), "--help"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert "Usage" in done.stdout


def wheel(root: Path, folder: Path) -> set[str]:
    """Build the wheel of the distribution at `root` and list its files."""
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
    """List the Python files of a package by their names in a wheel."""
    files = [file for file in modules(room) if "__pycache__" not in file.parts]
    return {file.relative_to(ROOMS[room]).as_posix() for file in files}


def test_wheel_contains_all_packages_and_no_weights(tmp_path: Path) -> None:
    names = wheel(ROOT, tmp_path)
    for room in ROOMS.keys() - {"imprompt_demo"}:
        assert packed(room) <= names
    assert "imprompt/py.typed" in names
    pages = ("parameters.json", "docs.css", "playground/index.html")
    assert {f"imprompt_gateway/{name}" for name in pages} <= names
    assert not [name for name in names if name.startswith(("imprompt_demo/", "tests/", "docs/"))]
    assert any(name.endswith("LICENSE") for name in names)
    assert sum(file.stat().st_size for file in tmp_path.iterdir()) < 2**20  # too small for weights


def test_wheel_of_the_demo(tmp_path: Path) -> None:
    """It contains the embedded bundle and depends on the same version of imprompt."""
    names = wheel(ROOMS["imprompt_demo"], tmp_path)
    bundle = ROOMS["imprompt_demo"] / "imprompt_demo/bundle"
    files = {file.relative_to(ROOMS["imprompt_demo"]).as_posix() for file in bundle.rglob("*") if file.is_file()}
    assert any(file.endswith(".safetensors") for file in files)
    assert packed("imprompt_demo") | files <= names
    own, main = (tomllib.loads((root / "pyproject.toml").read_text()) for root in (ROOMS["imprompt_demo"], ROOT))
    version = main["project"]["version"]
    assert own["project"]["version"] == version
    assert own["project"]["dependencies"] == [f"imprompt[export,server]=={version}"]
