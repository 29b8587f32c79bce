"""Examine whether this machine can serve: versions, known faults, GPUs, limits, and what is wrong."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import resource
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import psutil

from imprompt_serving.launcher.canary import read_fronts
from imprompt_serving.launcher.install import KNOWN_FAULTS, LaunchError, find_triton
from imprompt_serving.specs import Bundle

PACKAGES = ("imprompt", "numpy", "onnxruntime", "onnxruntime-gpu", "openvino", "torch", "diffusers", "tritonclient")
SHARED_MEMORY = Path("/dev/shm")
MIN_SHARED_MEMORY_MB = 512
"""A bundle takes about 10 MB, and large pictures of many callers some hundreds; Docker's default is 64 MB."""
MIN_FILES = 4096
"""Every connection is a file of Triton, and every model process has dozens."""
MIN_DISK_MB = 100
GPU_QUERY = ("nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader")
MEGABYTE = 2**20


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """One line of the examination."""

    verdict: Literal["ok", "warning", "error"]
    subject: str
    text: str


def examine(repository: Path | None = None) -> list[Finding]:
    """Examine this machine, and `repository` if given."""
    found = [*_python(), *_triton(), *_gpus(), *_limits()]
    return found + ([] if repository is None else list(_bundles(repository)))


def _python() -> Iterator[Finding]:
    yield Finding(verdict="ok", subject="Python", text=f"{platform.python_version()} on {platform.platform()}")
    versions = []
    for package in PACKAGES:
        try:
            versions.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    yield Finding(verdict="ok", subject="packages", text=", ".join(versions))


def _triton() -> Iterator[Finding]:
    try:
        triton = find_triton()
    except LaunchError as error:
        yield Finding(verdict="error", subject="Triton", text=str(error))
        return
    yield Finding(verdict="ok", subject="Triton", text=f"{triton.version or 'unknown version'} at {triton.binary}")
    for fault in KNOWN_FAULTS.get(triton.version, ()):
        yield Finding(verdict="warning", subject="Triton", text=f"known fault: {fault}")


def _gpus() -> Iterator[Finding]:
    try:
        done = subprocess.run(GPU_QUERY, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        yield Finding(verdict="ok", subject="GPU", text="none; bundles for a CPU only")
        return
    for line in done.stdout.splitlines():
        name, memory, driver = line.split(", ")
        yield Finding(verdict="ok", subject="GPU", text=f"{name}, {memory}, driver {driver}")


def _limits() -> Iterator[Finding]:
    cores, memory = len(os.sched_getaffinity(0)), psutil.virtual_memory()
    text = f"{cores} cores, {memory.available // MEGABYTE} of {memory.total // MEGABYTE} MB of memory available"
    yield Finding(verdict="ok", subject="machine", text=text)
    yield _room(SHARED_MEMORY, MIN_SHARED_MEMORY_MB, "in a container, set its size (docker run --shm-size=2g)")
    yield _room(Path(tempfile.gettempdir()), MIN_DISK_MB, "set TMPDIR to a folder with more")
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    enough = files == resource.RLIM_INFINITY or files >= MIN_FILES
    advice = "" if enough else f"; raise the limit to {MIN_FILES} (ulimit -n)"
    yield Finding(verdict="ok" if enough else "warning", subject="open files", text=f"at most {files}{advice}")


def _room(folder: Path, needed: int, advice: str) -> Finding:
    try:
        free = shutil.disk_usage(folder).free // MEGABYTE
    except OSError as error:
        return Finding(verdict="error", subject=str(folder), text=str(error.strerror))
    if not os.access(folder, os.W_OK):
        return Finding(verdict="error", subject=str(folder), text="cannot be written to")
    if free < needed:
        return Finding(verdict="warning", subject=str(folder), text=f"{free} MB free; {advice}")
    return Finding(verdict="ok", subject=str(folder), text=f"{free} MB free")


def _bundles(repository: Path) -> Iterator[Finding]:
    fronts = [front for front in read_fronts(repository) if not front.streaming] if repository.is_dir() else []
    if not fronts:
        yield Finding(verdict="error", subject="repository", text=f"no bundle in {repository}")
    for front in fronts:
        try:
            bundle = Bundle.load(repository / front.model / "1")
        except (ValueError, OSError) as error:
            yield Finding(verdict="error", subject=front.bundle, text=str(error))
            continue
        shapes = bundle.shapes
        yield Finding(
            verdict="ok",
            subject=front.bundle,
            text=f"{bundle.family}, {bundle.backend} {bundle.precision}, {shapes.rows.max} rows, "
            f"{shapes.height.min} to {shapes.height.max} pixels high, "
            f"at most {bundle.limits.waiting_rows} rows in the queue",
        )
