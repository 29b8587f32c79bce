"""What engines can be compiled for: the values of ``[engine]`` in a bundle file that go together."""

from __future__ import annotations

from typing import NamedTuple


class EngineError(RuntimeError):
    """An engine cannot be compiled, loaded or run; the message says what to do about it."""


class Backend(NamedTuple):
    """Precisions and hosts that a backend takes, the extra that it needs, and the ending of its engine files."""

    precisions: tuple[str, ...]
    hosts: tuple[str, ...] = ("python", "native")
    extra: str = "server"
    suffix: str = ".onnx"


BACKENDS = {
    "onnxruntime": Backend(("fp32",)),
    "openvino": Backend(("fp32", "int8"), hosts=("python",), extra="openvino", suffix=".xml"),
}
