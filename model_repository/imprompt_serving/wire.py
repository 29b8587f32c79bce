"""The tensors of the pipeline models on the wire: the one table behind config.pbtxt, parsing and the protocol page."""

from __future__ import annotations

from typing import NamedTuple

from imprompt_serving.specs import Bundle


class Tensor(NamedTuple):
    """A tensor of a model: Triton data type without its prefix, shape (-1: any), and what it is."""

    name: str
    dtype: str
    dims: tuple[int, ...]
    doc: str = ""


MANY = (-1,)
ONE = (1,)

REQUEST: tuple[Tensor, ...] = (
    Tensor("prompt", "STRING", MANY, "one or several prompts; a picture (or more) each"),
    Tensor("negative_prompt", "STRING", MANY, "what to stay away from: one for all prompts, or one each"),
    Tensor("ip_adapter_image", "STRING", MANY, "image prompts as encoded bytes (PNG, JPEG, WebP)"),
    Tensor("ip_adapter_image_adapter", "STRING", MANY, "name of the adapter of each `ip_adapter_image`"),
    Tensor("negative_ip_adapter_image", "STRING", MANY, "image prompts of the unconditional branch"),
    Tensor("negative_ip_adapter_image_adapter", "STRING", MANY, "name of the adapter of each of these"),
    Tensor("ip_adapter_scale", "FP64", MANY, "strength of the image prompt: one for all adapters, or one each"),
    Tensor(
        "ip_adapter_scale_config",
        "STRING",
        ONE,
        "JSON in place of `ip_adapter_scale`: for each adapter a number, an object of scales by block (as diffusers' "
        "`set_ip_adapter_scale`), or a list with a number for each masked image",
    ),
    Tensor(
        "ip_adapter_masks", "STRING", MANY, "a mask for each image prompt, as encoded pictures; white is where it acts"
    ),
    Tensor("ip_adapter_masks_adapter", "STRING", MANY, "name of the adapter of each mask"),
    Tensor("ip_adapter_start", "FP64", MANY, "share of the steps before an adapter acts: one, or one each (default 0)"),
    Tensor("ip_adapter_end", "FP64", MANY, "share of the steps after which it stops: one, or one each (default 1)"),
    Tensor("ip_adapter_weight_type", "STRING", MANY, "how the scale is spread over the layers: one, or one each"),
    Tensor("image", "STRING", MANY, "start pictures: image-to-image, or inpainting with `mask_image`"),
    Tensor("mask_image", "STRING", MANY, "what to repaint (white): one, or one for each `image`"),
    Tensor("strength", "FP64", ONE, "how much of `image` is replaced, above 0 to 1"),
    Tensor("padding_mask_crop", "INT32", ONE, "inpaint a crop around the mask with this margin in pixels"),
    Tensor("height", "INT32", ONE, "pixels, a multiple of 8"),
    Tensor("width", "INT32", ONE, "pixels, a multiple of 8"),
    Tensor("num_inference_steps", "INT32", ONE, "denoising steps (default 50)"),
    Tensor("guidance_scale", "FP64", ONE, "classifier-free guidance; at most 1 switches it off"),
    Tensor("guidance_rescale", "FP64", ONE, "rescaling of the guided noise (arXiv 2305.08891), 0 to 1"),
    Tensor("eta", "FP64", ONE, "noise share of DDIM and TCD, 0 to 1"),
    Tensor("clip_skip", "INT32", ONE, "layers of the text encoder to leave out"),
    Tensor("num_images_per_prompt", "INT32", ONE, "pictures for each prompt (default 1)"),
    Tensor("seed", "INT64", MANY, "one for all pictures together, or one each; random when absent"),
    Tensor("scheduler", "STRING", ONE, "class name of a diffusers scheduler"),
    Tensor("scheduler_config", "STRING", ONE, "JSON object: values that replace the scheduler's configuration"),
    Tensor("output_type", "STRING", ONE, "`np` (pictures, default) or `latent`"),
    Tensor("output_format", "STRING", ONE, "answer with files: `png`, `jpeg` or `webp`; clips: `gif` or `webp`"),
    Tensor("timeout", "FP64", ONE, "seconds after which the work on this request stops"),
    Tensor("priority", "INT32", ONE, "1 goes first, 9 last (default 5)"),
    Tensor("encode_image", "STRING", ONE, "adapter name: answer with the embeddings of `ip_adapter_image` only"),
)

SDXL_REQUEST: tuple[Tensor, ...] = (
    Tensor("prompt_2", "STRING", MANY, "prompts for the second text encoder (default: `prompt`)"),
    Tensor("negative_prompt_2", "STRING", MANY, "negative prompts for it (default: `negative_prompt`)"),
    *(
        Tensor(f"{prefix}{name}", "INT32", (2,), doc)
        for prefix in ("", "negative_")
        for name, doc in (
            ("original_size", "height and width the picture is to look as if it had had"),
            ("crops_coords_top_left", "top and left of the crop it is to look as if taken from"),
            ("target_size", "height and width it is meant for"),
        )
    ),
)
"""Only bundles of the SDXL family have these."""

CONTROL_REQUEST: tuple[Tensor, ...] = (
    Tensor("controlnet", "STRING", MANY, "names of the ControlNets to use, in this order (default: all of the bundle)"),
    Tensor(
        "control_image",
        "STRING",
        MANY,
        "control images as encoded pictures: one for each net, or one for each prompt (frame) of each net in turn",
    ),
    Tensor(
        "control_image_annotator",
        "STRING",
        MANY,
        "what makes the control image of a photo: `none` (default) or `canny`; one for all nets, or one each",
    ),
    Tensor(
        "controlnet_conditioning_scale", "FP64", MANY, "strength: one for all nets, or one each (default as diffusers)"
    ),
    Tensor(
        "control_guidance_start", "FP64", MANY, "share of the steps before a net acts: one, or one each (default 0)"
    ),
    Tensor(
        "control_guidance_end", "FP64", MANY, "share of the steps after which it stops: one, or one each (default 1)"
    ),
    Tensor("guess_mode", "BOOL", ONE, "nets act on the conditional branch only, and less on the finer residuals"),
)
"""Only bundles with ControlNets or T2I-Adapters have these; a T2I-Adapter counts as a net."""

VIDEO_REQUEST: tuple[Tensor, ...] = (
    Tensor("num_frames", "INT32", ONE, "frames of a clip; without it (and `video`) the answer is pictures"),
    Tensor("video", "STRING", MANY, "frames to start from, as encoded pictures: video-to-video with `strength`"),
    Tensor("context_length", "INT32", ONE, "frames that the motion modules see at once; longer clips run in windows"),
    Tensor(
        "context_stride", "INT32", ONE, "number of window widths: each twice the last, by skipping frames (default 1)"
    ),
    Tensor("context_overlap", "INT32", ONE, "frames that neighbouring windows share (default 4)"),
)
"""Only bundles with a motion adapter have these."""

STREAM_REQUEST: tuple[Tensor, ...] = (
    Tensor("progress_every", "INT32", ONE, "steps between two progress answers (default 1)"),
    Tensor("preview", "BOOL", ONE, "whether progress answers carry small pictures (default: no)"),
)

RESPONSE: tuple[Tensor, ...] = (
    Tensor("images", "UINT8", (-1, -1, -1, 3), "pictures [N, height, width, RGB]"),
    Tensor("encoded", "STRING", MANY, "pictures (or clips) as files when `output_format` asks for them"),
    Tensor("latents", "FP32", (-1, -1, -1, -1), "latents [N, channels, h, w] when `output_type` is `latent`"),
    Tensor(
        "seeds",
        "INT64",
        MANY,
        "the seed that repeats each picture; empty when several pictures share the generator of one seed",
    ),
    Tensor("nsfw_content_detected", "BOOL", MANY, "pictures that the safety checker blacked, when the base has one"),
    Tensor("timings", "STRING", ONE, "JSON object: seconds by stage"),
    Tensor("warnings", "STRING", MANY, "what the caller should know, such as a prompt that was cut; absent if nothing"),
)

VIDEO_RESPONSE: tuple[Tensor, ...] = (
    Tensor("frames", "UINT8", (-1, -1, -1, -1, 3), "clips [N, frames, height, width, RGB], in place of `images`"),
)
"""Only bundles with a motion adapter have these."""

STREAM_RESPONSE: tuple[Tensor, ...] = (
    Tensor("step", "INT32", ONE, "steps done"),
    Tensor("steps", "INT32", ONE, "steps in all"),
    Tensor("preview", "STRING", MANY, "JPEG of each picture as it looks so far, when `preview` asks for it"),
    Tensor("error", "STRING", (2,), "the last answer of a request that failed: gRPC status and message"),
)


def request_tensors(bundle: Bundle, *, stream: bool) -> tuple[Tensor, ...]:
    """Inputs of the pipeline of ``bundle``: the table above, and embeddings for each of its adapters."""
    embeds = tuple(
        Tensor(
            f"ip_adapter_image_embeds_{adapter.name}",
            "FP32",
            (-1, -1, *adapter.embed_shape),
            "embeddings in place of image prompts: [2 (negative, positive) or 1 (positive), pictures, ...]",
        )
        for adapter in bundle.adapters
    )
    family = SDXL_REQUEST if bundle.family == "sdxl" else ()
    control = CONTROL_REQUEST if bundle.controlnets or bundle.t2i_adapters else ()
    video = VIDEO_REQUEST if bundle.motion else ()
    return REQUEST + family + control + video + embeds + (STREAM_REQUEST if stream else ())


def response_tensors(bundle: Bundle, *, stream: bool) -> tuple[Tensor, ...]:
    """Outputs of the pipeline of ``bundle``."""
    embeds = tuple(
        Tensor(f"image_embeds_{adapter.name}", "FP32", (-1, -1, *adapter.embed_shape), "answer to `encode_image`")
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
    for prefix in ("", "negative_"):
        embeds.append(Tensor(f"{prefix}prompt_embeds", "FP32", (-1, length, width)))
        if bundle.pooled_size:
            embeds.append(Tensor(f"{prefix}pooled_prompt_embeds", "FP32", (-1, bundle.pooled_size)))
        for adapter in bundle.adapters:
            embeds.append(Tensor(f"{prefix}image_embeds_{adapter.name}", "FP32", (-1, *adapter.embed_shape)))
            if adapter.clip_shape:
                embeds.append(Tensor(f"{prefix}clip_embeds_{adapter.name}", "FP32", (-1, *adapter.clip_shape)))
    masks = (Tensor(f"ip_adapter_masks_{a.name}", "FP32", (-1, -1, -1)) for a in bundle.adapters)
    controls = (Tensor(f"control_image_{net.name}", "FP32", (-1, 3, -1, -1)) for net in bundle.controlnets)
    t2i = (Tensor(f"control_image_{a.name}", "FP32", (-1, a.channels, -1, -1)) for a in bundle.t2i_adapters)
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
