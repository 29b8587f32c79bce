"""The parameters of a request: one row each, from which everything else about them is made.

The reader takes types, defaults and ranges from here; `wire` the input tensors (and so `config.pbtxt`);
`protocol_table` the tables of `docs/protocol.md`; `signatures` the methods of the Python client and the options of
`imprompt generate`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum, StrEnum, auto
from typing import Any

import msgspec

from imprompt_serving.capabilities import SCHEDULERS
from imprompt_serving.families import get_family
from imprompt_serving.specs import Bundle
from imprompt_serving.weight_types import WEIGHT_TYPES

MAX_SCALE = 1e4
"""Largest guidance or conditioning scale, and largest value of an image embedding: half precision ends at 65504."""
_MAX_STEPS = 1000
PICTURE_FORMATS, VIDEO_FORMATS = ("png", "jpeg", "webp"), ("gif", "webp")


class Type(StrEnum):
    """What a parameter holds. The plural ones take several values, which a Python caller gives as a list or alone."""

    TEXT = auto()
    TEXTS = auto()
    CHOICE = auto()
    CHOICES = auto()
    INTEGER = auto()
    PAIR = auto()
    """Two integers."""
    SEEDS = auto()
    NUMBER = auto()
    NUMBERS = auto()
    FLAG = auto()
    OBJECT = auto()
    """JSON; in Python a dict."""
    PICTURES = auto()
    """Encoded pictures."""
    EMBEDS = auto()
    """Image embeddings: a tensor for each adapter (`tensor_names.request_embeds`)."""


_WIRE: dict[Type, tuple[str, tuple[int, ...]]] = {
    Type.TEXT: ("STRING", (1,)),
    Type.TEXTS: ("STRING", (-1,)),
    Type.CHOICE: ("STRING", (1,)),
    Type.CHOICES: ("STRING", (-1,)),
    Type.INTEGER: ("INT32", (1,)),
    Type.PAIR: ("INT32", (2,)),
    Type.SEEDS: ("INT64", (-1,)),
    Type.NUMBER: ("FP64", (1,)),
    Type.NUMBERS: ("FP64", (-1,)),
    Type.FLAG: ("BOOL", (1,)),
    Type.OBJECT: ("STRING", (1,)),
    Type.PICTURES: ("STRING", (-1,)),
}
"""Triton data type and shape (-1: any) of each type but `EMBEDS`."""


class Group(Enum):
    """Which models take a parameter. The values name the tables of `docs/protocol.md`."""

    ALWAYS = "REQUEST"
    FAMILY = "FAMILY_REQUEST"
    """Bundles whose family takes it (`Family.parameters`)."""
    CONTROL = "CONTROL_REQUEST"
    """Bundles with ControlNets or T2I-Adapters; a T2I-Adapter counts as a net."""
    VIDEO = "VIDEO_REQUEST"
    """Bundles with a motion adapter."""
    STREAM = "STREAM_REQUEST"
    """The streaming model of every bundle."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Parameter:
    """One parameter of a request.

    A `default` of None is explained by `doc`: it depends on the bundle or the task, or there is none. A missing bound
    depends on the bundle. `low`, `high` and `choices` hold for each of several values.
    """

    name: str
    type: Type
    doc: str
    group: Group = Group.ALWAYS
    default: Any = None
    low: float = -math.inf
    high: float = math.inf
    choices: tuple[str, ...] = ()
    sdk: bool = True
    """Whether it is a keyword argument of the Python client; the client fills in the others itself."""
    python: str | None = None
    """Type of the keyword argument, where `type` does not imply it."""
    literal: str | None = None
    """Name of the type that the Python client makes of `choices`."""
    python_doc: str | None = None
    """Documentation of the keyword argument, where it differs from `doc`."""
    option: bool = False
    """Whether it is an option of `imprompt generate` that needs no code of its own."""
    option_names: tuple[str, ...] = ()
    """Names of the option, where there is more than the parameter's own."""

    @property
    def dtype(self) -> str:
        """Triton data type, without its prefix."""
        return _WIRE[self.type][0]

    @property
    def dims(self) -> tuple[int, ...]:
        """Shape of the input tensor; -1: any."""
        return _WIRE[self.type][1]

    @property
    def range_and_default(self) -> str:
        """Both in words, in parentheses; empty if the row has neither."""
        parts = []
        if math.isfinite(self.low) and math.isfinite(self.high):
            parts.append(f"{self.low:g} to {self.high:g}")
        if self.default not in (None, {}):
            parts.append(f"default {_shown(self.default)}")
        return f" ({', '.join(parts)})" if parts else ""

    def applies_to(self, bundle: Bundle, *, stream: bool) -> bool:
        """Whether the pipeline of `bundle` (its streaming one: `stream`) takes it."""
        match self.group:
            case Group.ALWAYS:
                return True
            case Group.FAMILY:
                return self.name in get_family(bundle.family).parameters
            case Group.CONTROL:
                return bool(bundle.net_names)
            case Group.VIDEO:
                return bundle.motion is not None
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


_ONE_EACH_ADAPTER = "one for all adapters, or one each"
_ONE_EACH_NET = "one for all nets, or one each"
_OF_ADAPTERS = "PerAdapterImages"
_ANNOTATORS = ("none", "canny")


def _listed(choices: tuple[str, ...]) -> str:
    return ", ".join(f"`{choice}`" for choice in choices[:-1]) + f" or `{choices[-1]}`"


ROWS: tuple[Parameter, ...] = (
    Parameter(
        name="prompt",
        type=Type.TEXTS,
        doc="one or several prompts; each makes `num_images_per_prompt` pictures",
        sdk=False,
    ),
    Parameter(
        name="negative_prompt",
        type=Type.TEXTS,
        doc="what to avoid: one for all prompts, or one each",
        option=True,
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
        name="ip_adapter_image",
        type=Type.PICTURES,
        doc="image prompts as encoded bytes (PNG, JPEG, WebP)",
        python=_OF_ADAPTERS,
        python_doc="image prompts: a picture, a list with an entry for each adapter of the bundle (a picture, a list "
        "of pictures or None), or a dict by adapter name; the only adapter of a bundle takes a flat list",
    ),
    Parameter(
        name="ip_adapter_image_adapter",
        type=Type.TEXTS,
        doc="name of the adapter of each `ip_adapter_image`",
        sdk=False,
    ),
    Parameter(
        name="negative_ip_adapter_image",
        type=Type.PICTURES,
        doc="image prompts of the unconditional branch (default: none or an empty picture, as the adapter was trained)",
        python=_OF_ADAPTERS,
    ),
    Parameter(
        name="negative_ip_adapter_image_adapter",
        type=Type.TEXTS,
        doc="name of the adapter of each `negative_ip_adapter_image`",
        sdk=False,
    ),
    Parameter(
        name="ip_adapter_image_embeds",
        type=Type.EMBEDS,
        doc="embeddings in place of image prompts: [2 (negative, positive) or 1 (positive), pictures, ...]",
        python="Embeds | Sequence[Embeds | None] | Mapping[str, Embeds]",
        python_doc="embeddings in place of pictures, as `encode_image` and diffusers give them: [2 (negative, "
        "positive) or 1 (positive), pictures, ...]; a list with one for each adapter, or a dict by adapter name",
    ),
    Parameter(
        name="ip_adapter_scale",
        type=Type.NUMBERS,
        doc=f"strength of the image prompt: {_ONE_EACH_ADAPTER}",
        default=1.0,
        low=-MAX_SCALE,
        high=MAX_SCALE,
        python="Scale | Sequence[Scale] | Mapping[str, Scale | Sequence[float]]",
        python_doc="strength of the image prompt: a number, or a dict by block "
        "(`{'up': {'block_0': [0.0, 1.0, 0.0]}}`); a list with one of those for each adapter, or a dict by adapter "
        "name; with masks an adapter's entry may be a list with a number for each of its pictures",
    ),
    Parameter(
        name="ip_adapter_scale_config",
        type=Type.OBJECT,
        doc="JSON in place of `ip_adapter_scale`: for each adapter a number, an object of scales by block (as "
        "diffusers' `set_ip_adapter_scale`), or a list with a number for each masked image",
        sdk=False,
    ),
    Parameter(
        name="ip_adapter_masks",
        type=Type.PICTURES,
        doc="a mask for each image prompt, which acts where its mask is white",
        python="PerAdapterImages | Sequence[Any]",
        python_doc="regions: one mask for each picture, shaped like `ip_adapter_image`, or diffusers' tensors "
        "[1, pictures, H, W]; an image prompt acts where its mask is white",
    ),
    Parameter(
        name="ip_adapter_masks_adapter",
        type=Type.TEXTS,
        doc="name of the adapter of each mask",
        sdk=False,
    ),
    Parameter(
        name="ip_adapter_start",
        type=Type.NUMBERS,
        doc=f"share of the steps at which an adapter starts to act: {_ONE_EACH_ADAPTER}",
        default=0.0,
        low=0,
        high=1,
    ),
    Parameter(
        name="ip_adapter_end",
        type=Type.NUMBERS,
        doc=f"share of the steps at which an adapter stops acting: {_ONE_EACH_ADAPTER}",
        default=1.0,
        low=0,
        high=1,
    ),
    Parameter(
        name="ip_adapter_weight_type",
        type=Type.CHOICES,
        doc=f"how the scale is spread over the layers, {_listed(WEIGHT_TYPES)}: {_ONE_EACH_ADAPTER}",
        default="linear",
        choices=WEIGHT_TYPES,
        literal="WeightType",
    ),
    Parameter(
        name="image",
        type=Type.PICTURES,
        doc="pictures to start from: image-to-image, or inpainting with `mask_image`",
        option=True,
    ),
    Parameter(
        name="mask_image",
        type=Type.PICTURES,
        doc="what to repaint (white): one, or one for each `image`",
        option=True,
    ),
    Parameter(
        name="strength",
        type=Type.NUMBER,
        doc="how much of `image` or `video` is replaced; above 0, default as diffusers",
        low=0,
        high=1,
        option=True,
    ),
    Parameter(
        name="padding_mask_crop",
        type=Type.INTEGER,
        doc="inpaint a crop around the mask with this margin in pixels",
        low=0,
        high=4096,
    ),
    Parameter(
        name="control_image",
        type=Type.PICTURES,
        group=Group.CONTROL,
        doc="control images: one for each net, or one for each prompt (frame) of each net in turn",
        python="Images | Sequence[Sequence[ImageInput]]",
        python_doc="a control image for each net in `controlnet`; lists in a list as in diffusers: for clips the "
        "frames of each net, for several prompts the images of each prompt",
        option=True,
    ),
    Parameter(
        name="control_image_annotator",
        type=Type.CHOICES,
        group=Group.CONTROL,
        doc=f"what makes the control image from a photo, {_listed(_ANNOTATORS)}: {_ONE_EACH_NET}",
        default="none",
        choices=_ANNOTATORS,
        literal="Annotator",
    ),
    Parameter(
        name="controlnet",
        type=Type.TEXTS,
        group=Group.CONTROL,
        doc="names of the ControlNets to use, in this order (default: all of the bundle)",
        option=True,
    ),
    Parameter(
        name="controlnet_conditioning_scale",
        type=Type.NUMBERS,
        group=Group.CONTROL,
        doc=f"strength of the ControlNets: {_ONE_EACH_NET}; default as diffusers",
        low=-MAX_SCALE,
        high=MAX_SCALE,
        option=True,
    ),
    Parameter(
        name="control_guidance_start",
        type=Type.NUMBERS,
        group=Group.CONTROL,
        doc=f"share of the steps at which a net starts to act: {_ONE_EACH_NET}",
        default=0.0,
        low=0,
        high=1,
        option=True,
    ),
    Parameter(
        name="control_guidance_end",
        type=Type.NUMBERS,
        group=Group.CONTROL,
        doc=f"share of the steps at which a net stops acting: {_ONE_EACH_NET}",
        default=1.0,
        low=0,
        high=1,
        option=True,
    ),
    Parameter(
        name="guess_mode",
        type=Type.FLAG,
        group=Group.CONTROL,
        doc="let the nets act on the conditional branch only, and less on the finer residuals",
        default=False,
        option=True,
    ),
    Parameter(
        name="num_frames",
        type=Type.INTEGER,
        group=Group.VIDEO,
        doc="frames of a clip; without it (and `video`) the answer is pictures",
        option=True,
    ),
    Parameter(
        name="video",
        type=Type.PICTURES,
        group=Group.VIDEO,
        doc="frames to start from: video-to-video with `strength`",
        python="Sequence[ImageInput] | np.ndarray[Any, Any]",
        option=True,
    ),
    Parameter(
        name="context_length",
        type=Type.INTEGER,
        group=Group.VIDEO,
        doc="frames that the motion modules see at once; longer clips run in overlapping windows",
        low=2,
    ),
    Parameter(
        name="context_stride",
        type=Type.INTEGER,
        group=Group.VIDEO,
        doc="number of window widths: each twice the last, by skipping frames",
        default=1,
        low=1,
        high=8,
    ),
    Parameter(
        name="context_overlap",
        type=Type.INTEGER,
        group=Group.VIDEO,
        doc="frames that neighboring windows share, fewer than a window has",
        default=4,
        low=0,
    ),
    Parameter(
        name="height",
        type=Type.INTEGER,
        doc="pixels, a multiple of 8 (default: the bundle's, or that of the picture to start from)",
        option=True,
    ),
    Parameter(
        name="width",
        type=Type.INTEGER,
        doc="pixels, a multiple of 8 (default: the bundle's, or that of the picture to start from)",
        option=True,
    ),
    *(
        Parameter(name=f"{prefix}{name}", type=Type.PAIR, group=Group.FAMILY, doc=f"{doc}{whose}", default=default)
        for prefix, whose in (("", ""), ("negative_", ", for the unconditional branch"))
        for name, doc, default in (
            ("original_size", "height and width of the picture that the model imagines", None),
            ("crops_coords_top_left", "top and left of the crop that the model imagines", (0, 0)),
            ("target_size", "height and width that the picture is meant for", None),
        )
    ),
    Parameter(
        name="num_inference_steps",
        type=Type.INTEGER,
        doc="denoising steps",
        default=50,
        low=1,
        high=_MAX_STEPS,
        option=True,
        option_names=("--num-inference-steps", "--steps"),
    ),
    Parameter(
        name="guidance_scale",
        type=Type.NUMBER,
        doc="classifier-free guidance; at most 1 switches it off, default as diffusers",
        low=-MAX_SCALE,
        high=MAX_SCALE,
        option=True,
    ),
    Parameter(
        name="guidance_rescale",
        type=Type.NUMBER,
        doc="rescaling of the guided noise as in arXiv 2305.08891",
        default=0.0,
        low=0,
        high=1,
        option=True,
    ),
    Parameter(
        name="guidance_end",
        type=Type.NUMBER,
        doc="share of the steps after which guidance stops; a step without it is half the work",
        default=1.0,
        low=0,
        high=1,
        option=True,
    ),
    Parameter(
        name="eta",
        type=Type.NUMBER,
        doc="share of noise in each step of DDIM and TCD",
        default=0.0,
        low=0,
        high=1,
        option=True,
    ),
    Parameter(
        name="clip_skip",
        type=Type.INTEGER,
        doc="layers of the text encoder to leave out",
        default=0,
        low=0,
        option=True,
    ),
    Parameter(
        name="num_images_per_prompt",
        type=Type.INTEGER,
        doc="pictures (or clips) for each prompt",
        default=1,
        low=1,
        high=64,
        option=True,
    ),
    Parameter(
        name="seed",
        type=Type.SEEDS,
        doc="one for all pictures together, or one each; random when absent",
        python_doc="what `torch.Generator('cpu').manual_seed` takes: one for all pictures together, or one each; "
        "random if not given, and the result has it",
        option=True,
    ),
    Parameter(
        name="scheduler",
        type=Type.CHOICE,
        doc="class name of a diffusers scheduler (default: the bundle's)",
        choices=SCHEDULERS,
        literal="Scheduler",
        option=True,
    ),
    Parameter(
        name="scheduler_config",
        type=Type.OBJECT,
        doc="JSON object: values that replace the scheduler's configuration",
        default={},
        python_doc="values that replace those of the scheduler's configuration, or diffusers' whole "
        "`dict(pipe.scheduler.config)`",
        option=True,
    ),
    Parameter(
        name="output_type",
        type=Type.CHOICE,
        doc="pictures (`np`) or latents",
        default="np",
        choices=("np", "latent"),
        python="OutputType",
        python_doc="`pil` (default), `np` (uint8 [height, width, 3]) or `latent`",
    ),
    Parameter(
        name="output_format",
        type=Type.CHOICE,
        doc=f"answer with files: {_listed(PICTURE_FORMATS)}; clips: {_listed(VIDEO_FORMATS)}",
        choices=tuple(dict.fromkeys((*PICTURE_FORMATS, *VIDEO_FORMATS))),
        literal="OutputFormat",
        python_doc="receive pictures (or clips) as encoded files instead of raw pixels",
    ),
    Parameter(
        name="timeout",
        type=Type.NUMBER,
        doc="seconds after which the work on this request stops",
        python_doc="seconds after which the caller stops waiting and the work stops",
        low=1e-3,
        option=True,
    ),
    Parameter(
        name="priority",
        type=Type.INTEGER,
        doc="requests with a lower number go first",
        default=5,
        low=1,
        high=9,
    ),
    Parameter(
        name="encode_image",
        type=Type.TEXT,
        doc="adapter name: answer with the embeddings of `ip_adapter_image` only",
        sdk=False,
    ),
    Parameter(
        name="progress_every",
        type=Type.INTEGER,
        group=Group.STREAM,
        doc="steps between two progress answers",
        default=1,
        low=1,
        high=_MAX_STEPS,
    ),
    Parameter(
        name="preview",
        type=Type.FLAG,
        group=Group.STREAM,
        doc="whether progress answers carry small pictures",
        default=False,
    ),
)

PARAMETERS: dict[str, Parameter] = {row.name: row for row in ROWS}


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """The parameters of a request that are single values, checked, with defaults filled in.

    The pipeline hands them to the denoiser as they are. Each has the name of its row.
    """

    height: int
    width: int
    original_size: tuple[int, int] | None
    crops_coords_top_left: tuple[int, int]
    target_size: tuple[int, int] | None
    negative_original_size: tuple[int, int] | None
    negative_crops_coords_top_left: tuple[int, int]
    negative_target_size: tuple[int, int] | None
    num_inference_steps: int
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
    output_type: str
    output_format: str | None
    priority: int
    progress_every: int
    preview: bool

    @classmethod
    def with_defaults(cls, **values: Any) -> Settings:
        """Settings with `values`, and the defaults of the table for the others.

        Raises:
            msgspec.ValidationError: a value that has no default is missing, or one has another type.
        """
        defaults = {name: PARAMETERS[name].default for name in cls.__struct_fields__}
        return msgspec.convert(defaults | values, cls)
