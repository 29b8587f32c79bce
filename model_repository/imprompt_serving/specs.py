"""The description of a served bundle: the export writes it as `bundle.json`, and the models inside Triton read it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol

import msgspec

from imprompt_serving import families

if TYPE_CHECKING:
    from imprompt_serving.job_request import Task
    from imprompt_serving.parameters import Settings

FILE_NAME = "bundle.json"

AdapterKind = Literal["plain", "plus", "full_face", "faceid", "faceid_plus", "faceid_plusv2"]


class Range(NamedTuple):
    """Smallest, most common, and largest value of one dynamic axis."""

    min: int
    opt: int
    max: int


class CallRows(NamedTuple):
    """Numbers of rows that one call of an engine may have: 1 to `most`.

    If every new number costs a search for algorithms or a build (`Backend.buckets_rows`), engines run only a few
    numbers, the `buckets`, and calls are padded to the next one.
    """

    most: int
    bucketed: bool = False

    @property
    def buckets(self) -> tuple[int, ...]:
        """1, 2, 4, ..., and `most`."""
        return (*(1 << power for power in range((self.most - 1).bit_length())), self.most)

    def padded(self, rows: int) -> int:
        """Return how many rows a call of `rows` rows runs, padding included."""
        if not self.bucketed:
            return rows
        return next((bucket for bucket in self.buckets if bucket >= rows), rows)

    def unpadded(self, rows: int) -> int:
        """Return the largest number of rows, up to `rows`, that a call runs without padding."""
        if not self.bucketed:
            return rows
        return max(bucket for bucket in self.buckets if bucket <= rows)

    def of_frames(self, frames: int) -> CallRows:
        """Return the limits for rows of clips: a row with `frames` frames counts as that many rows."""
        return self if frames == 1 else CallRows(max(self.most // frames, 1), self.bucketed)


class Shapes(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Dimensions that requests may have, and the profiles of engines built for ranges of shapes. Sizes in pixels."""

    height: Range = Range(64, 512, 1024)
    width: Range = Range(64, 512, 1024)
    rows: Range = Range(1, 2, 16)
    frames: Range = Range(1, 16, 32)
    image_tokens: tuple[int, ...] = (4, 16, 64, 257, 1028)
    regions: int = 8
    """Largest number of masked images per adapter."""
    prompt_chunks: int = 8
    """Largest number of chunks of a prompt, each as long as the input of the text encoder."""

    def call_rows(self, *, bucketed: bool = False) -> CallRows:
        """Return the rows that a UNet call may have; with `bucketed`, engines run only a few numbers of rows."""
        return CallRows(self.rows.max, bucketed)

    def bucket(self, tokens: int) -> int:
        """Return the length to which `tokens` image tokens are padded."""
        return next((bucket for bucket in self.image_tokens if bucket >= tokens), tokens)


class Limits(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How much one request may cost, and how long the queue may grow. Requests beyond a limit are refused at once."""

    waiting_rows: int = 128
    """Rows (one picture in one guidance branch) that may wait for the denoiser."""
    waiting_seconds: float = 120.0
    """Seconds that a request may wait for the denoiser, estimated from the latest UNet calls."""
    prompt_characters: int = 65536
    """Characters in all prompts of a request."""
    json_characters: int = 65536
    """Characters of a JSON parameter (`scheduler_config`, `ip_adapter_scale_config`, `lora`)."""
    images: int = 256
    """Pictures in a request: image prompts, masks, start and control images, and frames of a video."""
    image_megapixels: float = 64.0
    """Total size of these pictures, in units of 1024 x 1024 pixels."""
    image_aspect_ratio: float = 64.0
    """Ratio of a picture's longer side to its shorter side."""
    sample_steps: int = 20000
    """Denoising steps, summed over all pictures and all frames of clips."""
    train_timesteps: int = 10000
    """Largest number in a `scheduler_config`, seeds aside: the memory of a scheduler grows with it."""
    timeout_seconds: float = 3600.0
    """Seconds that a request may take; its `timeout` can only shorten this."""


class ImageEncoder(msgspec.Struct, frozen=True, kw_only=True):
    """A CLIP vision encoder, and how it preprocesses pictures (transformers' `CLIPImageProcessor`)."""

    name: str
    shortest_edge: int | None
    resize: tuple[int, int] | None
    crop: tuple[int, int] | None
    resample: int
    rescale_factor: float
    mean: tuple[float, ...]
    std: tuple[float, ...]
    image_size: int


class Adapter(msgspec.Struct, frozen=True, kw_only=True):
    """An IP-Adapter, which makes `num_tokens` image tokens per picture from features of its `image_encoder`."""

    name: str
    kind: AdapterKind
    num_tokens: int
    image_encoder: str | None
    embed_shape: tuple[int, ...]
    """Shape of one picture's embedding: diffusers' `ip_adapter_image_embeds` without the first two axes."""
    clip_shape: tuple[int, ...] | None = None
    """FaceID Plus only: shape of the CLIP hidden states that it takes in addition to the face embedding."""

    @property
    def uses_hidden_states(self) -> bool:
        """Whether its input is the encoder's penultimate hidden states instead of the projected embedding."""
        return self.kind != "plain"

    @property
    def uses_face(self) -> bool:
        """Whether its input is a face embedding."""
        return self.kind.startswith("faceid")


class FaceEncoder(msgspec.Struct, frozen=True, kw_only=True):
    """insightface's detector and recognizer: the size at which it searches pictures, and its detection threshold."""

    det_size: tuple[int, int] = (640, 640)
    det_thresh: float = 0.5


class CrossAttention(msgspec.Struct, frozen=True, kw_only=True):
    """A cross-attention layer of the UNet; its resolution is the latent size halved (rounding up) `level` times."""

    name: str
    level: int


class Residual(NamedTuple):
    """A tensor that a ControlNet adds to the UNet: its channels, and how many times the latent size is halved."""

    channels: int
    level: int


class ControlNet(msgspec.Struct, frozen=True, kw_only=True):
    """A ControlNet; with `global_pool` it adds one number per channel instead of a plane (ControlNet Shuffle)."""

    name: str
    global_pool: bool = False


class T2IAdapter(msgspec.Struct, frozen=True, kw_only=True):
    """A T2I-Adapter: the channels of its control images (1: grayscale), and the factor that divides their sizes."""

    name: str
    channels: int
    downscale_factor: int


class Motion(msgspec.Struct, frozen=True, kw_only=True):
    """A motion UNet; its motion modules attend to at most `window` frames at once."""

    window: int


class TextEncoder(msgspec.Struct, frozen=True, kw_only=True):
    """A CLIP text encoder: its engine, the fixed length and padding of its input, and the width of its output."""

    engine: str
    max_length: int
    pad_token_id: int
    hidden_size: int


class GuidanceInputs(Protocol):
    """The parts of a request that decide how it is guided."""

    @property
    def task(self) -> str: ...

    @property
    def frames(self) -> int | None: ...

    @property
    def controls(self) -> Sequence[object]: ...

    @property
    def settings(self) -> Settings: ...


class Bundle(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that the pipeline and the denoiser know about one set of checkpoints."""

    name: str
    family: str
    """One of `families.NAMES`."""
    latent_channels: int
    unet_channels: int
    vae_scale_factor: int
    vae_scaling_factor: float
    vae_latents_mean: tuple[float, ...] = ()
    vae_latents_std: tuple[float, ...] = ()
    """Mean and standard deviation per latent channel, for VAEs that have them; empty: 0 and 1."""
    preview_factors: tuple[tuple[float, float, float], ...]
    """Red, green, and blue (-1 to 1) per latent channel: a linear fit to the VAE, for previews."""
    preview_offset: tuple[float, float, float] = (0.0, 0.0, 0.0)
    default_height: int
    default_width: int
    scheduler: str
    scheduler_config: dict[str, Any]
    defaults: dict[str, float] = {}
    """Values of parameters for requests that leave them out, in place of the defaults of diffusers' pipelines."""
    text_encoders: tuple[TextEncoder, ...]
    max_clip_skip: int
    pooled_size: int | None = None
    force_zeros_for_empty_prompt: bool = False
    time_cond_proj_dim: int | None = None
    layers: tuple[CrossAttention, ...]
    transformer_per_block: dict[str, int]
    adapters: tuple[Adapter, ...] = ()
    image_encoders: tuple[ImageEncoder, ...] = ()
    face_encoder: FaceEncoder | None = None
    safety_checker: ImageEncoder | None = None
    controlnets: tuple[ControlNet, ...] = ()
    residuals: tuple[Residual, ...] = ()
    """What ControlNets add: one entry per skip connection of the down blocks, then one for the middle block."""
    t2i_adapters: tuple[T2IAdapter, ...] = ()
    features: tuple[Residual, ...] = ()
    """What T2I-Adapters add within the blocks."""
    loras: tuple[str, ...] = ()
    """LoRAs of the UNets for requests to choose."""
    motion: Motion | None = None
    shapes: Shapes = Shapes()
    sizes: tuple[tuple[int, int], ...] = ()
    """The only heights and widths that engines are built for; empty: all sizes within `shapes`."""
    limits: Limits = Limits()
    backend: str = "onnxruntime"
    precision: str = "fp32"
    host: Literal["python", "native"] = "python"
    """What hosts the encoders and the VAE: imprompt (`python`), or Triton's own backend (`native`)."""
    threads: int = 0
    """Threads per engine call on the CPU; 0: one per core."""
    devices: tuple[int, ...] = ()
    """GPUs that serve the bundle; empty: the first one."""

    def __post_init__(self) -> None:
        if self.family not in families.NAMES:
            raise ValueError(f"unknown family {self.family!r}; known families are {', '.join(families.NAMES)}")

    @property
    def plain_task(self) -> Task:
        """The task of the simplest request: text-to-image, unless the checkpoints need a picture to start from."""
        if self.unet_channels != self.latent_channels:
            return "inpainting"
        return "image-to-image" if families.get_family(self.family).needs_image else "text-to-image"

    @property
    def levels(self) -> tuple[int, ...]:
        """The attention resolutions, each as the number of times that the latent size is halved."""
        return tuple(sorted({layer.level for layer in self.layers}))

    @property
    def max_text_tokens(self) -> int:
        """The largest number of tokens in the text embeddings of a prompt."""
        return self.text_encoders[0].max_length * self.shapes.prompt_chunks

    @property
    def region_tokens(self) -> int:
        """Image tokens per group next to region masks, in engines built for ranges: those of one picture."""
        return max(self.shapes.bucket(adapter.num_tokens) for adapter in self.adapters)

    @property
    def max_images(self) -> int:
        """The largest number of image prompts per adapter and request that engines are built for."""
        fewest = min((adapter.num_tokens for adapter in self.adapters), default=1)
        return max(self.shapes.image_tokens[-1] // fewest, self.shapes.regions)

    def embeds_guidance(self, request: GuidanceInputs) -> bool:
        """Return whether the guidance scale is a UNet input.

        That is the case for distilled UNets, in the tasks whose diffusers pipelines support them: not for ControlNets
        with a start picture, and not for AnimateDiff.
        """
        unsupported = request.frames is not None or (request.controls and request.task != "text-to-image")
        return self.time_cond_proj_dim is not None and not unsupported

    def guided(self, request: GuidanceInputs) -> bool:
        """Return whether a request also runs an unconditional branch."""
        return request.settings.guidance_scale > 1 and not self.embeds_guidance(request)

    def adapter(self, name: str) -> Adapter:
        """Look up an adapter by name."""
        return next(adapter for adapter in self.adapters if adapter.name == name)

    def finds_faces(self, adapter: Adapter) -> bool:
        """Return whether `adapter` can take pictures of people in place of face embeddings."""
        return adapter.uses_face and self.face_encoder is not None

    def image_encoder(self, name: str) -> ImageEncoder:
        """Look up an image encoder by name."""
        return next(encoder for encoder in self.image_encoders if encoder.name == name)

    @property
    def residual_names(self) -> tuple[str, ...]:
        """Names of `residuals`, as outputs of ControlNets and inputs of the UNet."""
        return residual_names(len(self.residuals))

    @property
    def feature_names(self) -> tuple[str, ...]:
        """Names of `features`, as outputs of T2I-Adapters and inputs of the UNet."""
        return feature_names(len(self.features))

    @property
    def net_names(self) -> tuple[str, ...]:
        """Names that the request parameter `controlnet` accepts."""
        return (*(net.name for net in self.controlnets), *(adapter.name for adapter in self.t2i_adapters))

    def t2i_adapter(self, name: str) -> T2IAdapter | None:
        """Look up a T2I-Adapter by name; None if there is none of that name."""
        return next((adapter for adapter in self.t2i_adapters if adapter.name == name), None)

    def controlnet(self, name: str) -> ControlNet:
        """Look up a ControlNet by name."""
        return next(net for net in self.controlnets if net.name == name)

    def model(self, part: str) -> str:
        """Name the Triton model that serves `part` of this bundle."""
        return f"{self.name}_{part}"

    @property
    def denoisers(self) -> dict[str, int]:
        """The Triton models of the denoisers, each with its GPU; several denoisers have the GPU in their names."""
        if len(self.devices) < 2:
            return {self.model("denoiser"): next(iter(self.devices), 0)}
        return {self.model(f"denoiser_{gpu}"): gpu for gpu in self.devices}

    def save(self, folder: Path) -> None:
        """Write `bundle.json` to `folder`, which is created if necessary."""
        folder.mkdir(parents=True, exist_ok=True)
        # Not msgspec's JSON, which turns the infinities in scheduler configurations into null.
        text = json.dumps(msgspec.to_builtins(self), indent=2, ensure_ascii=False)
        (folder / FILE_NAME).write_text(text + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> Bundle:
        """Read the bundle from a model's version folder.

        Raises:
            ValueError: another version of imprompt exported the bundle.
        """
        file = folder / FILE_NAME
        try:
            return msgspec.convert(json.loads(file.read_text(encoding="utf-8")), type=cls)
        except msgspec.ValidationError as error:
            raise ValueError(
                f"{file} was written by another version of imprompt; export the bundle again: {error}"
            ) from None


def level_size(size: int, level: int) -> int:
    """Return `size` after `level` stride-2 convolutions with padding 1."""
    for _ in range(level):
        size = (size + 1) // 2
    return size


def residual_names(count: int) -> tuple[str, ...]:
    """Name `count` residuals: those of the down blocks, then that of the middle block."""
    return (*(f"down_residual_{index}" for index in range(count - 1)), "mid_residual")


def feature_names(count: int) -> tuple[str, ...]:
    """Name `count` features of T2I-Adapters."""
    return tuple(f"intrablock_residual_{index}" for index in range(count))
