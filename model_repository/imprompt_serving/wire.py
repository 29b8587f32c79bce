"""Inputs and outputs of the Triton models, as written to `config.pbtxt`; request inputs come from `parameters`."""

from __future__ import annotations

from typing import NamedTuple

from imprompt_serving import tensor_names
from imprompt_serving.parameters import ROWS, Group, Type
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
    Tensor("encoded", "STRING", MANY, "pictures (or clips) as encoded files, when `output_format` is set"),
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
    Tensor("preview", "STRING", MANY, "JPEG preview of each picture, when `preview` is set"),
    Tensor("error", "STRING", (2,), "gRPC status and message: the last message of a failed request"),
)


def parameter_tensors(group: Group) -> tuple[Tensor, ...]:
    """List the inputs for the parameters of `group`, except those that depend on the bundle."""
    rows = (row for row in ROWS if row.group is group and row.type is not Type.EMBEDS)
    return tuple(Tensor(row.name, row.dtype, row.dims, row.doc + row.range_and_default) for row in rows)


def request_tensors(bundle: Bundle, *, stream: bool) -> tuple[Tensor, ...]:
    """List the inputs of the bundle's pipeline: its parameters, and image embeddings for each of its adapters."""
    groups = (group for group in Group if group.applies_to(bundle, stream=stream))
    embeds = tuple(
        Tensor(tensor_names.request_embeds(adapter.name), "FP32", (-1, -1, *adapter.embed_shape), row.doc)
        for row in ROWS
        if row.type is Type.EMBEDS
        for adapter in bundle.adapters
    )
    return tuple(tensor for group in groups for tensor in parameter_tensors(group)) + embeds


def response_tensors(bundle: Bundle, *, stream: bool) -> tuple[Tensor, ...]:
    """List the outputs of the bundle's pipeline."""
    embeds = tuple(
        Tensor(
            tensor_names.image_embeds(adapter.name), "FP32", (-1, -1, *adapter.embed_shape), "answer to `encode_image`"
        )
        for adapter in bundle.adapters
    )
    video = VIDEO_RESPONSE if bundle.motion else ()
    return RESPONSE + video + embeds + (STREAM_RESPONSE if stream else ())


JOB_RESPONSE: tuple[Tensor, ...] = (
    Tensor("latents", "FP32", (-1, -1, -1, -1)),
    Tensor("step", "INT32", ONE),
    Tensor("steps", "INT32", ONE),
    Tensor("preview", "STRING", MANY),
    Tensor("timings", "STRING", ONE),
    Tensor("error", "STRING", (2,), "status and message"),
)

SECRET = Tensor("secret", "STRING", ONE, "tells calls between models from those of strangers")
"""An input of every internal model that imprompt hosts, with a row for each row of the call."""
SECRET_ROW = SECRET._replace(dims=(1, 1))
"""The same for models without batching."""

FACE_CROP = 224
"""Size of the aligned face that CLIP gets to see, as in diffusers' guide."""
FACE_INPUT: tuple[Tensor, ...] = (Tensor("picture", "STRING", ONE, "encoded bytes"), SECRET_ROW)
FACE_OUTPUT: tuple[Tensor, ...] = (
    Tensor("embeddings", "FP32", (-1, -1), "[faces, 512]: none, or that of the largest face, of length 1"),
    Tensor("boxes", "FP32", (-1, 4), "[faces, (left, top, right, bottom)] in pixels"),
    Tensor("keypoints", "FP32", (-1, 5, 2), "[faces, (eyes, nose, corners of the mouth), (x, y)] in pixels"),
    Tensor("crops", "UINT8", (-1, FACE_CROP, FACE_CROP, 3), "aligned faces; blue, green, red"),
    Tensor("error", "STRING", (2,), "status and message"),
)


def job_tensors(bundle: Bundle) -> tuple[Tensor, ...]:
    """Inputs of the denoiser: ``job`` (a ``job.JobRequest``) and its tensors.

    Or ``admit`` alone (a ``job.Admission``), or the id of a job to ``cancel``.
    """
    width = sum(encoder.hidden_size for encoder in bundle.text_encoders)
    length = bundle.text_encoders[0].max_length
    embeds = []
    for prefix in ("", tensor_names.NEGATIVE):
        embeds.append(Tensor(f"{prefix}prompt_embeds", "FP32", (-1, length, width)))
        if bundle.pooled_size:
            embeds.append(Tensor(f"{prefix}pooled_prompt_embeds", "FP32", (-1, bundle.pooled_size)))
        for adapter in bundle.adapters:
            embeds.append(Tensor(prefix + tensor_names.image_embeds(adapter.name), "FP32", (-1, *adapter.embed_shape)))
            if adapter.clip_shape:
                embeds.append(
                    Tensor(prefix + tensor_names.clip_embeds(adapter.name), "FP32", (-1, *adapter.clip_shape))
                )
    masks = (Tensor(tensor_names.adapter_masks(a.name), "FP32", (-1, -1, -1)) for a in bundle.adapters)
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
    )
