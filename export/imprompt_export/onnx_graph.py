"""Export a graph to an ONNX file, by way of its `torch.export` program."""

from __future__ import annotations

import contextlib
import copy
import functools
import io
import logging
import math
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import onnx_ir as ir
import torch
from onnx_ir.tensor_adapters import from_torch_dtype, to_torch_dtype
from onnxscript import opset18 as op
from onnxscript.function_libs.torch_lib.ops.core import aten_cat, aten_flatten, aten_unflatten
from onnxscript.function_libs.torch_lib.ops.nn import aten_scaled_dot_product_attention
from onnxscript.rewriter.pattern import RewriteRule
from onnxscript.rewriter.rules.common import slice_split_rule
from torch.onnx._internal.exporter import _fx_passes, _registration

from imprompt_export.graphs import Graph
from imprompt_export.precision import cast
from imprompt_export.programs import trace
from imprompt_export.stages import Stages

OPSET = 18
_EXTERNAL_DATA_FROM = 1 << 30
"""Bytes of weights above which they go into a separate file (an ONNX file holds at most 2 GiB)."""
_NO_ARITHMETIC = (
    torch.ops.aten.embedding.default,
    torch.ops.aten.gather.default,
    torch.ops.aten.index.Tensor,
    torch.ops.aten.to.dtype,
)
"""Operators that compute nothing, so their tensors may have different types."""
_ASSERTION = torch.ops.aten._assert_tensor_metadata.default
_rewrite = RewriteRule.try_rewrite
_decompose = _fx_passes.decompose_with_registry
_promote = _fx_passes.insert_type_promotion_nodes
_translations = functools.cache(_registration.ONNXRegistry.from_torchlib)


def export_onnx(graph: Graph, path: Path, dtype: torch.dtype = torch.float32, stages: Stages | None = None) -> None:
    """Trace `graph` in `dtype` and write it to `path`, with the graph's names for tensors and axes."""
    stages = stages or Stages()
    path.parent.mkdir(parents=True, exist_ok=True)
    weights = sum(parameter.numel() * dtype.itemsize for parameter in graph.module.parameters())
    with cast(graph.module, dtype):  # keep it open until the file is written: the program refers to the weights
        with stages.time("tracing"):
            program = trace(graph, dtype)
        with stages.time("translating to ONNX"):
            onnx_program = _translate(graph, program)
        with stages.time("writing"):
            onnx_program.save(path, external_data=weights > _EXTERNAL_DATA_FROM)
    # onnxscript's rules keep the last graph that they were tried on: do not let them keep the weights of checkpoints.
    for value in onnx_program.model.graph.initializers.values():
        value.const_value = None


def _translate(graph: Graph, program: torch.export.ExportedProgram) -> torch.onnx.ONNXProgram:
    with torch.no_grad(), _quiet(), _quickly():
        onnx_program = torch.onnx.export(
            program,
            dynamo=True,
            opset_version=OPSET,
            input_names=[tensor.name for tensor in graph.inputs],
            output_names=list(graph.outputs),
            custom_translation_table={
                torch.ops.aten.cat.default: _cat,
                torch.ops.aten.concat.default: _cat,
                torch.ops.aten.concatenate.default: _cat,
                torch.ops.aten.flatten.using_ints: _flatten,
                torch.ops.aten.repeat_interleave.self_int: _repeat_interleave,
                torch.ops.aten.scaled_dot_product_attention.default: _attention,
                torch.ops.aten.to.device: _to_device,
                torch.ops.aten.to.dtype: _to,
                torch.ops.aten.unflatten.int: _unflatten,
            },
        )
    assert onnx_program is not None  # it is only None without dynamo=True
    model = onnx_program.model.graph
    shapes = [tensor.shape for tensor in graph.inputs] + list(graph.outputs.values())
    for value, shape in zip([*model.inputs, *model.outputs], shapes, strict=True):
        for axis, size in enumerate(shape):
            if isinstance(size, str):
                value.shape[axis] = size
    return onnx_program


def _repeat_interleave(tensor: Any, repeats: Any, dim: int = 0, output_size: Any = None) -> Any:
    """Translate `repeat_interleave` over the first axis, which motion UNets use; onnxscript repeats the wrong axis.

    https://github.com/microsoft/onnxscript/blob/main/onnxscript/function_libs/torch_lib/ops/core.py
    """
    assert dim == 0
    one, rest = op.Constant(value_ints=[1]), op.Constant(value_ints=[-1])
    ones = op.Constant(value_ints=[1] * (len(tensor.shape) - 1))
    repeated = op.Expand(op.Unsqueeze(tensor, one), op.Concat(one, op.Reshape(repeats, rest), ones, axis=0))
    return op.Reshape(repeated, op.Concat(rest, op.Shape(tensor, start=1), axis=0))


def _attention(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    """Translate attention, with or without an additive mask, to the few operators that engines fuse.

    onnxscript's own translation transposes the key through shapes that are computed at every call. It is still used for
    boolean masks, causal attention, and grouped queries.
    """
    if (attn_mask is not None and attn_mask.dtype == ir.DataType.BOOL) or is_causal or enable_gqa:
        return aten_scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    factor = op.CastLike(op.Constant(value_float=scale or query.shape[-1] ** -0.5), query)
    scores = op.MatMul(op.Mul(query, factor), op.Transpose(key, perm=[0, 1, 3, 2]))
    if attn_mask is not None:
        scores = op.Add(scores, attn_mask)
    return op.MatMul(op.Softmax(scores, axis=-1), value)


def _cat(tensors: Sequence[Any], dim: int = 0) -> Any:
    """Translate `cat`; tensors of several types become the type that PyTorch promotes them to.

    In half precision, SDXL's UNet concatenates pooled text embeddings with the embedding of sizes, which is float32.
    """
    types = {tensor.dtype for tensor in tensors}
    if len(types) > 1:
        common = functools.reduce(torch.promote_types, map(to_torch_dtype, types))
        tensors = [op.Cast(tensor, to=from_torch_dtype(common)) for tensor in tensors]
    return aten_cat(tensors, dim)


def _flatten(tensor: Any, start_dim: int = 0, end_dim: int = -1) -> Any:
    """Translate `flatten`; if it merges trailing axes of known size, do not compute shapes at every call."""
    sizes = tensor.shape[start_dim:]
    if end_dim not in (-1, len(tensor.shape) - 1) or not all(isinstance(size, int) for size in sizes):
        return aten_flatten(tensor, start_dim, end_dim)
    kept = [0] * (len(tensor.shape) - len(sizes))
    return op.Reshape(tensor, op.Constant(value_ints=[*kept, math.prod(sizes)]))


def _unflatten(tensor: Any, dim: int, sizes: Any) -> Any:
    """Translate `unflatten`; if it splits a last axis of known size, do not compute shapes at every call."""
    *kept, last = tensor.shape
    if dim not in (-1, len(kept)) or not all(isinstance(size, int) for size in (last, *sizes)):
        return aten_unflatten(tensor, dim, sizes)
    known = math.prod(size for size in sizes if size != -1)
    return op.Reshape(
        tensor, op.Constant(value_ints=[*(0 for _ in kept), *(last // known if size == -1 else size for size in sizes)])
    )


def _to_device(tensor: Any, device: Any, dtype: int, *_: Any, **__: Any) -> Any:
    """Translate `Tensor.to` with a device and a type."""
    return _to(tensor, dtype)


def _to(tensor: Any, dtype: int, *_: Any, **__: Any) -> Any:
    """Translate `Tensor.to` with a type."""
    return op.Cast(tensor, to=dtype)


@contextlib.contextmanager
def _quickly() -> Iterator[None]:
    """Skip passes of the exporter that change nothing here but are slow."""
    with (
        mock.patch.object(_fx_passes, "decompose_with_registry", _decompose_if_needed),
        mock.patch.object(_fx_passes, "insert_type_promotion_nodes", _promote_if_needed),
        mock.patch.object(_registration.ONNXRegistry, "from_torchlib", staticmethod(_copied_translations)),
        mock.patch.object(RewriteRule, "try_rewrite", _rewrite_if_possible),
        # This rewrite tries every pair of Slices: it is by far the slowest and never applies.
        mock.patch.object(slice_split_rule, "try_rewrite", return_value=None),
    ):
        yield


def _rewrite_if_possible(rule: RewriteRule, model: ir.Model, graph: ir.Graph, node: ir.Node, **options: Any) -> Any:
    """Apply a rule unless its pattern ends in another operator than `node`, which saves most of the comparisons."""
    pattern = rule._target_pattern
    if pattern.has_single_output_node and not pattern.output_node.op.matches(node.op_type):
        return None
    return _rewrite(rule, model, graph, node, **options)


def _decompose_if_needed(program: torch.export.ExportedProgram, registry: Any) -> torch.export.ExportedProgram:
    """Decompose a program only if it has operators without a translation to ONNX."""
    _add_out_of_place(program.graph)
    targets = {node.target for node in program.graph.nodes if node.op == "call_function"} - {_ASSERTION}
    translated = all(registry.is_registered(target) for target in targets)
    mutable = any(target._schema.is_mutable for target in targets if isinstance(target, torch._ops.OpOverload))
    return program if translated and not mutable else _decompose(program, registry)


def _add_out_of_place(graph: torch.fx.Graph) -> None:
    """Replace `add_` by `add` where only later uses of the changed tensor can tell them apart.

    `UNet2DConditionModel` adds the features of T2I-Adapters in place. Decomposing a UNet only for that takes longer
    than the rest of its translation.
    """
    position = {node: index for index, node in enumerate(graph.nodes)}
    for node in graph.nodes:
        if node.target is not torch.ops.aten.add_.Tensor:
            continue
        changed = node.args[0]
        earlier = [user for user in changed.users if position[user] < position[node]]
        one_type = len({tensor.dtype for tensor in _tensors(node.all_input_nodes)}) == 1
        if changed.op != "call_function" or not one_type or any(map(_may_alias, (changed, *earlier))):
            continue
        node.target = torch.ops.aten.add.Tensor
        changed.replace_all_uses_with(node, lambda user, node=node: position[user] > position[node])


def _may_alias(node: torch.fx.Node) -> bool:
    """Return whether the results of an operator may share memory with its arguments."""
    schema = getattr(node.target, "_schema", None)
    return node.op == "call_function" and (schema is None or any(value.alias_info for value in schema.returns))


def _promote_if_needed(module: torch.fx.GraphModule) -> None:
    """Insert casts only if some operator computes in another type than that of its tensors."""
    if any(_casts(node) for node in module.graph.nodes if node.op == "call_function"):
        _promote(module)


def _casts(node: torch.fx.Node) -> bool:
    """Return whether an operator takes tensors of several types, or makes floats from integers or booleans."""
    if node.target in _NO_ARITHMETIC:
        return False
    given = {value.dtype for value in _tensors(node.all_input_nodes)}
    fractions = any(value.dtype.is_floating_point for value in _tensors([node]))
    return len(given) > 1 or (fractions and not all(dtype.is_floating_point for dtype in given))


def _tensors(nodes: Iterable[torch.fx.Node]) -> list[torch.Tensor]:
    return [node.meta["val"] for node in nodes if isinstance(node.meta.get("val"), torch.Tensor)]


def _copied_translations(opset_version: int) -> Any:
    """Return a copy of the exporter's table of translations, because each export adds to its own."""
    registry = copy.copy(_translations(opset_version))
    registry.functions = {target: [*functions] for target, functions in registry.functions.items()}
    return registry


@contextlib.contextmanager
def _quiet():  # type: ignore[no-untyped-def]
    """Hide the exporter's own progress and messages from the user."""
    noisy = logging.getLogger("torch.onnx")
    level = noisy.level
    noisy.setLevel(logging.ERROR)
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield
    noisy.setLevel(level)
