"""Every row of the table of parameters has its place in the server, the client, and the command."""

from __future__ import annotations

import inspect
import io
import json
import math
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2 as pb
from typer.main import get_command

import imprompt
import imprompt_gateway
from imprompt import AsyncClient, Client, cli
from imprompt._request import MIN_TIMEOUT_S
from imprompt_bench import rig
from imprompt_export.sections import DefaultsSection
from imprompt_serving import config, json_schema, signatures
from imprompt_serving.capabilities import capabilities
from imprompt_serving.errors import InvalidRequest
from imprompt_serving.parameters import PARAMETERS, ROWS, Group, Parameter, Settings, Type
from imprompt_serving.pipeline.request import Request, parse
from imprompt_serving.specs import Bundle, ControlNet, Motion, Range, Residual, Shapes
from imprompt_serving.weight_types import WEIGHT_TYPES
from tiny import images

SOURCES = Path(imprompt.__file__).parent
PLAIN = rig.sd15(rows=2, adapters=("plain",))
BUNDLE = msgspec.structs.replace(
    PLAIN,
    family="sdxl",
    text_encoders=PLAIN.text_encoders * 2,
    shapes=Shapes(height=Range(64, 64, 128), width=Range(64, 64, 128)),
    default_height=64,
    default_width=64,
    controlnets=(ControlNet(name="depth"),),
    residuals=(Residual(4, 0),),
    motion=Motion(window=16),
    pooled_size=4,
    loras=("soft", "bold"),
)
"""A bundle that takes every parameter, except those of `REFINER`."""
REFINER = msgspec.structs.replace(BUNDLE, family="sdxl_refiner", text_encoders=PLAIN.text_encoders)


def png() -> bytes:
    file = io.BytesIO()
    images.photo(0, size=(64, 64)).save(file, "PNG")
    return file.getvalue()


SMALL = png()
PICTURE: dict[str, Any] = {
    "prompt": [b"a cat"],
    "negative_prompt": [b"a dog"],
    "image": [SMALL],
    "mask_image": [SMALL],
    "control_image": [SMALL],
    "ip_adapter_image": [SMALL],
}
CLIP: dict[str, Any] = {"prompt": [b"a cat"], "num_frames": [8]}
NUMPY = {"FP64": np.float64, "INT32": np.int32, "INT64": np.int64, "BOOL": np.bool_, "STRING": np.object_}


def taking(row: Parameter) -> Bundle:
    return BUNDLE if row.applies_to(BUNDLE, stream=True) else REFINER


def parsed(row: Parameter, values: dict[str, Any], **tensors: np.ndarray) -> Request:
    arrays = {name: np.array(value, NUMPY[PARAMETERS[name].dtype]) for name, value in values.items()}
    return parse(arrays | tensors, taking(row))


def ids(row: Parameter) -> str:
    return row.name


def test_client_and_server_agree_on_the_smallest_timeout() -> None:
    assert PARAMETERS["timeout"].low == MIN_TIMEOUT_S


def test_names_are_unique() -> None:
    assert len(PARAMETERS) == len(ROWS)


def test_every_setting_has_a_row() -> None:
    assert set(Settings.__struct_fields__) <= PARAMETERS.keys()


@pytest.mark.parametrize("row", ROWS, ids=ids)
def test_models_have_an_input_for_every_row(row: Parameter) -> None:
    inputs = {}
    for stream in (False, True):
        text = config.to_pbtxt(config.pipeline(taking(row), stream=stream, capabilities="{}"))
        inputs[stream] = {tensor.name for tensor in text_format.Parse(text, pb.ModelConfig()).input}
    name = f"{row.name}_plain" if row.type is Type.EMBEDS else row.name
    assert name in inputs[True]
    assert (name in inputs[False]) == (row.group is not Group.STREAM)


@pytest.mark.parametrize("row", ROWS, ids=ids)
def test_pipeline_reads_every_row(row: Parameter) -> None:
    name = f"{row.name}_plain" if row.type is Type.EMBEDS else row.name
    with pytest.raises(InvalidRequest, match="complex") as caught:
        parsed(row, CLIP if row.group is Group.VIDEO else PICTURE, **{name: np.array([1j])})
    assert caught.value.parameter == name


BOUNDS = [
    (row, value)
    for row in ROWS
    for value in (row.low - 1, row.high + 1)
    if math.isfinite(value) and row.dtype in ("INT32", "FP64")
]


@pytest.mark.parametrize(("row", "value"), BOUNDS, ids=str)
def test_values_outside_the_range_are_refused(row: Parameter, value: float) -> None:
    with pytest.raises(InvalidRequest, match="must be") as caught:
        parsed(row, (CLIP if row.group is Group.VIDEO else PICTURE) | {row.name: [value]})
    assert caught.value.parameter == row.name


@pytest.mark.parametrize("row", [row for row in ROWS if row.choices], ids=ids)
def test_unknown_choices_are_refused(row: Parameter) -> None:
    with pytest.raises(InvalidRequest, match="'none such' is not one of") as caught:
        parsed(row, PICTURE | {row.name: [b"none such"]})
    assert caught.value.parameter == row.name


def test_defaults_of_a_bundle_are_documented_and_described() -> None:
    section = DefaultsSection(num_inference_steps=4, guidance_scale=0.0, guidance_rescale=0.7)
    assert section.values.keys() == {row.name for row in ROWS if row.set_by_bundles}
    assert "(1 to 1000, default: the bundle's, usually 50)" in signatures.summary(PARAMETERS["num_inference_steps"])
    usual = capabilities(PLAIN)["defaults"]
    assert (usual["num_inference_steps"], usual["guidance_scale"], usual["guidance_rescale"]) == (50, 7.5, 0.0)
    own = capabilities(msgspec.structs.replace(PLAIN, defaults=section.values))["defaults"]
    assert section.values.items() <= own.items()


@pytest.mark.parametrize("row", [row for row in ROWS if row.sdk], ids=ids)
def test_client_documents_a_keyword_for_every_row(row: Parameter) -> None:
    where = Client.stream if row.group is Group.STREAM else Client.generate
    methods: list[Any] = [where, Client.stream, getattr(AsyncClient, where.__name__), AsyncClient.stream]
    for method in methods:
        assert row.name in inspect.signature(method).parameters
    assert f"            {row.name}: " in (where.__doc__ or "")


@pytest.mark.parametrize("row", [row for row in ROWS if row.sdk and row.type is not Type.TENSOR], ids=ids)
def test_command_has_an_option_for_every_row(row: Parameter) -> None:
    generate = get_command(cli.app).commands["generate"]  # type: ignore[attr-defined]
    (option,) = (parameter for parameter in generate.params if parameter.name == row.name)
    assert f"--{row.name.replace('_', '-')}" in option.opts
    assert set(row.option_names) <= set(option.opts)
    if row in signatures.OPTIONS and row.option_doc is None:
        assert option.help.endswith(f"{row.range_and_default}.".replace("`", ""))


@pytest.mark.parametrize("name", signatures.FILES)
def test_client_source_matches_the_table(name: str) -> None:
    source = (SOURCES / name).read_text(encoding="utf-8")
    assert "imprompt_serving.signatures" in source
    assert signatures.filled(source) == source, "run: python -m imprompt_serving.signatures client/imprompt"


def test_gateway_knows_every_parameter() -> None:
    file = Path(imprompt_gateway.__file__).parent / json_schema.FILE
    assert file.read_text(encoding="utf-8") == json_schema.text(), (
        "run: python -m imprompt_serving.json_schema gateway/imprompt_gateway"
    )
    schemas = json.loads(json_schema.text())
    assert schemas.keys() == {row.name for row in ROWS if row.sdk} - {"output_type"} | {"prompt"}
    assert schemas["eta"] == {
        "type": "number",
        "minimum": 0,
        "maximum": 1,
        "description": PARAMETERS["eta"].doc,
        "x-type": "number",
        "default": 0.0,
    }
    assert schemas["ip_adapter_weight_type"]["anyOf"][0]["enum"] == list(WEIGHT_TYPES)
    assert schemas["preview"]["x-stream"]


def test_stale_source_would_be_noticed() -> None:
    source = (SOURCES / "_client.py").read_text(encoding="utf-8")
    for line in ("        eta: float | None = None,\n", "            priority: requests with a lower number"):
        assert signatures.filled(source.replace(line, "old")) == source
