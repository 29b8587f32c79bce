"""What a served bundle is: written by the exporter as ``bundle.json``, read by the models inside Triton."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol

import msgspec

from imprompt_serving import families

if TYPE_CHECKING:
    from imprompt_serving.parameters import Settings

FILE_NAME = "bundle.json"

AdapterKind = Literal["plain", "plus", "full_face", "faceid", "faceid_plus", "faceid_plusv2"]


class Range(NamedTuple):
    """Smallest, most usual and largest value of one dynamic axis."""

    min: int
    opt: int
    max: int


class CallRows(NamedTuple):
    """Numbers of rows that one call of an engine may have: 1 to `most`.

    Where each new number costs a search for algorithms or a build (`Backend.buckets_rows`), engines run a few of them
    alone, the `buckets`, and calls are padded to the next one.
    """

    most: int
    bucketed: bool = False

    @property
    def buckets(self) -> tuple[int, ...]:
        """1, 2, 4, ... and `most`."""
        return (*(1 << power for power in range((self.most - 1).bit_length())), self.most)

    def padded(self, rows: int) -> int:
        """The rows that a call of `rows` rows runs."""
        if not self.bucketed:
            return rows
        return next((bucket for bucket in self.buckets if bucket >= rows), rows)

    def unpadded(self, rows: int) -> int:
        """The most of `rows` rows that a call runs without padding."""
        if not self.bucketed:
            return rows
        return max(bucket for bucket in self.buckets if bucket <= rows)

    def of_frames(self, frames: int) -> CallRows:
        """For rows of a clip: a row of `frames` frames takes as much room as that many rows of one."""
        return self if frames == 1 else CallRows(max(self.most // frames, 1), self.bucketed)


class Shapes(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Limits of a request, and the profiles of engines that are built for ranges. Sizes in pixels."""

    height: Range = Range(64, 512, 1024)
    width: Range = Range(64, 512, 1024)
    rows: Range = Range(1, 2, 16)
    frames: Range = Range(1, 16, 32)
    image_tokens: tuple[int, ...] = (4, 16, 64, 257, 1028)
    regions: int = 8
    """Region masks of one adapter."""

    def call_rows(self, *, bucketed: bool = False) -> CallRows:
        """Rows of a call of the UNet; ``bucketed`` where engines run few numbers of them."""
        return CallRows(self.rows.max, bucketed)

    def bucket(self, tokens: int) -> int:
        """What so many image tokens are padded to."""
        return next((bucket for bucket in self.image_tokens if bucket >= tokens), tokens)


class Limits(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What one request may cost, and how long the waiting line may get. Requests beyond a limit are refused at once."""

    waiting_rows: int = 128
    """Rows (one picture in one guidance branch) that may wait for the denoiser."""
    waiting_seconds: float = 120.0
    """Seconds that a request may wait for the denoiser, estimated from the latest calls of the UNet."""
    prompt_characters: int = 65536
    """Characters in all prompts of a request together."""
    json_characters: int = 65536
    """Characters of a JSON parameter (`scheduler_config`, `ip_adapter_scale_config`, `lora`)."""
    images: int = 256
    """Pictures that a request may bring: image prompts, masks, start and control images, frames of a video."""
    image_megapixels: float = 64.0
    """Size of these pictures together, in units of 1024 x 1024 pixels."""
    image_aspect_ratio: float = 64.0
    """Longer side of a picture over its shorter side."""
    sample_steps: int = 20000
    """Denoising steps, counted for every picture and every frame of a clip."""
    train_timesteps: int = 10000
    """Largest whole number in a `scheduler_config`, seeds aside: the memory of a scheduler grows with it."""
    timeout_seconds: float = 3600.0
    """Seconds that a request may take; its own `timeout` can only shorten this."""


class ImageEncoder(msgspec.Struct, frozen=True, kw_only=True):
    """A CLIP vision encoder and the preprocessing of its pictures (transformers' ``CLIPImageProcessor``)."""

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
    """One IP-Adapter: ``num_tokens`` image tokens per picture, made from features of its ``image_encoder``."""

    name: str
    kind: AdapterKind
    num_tokens: int
    image_encoder: str | None
    embed_shape: tuple[int, ...]
    """Shape of one picture's embedding, as in diffusers' ``ip_adapter_image_embeds`` after the first two axes."""
    clip_shape: tuple[int, ...] | None = None
    """FaceID plus: shape of the CLIP hidden states that it takes beside the face embedding."""

    @property
    def uses_hidden_states(self) -> bool:
        """Whether the encoder's penultimate hidden states are its input, not the projected embedding."""
        return self.kind != "plain"

    @property
    def uses_face(self) -> bool:
        """Whether a face embedding is its input."""
        return self.kind.startswith("faceid")


class FaceEncoder(msgspec.Struct, frozen=True, kw_only=True):
    """insightface's detector and recogniser: the size that pictures are searched at, and how sure it must be."""

    det_size: tuple[int, int] = (640, 640)
    det_thresh: float = 0.5


class CrossAttention(msgspec.Struct, frozen=True, kw_only=True):
    """A cross-attention layer of the UNet; ``level`` halves the latent size (rounding up) that many times."""

    name: str
    level: int


class Residual(NamedTuple):
    """A tensor that a ControlNet adds to the UNet: channels, and how often the latent size is halved."""

    channels: int
    level: int


class ControlNet(msgspec.Struct, frozen=True, kw_only=True):
    """A ControlNet; one with ``global_pool`` adds a number for each channel instead of a plane (ControlNet shuffle)."""

    name: str
    global_pool: bool = False


class T2IAdapter(msgspec.Struct, frozen=True, kw_only=True):
    """A T2I-Adapter: channels of its control images (1 is grey), and what their sizes are multiples of."""

    name: str
    channels: int
    downscale_factor: int


class Motion(msgspec.Struct, frozen=True, kw_only=True):
    """A motion UNet: ``window`` is the largest number of frames that its motion modules see at once."""

    window: int


class TextEncoder(msgspec.Struct, frozen=True, kw_only=True):
    """A CLIP text encoder: engine name, tokenizer file and the fixed length of its input."""

    engine: str
    max_length: int
    pad_token_id: int
    hidden_size: int


class Asked(Protocol):
    """What of a request decides how it is guided."""

    @property
    def task(self) -> str: ...

    @property
    def frames(self) -> int | None: ...

    @property
    def controls(self) -> Sequence[object]: ...

    @property
    def settings(self) -> Settings: ...


class Bundle(msgspec.Struct, frozen=True, kw_only=True):
    """Everything the pipeline and the denoiser know of one checkpoint set."""

    name: str
    family: str
    """One of `families.NAMES`."""
    latent_channels: int
    unet_channels: int
    vae_scale_factor: int
    vae_scaling_factor: float
    vae_latents_mean: tuple[float, ...] = ()
    vae_latents_std: tuple[float, ...] = ()
    """Of each latent channel, for VAEs that have them; none: 0 and 1."""
    preview_factors: tuple[tuple[float, float, float], ...]
    """Red, green and blue (-1 to 1) by latent channel: a linear fit to the VAE, for previews."""
    preview_offset: tuple[float, float, float] = (0.0, 0.0, 0.0)
    default_height: int
    default_width: int
    scheduler: str
    scheduler_config: dict[str, Any]
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
    """What ControlNets add: to each skip connection of the down blocks, and last to the middle block."""
    t2i_adapters: tuple[T2IAdapter, ...] = ()
    features: tuple[Residual, ...] = ()
    """What T2I-Adapters add within the blocks."""
    loras: tuple[str, ...] = ()
    """LoRAs of the UNets that requests choose."""
    motion: Motion | None = None
    shapes: Shapes = Shapes()
    sizes: tuple[tuple[int, int], ...] = ()
    """Height and width of the pictures that engines are built for, one by one; none: all within `shapes`."""
    limits: Limits = Limits()
    backend: str = "onnxruntime"
    precision: str = "fp32"
    host: Literal["python", "native"] = "python"
    """Who hosts the encoders and the VAE: imprompt, or Triton's own backend."""
    threads: int = 0
    """Threads of one call of an engine on the CPU; 0 for one a core."""
    devices: tuple[int, ...] = ()
    """GPUs that serve it; none: the first one."""

    def __post_init__(self) -> None:
        if self.family not in families.NAMES:
            raise ValueError(f"no family {self.family!r}; there are {', '.join(families.NAMES)}")

    @property
    def levels(self) -> tuple[int, ...]:
        """The attention resolutions, as numbers of halvings of the latent size."""
        return tuple(sorted({layer.level for layer in self.layers}))

    @property
    def region_tokens(self) -> int:
        """Image tokens of a group beside region masks, in engines that are built for ranges: those of one picture."""
        return max(self.shapes.bucket(adapter.num_tokens) for adapter in self.adapters)

    @property
    def most_images(self) -> int:
        """Image prompts of one adapter in a request, as far as engines are built for them."""
        fewest = min((adapter.num_tokens for adapter in self.adapters), default=1)
        return max(self.shapes.image_tokens[-1] // fewest, self.shapes.regions)

    def embeds_guidance(self, request: Asked) -> bool:
        """Whether the guidance scale is an input of the UNet: of distilled ones, in the tasks for which diffusers'
        pipelines know them, which leaves out ControlNets with a start picture, and AnimateDiff."""
        unaware = request.frames is not None or (request.controls and request.task != "text-to-image")
        return self.time_cond_proj_dim is not None and not unaware

    def guided(self, request: Asked) -> bool:
        """Whether a request runs an unconditional branch too."""
        return request.settings.guidance_scale > 1 and not self.embeds_guidance(request)

    def adapter(self, name: str) -> Adapter:
        return next(adapter for adapter in self.adapters if adapter.name == name)

    def finds_faces(self, adapter: Adapter) -> bool:
        """Whether pictures of people may stand in for the face embeddings of ``adapter``."""
        return adapter.uses_face and self.face_encoder is not None

    def image_encoder(self, name: str) -> ImageEncoder:
        return next(encoder for encoder in self.image_encoders if encoder.name == name)

    @property
    def residual_names(self) -> tuple[str, ...]:
        """Names of ``residuals``, as outputs of ControlNets and inputs of the UNet."""
        return residual_names(len(self.residuals))

    @property
    def feature_names(self) -> tuple[str, ...]:
        """Names of ``features``, as inputs of the UNet and outputs of T2I-Adapters."""
        return feature_names(len(self.features))

    @property
    def net_names(self) -> tuple[str, ...]:
        """What requests may name as ``controlnet``."""
        return (*(net.name for net in self.controlnets), *(adapter.name for adapter in self.t2i_adapters))

    def t2i_adapter(self, name: str) -> T2IAdapter | None:
        return next((adapter for adapter in self.t2i_adapters if adapter.name == name), None)

    def controlnet(self, name: str) -> ControlNet:
        return next(net for net in self.controlnets if net.name == name)

    def model(self, part: str) -> str:
        """Name of the Triton model that serves ``part`` of this bundle."""
        return f"{self.name}_{part}"

    @property
    def denoisers(self) -> dict[str, int]:
        """The Triton models of its denoisers and the GPU of each; with a number in the name if they are several."""
        if len(self.devices) < 2:
            return {self.model("denoiser"): next(iter(self.devices), 0)}
        return {self.model(f"denoiser_{gpu}"): gpu for gpu in self.devices}

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        # Not msgspec's JSON, which makes null of the infinities in configurations of schedulers.
        text = json.dumps(msgspec.to_builtins(self), indent=2, ensure_ascii=False)
        (folder / FILE_NAME).write_text(text + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> Bundle:
        """The bundle of a model's version folder.

        Raises:
            ValueError: another version of imprompt exported it.
        """
        file = folder / FILE_NAME
        try:
            return msgspec.convert(json.loads(file.read_text(encoding="utf-8")), type=cls)
        except msgspec.ValidationError as error:
            raise ValueError(f"{file} is of another version of imprompt, export the bundle again: {error}") from None


def level_size(size: int, level: int) -> int:
    """``size`` after ``level`` stride-2 convolutions with padding 1."""
    for _ in range(level):
        size = (size + 1) // 2
    return size


def residual_names(count: int) -> tuple[str, ...]:
    """Names of ``count`` residuals: those of the down blocks and that of the middle block."""
    return (*(f"down_residual_{index}" for index in range(count - 1)), "mid_residual")


def feature_names(count: int) -> tuple[str, ...]:
    """Names of ``count`` features of T2I-Adapters."""
    return tuple(f"intrablock_residual_{index}" for index in range(count))
