"""Find Triton: `tritonserver` on PATH (the NGC container), or the binary inside the `nvidia-pytriton` package.

A Python model runs in a *stub*, a process that embeds libpython. The stub must load the same libpython as the
interpreter whose packages the models import; otherwise extension modules fail to load (`undefined symbol:
_PyModule_Add`).
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

PIP_VERSION = "2.51.0"
"""The Triton inside nvidia-pytriton 0.7. The binary does not tell its version."""
KNOWN_FAULTS = {
    PIP_VERSION: (
        "a stream that asks for `triton_grpc_error` crashes it after some hundreds of errors",
        "over HTTP, deeply nested JSON and bodies in tiny chunks crash it",
        "it may crash when a model process gets no CPU for a second while it is called",
        "it has no security fixes since October 2024",
    )
}
"""Faults by version that imprompt cannot prevent: callers can crash the server."""
PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"


class LaunchError(RuntimeError):
    """The server cannot start, or has stopped unexpectedly. The message says why and what to do."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TritonInstall:
    """A Triton installation: the binary and the folders it needs."""

    version: str
    """Version of Triton; empty if unknown."""
    binary: Path
    backends: Path
    caches: Path
    libraries: Path | None
    """Folder of its own shared libraries, if the loader does not search there by default."""
    stub: Path
    """The executable that hosts a Python model, linked against `libpython<PYTHON>`."""

    def prepare_backends(self, scratch: Path) -> Path:
        """Return the backend folder for Triton: its own if it has the right stub, otherwise a folder of links."""
        if self.stub.parent == self.backends / "python":
            return self.backends
        linked = scratch / "backends"
        (linked / "python").mkdir(parents=True)
        for file in [*(self.backends / "python").glob("*.*"), self.stub]:
            (linked / "python" / file.name).symlink_to(file)
        return linked

    def environment(self) -> dict[str, str]:
        """Return the environment for the server, with the libpython and the `python3` of this interpreter first.

        The stub locates the packages (also those of a virtual environment) through `python3` on PATH. It ignores
        `PYTHONPATH` and all other `PYTHON*` variables, so the models import only installed packages.
        """
        # Processes share the cores: an idle OpenMP thread that spins takes its core from the one it waits for.
        environment = {"OMP_WAIT_POLICY": "PASSIVE", **os.environ}
        libraries = [str(_libpython_folder()), *([str(self.libraries)] if self.libraries else [])]
        _prepend(environment, "LD_LIBRARY_PATH", libraries)
        _prepend(environment, "PATH", [str(Path(sys.executable).parent)])
        return environment


def find_triton() -> TritonInstall:
    """Locate the Triton to start.

    Raises:
        LaunchError: no Triton is installed, or none that can run the models of this interpreter.
    """
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
    # NGC containers set this variable.
    version = os.environ.get("TRITON_SERVER_VERSION", "")
    return TritonInstall(
        version=version,
        binary=binary,
        backends=root / "backends",
        caches=root / "caches",
        libraries=root / "lib",
        stub=stub,
    )


def _pip_triton() -> TritonInstall:
    spec = importlib.util.find_spec("pytriton")
    if spec is None or spec.origin is None:
        raise LaunchError(
            "no Triton found: `tritonserver` is not on PATH, and the package nvidia-pytriton is not installed; "
            'run `pip install "imprompt[server]"`, or use an NGC Triton container'
        )
    # With numpy 2, Triton 2.51, which this package ships, silently passes empty tensors to the models.
    numpy_version = importlib.metadata.version("numpy")
    if int(numpy_version.split(".")[0]) >= 2:
        raise LaunchError(
            f"numpy {numpy_version} is installed, but the Triton in nvidia-pytriton needs numpy < 2 "
            '(with numpy 2, models receive empty tensors): run `pip install "numpy<2"`'
        )
    package = Path(spec.origin).parent
    root = package / "tritonserver"
    stubs = root / "python_backend_stubs"
    stub = stubs / PYTHON / "triton_python_backend_stub"
    if not stub.is_file():
        have = ", ".join(sorted((p.name for p in stubs.glob("3.*")), key=lambda v: int(v.split(".")[1])))
        raise LaunchError(f"nvidia-pytriton has no Python stub for Python {PYTHON} (it has {have})")
    return TritonInstall(
        version=PIP_VERSION,
        binary=root / "bin" / "tritonserver",
        backends=root / "backends",
        caches=root / "caches",
        libraries=package.parent / "nvidia_pytriton.libs",
        stub=stub,
    )


def _libpython_folder() -> Path:
    """Return the folder that holds the shared library of the running interpreter."""
    name = f"libpython{PYTHON}.so.1.0"
    libdir = Path(sysconfig.get_config_var("LIBDIR") or "/usr/lib")
    # In order: LIBDIR as built; Debian's layout; a relocated Python, whose LIBDIR names a folder of the build machine.
    candidates = [libdir, libdir / (sysconfig.get_config_var("MULTIARCH") or ""), Path(sys.base_prefix) / "lib"]
    for folder in candidates:
        if (folder / name).is_file():
            return folder
    raise LaunchError(
        f"{sys.executable} has no shared {name} (searched {', '.join(map(str, candidates))}), which Triton "
        "needs to host Python models: use a Python built with --enable-shared"
    )


def _prepend(environment: dict[str, str], name: str, folders: list[str]) -> None:
    environment[name] = os.pathsep.join([*folders, *filter(None, [environment.get(name)])])
