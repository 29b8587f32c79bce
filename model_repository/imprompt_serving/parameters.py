"""The request parameters, one row each: the single source of everything derived from them.

The request parser takes types, defaults and ranges from this table; `wire` derives the input tensors (and so
`config.pbtxt`), `protocol_table` the tables of `docs/protocol.md`, and `signatures` the methods of the Python client
and the options of `imprompt generate`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum, StrEnum, auto
from typing import Any

import msgspec

from imprompt_serving.families import get_family
from imprompt_serving.scheduler_names import SCHEDULERS
from imprompt_serving.specs import Bundle
from imprompt_serving.weight_types import WEIGHT_TYPES

MAX_SCALE = 1e4
"""Upper limit for guidance and conditioning scales and for values of image embeddings; float16 overflows at 65504."""
MAX_LORA_SCALE = 10.0
"""Upper limit for the scales of LoRAs: sliders are used up to about 5, and larger scales leave nothing of a picture."""
_MAX_STEPS = 1000
PICTURE_FORMATS, VIDEO_FORMATS = ("png", "jpeg", "webp"), ("gif", "webp")


class Type(StrEnum):
    """The type of a parameter. Plural types hold several values; Python callers pass a list or a single value."""

    TEXT = auto()
    TEXTS = auto()
    CHOICE = auto()
    CHOICES = auto()
    INTEGER = auto()
    INTEGERS = auto()
    PAIR = auto()
    """Two integers."""
    SEEDS = auto()
    NUMBER = auto()
    NUMBERS = auto()
    FLAG = auto()
    OBJECT = auto()
    """JSON on the wire, a dict in Python."""
    PICTURES = auto()
    """Encoded pictures."""
    EMBEDS = auto()
    """Image embeddings: one tensor per adapter (`tensor_names.request_embeds`)."""
    TENSOR = auto()
    """Floats with several axes (`Parameter.axes`)."""


_WIRE: dict[Type, tuple[str, tuple[int, ...]]] = {
    Type.TEXT: ("STRING", (1,)),
    Type.TEXTS: ("STRING", (-1,)),
    Type.CHOICE: ("STRING", (1,)),
    Type.CHOICES: ("STRING", (-1,)),
    Type.INTEGER: ("INT32", (1,)),
    Type.INTEGERS: ("INT32", (-1,)),
    Type.PAIR: ("INT32", (2,)),
    Type.SEEDS: ("INT64", (-1,)),
    Type.NUMBER: ("FP64", (1,)),
    Type.NUMBERS: ("FP64", (-1,)),
    Type.FLAG: ("BOOL", (1,)),
    Type.OBJECT: ("STRING", (1,)),
    Type.PICTURES: ("STRING", (-1,)),
}
"""Triton data type and shape (-1: any size) of every type except `EMBEDS` and `TENSOR`."""


class Group(Enum):
    """Which models take a parameter. The values name the tables of `docs/protocol.md`."""

    ALWAYS = "REQUEST"
    FAMILY = "FAMILY_REQUEST"
    """Bundles whose family takes it (`Family.parameters`)."""
    CONTROL = "CONTROL_REQUEST"
    """Bundles with ControlNets or T2I-Adapters; a T2I-Adapter counts as a net."""
    VIDEO = "VIDEO_REQUEST"
    """Bundles with a motion adapter."""
    LORA = "LORA_REQUEST"
    """Bundles with LoRAs that are not fused."""
    STREAM = "STREAM_REQUEST"
    """The streaming model of every bundle."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Parameter:
    """One parameter of a request.

    Where `default` is None, `doc` says what applies: the default depends on the bundle or the task, or there is none.
    A bound that is missing here depends on the bundle. `low`, `high` and `choices` apply to every value of a list.
    """

    name: str
    type: Type
    doc: str
    group: Group = Group.ALWAYS
    default: Any = None
    low: float = -math.inf
    high: float = math.inf
    choices: tuple[str, ...] = ()
    axes: int = 0
    """Number of axes of a `TENSOR`."""
    set_by_bundles: bool = False
    """Whether a bundle may set another default (`[defaults]` in the bundle file)."""
    sdk: bool = True
    """Whether it is a keyword argument of the Python client; the client sets the others itself."""
    python: str | None = None
    """Type annotation of the keyword argument, where `type` does not imply it."""
    literal: str | None = None
    """Name of the Python client's `Literal` type for `choices`."""
    python_doc: str | None = None
    """Documentation of the keyword argument, where it differs from `doc`."""
    option_names: tuple[str, ...] = ()
    """Further names of its option of `imprompt generate`."""
    option_doc: str | None = None
    """Documentation of the option, where it differs from `doc`."""

    @property
    def dtype(self) -> str:
        """Triton data type, without the `TYPE_` prefix."""
        return "FP32" if self.type is Type.TENSOR else _WIRE[self.type][0]

    @property
    def dims(self) -> tuple[int, ...]:
        """Shape of the input tensor; -1 means any size."""
        return (-1,) * self.axes if self.type is Type.TENSOR else _WIRE[self.type][1]

    @property
    def range_and_default(self) -> str:
        """Range and default as text in parentheses; empty if the row has neither."""
        parts = []
        if math.isfinite(self.low) and math.isfinite(self.high):
            parts.append(f"{self.low:g} to {self.high:g}")
        if self.default not in (None, {}, ()):
            default = _shown(self.default)
            parts.append(f"default: the bundle's, usually {default}" if self.set_by_bundles else f"default {default}")
        return f" ({', '.join(parts)})" if parts else ""

    def applies_to(self, bundle: Bundle, *, stream: bool) -> bool:
        """Return whether the pipeline of `bundle` takes it (with `stream`, the streaming pipeline)."""
        match self.group:
            case Group.ALWAYS:
                return True
            case Group.FAMILY:
                return self.name in get_family(bundle.family).parameters
            case Group.CONTROL:
                return bool(bundle.net_names)
            case Group.VIDEO:
                return bundle.motion is not None
            case Group.LORA:
                return bool(bundle.loras)
            case Group.STREAM:
                return stream


def _shown(default: Any) -> str:
    match default:
        case bool():
            return str(default).lower()
        case str():
            return f"`{default}`"
        case tuple():
            return ", ".join(map(str, default))
        case _:
            return f"{default:g}"


_ONE_EACH_ADAPTER = "one value for all, or one per adapter"
_ONE_EACH_NET = "one value for all, or one per ControlNet"
_OF_ADAPTERS = "PerAdapterImages"
_ANNOTATORS = ("none", "canny")
_IMAGE_SCOPES = ("request", "prompt", "frame")


def _listed(choices: tuple[str, ...]) -> str:
    return ", ".join(f"`{choice}`" for choice in choices[:-1]) + f" or `{choices[-1]}`"


ROWS: tuple[Parameter, ...] = (
    Parameter(
        name="prompt",
        type=Type.TEXTS,
        doc="one or more prompts; each produces `num_images_per_prompt` pictures",
        sdk=False,
    ),
    Parameter(
        name="negative_prompt",
        type=Type.TEXTS,
        doc="what to avoid: one text for all prompts, or one per prompt",
    ),
    Parameter(
        name="prompt_2",
        type=Type.TEXTS,
        group=Group.FAMILY,
        doc="prompts for the second text encoder (default: `prompt`)",
    ),
    Parameter(
        name="negative_prompt_2",
        type=Type.TEXTS,
        group=Group.FAMILY,
        doc="negative prompts for the second text encoder (default: `negative_prompt`)",
    ),
    Parameter(
        name="prompt_syntax",
        type=Type.CHOICE,
        doc="`a1111` reads weights such as `(word:1.3)` and `[word]`, and `BREAK`, as Stable Diffusion web UI does; in "
        "`plain` prompts they are text",
        default="plain",
        choices=("plain", "a1111"),
        literal="PromptSyntax",
    ),
    Parameter(
        name="max_embeddings_multiples",
        type=Type.INTEGER,
        doc="number of chunks of 75 tokens that a prompt may have, up to the bundle's limit; the rest is cut off, with "
        "a warning (default: 1, as in diffusers; for `a1111` prompts the bundle's limit)",
        low=1,
        high=64,
    ),
    Parameter(
        name="prompt_embeds",
        type=Type.TENSOR,
        axes=3,
        doc="text embeddings in place of `prompt`, as returned by `encode_prompt` and by diffusers: "
        "[prompts, tokens, features]",
    ),
    Parameter(
        name="negative_prompt_embeds",
        type=Type.TENSOR,
        axes=3,
        doc="text embeddings in place of `negative_prompt`, in the shape of `prompt_embeds`",
    ),
    *(
        Parameter(
            name=f"{prefix}pooled_prompt_embeds",
            type=Type.TENSOR,
            axes=2,
            group=Group.FAMILY,
            doc=f"pooled text embeddings, which go with `{prefix}prompt_embeds`: [prompts, features]",
        )
        for prefix in ("", "negative_")
    ),
    Parameter(
        name="ip_adapter_image",
        type=Type.PICTURES,
        doc="image prompts",
        python=_OF_ADAPTERS,
        python_doc="image prompts: a picture, a list with one entry per adapter of the bundle (a picture, a list of "
        "pictures, or None), or a dict keyed by adapter name; for a bundle with a single adapter, a flat list of "
        "pictures works too",
        option_doc="image prompt, for the adapter NAME; may be repeated",
    ),
    Parameter(
        name="ip_adapter_image_adapter",
        type=Type.TEXTS,
        doc="for each `ip_adapter_image`, the name of its adapter",
        sdk=False,
    ),
    Parameter(
        name="negative_ip_adapter_image",
        type=Type.PICTURES,
        doc="image prompts for the unconditional branch (default: no image or a blank one, whichever the adapter was "
        "trained with)",
        python=_OF_ADAPTERS,
        option_doc="picture to steer away from; may be repeated",
    ),
    Parameter(
        name="negative_ip_adapter_image_adapter",
        type=Type.TEXTS,
        doc="for each `negative_ip_adapter_image`, the name of its adapter",
        sdk=False,
    ),
    Parameter(
        name="ip_adapter_image_embeds",
        type=Type.EMBEDS,
        doc="precomputed embeddings in place of image prompts: [2 (negative, positive) or 1 (positive), pictures, ...]",
        python="Embeds | Sequence[Embeds | None] | Mapping[str, Embeds]",
        python_doc="precomputed embeddings in place of pictures, as returned by `encode_image` and by diffusers: [2 "
        "(negative, positive) or 1 (positive), pictures, ...]; a list with one array per adapter, or a dict keyed by "
        "adapter name",
        option_doc="precomputed embeddings in place of image prompts, written by `imprompt encode`; may be repeated",
    ),
    Parameter(
        name="ip_adapter_image_per",
        type=Type.CHOICES,
        doc="what the pictures of an adapter apply to: all of them to every result (`request`), or an equal share, in "
        f"order, to each `prompt` or to each `frame` of a clip: {_ONE_EACH_ADAPTER}",
        default="request",
        choices=_IMAGE_SCOPES,
        literal="ImageScope",
    ),
    Parameter(
        name="ip_adapter_keyframes",
        type=Type.INTEGERS,
        group=Group.VIDEO,
        doc="for adapters with pictures per `frame`: the frames that have pictures, in ascending order from 0 "
        "(default: all frames); image tokens are interpolated between them, and stay the same after the last one",
        default=(),
        low=0,
    ),
    Parameter(
        name="ip_adapter_scale",
        type=Type.NUMBERS,
        doc=f"strength of the image prompt: {_ONE_EACH_ADAPTER}",
        default=1.0,
        low=-MAX_SCALE,
        high=MAX_SCALE,
        python="Scale | Sequence[Scale] | Mapping[str, Scale | Sequence[float]]",
        python_doc="strength of the image prompt: a number, or a dict of scales by block "
        "(`{'up': {'block_0': [0.0, 1.0, 0.0]}}`); for several adapters, a list of these or a dict keyed by adapter "
        "name; with masks, an adapter's entry may be a list with one number per picture",
        option_doc="strength of the image prompt: a number or an object of scales by block; for several adapters, a "
        "list of these or an object keyed by adapter name (default 1)",
    ),
    Parameter(
        name="ip_adapter_scale_config",
        type=Type.OBJECT,
        doc="JSON in place of `ip_adapter_scale`: for each adapter a number, an object of scales by block (as in "
        "diffusers' `set_ip_adapter_scale`), or a list with one number per masked image",
        sdk=False,
    ),
    Parameter(
        name="ip_adapter_masks",
        type=Type.PICTURES,
        doc="one mask per image prompt, which takes effect where its mask is white; or such a set of masks for each "
        "prompt (for clips, for each frame), in order",
        python="PerAdapterImages | Sequence[Any]",
        python_doc="regional masks: one per picture, nested like `ip_adapter_image`, or diffusers' tensors "
        "[1, pictures, H, W]; an image prompt takes effect where its mask is white; or such a set of masks for each "
        "prompt (for clips, for each frame), in order",
        option_names=("--ip-adapter-mask",),
        option_doc="regional mask; repeat it for each image prompt, in the same order",
    ),
    Parameter(
        name="ip_adapter_masks_adapter",
        type=Type.TEXTS,
        doc="for each mask, the name of its adapter",
        sdk=False,
    ),
    Parameter(
        name="ip_adapter_start",
        type=Type.NUMBERS,
        doc=f"fraction of the steps after which an adapter takes effect: {_ONE_EACH_ADAPTER}",
        default=0.0,
        low=0,
        high=1,
    ),
    Parameter(
        name="ip_adapter_end",
        type=Type.NUMBERS,
        doc=f"fraction of the steps after which an adapter no longer takes effect: {_ONE_EACH_ADAPTER}",
        default=1.0,
        low=0,
        high=1,
    ),
    Parameter(
        name="ip_adapter_weight_type",
        type=Type.CHOICES,
        doc=f"how the scale is distributed over the layers ({_listed(WEIGHT_TYPES)}): {_ONE_EACH_ADAPTER}",
        default="linear",
        choices=WEIGHT_TYPES,
        literal="WeightType",
    ),
    Parameter(
        name="image",
        type=Type.PICTURES,
        doc="pictures to start from, for image-to-image or (with `mask_image`) inpainting",
        python="Images | Embeds",
        python_doc="pictures to start from, for image-to-image or (with `mask_image`) inpainting; for image-to-image "
        "also latents as a float array [pictures, 4, height / 8, width / 8], such as `Result.latents`",
    ),
    Parameter(
        name="image_latents",
        type=Type.TENSOR,
        axes=4,
        doc="latents to start from in place of `image`, for image-to-image: [pictures, channels, h, w]",
        sdk=False,
    ),
    Parameter(
        name="latents",
        type=Type.TENSOR,
        axes=4,
        doc="initial noise, with a standard deviation of 1, in place of noise drawn from `seed`: "
        "[pictures, channels, h, w]; for clips [clips, channels * frames, h, w]",
        python_doc="initial noise, with a standard deviation of 1, in place of noise drawn from `seed`: "
        "[pictures, channels, height / 8, width / 8]; for clips [clips, channels, frames, height / 8, width / 8]",
    ),
    Parameter(
        name="mask_image",
        type=Type.PICTURES,
        doc="masks for inpainting, white where to repaint: one for all, or one per `image`",
    ),
    Parameter(
        name="strength",
        type=Type.NUMBER,
        doc="how strongly to change `image` or `video`, above 0; default as in diffusers",
        low=0,
        high=1,
    ),
    Parameter(
        name="padding_mask_crop",
        type=Type.INTEGER,
        doc="inpaint only a crop around the mask, with this margin in pixels",
        low=0,
        high=4096,
    ),
    Parameter(
        name="control_image",
        type=Type.PICTURES,
        group=Group.CONTROL,
        doc="control images, grouped by ControlNet: one each, or one per prompt (for clips, one per frame)",
        python="Images | Sequence[Sequence[ImageInput]]",
        python_doc="one control image per ControlNet in `controlnet`; or a list of lists as in diffusers: for clips "
        "the frames of each ControlNet, for several prompts the images of each prompt",
    ),
    Parameter(
        name="control_image_annotator",
        type=Type.CHOICES,
        group=Group.CONTROL,
        doc=f"annotator that turns a photo into the control image ({_listed(_ANNOTATORS)}): {_ONE_EACH_NET}",
        default="none",
        choices=_ANNOTATORS,
        literal="Annotator",
    ),
    Parameter(
        name="controlnet",
        type=Type.TEXTS,
        group=Group.CONTROL,
        doc="names of the ControlNets to use, in this order (default: all in the bundle)",
    ),
    Parameter(
        name="controlnet_conditioning_scale",
        type=Type.NUMBERS,
        group=Group.CONTROL,
        doc=f"strength of the ControlNets: {_ONE_EACH_NET}; default as in diffusers",
        low=-MAX_SCALE,
        high=MAX_SCALE,
    ),
    Parameter(
        name="control_guidance_start",
        type=Type.NUMBERS,
        group=Group.CONTROL,
        doc=f"fraction of the steps after which a ControlNet takes effect: {_ONE_EACH_NET}",
        default=0.0,
        low=0,
        high=1,
    ),
    Parameter(
        name="control_guidance_end",
        type=Type.NUMBERS,
        group=Group.CONTROL,
        doc=f"fraction of the steps after which a ControlNet no longer takes effect: {_ONE_EACH_NET}",
        default=1.0,
        low=0,
        high=1,
    ),
    Parameter(
        name="guess_mode",
        type=Type.FLAG,
        group=Group.CONTROL,
        doc="apply the ControlNets to the conditional branch only, and more weakly to the finer residuals",
        default=False,
    ),
    Parameter(
        name="lora",
        type=Type.OBJECT,
        group=Group.LORA,
        doc="JSON object with the names of LoRAs and a scale for each",
        default={},
        low=-MAX_LORA_SCALE,
        high=MAX_LORA_SCALE,
        python="Mapping[str, float]",
        python_doc="LoRAs to use, as a dict of scales (-10 to 10) by name: `{'watercolor': 0.8}`",
        option_doc="LoRA to use, with its scale (-10 to 10); may be repeated",
    ),
    Parameter(
        name="num_frames",
        type=Type.INTEGER,
        group=Group.VIDEO,
        doc="number of frames of a clip; without it and `video`, the result is pictures",
    ),
    Parameter(
        name="video",
        type=Type.PICTURES,
        group=Group.VIDEO,
        doc="frames to start from, for video-to-video; see `strength`",
        python_doc="frames to start from, for video-to-video (see `strength`): a list of pictures, an array [frames, "
        "height, width, 3], or an animated GIF or WebP file",
    ),
    Parameter(
        name="context_length",
        type=Type.INTEGER,
        group=Group.VIDEO,
        doc="number of frames the motion modules see at once; longer clips run in overlapping windows",
        low=2,
    ),
    Parameter(
        name="context_stride",
        type=Type.INTEGER,
        group=Group.VIDEO,
        doc="number of frame strides to run the windows at (1, 2, 4, ...); larger strides skip frames to cover more",
        default=1,
        low=1,
        high=8,
    ),
    Parameter(
        name="context_overlap",
        type=Type.INTEGER,
        group=Group.VIDEO,
        doc="number of frames shared by neighboring windows; must be less than a window's length",
        default=4,
        low=0,
    ),
    Parameter(
        name="height",
        type=Type.INTEGER,
        doc="height in pixels, a multiple of 8 (default: that of the picture to start from, or else the bundle's)",
    ),
    Parameter(
        name="width",
        type=Type.INTEGER,
        doc="width in pixels, a multiple of 8 (default: that of the picture to start from, or else the bundle's)",
    ),
    *(
        Parameter(name=f"{prefix}{name}", type=Type.PAIR, group=Group.FAMILY, doc=f"{doc}{whose}", default=default)
        for prefix, whose in (("", ""), ("negative_", ", for the unconditional branch"))
        for name, doc, default in (
            ("original_size", "SDXL conditioning: height and width of the picture before cropping", None),
            ("crops_coords_top_left", "SDXL conditioning: top and left of the crop", (0, 0)),
            ("target_size", "SDXL conditioning: target height and width", None),
        )
    ),
    *(
        Parameter(
            name=f"{prefix}aesthetic_score",
            type=Type.NUMBER,
            group=Group.FAMILY,
            doc=f"conditioning of the SDXL refiner: how appealing the picture should be{whose}",
            default=default,
            low=0,
            high=10,
        )
        for prefix, whose, default in (("", "", 6.0), ("negative_", ", for the unconditional branch", 2.5))
    ),
    Parameter(
        name="num_inference_steps",
        type=Type.INTEGER,
        doc="number of denoising steps",
        default=50,
        set_by_bundles=True,
        low=1,
        high=_MAX_STEPS,
        option_names=("--steps",),
    ),
    Parameter(
        name="timesteps",
        type=Type.INTEGERS,
        doc="timesteps in place of `num_inference_steps`, for schedulers that take them, in descending order",
        default=(),
        low=0,
    ),
    Parameter(
        name="sigmas",
        type=Type.NUMBERS,
        doc="noise levels in place of `num_inference_steps`, for schedulers that take them, in descending order",
        default=(),
        low=0,
        high=MAX_SCALE,
    ),
    Parameter(
        name="denoising_start",
        type=Type.NUMBER,
        group=Group.FAMILY,
        doc="fraction of the denoising that `image` has behind it: it gets no noise, and `strength` does not apply",
        low=0,
        high=1,
    ),
    Parameter(
        name="denoising_end",
        type=Type.NUMBER,
        group=Group.FAMILY,
        doc="fraction of the denoising after which to stop; another request can continue with `denoising_start`",
        low=0,
        high=1,
    ),
    Parameter(
        name="guidance_scale",
        type=Type.NUMBER,
        doc="strength of classifier-free guidance; values up to 1 disable it (default: the bundle's, usually as in "
        "diffusers)",
        set_by_bundles=True,
        low=-MAX_SCALE,
        high=MAX_SCALE,
    ),
    Parameter(
        name="guidance_rescale",
        type=Type.NUMBER,
        doc="how much to rescale the guided noise, as in arXiv 2305.08891",
        default=0.0,
        set_by_bundles=True,
        low=0,
        high=1,
    ),
    Parameter(
        name="guidance_end",
        type=Type.NUMBER,
        doc="fraction of the steps after which guidance stops; a step without guidance is half the work",
        default=1.0,
        low=0,
        high=1,
    ),
    Parameter(
        name="eta",
        type=Type.NUMBER,
        doc="how much noise each step of DDIM and TCD adds",
        default=0.0,
        low=0,
        high=1,
    ),
    Parameter(
        name="clip_skip",
        type=Type.INTEGER,
        doc="number of final text encoder layers to skip",
        default=0,
        low=0,
    ),
    Parameter(
        name="num_images_per_prompt",
        type=Type.INTEGER,
        doc="number of pictures (or clips) per prompt",
        default=1,
        low=1,
        high=64,
    ),
    Parameter(
        name="seed",
        type=Type.SEEDS,
        doc="one seed for all pictures together, or one per picture (default: random)",
        python_doc="any seed that `torch.Generator('cpu').manual_seed` accepts: one for all pictures together, or one "
        "per picture (default: random; `Result.seeds` reports it)",
    ),
    Parameter(
        name="scheduler",
        type=Type.CHOICE,
        doc="class name of a diffusers scheduler (default: the bundle's)",
        choices=SCHEDULERS,
        literal="Scheduler",
    ),
    Parameter(
        name="scheduler_config",
        type=Type.OBJECT,
        doc="JSON object with values that override the scheduler's configuration",
        default={},
        python_doc="values that override the scheduler's configuration, or a whole configuration "
        "(`dict(pipe.scheduler.config)` in diffusers)",
    ),
    Parameter(
        name="output_type",
        type=Type.CHOICE,
        doc="whether to return pictures (`np`) or latents (`latent`)",
        default="np",
        choices=("np", "latent"),
        python="OutputType",
        python_doc="`pil` (default), `np` (uint8 [height, width, 3]) or `latent`",
        option_doc="`latent` saves latents in a .npy file in place of pictures",
    ),
    Parameter(
        name="output_format",
        type=Type.CHOICE,
        doc=f"return encoded files instead of raw pixels: {_listed(PICTURE_FORMATS)} for pictures, "
        f"{_listed(VIDEO_FORMATS)} for clips",
        choices=tuple(dict.fromkeys((*PICTURE_FORMATS, *VIDEO_FORMATS))),
        literal="OutputFormat",
        python_doc="transfer pictures (or clips) as encoded files instead of raw pixels",
    ),
    Parameter(
        name="output_encoding",
        type=Type.CHOICE,
        doc="how to return encoded files and previews: as bytes (`binary`), or as text for JSON (`base64`, which needs "
        "`output_format`)",
        default="binary",
        choices=("binary", "base64"),
        sdk=False,
    ),
    Parameter(
        name="timeout",
        type=Type.NUMBER,
        doc="seconds after which the server stops working on this request",
        python_doc="seconds after which the client stops waiting and the server stops working",
        low=1e-3,
    ),
    Parameter(
        name="priority",
        type=Type.INTEGER,
        doc="requests with a lower number run first",
        default=5,
        low=1,
        high=9,
    ),
    Parameter(
        name="encode_image",
        type=Type.TEXT,
        doc="name of an adapter: return its embeddings of `ip_adapter_image` and nothing else",
        sdk=False,
    ),
    Parameter(
        name="encode_prompt",
        type=Type.FLAG,
        doc="return the text embeddings of the prompts and nothing else",
        default=False,
        sdk=False,
    ),
    Parameter(
        name="progress_every",
        type=Type.INTEGER,
        group=Group.STREAM,
        doc="number of steps between progress messages",
        default=1,
        low=1,
        high=_MAX_STEPS,
    ),
    Parameter(
        name="preview",
        type=Type.FLAG,
        group=Group.STREAM,
        doc="whether progress messages carry small preview pictures",
        default=False,
    ),
)

PARAMETERS: dict[str, Parameter] = {row.name: row for row in ROWS}


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """The single-valued parameters of a request, validated and with defaults filled in.

    The pipeline passes them to the denoiser unchanged. Every field is named after its row.
    """

    height: int
    width: int
    original_size: tuple[int, int] | None
    crops_coords_top_left: tuple[int, int]
    target_size: tuple[int, int] | None
    negative_original_size: tuple[int, int] | None
    negative_crops_coords_top_left: tuple[int, int]
    negative_target_size: tuple[int, int] | None
    aesthetic_score: float
    negative_aesthetic_score: float
    num_inference_steps: int
    timesteps: tuple[int, ...]
    sigmas: tuple[float, ...]
    denoising_start: float | None
    denoising_end: float | None
    guidance_scale: float
    guidance_rescale: float
    guidance_end: float
    eta: float
    strength: float
    clip_skip: int
    num_images_per_prompt: int
    scheduler: str | None
    scheduler_config: dict[str, Any]
    guess_mode: bool
    lora: dict[str, float]
    output_type: str
    output_format: str | None
    output_encoding: str
    priority: int
    progress_every: int
    preview: bool

    @property
    def steps(self) -> int:
        """The number of denoising steps, before `strength` and `denoising_start` skip some."""
        return len(self.timesteps or self.sigmas) or self.num_inference_steps

    @classmethod
    def with_defaults(cls, **values: Any) -> Settings:
        """Build settings from `values`, with the table's defaults for the rest.

        Raises:
            msgspec.ValidationError: a value without a default is missing, or a value has the wrong type.
        """
        defaults = {name: PARAMETERS[name].default for name in cls.__struct_fields__}
        return msgspec.convert(defaults | values, cls)
