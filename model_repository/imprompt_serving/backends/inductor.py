"""Load networks that torch compiled ahead of time (AOTInductor), and describe their packages."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from imprompt_serving.backends import FLOATS, Backend, Engine, EngineError
from imprompt_serving.backends.files import write_atomically

if TYPE_CHECKING:
    import torch
    from torch import Tensor

WEIGHTS = ".safetensors"
"""The suffix of the weights, which all packages of an engine share."""
LORA_DOWN, LORA_UP = ".down", ".up"
"""Suffixes of the factors of a weight in a `lora_file`; `up @ down` is added to the weight at scale 1."""
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
"""Parameters of `mallopt` (malloc.h of glibc)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Inductor(Backend):
    def _load(self, file: Path, threads: int, device: str) -> Engine:
        info = EngineInfo.load(file)
        if info.target.startswith("cuda"):
            from imprompt_serving.gpu.inductor import InductorDeviceEngine

            return InductorDeviceEngine(file, info, device=device or "cuda")
        return InductorEngine(file, info, threads=threads)

    def device(self, index: int = 0) -> torch.device:
        from imprompt_serving.gpu import cuda_or_cpu

        return cuda_or_cpu(index)


BACKENDS = {
    "inductor": Inductor(
        name="inductor", precisions=(*FLOATS, "fp8"), suffix=".json", extra="server", swaps_weights=True
    )
}


class Package(msgspec.Struct, frozen=True, kw_only=True):
    """A file of machine code, and the sizes of axes that it was compiled for."""

    suffix: str
    """What follows the engine's name in the file name."""
    axes: dict[str, int] = {}
    """Sizes by name; other axes may have any size."""


class EngineInfo(msgspec.Struct, frozen=True, kw_only=True):
    """Description of an engine: the JSON file that is loaded, next to its packages and weights."""

    version: str
    """The version of torch, whose internal functions the packages call."""
    target: str
    """The CPU instructions or the compute capability that the packages were compiled for (see `target`)."""
    inputs: dict[str, tuple[int | str, ...]]
    """Shapes of the inputs, in the order of the call. An axis is a size or a name."""
    outputs: tuple[str, ...]
    internal: dict[str, str] = {}
    """The types, by their names in torch, of inputs that come from other engines of the denoiser."""
    packages: tuple[Package, ...]
    channels_last: bool = False
    """Whether the packages expect convolution weights in this memory format."""

    def save(self, file: Path) -> None:
        write_atomically(file, msgspec.json.format(msgspec.json.encode(self)) + b"\n")

    @classmethod
    def load(cls, file: Path) -> EngineInfo:
        """Read `file`, and check that its packages can run on this machine.

        Raises:
            EngineError: they cannot.
        """
        import torch

        info = msgspec.json.decode(file.read_bytes(), type=cls)
        engine = file.stem
        if info.version != torch.__version__:
            raise EngineError(
                f"{engine} was built with torch {info.version}, but {torch.__version__} is installed: export the "
                "bundle again, or install that version"
            )
        if info.target.startswith("cuda") and not torch.cuda.is_available():
            raise EngineError(f"{engine} was built for an NVIDIA GPU ({info.target}); this machine has none")
        here = target(info.target.split()[0])
        if info.target != here:
            raise EngineError(
                f"{engine} was built for {info.target}, but this machine is {here}: export the bundle on it"
            )
        return info

    def select_inputs(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the inputs among `tensors`, in the order of the call and in the types that the packages expect."""
        import torch

        types = {name: getattr(torch, dtype) for name, dtype in self.internal.items()}
        return {name: tensors[name].to(types.get(name, tensors[name].dtype)) for name in self.inputs}

    def axes_of(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
        """Return the sizes of the named axes in a call with inputs of these shapes."""
        return {
            axis: size
            for name, declared in self.inputs.items()
            for axis, size in zip(declared, shapes[name], strict=True)
            if isinstance(axis, str)
        }

    def package_for(self, axes: Mapping[str, int]) -> int:
        """Return the index of the package that takes a call with these sizes.

        Raises:
            EngineError: none does; the message lists the sizes that the engine was built for.
        """
        for index, package in enumerate(self.packages):
            if all(axes[axis] == size for axis, size in package.axes.items()):
                return index
        requested = {axis: axes[axis] for axis in self.packages[0].axes}
        built = "; ".join(dict.fromkeys(_format_axes(package.axes) for package in self.packages))
        raise EngineError(f"the engine takes {built}, not {_format_axes(requested)}; see [shapes]")


def lora_file(file: Path, name: str) -> Path:
    """Return the path of the LoRA called `name` for the engine `file`."""
    return file.with_name(f"{file.stem}.lora_{name}{WEIGHTS}")


def lora_files(file: Path) -> dict[str, Path]:
    """Find the LoRAs for the engine `file`, by name."""
    prefix, suffix = lora_file(file, "*").name.split("*")
    found = sorted(file.parent.glob(prefix + "*" + suffix))
    return {path.name.removeprefix(prefix).removesuffix(suffix): path for path in found}


def _format_axes(axes: Mapping[str, int]) -> str:
    return " ".join(f"{axis}={size}" for axis, size in axes.items())


def target(kind: str) -> str:
    """Return what code of this `kind` (`cpu` or `cuda`) is compiled for on this machine."""
    import torch

    if kind == "cpu":
        return f"cpu {torch.backends.cpu.get_cpu_capability()}"
    major, minor = torch.cuda.get_device_capability()
    return f"cuda SM{major}{minor}"


def load_packages(file: Path, info: EngineInfo, weights: Mapping[str, Tensor], index: int = -1) -> list[Any]:
    """Load the packages of an engine, which share `weights`. The caller must keep the weights alive.

    Args:
        index: the index of the GPU; -1 for the CPU.
    """
    import torch

    packages = []
    for described in info.packages:
        part = file.with_name(file.stem + described.suffix)
        try:
            package = torch._inductor.aoti_load_package(str(part), device_index=index)
            wanted = {name: weights[name] for name in package.get_constant_fqns()}
        except (RuntimeError, KeyError) as error:
            raise EngineError(f"cannot load {part.name}: {error}") from None
        package.load_constants(wanted, check_full_update=True, user_managed=True)
        packages.append(package)
    return packages


def _reuse_memory() -> None:
    """Let this process keep the memory of intermediate results, which packages allocate and free in every call.

    Servers let glibc return all large blocks to the system (`imprompt_serving.launcher.server`), but clearing new ones
    takes a fifth of a UNet call.
    """
    libc = ctypes.CDLL(None)
    libc.mallopt(_M_MMAP_THRESHOLD, 32 << 20)  # the most that glibc accepts
    libc.mallopt(_M_TRIM_THRESHOLD, 1 << 30)


class InductorEngine:
    """Packages on the CPU, with memory-mapped weights. `run` is safe to call from several threads."""

    def __init__(self, file: Path, info: EngineInfo, *, threads: int = 0) -> None:
        import torch
        from safetensors.torch import load_file

        from imprompt_serving.gpu.loras import LoraWeights

        # The packages run on torch's threads, which processes inside Triton otherwise limit to one.
        torch.set_num_threads(threads or len(os.sched_getaffinity(0)))
        _reuse_memory()
        self._info = info
        self._weights = load_file(file.with_suffix(WEIGHTS))
        self._packages = load_packages(file, info, self._weights)
        # A second mapping of the file holds the original weights and takes no further memory.
        self._loras = LoraWeights(file, self._weights, load_file(file.with_suffix(WEIGHTS)).__getitem__)

    def use_loras(self, scales: Mapping[str, float]) -> None:
        """Run the next calls with LoRAs of these scales. No other thread may be in a call."""
        self._loras.use(scales)

    def run(self, tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        import torch

        from imprompt_serving.gpu import to_array

        answer = self.run_tensors({name: torch.from_numpy(value) for name, value in tensors.items()})
        return {name: to_array(value) for name, value in answer.items()}

    def run_tensors(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Run one call on tensors, without copies."""
        given = {name: tensor.contiguous() for name, tensor in self._info.select_inputs(tensors).items()}
        axes = self._info.axes_of({name: tuple(tensor.shape) for name, tensor in given.items()})
        answer = self._packages[self._info.package_for(axes)](*given.values())
        return dict(zip(self._info.outputs, answer, strict=True))
