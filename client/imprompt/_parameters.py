"""Types of the keyword arguments of a request, and their names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeAlias

import numpy as np

from imprompt._images import ImageInput

Images: TypeAlias = ImageInput | Sequence[ImageInput]
PerAdapterImages: TypeAlias = ImageInput | Sequence[Images | None] | Mapping[str, Images]
Embeds: TypeAlias = np.ndarray[Any, Any] | Any
"""A numpy array or torch tensor."""
Scale: TypeAlias = float | Mapping[str, Any] | Sequence[float]
OutputType: TypeAlias = Literal["pil", "np", "latent"]

# Made by imprompt_serving.signatures: types
WeightType: TypeAlias = Literal[
    "linear",
    "ease in",
    "ease out",
    "ease in-out",
    "reverse in-out",
    "weak input",
    "weak middle",
    "weak output",
    "strong middle",
    "style",
    "composition",
    "style and composition",
]
Annotator: TypeAlias = Literal[
    "none",
    "canny",
]
Scheduler: TypeAlias = Literal[
    "DDIMScheduler",
    "DDPMScheduler",
    "DEISMultistepScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSDEScheduler",
    "DPMSolverSinglestepScheduler",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "HeunDiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "LCMScheduler",
    "LMSDiscreteScheduler",
    "PNDMScheduler",
    "TCDScheduler",
    "UniPCMultistepScheduler",
]
OutputFormat: TypeAlias = Literal[
    "png",
    "jpeg",
    "webp",
    "gif",
]
NAMES = (
    "negative_prompt",
    "prompt_2",
    "negative_prompt_2",
    "ip_adapter_image",
    "negative_ip_adapter_image",
    "ip_adapter_image_embeds",
    "ip_adapter_scale",
    "ip_adapter_masks",
    "ip_adapter_start",
    "ip_adapter_end",
    "ip_adapter_weight_type",
    "image",
    "mask_image",
    "strength",
    "padding_mask_crop",
    "control_image",
    "control_image_annotator",
    "controlnet",
    "controlnet_conditioning_scale",
    "control_guidance_start",
    "control_guidance_end",
    "guess_mode",
    "num_frames",
    "video",
    "context_length",
    "context_stride",
    "context_overlap",
    "height",
    "width",
    "original_size",
    "crops_coords_top_left",
    "target_size",
    "negative_original_size",
    "negative_crops_coords_top_left",
    "negative_target_size",
    "num_inference_steps",
    "guidance_scale",
    "guidance_rescale",
    "guidance_end",
    "eta",
    "clip_skip",
    "num_images_per_prompt",
    "seed",
    "scheduler",
    "scheduler_config",
    "output_type",
    "output_format",
    "timeout",
    "priority",
    "progress_every",
    "preview",
)
# End


def given(arguments: Mapping[str, Any]) -> dict[str, object]:
    """The parameters among the local variables of a method, with those that it does not know (`unknown`)."""
    known = {name: value for name, value in arguments.items() if name in NAMES and value is not None}
    return {**known, **arguments["unknown"]}
