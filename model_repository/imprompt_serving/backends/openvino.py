"""Run OpenVINO models on the CPU."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from imprompt_serving.backends import Backend, Engine

if TYPE_CHECKING:
    import torch

SETTINGS: dict[str, Any] = {
    "PERFORMANCE_HINT": "LATENCY",  # one call at a time, on all cores
    # Compute in the types of the graph. Otherwise, on CPUs that support it, OpenVINO rounds all to bfloat16, even
    # the timestep: 999 would become 1000.
    "INFERENCE_PRECISION_HINT": "dynamic",
    # Several processes share the cores: their pinned threads would compete for the same ones.
    "ENABLE_CPU_PINNING": False,
    # OpenVINO 2026.4 reuses a kernel that it generated for a call with one query (a UNet at its smallest size) for
    # later calls with more queries, and returns wrong results. Other kernels are not slower.
    "SNIPPETS_MODE": "DISABLE",
}
ROUND_TO_BF16 = ("imprompt", "round_to_bf16")
"""The entry of a model whose floats may be rounded to bf16, because its timesteps are marked as exact."""


@dataclass(frozen=True, kw_only=True, slots=True)
class OpenVino(Backend):
    def _load(self, file: Path, threads: int, device: str) -> Engine:
        return OpenVinoEngine(file, threads=threads)

    def device(self, index: int = 0) -> torch.device:
        import torch

        return torch.device("cpu")


class OpenVinoEngine:
    """An OpenVINO model behind the engine interface. A lock serializes calls from several threads.

    Weights are memory-mapped, except for those that the CPU needs in a different layout.

    Args:
        path: the model's `.xml`.
        threads: as in `Backend.load`.
        round_to_bf16: whether to round all floats to bf16, also timesteps, if the CPU has arithmetic for it.
    """

    def __init__(self, path: Path, *, threads: int = 0, round_to_bf16: bool = False) -> None:
        import openvino

        core, settings = openvino.Core(), SETTINGS | ({"INFERENCE_NUM_THREADS": threads} if threads else {})
        model = core.read_model(path)
        if not has_bf16():
            convert_to_fp32(model)
        elif round_to_bf16 or model.has_rt_info([*ROUND_TO_BF16]):
            settings["INFERENCE_PRECISION_HINT"] = "bf16"
        # Before it is compiled, because that may rename outputs.
        self._inputs, self._outputs = ([port.any_name for port in ports] for ports in (model.inputs, model.outputs))
        self._request = core.compile_model(model, "CPU", settings).create_infer_request()
        self._lock = threading.Lock()

    def run(self, tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        feeds = {name: value for name, value in tensors.items() if name in self._inputs}
        with self._lock:
            answer = self._request.infer(feeds, share_inputs=True)  # outputs are copies
        return dict(zip(self._outputs, answer.values(), strict=True))


def has_bf16(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Return whether this CPU has arithmetic for bf16.

    OpenVINO's own property, `OPTIMIZATION_CAPABILITIES`, has BF16 for every CPU with AVX-512.
    """
    return not {"avx512_bf16", "amx_bf16"}.isdisjoint(cpuinfo.read_text().split())


def convert_to_fp32(model: Any) -> None:
    """Let `model` compute in float32 where it computes in bf16, with the same rounded weights.

    OpenVINO emulates bf16 on CPUs without such arithmetic, which takes several times as long.
    """
    import openvino
    from openvino import op

    in_bf16 = [
        node
        for node in model.get_ordered_ops()
        if node.get_output_size() == 1 and node.get_output_element_type(0) == openvino.Type.bf16
    ]
    for node in in_bf16:
        if node.get_type_name() == "Constant":
            exact = op.Constant(node.get_data(dtype=np.float32))
            for port in node.output(0).get_target_inputs():
                port.replace_source_output(exact.output(0))
        elif node.get_type_name() == "Convert":
            node.set_attribute("destination_type", "f32")
    if in_bf16:
        model.validate_nodes_and_infer_types()


BACKENDS = {"openvino": OpenVino(name="openvino", precisions=("fp32", "bf16", "int8"), suffix=".xml", extra="openvino")}
