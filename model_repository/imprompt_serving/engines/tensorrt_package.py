"""TensorRT and TensorRT-RTX: two packages with one interface, and what an engine file says of itself."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import msgspec

from imprompt_serving.engines.backends import BACKENDS, EngineError
from imprompt_serving.engines.files import write_whole

_MODULES = {"tensorrt": ("tensorrt",), "tensorrt_rtx": ("tensorrt_rtx", "tensorrt_rtx_bindings")}
"""What a backend is imported as; the bindings of TensorRT-RTX are a wheel of their own."""
_OLDEST = {"tensorrt": (10, 12), "tensorrt_rtx": (1, 4)}
"""From these on, what is used here is there."""


def tensorrt(backend: str) -> Any:
    """The Python module of ``backend``.

    Raises:
        EngineError: it is not installed, or too old; the message says what to install.
    """
    for name in _MODULES[backend]:
        try:
            module = importlib.import_module(name)
        except ImportError:
            continue
        if tuple(int(part) for part in module.__version__.split(".")[:2]) < _OLDEST[backend]:
            oldest = ".".join(map(str, _OLDEST[backend]))
            raise EngineError(f"{backend} {module.__version__} is too old; {oldest} or newer is needed")
        return module
    extra = BACKENDS[backend].extra
    raise EngineError(f'engine.backend = "{backend}" needs {_MODULES[backend][0]}: pip install "imprompt[{extra}]"')


class EngineTensor(msgspec.Struct, frozen=True, kw_only=True):
    """An input or output: its type, its shape (-1: dynamic), and of inputs [min, opt, max] in each profile."""

    dtype: str
    shape: tuple[int, ...]
    profiles: tuple[tuple[tuple[int, ...], ...], ...] = ()


class EngineInfo(msgspec.Struct, frozen=True, kw_only=True):
    """What an engine was built from and for; kept as JSON beside it.

    ``model`` is a hash of the graph with its weights, ``architecture`` one without: engines of equal architecture can
    take each other's weights. ``target`` is the name of the GPU, or the compute capabilities that were asked for.
    """

    backend: str
    version: str
    target: str
    model: str
    architecture: str
    settings: str
    """A hash of the profiles, of whether the weights can be replaced, and of how this version of imprompt builds."""
    refit: bool
    inputs: dict[str, EngineTensor] = {}
    outputs: dict[str, EngineTensor] = {}
    """As the builder understood the graph. Inputs that a graph does not use are not there."""

    def save(self, engine: Path) -> None:
        write_whole(_beside(engine), msgspec.json.format(msgspec.json.encode(self)) + b"\n")

    @classmethod
    def load(cls, engine: Path) -> EngineInfo:
        return msgspec.json.decode(_beside(engine).read_bytes(), type=cls)

    @classmethod
    def check(cls, engine: Path, version: str) -> None:
        """Raise for an engine that another version of the package has built."""
        info = cls.load(engine)
        if info.version != version:
            raise EngineError(
                f"{engine.name} was built by {info.backend} {info.version}, but {version} is installed here: "
                "export the bundle again, or install that version"
            )


def _beside(engine: Path) -> Path:
    return engine.with_suffix(".json")
