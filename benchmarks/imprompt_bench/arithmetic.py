"""The hardware limit: floating-point operations of a UNet call, and the machine's rate for a matrix product."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import onnxruntime
import torch
from diffusers import UNet2DConditionModel
from onnx import TensorProto, helper
from torch.utils.flop_counter import FlopCounterMode

EDGE = 2048
REPEATS = 8


def unet_flop(folder: Path, size: int) -> float:
    """Count the floating-point operations of one call of the UNet in `folder`: one guided picture, no image prompt.

    The call has two rows. Torch counts on the meta device, so UNets of any size fit into memory.
    """
    config = UNet2DConditionModel.load_config(folder)
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        model = UNet2DConditionModel.from_config(config)
        added = {}
        if model.config.addition_embed_type:
            pooled = model.config.projection_class_embeddings_input_dim - 6 * model.config.addition_time_embed_dim
            added = {"text_embeds": torch.empty(2, pooled), "time_ids": torch.empty(2, 6)}
        text = torch.empty(2, 77, model.config.cross_attention_dim)
        model(torch.empty(2, 4, size // 8, size // 8), torch.empty(2), text, added_cond_kwargs=added)
    return float(counter.get_total_flops())


def gemm_flops() -> float:
    """Measure the FLOP/s of a 2048 x 2048 float32 matrix product on all cores.

    Returns the fastest of several runs of PyTorch and ONNX Runtime; which of them is faster depends on the machine.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(os.cpu_count() or 1)
    a, b = torch.randn(EDGE, EDGE), torch.randn(EDGE, EDGE)
    feeds, engine = {"a": a.numpy(), "b": b.numpy()}, _product()
    seconds = min(_fastest(lambda: a @ b), _fastest(lambda: engine.run(None, feeds)))
    torch.set_num_threads(threads)
    return 2 * EDGE**3 / seconds


def _product() -> onnxruntime.InferenceSession:
    """Build a session for a graph that consists of one matrix product."""
    a, b, c = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [EDGE, EDGE]) for name in "abc")
    graph = helper.make_graph([helper.make_node("MatMul", ["a", "b"], ["c"])], "product", [a, b], [c])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    return onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])


def _fastest(call: Callable[[], object]) -> float:
    """Time several calls and return the seconds of the fastest."""
    seconds = []
    for _ in range(REPEATS):
        began = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - began)
    return min(seconds)
