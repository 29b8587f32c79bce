"""Prepare int8 networks for servers that compute their other parts, such as attention to prompts, in bf16.

If the server asks for bf16 (`imprompt_serving.backends.openvino`), OpenVINO rounds all floats, timesteps included: 999
would become 1000. The operations up to the sinusoidal embeddings of timesteps and sizes are therefore marked as exact.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from imprompt_serving.backends.openvino import ROUND_TO_BF16

_RESHAPES = ("Reshape", "Unsqueeze", "Squeeze")
"""OpenVINO turns one or several of these into a new `Reshape`, and forgets that it must be exact."""


def save_for_bf16(model: Any, target: Path) -> None:
    """Save an OpenVINO model whose floats servers may compute in bf16, with its timesteps and sizes marked as exact."""
    import openvino

    exact = _exact_operations(model)
    model.set_rt_info(True, [*ROUND_TO_BF16])
    openvino.save_model(model, target, compress_to_fp16=False)
    document = ElementTree.parse(target)
    for layer in document.iterfind("layers/layer"):
        if layer.get("name") in exact:
            _attributes(layer).append(ElementTree.Element("attribute", name="precise", version="0"))
    document.write(target, encoding="utf-8", xml_declaration=True)


def _exact_operations(model: Any) -> set[str]:
    """Return the names of the sines and cosines of timesteps and sizes, and of all operations before them."""
    remaining = [op for op in model.get_ops() if op.get_type_name() in ("Sin", "Cos")]
    found = set()
    while remaining:
        op = remaining.pop()
        found.add(op.get_friendly_name())
        for port in op.inputs():
            source = port.get_source_output().get_node()
            if source.get_type_name() in _RESHAPES:
                source = _replace_by_one_reshape(source)
            if source.get_type_name() not in ("Parameter", "Constant"):
                remaining.append(source)
    return found


def _replace_by_one_reshape(last: Any) -> Any:
    """Replace `last` and the reshapes before it; return the new `Reshape`.

    The result has at most one dynamic dimension, as the argument of a sinusoidal embedding has.
    """
    from openvino import opset13 as opset

    source = last.input_value(0)
    while source.get_node().get_type_name() in _RESHAPES:
        source = source.get_node().input_value(0)
    shape = [-1 if length.is_dynamic else length.get_length() for length in last.output(0).partial_shape]
    reshape = opset.reshape(source, shape, special_zero=False)
    reshape.set_friendly_name(last.get_friendly_name())
    for port in last.output(0).get_target_inputs():
        port.replace_source_output(reshape.output(0))
    return reshape


def _attributes(layer: ElementTree.Element) -> ElementTree.Element:
    """Return the element of `layer` for runtime attributes, which comes before its ports."""
    found = layer.find("rt_info")
    if found is None:
        found = ElementTree.Element("rt_info")
        layer.insert(0 if layer.find("data") is None else 1, found)
    return found
