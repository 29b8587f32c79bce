"""The tables of a bundle file, as `BundleFile` holds them."""

from __future__ import annotations

from typing import Any, Literal

import msgspec


class Section(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A table of the bundle file."""


class IPAdapterSection(Section, frozen=True):
    """An IP-Adapter, with the parameters of diffusers' `load_ip_adapter`; `path` may also be the file itself."""

    name: str
    path: str
    weight_name: str | None = None
    subfolder: str = ""
    image_encoder_folder: str | Literal[False] = "image_encoder"


class NetworkSection(Section, frozen=True):
    """A network in a diffusers folder, or in a single file with the parameters of diffusers' `from_single_file`."""

    path: str
    weight_name: str | None = None
    """The single file in the folder or repository `path`; `path` may also be the file itself."""
    config: str | None = None
    """For a single file: the folder or hub id with its configuration."""
    variant: str | None = None


class ControlNetSection(NetworkSection, frozen=True, kw_only=True):
    """A ControlNet, with its name in requests."""

    name: str


class T2IAdapterSection(Section, frozen=True):
    """A T2I-Adapter: its name in requests and its diffusers folder."""

    name: str
    path: str
    variant: str | None = None


class MotionAdapterSection(Section, frozen=True):
    """An AnimateDiff motion adapter: its diffusers folder."""

    path: str
    variant: str | None = None


class TextualInversionSection(Section, frozen=True):
    """A textual inversion embedding, with the parameters of diffusers' `load_textual_inversion`.

    `token` is the word, or the list of words, that stands for it in prompts; None: the name in the file.
    """

    path: str
    weight_name: str | None = None
    subfolder: str | None = None
    token: str | tuple[str, ...] | None = None


class FaceEncoderSection(Section, frozen=True):
    """A folder of insightface models, so that FaceID adapters take pictures of people, and the detector's settings."""

    path: str
    det_size: tuple[int, int] = (640, 640)
    det_thresh: float = 0.5


class LoraSection(Section, frozen=True):
    """A LoRA, with the parameters of diffusers' `load_lora_weights`: fused into the base, or chosen by requests."""

    path: str
    weight_name: str | None = None
    subfolder: str | None = None
    scale: float | None = None
    fused: bool = True
    name: str | None = None
    """The name in requests, for a LoRA that is not fused."""


class EngineSection(Section, frozen=True):
    """The backend of the engines and its options.

    `host` names the process that hosts the encoders and the VAE (`python`, or `native` for Triton's own backends).
    `threads` are those of one engine call on the CPU; 0 means one per core. `devices` are the GPUs that get a denoiser
    each. `min_snr_db` is the minimum quality of int8 and fp8 (`quality.Quality`). `targets` are the compute
    capabilities that TensorRT-RTX builds for. `refit` says whether the weights of TensorRT engines can be replaced
    later.
    """

    backend: str = "onnxruntime"
    precision: str = "fp32"
    host: str = "python"
    threads: int = 0
    devices: tuple[int, ...] = ()
    min_snr_db: float = 10.0
    targets: tuple[str, ...] = ("SM80", "SM86", "SM89", "SM120")
    refit: bool = False


class DefaultsSection(Section, frozen=True):
    """Values of request parameters for requests that leave them out; None: as in diffusers' pipelines.

    `scheduler` and `scheduler_config` replace the scheduler of the base: requests start from this one.
    """

    scheduler: str | None = None
    scheduler_config: dict[str, Any] = {}
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    guidance_rescale: float | None = None

    @property
    def values(self) -> dict[str, int | float]:
        """The defaults of parameters with a number."""
        names = ("num_inference_steps", "guidance_scale", "guidance_rescale")
        return {name: value for name in names if (value := getattr(self, name)) is not None}
