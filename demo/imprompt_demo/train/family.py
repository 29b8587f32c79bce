"""The models of one training run and their dependencies: load trained models, or train them."""

from collections.abc import Callable
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor

from . import adapter, clip, controlnet, lcm, motion, publish, text, things, unet, vae
from .data import Pictures, pictures
from .loop import Plan, load_mean


class Family:
    """One training run. Trained models are loaded from the folder; `train(stage)` trains one."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def train(self, stage: str, steps: int | None = None) -> None:
        """Run or resume one stage."""

        def plan(default: Plan) -> dict[str, Any]:
            return {"folder": self.folder, "plan": replace(default, steps=steps) if steps else default}

        match stage:
            case "vae":
                vae.train(data=self.data, **plan(vae.PLAN))
            case "clip":
                clip.train(data=self.data, **plan(clip.PLAN))
            case "unet":
                unet.train(latents=self.latents, captions=self.captions, **plan(unet.PLAN))
            case "plain" | "plus":
                features = self.features[stage]
                adapter.train(
                    stage,
                    unet=self.unet,
                    latents=self.latents,
                    captions=self.captions,
                    features=features,
                    **plan(adapter.PLAN),
                )
            case "controlnet":
                controlnet.train(
                    unet=self.unet,
                    data=self.data,
                    latents=self.latents,
                    captions=self.captions,
                    **plan(controlnet.PLAN),
                )
            case "lcm":
                lcm.train(
                    unet=self.with_image_prompt,
                    latents=self.latents,
                    captions=self.captions,
                    references=self.features["plain"][0],
                    **plan(lcm.PLAN),
                )
            case "motion":
                material = self._cached("clips", lambda: motion.clips(self.vae, self.towers))
                motion.train(unet=self.with_image_prompt, material=material, **plan(motion.PLAN))
            case "things":
                things.train(data=self.data, **plan(things.PLAN))
            case "publish":
                publish.publish(self.folder, self.folder / "bundle")
            case _:
                raise SystemExit(f"unknown stage {stage!r}")

    @cached_property
    def data(self) -> Pictures:
        """All training pictures."""
        return pictures(self.folder)

    @cached_property
    def vae(self) -> AutoencoderKL:
        """The trained autoencoder with standardized latents."""
        return vae.load(self.folder)

    @cached_property
    def towers(self) -> clip.Towers:
        """The trained CLIP towers."""
        return load_mean("clip", self.folder, clip.build(self.folder)).requires_grad_(False)

    @cached_property
    def latents(self) -> Tensor:
        """Latents of all pictures, [N, 4, 16, 16]."""
        return self._cached("latents", lambda: vae.encode_all(self.vae, self.data))

    @cached_property
    def captions(self) -> text.Captions:
        """Encoded captions of all pictures."""
        return text.Captions(
            **self._cached("captions", lambda: text.captions(self.towers, self.data.looks, self.data.layouts))
        )

    @cached_property
    def unet(self) -> UNet2DConditionModel:
        """The trained UNet, frozen."""
        return load_mean("unet", self.folder, unet.build()).requires_grad_(False)

    @cached_property
    def with_image_prompt(self) -> UNet2DConditionModel:
        """The base with the trained `plain` adapter, frozen."""
        return load_mean("plain", self.folder, adapter.build("plain", self.unet)).requires_grad_(False)

    @cached_property
    def features(self) -> dict[str, tuple[Tensor, Tensor]]:
        """For each kind of adapter: the image features of all pictures, and the features for no image."""
        embeds, hidden = self._cached("features", lambda: clip.image_features(self.towers, self.data))
        with torch.no_grad():
            gray = self.towers.vision(torch.zeros(1, 3, 64, 64), output_hidden_states=True).hidden_states[-2]
        return {"plain": (embeds, torch.zeros_like(embeds[:1])), "plus": (hidden, gray)}

    def _cached(self, name: str, make: Callable[[], Any]) -> Any:
        """Return the result of `make`, computed once and cached in the run folder."""
        file = self.folder / f"{name}.cache"
        if not file.exists():
            torch.save(make(), file.with_suffix(".part"))
            file.with_suffix(".part").replace(file)
        return torch.load(file, weights_only=True)
