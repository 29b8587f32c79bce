"""What engines on a GPU have in common: a stream for each engine, and a CUDA graph for each shape of its inputs."""

from __future__ import annotations

import contextlib
import logging
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from imprompt_serving.gpu import call_shapes, to_array
from imprompt_serving.gpu.lru_cache import LRUCache

logger = logging.getLogger(__name__)

GRAPHS = 16
"""The number of shapes whose buffers and CUDA graphs are kept: picture sizes in use, times numbers of rows."""
_PREPARING = threading.Lock()
"""Several threads may run engines, but a process can only capture one CUDA graph at a time."""


@contextlib.contextmanager
def on_stream(stream: torch.cuda.Stream, inputs: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """Order a call on `stream`: after the work that makes `inputs`, before that which uses its outputs.

    Yields:
        A list to which the call adds its outputs.
    """
    caller, answers = torch.cuda.current_stream(stream.device), list[Tensor]()
    stream.wait_stream(caller)
    with torch.cuda.stream(stream):
        yield answers
    caller.wait_stream(stream)
    # Otherwise torch could reuse the memory once the allocating stream is done with it.
    for tensor in inputs:
        if tensor.is_cuda:
            tensor.record_stream(stream)
    for tensor in answers:
        tensor.record_stream(caller)


@contextlib.contextmanager
def capturing() -> Iterator[torch.cuda.CUDAGraph]:
    """Capture what is launched on the current stream as a CUDA graph.

    `torch.cuda.graph` first waits for the whole device, which is an error while another thread captures.

    Raises:
        RuntimeError: something was launched that cannot be captured.
    """
    graph, pool = torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle()
    graph.capture_begin(pool, capture_error_mode="thread_local")
    try:
        yield graph
    finally:
        try:
            graph.capture_end()
        except RuntimeError:
            # Otherwise torch would assume that the capture continues, and never reuse memory that two streams used.
            torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), pool)
            raise


@dataclass(frozen=True, kw_only=True, slots=True)
class PreparedCall:
    """Buffers for one shape, and a function that runs the engine on them: with a CUDA graph, in a single launch."""

    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]
    launch: Callable[[], None]
    context: object = None
    """What must live as long as `launch`."""


class GraphedEngine(ABC):
    """An engine on one GPU. A lock serializes calls from several threads.

    The engine has its own stream. The caller's stream waits for it, the host does not.

    Args:
        inputs: names of the inputs. Calls may have more tensors.
        capturable: whether the engine's launches can become a CUDA graph.
    """

    def __init__(self, file: Path, inputs: Iterable[str], device: torch.device, *, capturable: bool = True) -> None:
        self._file, self._names, self._device, self._capturable = file, tuple(inputs), device, capturable
        self._stream = torch.cuda.Stream(device)
        self._calls: LRUCache[PreparedCall] = LRUCache(GRAPHS, before_dropping=self._stream.synchronize)
        self._lock = threading.Lock()

    @abstractmethod
    def _prepare(self, given: Mapping[str, Tensor]) -> PreparedCall:
        """Allocate buffers for inputs of these shapes, and run once to load kernels, which cannot be captured."""

    def run(self, tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        given = {name: torch.from_numpy(value).to(self._device) for name, value in tensors.items()}
        return {name: to_array(value) for name, value in self.run_tensors(given).items()}

    def run_tensors(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        given = {name: tensors[name] for name in self._names}
        with self._lock, torch.cuda.device(self._device), on_stream(self._stream, given.values()) as answers:
            call = self._calls.get(call_shapes(given), lambda: self._prepare_alone(given))
            for name, tensor in given.items():
                call.inputs[name].copy_(tensor, non_blocking=True)
            call.launch()
            answer = {name: tensor.clone() for name, tensor in call.outputs.items()}
            answers += answer.values()
        return answer

    def _prepare_alone(self, given: Mapping[str, Tensor]) -> PreparedCall:
        with _PREPARING:
            return self._prepare(given)

    def _captured(self, launch: Callable[[], None]) -> Callable[[], None]:
        """Capture `launch` as a CUDA graph, or return it unchanged if this engine cannot be captured."""
        if not self._capturable:
            return launch
        self._stream.synchronize()
        try:
            with capturing() as graph:
                launch()
        except RuntimeError as error:
            self._capturable = False
            logger.warning("%s runs without CUDA graphs: %s", self._file, error)
            return launch
        return graph.replay
