"""AOTInductor: networks compiled by torch itself, and what their packages say of themselves."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from imprompt_serving.backends import FLOATS, Backend, Engine, EngineError
from imprompt_serving.backends.files import write_whole

if TYPE_CHECKING:
    import torch
    from torch import Tensor

WEIGHTS = ".safetensors"
"""Suffix of the weights, which all packages of an engine share."""
LORA_DOWN, LORA_UP = ".down", ".up"
"""Endings of the factors of a weight in a file of `lora_file`: `up @ down` is added to it at scale 1."""


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
    "inductor": Inductor(name="inductor", precisions=FLOATS, suffix=".json", extra="server", swaps_weights=True)
}


class Package(msgspec.Struct, frozen=True, kw_only=True):
    """A file of machine code, named by what follows the engine's name, and the sizes of axes that it is for."""

    suffix: str
    axes: dict[str, int] = {}
    """Axes that are not there may have any size."""


class EngineInfo(msgspec.Struct, frozen=True, kw_only=True):
    """An engine: the file that is loaded, with packages and weights beside it."""

    version: str
    """Of torch, whose internal functions the packages call."""
    target: str
    """Instructions of the CPU, or compute capability of the GPU, that the packages are for (`target`)."""
    inputs: dict[str, tuple[int | str, ...]]
    """Their shapes, in the order of the call; axes that are strings have names."""
    outputs: tuple[str, ...]
    packages: tuple[Package, ...]
    channels_last: bool = False
    """Whether the weights of convolutions lie in this order, on which the packages rely."""

    def save(self, file: Path) -> None:
        write_whole(file, msgspec.json.format(msgspec.json.encode(self)) + b"\n")

    @classmethod
    def load(cls, file: Path) -> EngineInfo:
        """Read `file`.

        Raises:
            EngineError: the packages cannot run here.
        """
        import torch

        info = msgspec.json.decode(file.read_bytes(), type=cls)
        engine = file.stem
        if info.version != torch.__version__:
            raise EngineError(
                f"{engine} was built by torch {info.version}, but {torch.__version__} is installed here: export the "
                "bundle again, or install that version"
            )
        if info.target.startswith("cuda") and not torch.cuda.is_available():
            raise EngineError(f"{engine} was built for an NVIDIA GPU ({info.target}); there is none here")
        here = target(info.target.split()[0])
        if info.target != here:
            raise EngineError(f"{engine} was built for {info.target}, but here is {here}: export the bundle here")
        return info

    def axes_of(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
        """Sizes of the named axes in a call with inputs of these shapes."""
        return {
            axis: size
            for name, declared in self.inputs.items()
            for axis, size in zip(declared, shapes[name], strict=True)
            if isinstance(axis, str)
        }

    def package_for(self, axes: Mapping[str, int]) -> int:
        """Number of the package that takes a call of these sizes.

        Raises:
            EngineError: none does; the message says which there are.
        """
        for index, package in enumerate(self.packages):
            if all(axes[axis] == size for axis, size in package.axes.items()):
                return index
        asked = {axis: axes[axis] for axis in self.packages[0].axes}
        built = "; ".join(dict.fromkeys(_shown(package.axes) for package in self.packages))
        raise EngineError(f"the engine takes {built}, not {_shown(asked)}; see [shapes]")


def lora_file(file: Path, name: str) -> Path:
    """Where the LoRA called `name` is kept for the engine `file`."""
    return file.with_name(f"{file.stem}.lora_{name}{WEIGHTS}")


def lora_files(file: Path) -> dict[str, Path]:
    """The LoRAs that are kept for the engine `file`, by name."""
    prefix, suffix = lora_file(file, "*").name.split("*")
    found = sorted(file.parent.glob(prefix + "*" + suffix))
    return {path.name.removeprefix(prefix).removesuffix(suffix): path for path in found}


def _shown(axes: Mapping[str, int]) -> str:
    return " ".join(f"{axis}={size}" for axis, size in axes.items())


def target(kind: str) -> str:
    """What code of this `kind` (`cpu` or `cuda`) is compiled for on this machine."""
    import torch

    if kind == "cpu":
        return f"cpu {torch.backends.cpu.get_cpu_capability()}"
    major, minor = torch.cuda.get_device_capability()
    return f"cuda SM{major}{minor}"


def load_packages(file: Path, info: EngineInfo, weights: Mapping[str, Tensor], index: int = -1) -> list[Any]:
    """The packages of an engine, all of them on the same `weights`; the caller keeps these alive.

    Args:
        index: the GPU.
    """
    import torch

    packages = []
    for described in info.packages:
        part = file.with_name(file.stem + described.suffix)
        try:
            package = torch._inductor.aoti_load_package(str(part), device_index=index)
            wanted = {name: weights[name] for name in package.get_constant_fqns()}
        except (RuntimeError, KeyError) as error:
            raise EngineError(f"{part.name} cannot be loaded: {error}") from None
        package.load_constants(wanted, check_full_update=True, user_managed=True)
        packages.append(package)
    return packages


class InductorEngine:
    """Packages on the CPU, with weights that are mapped from their file; `run` is safe to call from several threads."""

    def __init__(self, file: Path, info: EngineInfo, *, threads: int = 0) -> None:
        import torch
        from safetensors.torch import load_file

        from imprompt_serving.gpu.loras import LoraWeights

        # The packages run on torch's own threads, which the processes inside Triton otherwise limit to one.
        torch.set_num_threads(threads or len(os.sched_getaffinity(0)))
        self._info = info
        self._weights = load_file(file.with_suffix(WEIGHTS))
        self._packages = load_packages(file, info, self._weights)
        # A second mapping of the file keeps the base without any memory of its own.
        self._loras = LoraWeights(file, self._weights, load_file(file.with_suffix(WEIGHTS)).__getitem__)

    def use_loras(self, scales: Mapping[str, float]) -> None:
        """Compute the next calls with these LoRAs; no other thread may be in a call."""
        self._loras.use(scales)

    def run(self, tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        import torch

        answer = self.run_tensors({name: torch.from_numpy(value) for name, value in tensors.items()})
        return {name: value.numpy() for name, value in answer.items()}

    def run_tensors(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The same on tensors, without copies."""
        given = {name: tensors[name].contiguous() for name in self._info.inputs}
        axes = self._info.axes_of({name: tuple(tensor.shape) for name, tensor in given.items()})
        answer = self._packages[self._info.package_for(axes)](*given.values())
        return dict(zip(self._info.outputs, answer, strict=True))
