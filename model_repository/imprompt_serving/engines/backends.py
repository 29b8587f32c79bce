"""What engines can be compiled for: the values of ``[engine]`` in a bundle file that go together."""

from __future__ import annotations

from typing import NamedTuple


class EngineError(RuntimeError):
    """An engine cannot be compiled, loaded or run; the message says what to do about it."""


class Backend(NamedTuple):
    """Precisions and hosts that a backend takes, the extra that it needs, and the ending of its engine files.

    ``compiled`` engines are built for ranges of shapes, one kind of GPU and one version of the package.
    """

    precisions: tuple[str, ...]
    hosts: tuple[str, ...] = ("python", "native")
    extra: str = "server"
    suffix: str = ".onnx"
    compiled: bool = False


_FLOATS = ("fp32", "fp16", "bf16")
BACKENDS = {
    "onnxruntime": Backend(_FLOATS),
    "openvino": Backend(("fp32", "int8"), hosts=("python",), extra="openvino", suffix=".xml"),
    "tensorrt": Backend(_FLOATS, extra="gpu", suffix=".plan", compiled=True),
    # Triton has no backend of its own for it.
    "tensorrt_rtx": Backend(_FLOATS, hosts=("python",), extra="rtx", suffix=".plan", compiled=True),
}
