"""What a bundle can do, as clients read it (`Client.describe`)."""

from __future__ import annotations

from typing import Any

from imprompt_serving.specs import Bundle

SCHEDULERS: tuple[str, ...] = (
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
)
"""diffusers schedulers that work with a Stable Diffusion UNet."""

CUSTOM_STEPS: dict[str, tuple[str, ...]] = {
    "timesteps": (
        "DDPMScheduler",
        "DPMSolverMultistepScheduler",
        "DPMSolverSinglestepScheduler",
        "EulerDiscreteScheduler",
        "HeunDiscreteScheduler",
        "LCMScheduler",
        "TCDScheduler",
    ),
    "sigmas": ("EulerDiscreteScheduler", "UniPCMultistepScheduler"),
}
"""Schedulers whose `set_timesteps` takes `timesteps` or `sigmas`; the others choose their own."""


def capabilities(bundle: Bundle) -> dict[str, Any]:
    """Describe adapters, schedulers, defaults, and limits as plain JSON values."""
    shapes = bundle.shapes
    return {
        "name": bundle.name,
        "family": bundle.family,
        "backend": bundle.backend,
        "precision": bundle.precision,
        "ip_adapters": [
            {
                "name": adapter.name,
                "kind": adapter.kind,
                "image_tokens": adapter.num_tokens,
                "image_embeds": list(adapter.embed_shape),
                "takes_images": adapter.image_encoder is not None or bundle.finds_faces(adapter),
                "finds_faces": bundle.finds_faces(adapter),
            }
            for adapter in bundle.adapters
        ],
        "controlnets": list(bundle.net_names),
        "loras": list(bundle.loras),
        "video": bundle.motion is not None,
        "schedulers": list(SCHEDULERS),
        "defaults": {
            "height": bundle.default_height,
            "width": bundle.default_width,
            "scheduler": bundle.scheduler,
            **bundle.defaults,
        },
        "limits": {
            "height": [shapes.height.min, shapes.height.max],
            "width": [shapes.width.min, shapes.width.max],
            "rows": shapes.rows.max,
            **({"frames": [shapes.frames.min, shapes.frames.max]} if bundle.motion else {}),
            "image_tokens": shapes.image_tokens[-1],
        },
    }
