"""What engines can be compiled for: the values of ``[engine]`` in a bundle file that go together."""

from __future__ import annotations

from typing import NamedTuple


class EngineError(RuntimeError):
    """An engine cannot be compiled, loaded or run; the message says what to do about it."""


class Backend(NamedTuple):
    """Precisions and hosts that a backend takes, and the extra that it needs.

    ``compiled`` engines are built for ranges of shapes, one kind of GPU and one version of the package.
    """

    precisions: tuple[str, ...]
    hosts: tuple[str, ...] = ("python", "native")
    extra: str = "server"
    compiled: bool = False

    @property
    def suffix(self) -> str:
        """Ending of its engine files."""
        return ".plan" if self.compiled else ".onnx"


BACKENDS = {
    "onnxruntime": Backend(("fp32", "fp16", "bf16")),
    "tensorrt": Backend(("fp32", "fp16", "bf16"), extra="gpu", compiled=True),
    # Triton has no backend of its own for it.
    "tensorrt_rtx": Backend(("fp32", "fp16", "bf16"), hosts=("python",), extra="rtx", compiled=True),
}
