"""Attention in ONNX files as one operator of ONNX Runtime, in place of two products and a softmax.

`MultiHeadAttention` takes rows of heads as the projections write them, so the transposes around it go too. It has
kernels for the CPU (float32) and for CUDA (flash attention, or a memory-efficient one where there is a bias):
https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md#com.microsoft.MultiHeadAttention
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import onnx
from onnx import ModelProto, NodeProto, helper, numpy_helper

DOMAIN = "com.microsoft"
_HEADS_FIRST = [0, 2, 1, 3]
_KEYS_LAST = [0, 2, 3, 1]


def fuse_attention(source: Path) -> int:
    """Rewrite the attention layers of the ONNX file `source`, which keeps its weights; returns how many were found.

    Layers of any other form than `onnx_graph` writes, such as causal ones, stay as they are.
    """
    model = onnx.load(source, load_external_data=False)
    layers = list(_Graph(model).layers())
    for layer in layers:
        _replace(model, layer)
    if layers:
        _drop_unused(model)
        model.opset_import.append(helper.make_opsetid(DOMAIN, 1))
        onnx.save(model, source)
    return len(layers)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Layer:
    """One attention layer: tensors [B, S, heads * d], and the node whose output it becomes."""

    query: str
    key: str
    value: str
    bias: str | None
    heads: int
    scale: float
    last: NodeProto


class _Graph:
    """Finds attention layers in a model."""

    def __init__(self, model: ModelProto) -> None:
        graph = model.graph
        self._nodes = list(graph.node)
        self._makers = {name: node for node in graph.node for name in node.output}
        self._uses = Counter(name for node in graph.node for name in node.input)
        self._uses.update(output.name for output in graph.output)
        self._users = {name: node for node in graph.node for name in node.input}
        self._weights = {weight.name: weight for weight in graph.initializer}
        self._shapes = {
            value.name: [size.dim_value for size in value.type.tensor_type.shape.dim]
            for value in (*graph.value_info, *graph.input, *graph.output)
        }

    def layers(self) -> Iterator[_Layer]:
        for node in self._nodes:
            layer = self._layer(node) if node.op_type == "Softmax" else None
            if layer is not None:
                yield layer

    def _layer(self, softmax: NodeProto) -> _Layer | None:
        """The layer around `softmax`; None if it has another form, or a tensor in it is used elsewhere too."""
        scores, bias = self._maker(softmax.input[0], "MatMul"), None
        if scores is None:
            added = self._maker(softmax.input[0], "Add")
            scores = added and self._maker(added.input[0], "MatMul")
            bias = added and added.input[1]
        scaled = scores and self._maker(scores.input[0], "Mul")
        attended = self._only_user(softmax.output[0], "MatMul")
        turned = attended and self._only_user(attended.output[0], "Transpose", _HEADS_FIRST)
        last = turned and self._only_user(turned.output[0], "Reshape")
        if scores is None or scaled is None or attended is None or last is None:
            return None
        factor = self._weights.get(scaled.input[1])
        query = self._rows(scaled.input[0], _HEADS_FIRST)
        key = self._rows(scores.input[1], _KEYS_LAST)
        value = self._rows(attended.input[1], _HEADS_FIRST)
        sizes = self._shapes.get(scaled.input[0], [])
        if not (factor and query and key and value and len(sizes) == 4 and sizes[1] and self._is_rows(last.output[0])):
            return None
        scale = float(numpy_helper.to_array(factor))
        return _Layer(query=query, key=key, value=value, bias=bias, heads=sizes[1], scale=scale, last=last)

    def _rows(self, name: str, order: list[int]) -> str | None:
        """The tensor [B, S, heads * d] that was split into heads and turned to `order` to make `name`."""
        turned = self._maker(name, "Transpose", order)
        split = turned and self._maker(turned.input[0], "Reshape")
        return split.input[0] if split is not None and self._is_rows(split.input[0]) else None

    def _is_rows(self, name: str) -> bool:
        return len(self._shapes.get(name, [])) == 3

    def _maker(self, name: str, operator: str, order: list[int] | None = None) -> NodeProto | None:
        node = self._makers.get(name)
        return node if node is not None and _is(node, operator, order) else None

    def _only_user(self, name: str, operator: str, order: list[int] | None = None) -> NodeProto | None:
        node = self._users.get(name)
        return node if node is not None and self._uses[name] == 1 and _is(node, operator, order) else None


def _is(node: NodeProto, operator: str, order: list[int] | None) -> bool:
    if node.op_type != operator:
        return False
    return order is None or any(list(attribute.ints) == order for attribute in node.attribute)


def _replace(model: ModelProto, layer: _Layer) -> None:
    name = layer.last.output[0]
    inputs = [layer.query, layer.key, layer.value]
    made: list[NodeProto] = []
    if layer.bias is not None:  # the operator repeats it over rows and heads, not over the positions of the query
        parts = {"rows": (layer.bias, 0, 2), "positions": (layer.query, 1, 2), "tokens": (layer.bias, 3, 4)}
        made = [
            helper.make_node("Shape", [tensor], [f"{name}_{part}"], start=start, end=end)
            for part, (tensor, start, end) in parts.items()
        ]
        made.append(helper.make_node("Concat", [f"{name}_{part}" for part in parts], [f"{name}_shape"], axis=0))
        made.append(helper.make_node("Expand", [layer.bias, f"{name}_shape"], [f"{name}_bias"]))
        inputs += ["", "", f"{name}_bias"]
    made.append(
        helper.make_node(
            "MultiHeadAttention",
            inputs,
            [name],
            name=f"{name}_attention",
            domain=DOMAIN,
            num_heads=layer.heads,
            scale=layer.scale,
        )
    )
    nodes = model.graph.node
    place = next(index for index, node in enumerate(nodes) if name in node.output)
    del nodes[place]
    for node in reversed(made):
        nodes.insert(place, node)


def _drop_unused(model: ModelProto) -> None:
    """Remove the nodes and weights that nothing takes any more."""
    graph = model.graph
    needed = {output.name for output in graph.output}
    kept = []
    for node in reversed(graph.node):  # in topological order, as ONNX demands
        if needed.intersection(node.output):
            kept.append(node)
            needed.update(node.input)
    weights = [weight for weight in graph.initializer if weight.name in needed]
    shapes = [value for value in graph.value_info if value.name in needed]
    for field, values in ((graph.node, kept[::-1]), (graph.initializer, weights), (graph.value_info, shapes)):
        copies = [type(value).FromString(value.SerializeToString()) for value in values]
        del field[:]
        field.extend(copies)
