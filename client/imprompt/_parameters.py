"""The keyword arguments of a request: those of the diffusers pipelines, with their meaning and defaults."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias, TypedDict

import numpy as np

from imprompt._images import ImageInput

Images: TypeAlias = ImageInput | Sequence[ImageInput]
PerAdapterImages: TypeAlias = ImageInput | Sequence[Images | None] | Mapping[str, Images]
Embeds: TypeAlias = np.ndarray[Any, Any] | Any
"""A numpy array or torch tensor."""
Scale: TypeAlias = float | Mapping[str, Any] | Sequence[float]


class Parameters(TypedDict, total=False):
    """All optional; None is the same as not given.

    A server may know more or fewer of them: it says so itself, and what it does not know is refused by name.
    """

    negative_prompt: str | Sequence[str] | None
    """What to stay away from: one for all prompts, or one each."""
    prompt_2: str | Sequence[str] | None
    """For the second text encoder of SDXL (default: `prompt`)."""
    negative_prompt_2: str | Sequence[str] | None

    ip_adapter_image: PerAdapterImages | None
    """Image prompts. As in diffusers: a picture, or a list with an entry for each adapter of the bundle (a picture, a
    list of pictures, or None). Or a dict by adapter name. The only adapter of a bundle takes a flat list."""
    negative_ip_adapter_image: PerAdapterImages | None
    """Pictures to stay away from (default: none, or the encoding of an empty picture, as the adapter was trained)."""
    ip_adapter_image_embeds: Embeds | Sequence[Embeds | None] | Mapping[str, Embeds] | None
    """Embeddings in place of pictures, as `encode_image` and diffusers give them: [2 (negative, positive) or
    1 (positive), pictures, ...] floats; a list with one for each adapter, or a dict by adapter name."""
    ip_adapter_scale: Scale | Sequence[Scale] | Mapping[str, Scale | Sequence[float]] | None
    """Strength of the image prompt (default 1.0): a number, or a dict by block
    (`{"up": {"block_0": [0.0, 1.0, 0.0]}}`); a list with one of those for each adapter, or a dict by adapter name.
    With masks an adapter's entry may be a list: one number for each of its pictures."""
    ip_adapter_masks: PerAdapterImages | Sequence[Any] | None
    """Regions: one mask for each picture, shaped like `ip_adapter_image`; or diffusers' tensors [1, pictures, H, W]."""
    ip_adapter_start: float | Sequence[float] | None
    """Share of the steps (0 to 1) at which image prompts set in; one for all adapters, or one each."""
    ip_adapter_end: float | Sequence[float] | None
    """Share of the steps (0 to 1) at which image prompts end; one for all adapters, or one each."""
    ip_adapter_weight_type: str | Sequence[str] | None
    """`linear`, `style`, `composition`, `style and composition`, `ease in`, `ease out`, `strong middle`; one for all
    adapters, or one each."""

    image: Images | None
    """Picture to start from: image-to-image, or inpainting with `mask_image`."""
    mask_image: Images | None
    """White is repainted, black stays."""
    strength: float | None
    """Share of noise on `image` or `video`, 0 to 1."""
    padding_mask_crop: int | None
    """Pixels around the mask to crop to, for inpainting of a detail."""

    control_image: Images | Sequence[Sequence[ImageInput]] | None
    """One for each net in `controlnet`. Lists in a list as in diffusers: for clips the frames of each net, for several
    prompts the images of each prompt."""
    control_image_annotator: str | Sequence[str] | None
    """What makes the control image of a photo: `none` (default) or `canny`; one for all nets, or one each."""
    controlnet: str | Sequence[str] | None
    """Names of ControlNets of the bundle (default: all of them)."""
    controlnet_conditioning_scale: float | Sequence[float] | None
    control_guidance_start: float | Sequence[float] | None
    """Share of the steps (0 to 1) at which a ControlNet sets in."""
    control_guidance_end: float | Sequence[float] | None
    """Share of the steps (0 to 1) at which a ControlNet ends."""
    guess_mode: bool | None

    num_frames: int | None
    """Frames of a clip: text-to-video."""
    video: Sequence[ImageInput] | np.ndarray[Any, Any] | None
    """Frames to start from: video-to-video."""
    context_length: int | None
    """Frames that the motion modules see at once; longer clips run in overlapping windows."""
    context_stride: int | None
    context_overlap: int | None

    height: int | None
    """Pixels, a multiple of 8 (default: the bundle's)."""
    width: int | None
    """Pixels, a multiple of 8 (default: the bundle's)."""
    original_size: Sequence[int] | None
    """SDXL: (height, width) of the picture that the model imagines."""
    crops_coords_top_left: Sequence[int] | None
    target_size: Sequence[int] | None
    negative_original_size: Sequence[int] | None
    negative_crops_coords_top_left: Sequence[int] | None
    negative_target_size: Sequence[int] | None

    num_inference_steps: int | None
    """Denoising steps (default 50)."""
    guidance_scale: float | None
    """Classifier-free guidance; at most 1 switches it off."""
    guidance_rescale: float | None
    """Rescaling of the guided noise, 0 to 1 (arXiv 2305.08891)."""
    eta: float | None
    """Share of noise in each step of DDIM and TCD, 0 to 1."""
    clip_skip: int | None
    """Layers of the text encoder to leave out."""
    num_images_per_prompt: int | None
    seed: int | Sequence[int] | None
    """What `torch.Generator("cpu").manual_seed` takes: one for all pictures, or one each, each of 64 bits, signed or
    not (-1 is 2**64 - 1). Random if not given; the result tells which."""
    scheduler: str | None
    """diffusers class name (default: the bundle's)."""
    scheduler_config: Mapping[str, Any] | None
    """Values that replace those of the scheduler's configuration; diffusers' whole `dict(pipe.scheduler.config)` will
    do."""

    output_type: str | None
    """`pil` (default), `np` (uint8 [height, width, 3]) or `latent`."""
    output_format: str | None
    """Send pictures encoded (`png`, `jpeg`, `webp`) instead of raw."""
    progress_every: int | None
    """Steps between two progress events; for `stream` only."""
    preview: bool | None
    """Whether progress events carry a small picture; for `stream` only."""
    priority: int | None
    timeout: float | None
    """Seconds after which the caller does not wait any more and the work stops."""
