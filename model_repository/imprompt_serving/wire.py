"""Inputs and outputs of the Triton models, as written to `config.pbtxt`; request inputs come from `parameters`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from imprompt_serving import tensor_names
from imprompt_serving.families import get_family
from imprompt_serving.parameters import ROWS, Group, Parameter, Type
from imprompt_serving.specs import Bundle


class Tensor(NamedTuple):
    """A tensor of a model: Triton data type without the `TYPE_` prefix, shape (-1: any size), and a description."""

    name: str
    dtype: str
    dims: tuple[int, ...]
    doc: str = ""


MANY = (-1,)
ONE = (1,)

RESPONSE: tuple[Tensor, ...] = (
    Tensor("images", "UINT8", (-1, -1, -1, 3), "pictures [N, height, width, RGB]"),
    Tensor(
        "encoded",
        "STRING",
        MANY,
        "pictures (or clips) as encoded files, when `output_format` is set; see `output_encoding`",
    ),
    Tensor("latents", "FP32", (-1, -1, -1, -1), "latents [N, channels, h, w] when `output_type` is `latent`"),
    Tensor(
        "seeds",
        "INT64",
        MANY,
        "for each picture, the seed that reproduces it; empty when several pictures share one seed's generator",
    ),
    Tensor(
        "nsfw_content_detected",
        "BOOL",
        MANY,
        "for each picture, whether the safety checker blacked it out; absent if the base has no safety checker",
    ),
    Tensor("timings", "STRING", ONE, "JSON object: seconds per stage"),
    Tensor("warnings", "STRING", MANY, "notes for the caller, such as a truncated prompt; absent if there are none"),
)

VIDEO_RESPONSE: tuple[Tensor, ...] = (
    Tensor("frames", "UINT8", (-1, -1, -1, -1, 3), "clips [N, frames, height, width, RGB], in place of `images`"),
)
"""Only for bundles with a motion adapter."""

STREAM_RESPONSE: tuple[Tensor, ...] = (
    Tensor("step", "INT32", ONE, "number of steps done"),
    Tensor("steps", "INT32", ONE, "total number of steps"),
    Tensor("preview", "STRING", MANY, "JPEG preview of each picture, when `preview` is set; see `output_encoding`"),
    Tensor("error", "STRING", (2,), "gRPC status and message: the last message of a failed request"),
)


def parameter_tensors(group: Group) -> tuple[Tensor, ...]:
    """List the inputs for the parameters of `group`, except those that depend on the bundle."""
    return _inputs(row for row in ROWS if row.group is group)


def request_tensors(bundle: Bundle, *, stream: bool) -> tuple[Tensor, ...]:
    """List the inputs of the bundle's pipeline: its parameters, and image embeddings for each of its adapters."""
    rows = (row for group in Group for row in ROWS if row.group is group and row.applies_to(bundle, stream=stream))
    embeds = tuple(
        Tensor(tensor_names.request_embeds(adapter.name), "FP32", (-1, -1, *adapter.embed_shape), row.doc)
        for row in ROWS
        if row.type is Type.EMBEDS
        for adapter in bundle.adapters
    )
    return _inputs(rows) + embeds


def _inputs(rows: Iterable[Parameter]) -> tuple[Tensor, ...]:
    return tuple(
        Tensor(row.name, row.dtype, row.dims, row.doc + row.range_and_default)
        for row in rows
        if row.type is not Type.EMBEDS
    )


def response_tensors(bundle: Bundle, *, stream: bool) -> tuple[Tensor, ...]:
    """List the outputs of the bundle's pipeline."""
    embeds = tuple(
        Tensor(
            tensor_names.image_embeds(adapter.name), "FP32", (-1, -1, *adapter.embed_shape), "result of `encode_image`"
        )
        for adapter in bundle.adapters
    )
    video = VIDEO_RESPONSE if bundle.motion else ()
    return RESPONSE + video + embeds + _text_embeds(bundle) + (STREAM_RESPONSE if stream else ())


def _text_embeds(bundle: Bundle) -> tuple[Tensor, ...]:
    """List the text embeddings of both branches, [prompts, tokens, features] or [prompts, features]."""
    return tuple(
        Tensor(prefix + name, "FP32", (*(-1 for _ in shape), shape[-1]), "result of `encode_prompt`")
        for prefix in ("", tensor_names.NEGATIVE)
        for name, shape in get_family(bundle.family).text_shapes(bundle).items()
    )


JOB_RESPONSE: tuple[Tensor, ...] = (
    Tensor("latents", "FP32", (-1, -1, -1, -1)),
    Tensor("step", "INT32", ONE),
    Tensor("steps", "INT32", ONE),
    Tensor("preview", "STRING", MANY),
    Tensor("timings", "STRING", ONE),
    Tensor("error", "STRING", (2,), "status and message"),
)

SECRET = Tensor("secret", "STRING", ONE, "proves that a call comes from another model of this server")
"""Input of every internal model that imprompt hosts, with a row for each row of the call."""
SECRET_ROW = SECRET._replace(dims=(1, 1))
"""The same input for models without batching."""

FACE_CROP = 224
"""Size in pixels of the aligned face that CLIP encodes, as in the diffusers guide."""
FACE_INPUT: tuple[Tensor, ...] = (Tensor("picture", "STRING", ONE, "encoded bytes"), SECRET_ROW)
FACE_OUTPUT: tuple[Tensor, ...] = (
    Tensor("embeddings", "FP32", (-1, -1), "[faces, 512]: the unit-length embedding of the largest face, or no rows"),
    Tensor("boxes", "FP32", (-1, 4), "[faces, (left, top, right, bottom)] in pixels"),
    Tensor("keypoints", "FP32", (-1, 5, 2), "[faces, (eyes, nose, corners of the mouth), (x, y)] in pixels"),
    Tensor("crops", "UINT8", (-1, FACE_CROP, FACE_CROP, 3), "aligned faces, in BGR order"),
    Tensor("error", "STRING", (2,), "status and message"),
)


def job_tensors(bundle: Bundle) -> tuple[Tensor, ...]:
    """List the inputs of the denoiser.

    A call carries `job` (a `job_request.JobRequest`) and its tensors, or only `admit` (a `job_request.Admission`), or
    only `cancel` (the id of the job to cancel).
    """
    embeds = list(_text_embeds(bundle))
    for prefix in ("", tensor_names.NEGATIVE):
        for adapter in bundle.adapters:
            embeds.append(Tensor(prefix + tensor_names.image_embeds(adapter.name), "FP32", (-1, *adapter.embed_shape)))
            if adapter.clip_shape:
                embeds.append(
                    Tensor(prefix + tensor_names.clip_embeds(adapter.name), "FP32", (-1, *adapter.clip_shape))
                )
    masks = (Tensor(tensor_names.adapter_masks(a.name), "BOOL", (-1, -1, -1)) for a in bundle.adapters)
    controls = (Tensor(tensor_names.control_image(net.name), "FP32", (-1, 3, -1, -1)) for net in bundle.controlnets)
    t2i = (Tensor(tensor_names.control_image(a.name), "FP32", (-1, a.channels, -1, -1)) for a in bundle.t2i_adapters)
    moments = (-1, 2 * bundle.latent_channels, -1, -1)
    return (
        SECRET_ROW,
        Tensor("job", "STRING", ONE),
        Tensor("admit", "STRING", ONE),
        Tensor("cancel", "STRING", ONE),
        *embeds,
        *masks,
        *controls,
        *t2i,
        Tensor("image_moments", "FP32", moments),
        Tensor("masked_image_moments", "FP32", moments),
        Tensor("mask", "FP32", (-1, 1, -1, -1)),
        Tensor("latents", "FP32", (-1, -1, -1, -1)),
        Tensor("image_latents", "FP32", (-1, -1, -1, -1)),
    )
