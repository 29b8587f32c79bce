"""The diffusers schedulers that requests may choose, and what they take."""

from __future__ import annotations

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
