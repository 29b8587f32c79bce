"""Finds a Triton: `tritonserver` on PATH (the NGC container), or the one inside the `nvidia-pytriton` package.

A Python model runs in a *stub*, a process that embeds libpython. It must be the very library of the interpreter whose
packages the models import; otherwise extension modules fail to load (`undefined symbol: _PyModule_Add`).
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import shutil
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

from imprompt_serving.backends import EngineError
from imprompt_serving.backends.onnxruntime import check_one_installed

PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"


class LaunchError(RuntimeError):
    """The server cannot be started, or ended by itself. The message says why and what to do."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TritonInstall:
    """A Triton with the folders it needs."""

    binary: Path
    backends: Path
    caches: Path
    libraries: Path | None
    """Where its own shared libraries are, when they are not where the loader looks."""
    stub: Path
    """The executable that hosts a Python model; links `libpython<PYTHON>`."""

    def prepare_backends(self, scratch: Path) -> Path:
        """The backend folder to pass: the Triton's own if it has the right stub, otherwise a folder of links."""
        if self.stub.parent == self.backends / "python":
            return self.backends
        linked = scratch / "backends"
        (linked / "python").mkdir(parents=True)
        for file in [*(self.backends / "python").glob("*.*"), self.stub]:
            (linked / "python" / file.name).symlink_to(file)
        return linked

    def environment(self) -> dict[str, str]:
        """The environment of the server, with the libpython and the `python3` of this interpreter first.

        From `python3` on PATH the stub finds the packages (of a virtual environment too). It ignores `PYTHONPATH` and
        all other `PYTHON*` variables: the models import what is installed.
        """
        # Processes share the cores: an idle OpenMP thread that spins takes its core from the one it waits for.
        environment = {"OMP_WAIT_POLICY": "PASSIVE", **os.environ}
        libraries = [str(_libpython_folder()), *([str(self.libraries)] if self.libraries else [])]
        _prepend(environment, "LD_LIBRARY_PATH", libraries)
        _prepend(environment, "PATH", [str(Path(sys.executable).parent)])
        return environment


def find_triton() -> TritonInstall:
    """The Triton to start. Raises `LaunchError` when there is none, or none that can run this interpreter's models."""
    try:
        check_one_installed()
    except EngineError as error:
        raise LaunchError(str(error)) from None
    on_path = shutil.which("tritonserver")
    triton = _system_triton(Path(on_path)) if on_path else _pip_triton()
    _libpython_folder()
    return triton


def _system_triton(binary: Path) -> TritonInstall:
    root = binary.resolve().parent.parent
    stub = root / "backends" / "python" / "triton_python_backend_stub"
    if not stub.is_file() or f"libpython{PYTHON}.so".encode() not in stub.read_bytes():
        raise LaunchError(
            f"the Triton at {binary} has no Python stub for Python {PYTHON} in {stub.parent}: "
            "install imprompt into the Python that this Triton was built for"
        )
    return TritonInstall(
        binary=binary, backends=root / "backends", caches=root / "caches", libraries=root / "lib", stub=stub
    )


def _pip_triton() -> TritonInstall:
    spec = importlib.util.find_spec("pytriton")
    if spec is None or spec.origin is None:
        raise LaunchError(
            "no Triton found: `tritonserver` is not on PATH, and the package nvidia-pytriton is not installed; "
            'run `pip install "imprompt[server]"`, or use an NGC Triton container'
        )
    # Version 2.51, which this package ships, passes empty tensors to the models with numpy 2, without any message.
    numpy_version = importlib.metadata.version("numpy")
    if int(numpy_version.split(".")[0]) >= 2:
        raise LaunchError(
            f"numpy {numpy_version} is installed, and the Triton of nvidia-pytriton needs numpy < 2 "
            '(it would pass empty tensors): run `pip install "numpy<2"`'
        )
    package = Path(spec.origin).parent
    root = package / "tritonserver"
    stubs = root / "python_backend_stubs"
    stub = stubs / PYTHON / "triton_python_backend_stub"
    if not stub.is_file():
        have = ", ".join(sorted((p.name for p in stubs.glob("3.*")), key=lambda v: int(v.split(".")[1])))
        raise LaunchError(f"nvidia-pytriton has no Python stub for Python {PYTHON} (it has {have})")
    return TritonInstall(
        binary=root / "bin" / "tritonserver",
        backends=root / "backends",
        caches=root / "caches",
        libraries=package.parent / "nvidia_pytriton.libs",
        stub=stub,
    )


def _libpython_folder() -> Path:
    """Where the shared library of this very interpreter is."""
    name = f"libpython{PYTHON}.so.1.0"
    libdir = Path(sysconfig.get_config_var("LIBDIR") or "/usr/lib")
    # As built; Debian's own; a relocated Python, whose LIBDIR is that of the machine it was built on.
    candidates = [libdir, libdir / (sysconfig.get_config_var("MULTIARCH") or ""), Path(sys.base_prefix) / "lib"]
    for folder in candidates:
        if (folder / name).is_file():
            return folder
    raise LaunchError(
        f"{sys.executable} has no shared {name} (looked in {', '.join(map(str, candidates))}), "
        "which Triton needs to host Python models: use a Python that was built with --enable-shared"
    )


def _prepend(environment: dict[str, str], name: str, folders: list[str]) -> None:
    environment[name] = os.pathsep.join([*folders, *filter(None, [environment.get(name)])])
