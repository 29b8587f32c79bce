"""diffusers as the oracle: pipelines from the tiny folders, and the distance between two pictures."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import numpy.typing as npt
import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline
from PIL import Image

Pictures = npt.NDArray[np.uint8]


@dataclass(frozen=True, kw_only=True, slots=True)
class Adapter:
    """Location of an IP-Adapter, as arguments of `load_ip_adapter` (FaceID: `subfolder=None`, no encoder folder)."""

    path: str | Path
    weight_name: str
    subfolder: str | None = "models"
    image_encoder_folder: str | None = "image_encoder"


def pipeline(
    base_folder: str | Path,
    adapters: Sequence[Adapter] = (),
    cls: type[DiffusionPipeline] = StableDiffusionPipeline,
    scheduler: str | None = None,
    scheduler_config: Mapping[str, Any] | None = None,
    *,
    safety_checker: bool = False,
    **components: Any,
) -> Any:
    """Load a folder on the CPU in fp32, then the adapters with diffusers' `load_ip_adapter`.

    `scheduler` is the name of a diffusers class to create from the folder's scheduler configuration, `scheduler_config`
    overrides values of that configuration, and `components` (`controlnet=...`, `motion_adapter=...`) are passed to
    `from_pretrained`.
    """
    if not safety_checker and "safety_checker" in cls._optional_components:
        components |= {"safety_checker": None, "requires_safety_checker": False}
    if any(Path(base_folder).glob("unet/*.fp16.safetensors")):
        components |= {"variant": "fp16"}
    pipe = cls.from_pretrained(base_folder, dtype=torch.float32, local_files_only=True, **components)
    if adapters:
        # As in diffusers, the first adapter with an image encoder loads it, and the others share it.
        encoders = [adapter.image_encoder_folder for adapter in adapters if adapter.image_encoder_folder]
        pipe.load_ip_adapter(
            [str(adapter.path) for adapter in adapters],
            subfolder=[adapter.subfolder for adapter in adapters],
            weight_name=[adapter.weight_name for adapter in adapters],
            image_encoder_folder=encoders[0] if encoders else None,
            local_files_only=True,
        )
    if scheduler or scheduler_config:
        scheduler_class = getattr(diffusers, scheduler) if scheduler else type(pipe.scheduler)
        pipe.scheduler = scheduler_class.from_config(pipe.scheduler.config, **(scheduler_config or {}))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def show_face(
    pipe: Any, pictures: list[Image.Image], *, adapter: int = 0, shortcut: bool, guidance: bool = True
) -> None:
    """Pass cropped faces to a FaceID-plus adapter, as in diffusers' guide; `shortcut` is True only for v2.

    They stay in the projection layer until the next call, and are valid for one picture per prompt.
    """
    hidden_states, unconditional = pipe.encode_image(pictures, "cpu", 1, True)
    projection = pipe.unet.encoder_hid_proj.image_projection_layers[adapter]
    projection.clip_embeds = torch.stack([unconditional, hidden_states] if guidance else [hidden_states])
    projection.shortcut = shortcut


def generate(pipe: Any, *, seed: int | Sequence[int] = 0, **arguments: Any) -> Pictures:
    """Run the pipeline, by default in four steps; return uint8 pictures [N, H, W, 3], or clips [N, F, H, W, 3]."""
    seeds = [seed] if isinstance(seed, int) else list(seed)
    generators = [torch.Generator("cpu").manual_seed(one) for one in seeds]
    arguments = {"prompt": "a photo of a cat", "num_inference_steps": 4, **arguments}
    output = pipe(generator=generators if len(generators) > 1 else generators[0], **arguments)
    pictures = output.frames if hasattr(output, "frames") else output.images
    return np.stack([as_array(picture) for picture in pictures])


def as_array(picture: Image.Image | Sequence[Image.Image] | Pictures) -> Pictures:
    """Convert a PIL image, or a list of them, to a uint8 array."""
    if isinstance(picture, Image.Image):
        return np.asarray(picture.convert("RGB"))
    return np.stack([np.asarray(one) for one in picture])


def picture_distance(a: Any, b: Any) -> tuple[int, float]:
    """Return the largest and the mean difference in uint8 levels.

    Raises:
        ValueError: the shapes differ, or the pictures are not uint8.
    """
    first, second = (as_array(x) if not isinstance(x, np.ndarray) else x for x in (a, b))
    if first.shape != second.shape or first.dtype != np.uint8 or second.dtype != np.uint8:
        raise ValueError(f"cannot compare {first.shape} {first.dtype} with {second.shape} {second.dtype}")
    difference = np.abs(first.astype(np.int16) - second.astype(np.int16))
    return int(difference.max()), float(difference.mean())
