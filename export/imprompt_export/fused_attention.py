"""Replace attention in ONNX files (two matrix products and a softmax) by one operator of ONNX Runtime.

`MultiHeadAttention` takes its inputs in the layout of the projections, so the transposes around it disappear as well.
It has kernels for the CPU (float32) and for CUDA (flash attention, or memory-efficient attention with a bias):
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
    """Rewrite the attention layers of the ONNX file `source` in place, and return how many there were.

    External weights are not touched. Layers of another form than `onnx_graph` writes, such as causal attention, stay as
    they are.
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
    """One attention layer: its input tensors [B, S, heads * d], and the node whose output it replaces."""

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
        self._producers = {name: node for node in graph.node for name in node.output}
        self._use_counts = Counter(name for node in graph.node for name in node.input)
        self._use_counts.update(output.name for output in graph.output)
        self._consumers = {name: node for node in graph.node for name in node.input}
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
        """Return the layer around `softmax`; None if it has another form or one of its tensors is used elsewhere."""
        scores, bias = self._producer(softmax.input[0], "MatMul"), None
        if scores is None:
            added = self._producer(softmax.input[0], "Add")
            scores = added and self._producer(added.input[0], "MatMul")
            bias = added and added.input[1]
        scaled = scores and self._producer(scores.input[0], "Mul")
        attended = self._only_consumer(softmax.output[0], "MatMul")
        transposed = attended and self._only_consumer(attended.output[0], "Transpose", _HEADS_FIRST)
        last = transposed and self._only_consumer(transposed.output[0], "Reshape")
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
        """Return the tensor [B, S, heads * d] that was split into heads and transposed by `order` to make `name`."""
        transposed = self._producer(name, "Transpose", order)
        split = transposed and self._producer(transposed.input[0], "Reshape")
        return split.input[0] if split is not None and self._is_rows(split.input[0]) else None

    def _is_rows(self, name: str) -> bool:
        return len(self._shapes.get(name, [])) == 3

    def _producer(self, name: str, operator: str, order: list[int] | None = None) -> NodeProto | None:
        node = self._producers.get(name)
        return node if node is not None and _is(node, operator, order) else None

    def _only_consumer(self, name: str, operator: str, order: list[int] | None = None) -> NodeProto | None:
        node = self._consumers.get(name)
        return node if node is not None and self._use_counts[name] == 1 and _is(node, operator, order) else None


def _is(node: NodeProto, operator: str, order: list[int] | None) -> bool:
    if node.op_type != operator:
        return False
    return order is None or any(list(attribute.ints) == order for attribute in node.attribute)


def _replace(model: ModelProto, layer: _Layer) -> None:
    name = layer.last.output[0]
    inputs = [layer.query, layer.key, layer.value]
    new_nodes: list[NodeProto] = []
    if layer.bias is not None:  # the operator broadcasts it over rows and heads, but not over query positions
        parts = {"rows": (layer.bias, 0, 2), "positions": (layer.query, 1, 2), "tokens": (layer.bias, 3, 4)}
        new_nodes = [
            helper.make_node("Shape", [tensor], [f"{name}_{part}"], start=start, end=end)
            for part, (tensor, start, end) in parts.items()
        ]
        new_nodes.append(helper.make_node("Concat", [f"{name}_{part}" for part in parts], [f"{name}_shape"], axis=0))
        new_nodes.append(helper.make_node("Expand", [layer.bias, f"{name}_shape"], [f"{name}_bias"]))
        inputs += ["", "", f"{name}_bias"]
    new_nodes.append(
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
    for node in reversed(new_nodes):
        nodes.insert(place, node)


def _drop_unused(model: ModelProto) -> None:
    """Remove the nodes and weights that are no longer used."""
    graph = model.graph
    needed = {output.name for output in graph.output}
    kept = []
    for node in reversed(graph.node):  # ONNX requires topological order
        if needed.intersection(node.output):
            kept.append(node)
            needed.update(node.input)
    weights = [weight for weight in graph.initializer if weight.name in needed]
    shapes = [value for value in graph.value_info if value.name in needed]
    for field, values in ((graph.node, kept[::-1]), (graph.initializer, weights), (graph.value_info, shapes)):
        copies = [type(value).FromString(value.SerializeToString()) for value in values]
        del field[:]
        field.extend(copies)
