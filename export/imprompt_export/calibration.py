"""Run the denoising loop of a bundle without a server, to record the calls of its networks.

The pipeline's own text encoders encode the prompts, all other networks are engines, and image prompts are pictures that
the bundle itself has generated.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import msgspec
import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from imprompt_export.checkpoints import Checkpoints
from imprompt_serving import tensor_names
from imprompt_serving.backends import Engine
from imprompt_serving.denoiser.assembly import assemble
from imprompt_serving.denoiser.batch import Batcher, RowSlice
from imprompt_serving.denoiser.job import Job
from imprompt_serving.job_request import AdapterOptions, ControlOptions, JobRequest
from imprompt_serving.parameters import Settings
from imprompt_serving.specs import Adapter, Bundle

Arrays = Mapping[str, np.ndarray]
GUIDANCE_SCALE = 7.5
NEGATIVE_PROMPT = "blurry, low quality"


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """One request."""

    prompt: str
    steps: int
    seed: int
    scale: float = 0.0
    """Scale of every image prompt; 0 for no image prompts."""
    controlled: bool = False
    """Whether to apply all ControlNets and T2I-Adapters."""


RUNS = (
    Run(prompt="a photo of a dog in a park, sunny day", steps=3, seed=0),
    Run(prompt="a portrait of a woman, oil painting", steps=3, seed=1, scale=1.0),
    Run(prompt="a red car in front of an old house", steps=4, seed=2, scale=0.6, controlled=True),
    Run(prompt="", steps=4, seed=3, scale=0.8),
)
"""The runs that calibration records. They visit different timesteps over the whole range.

More steps take more time and gain nothing: with 7 to 10 of them, the embedded bundle in int8 was not closer to fp32.
"""
HELD_OUT = Run(prompt="a bowl of fruit on a wooden table, best quality", steps=5, seed=4, scale=0.7, controlled=True)
"""A run that calibration does not see, to measure the quality of the result."""


@dataclass(kw_only=True, slots=True)
class Calls:
    """The recorded calls of a network, in order."""

    inputs: list[Arrays] = field(default_factory=list)
    outputs: list[Arrays] = field(default_factory=list)


class Recorder:
    """An engine that adds its calls to `calls`."""

    def __init__(self, engine: Engine, calls: Calls) -> None:
        self._engine, self._calls = engine, calls

    def run(self, tensors: Arrays) -> dict[str, np.ndarray]:
        answer = self._engine.run(tensors)
        self._calls.inputs.append(tensors)
        self._calls.outputs.append(answer)
        return answer


class CalibrationRunner:
    """Generates pictures of the usual size of `bundle` in this process.

    Args:
        bundle: the bundle; its motion adapter is ignored.
        checkpoints: its checkpoints, for the text encoders and the preprocessing of image prompts.
        engine: loads an engine by its name. Those of the denoising loop are loaded for each picture, and the VAE and
            image encoders for each call: all of them together would need too much memory.
    """

    def __init__(self, bundle: Bundle, checkpoints: Checkpoints, engine: Callable[[str], Engine]) -> None:
        self.bundle = msgspec.structs.replace(bundle, motion=None)
        self._checkpoints, self._engine = checkpoints, engine

    def pictures(self, runs: Sequence[Run]) -> np.ndarray:
        """Generate a picture for each run, the image prompt of the next one; return the last, uint8 [H, W, 3]."""
        picture: np.ndarray | None = None
        for run in runs:
            picture = self.picture(run, self.encode(run, picture))
        assert picture is not None
        return picture

    @torch.inference_mode()
    def picture(self, run: Run, tensors: dict[str, Tensor]) -> np.ndarray:
        """Generate the picture of `run`, uint8 [H, W, 3], from the tensors that `encode` returned."""
        latents = self._denoise(run, tensors)
        return self._engine("vae_decoder").run({"latents": latents})["images"][0]

    def _denoise(self, run: Run, tensors: dict[str, Tensor]) -> np.ndarray:
        request, (conditioner, networks) = self._request(run), assemble(self.bundle, self._engine)
        job = Job(request, self.bundle, conditioner(request, tensors), tensors)
        batcher = Batcher(self.bundle)
        while not job.done:
            parts = [RowSlice(job, 0, job.rows)]
            job.add_output_rows(networks(parts, batcher.inputs(parts)))
        return job.result().numpy()

    def _request(self, run: Run) -> JobRequest:
        bundle, shapes = self.bundle, self.bundle.shapes
        return JobRequest(
            id="calibration",
            task=bundle.plain_task,
            settings=Settings.with_defaults(
                height=shapes.height.opt,
                width=shapes.width.opt,
                num_inference_steps=run.steps,
                guidance_scale=GUIDANCE_SCALE,
                strength=1.0,
            ),
            seeds=(run.seed,),
            adapters=tuple(AdapterOptions(name=a.name, scale=run.scale) for a in bundle.adapters if run.scale),
            controls=tuple(ControlOptions(name=name) for name in bundle.net_names if run.controlled),
        )

    @torch.inference_mode()
    def encode(self, run: Run, picture: np.ndarray | None = None) -> dict[str, Tensor]:
        """Encode the prompts of `run`; `picture` is its image prompt and control image."""
        return self._texts(run.prompt) | self.encode_pictures(run, picture)

    @torch.inference_mode()
    def encode_pictures(self, run: Run, picture: np.ndarray | None = None) -> dict[str, Tensor]:
        """Encode the image prompts of `run`, and prepare its control images and its mask."""
        shapes = self.bundle.shapes
        size = shapes.height.opt, shapes.width.opt
        unit = torch.zeros(1, 3, *size) if picture is None else torch.from_numpy(picture).permute(2, 0, 1)[None] / 255
        tensors: dict[str, Tensor] = {}
        for adapter in self.bundle.adapters if run.scale else ():
            tensors |= self._image_prompt(adapter, run.seed, unit)
        for name in self.bundle.net_names if run.controlled else ():
            t2i = self.bundle.t2i_adapter(name)
            gray = t2i is not None and t2i.channels == 1
            tensors[tensor_names.control_image(name)] = unit.mean(1, keepdim=True) if gray else unit
        if self.bundle.unet_channels != self.bundle.latent_channels:
            tensors |= self._mask(unit)
        return tensors

    def _texts(self, prompt: str) -> dict[str, Tensor]:
        names = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
        encoded = self._checkpoints.pipeline.encode_prompt(
            prompt=prompt,
            device="cpu",
            num_images_per_prompt=1,
            do_classifier_free_guidance=True,
            negative_prompt=NEGATIVE_PROMPT,
        )
        return dict(zip(names, encoded, strict=False))

    def _image_prompt(self, adapter: Adapter, seed: int, unit: Tensor) -> dict[str, Tensor]:
        """Encode two image prompts, the picture and its mirror image: two do not fill a bucket, so there is padding."""
        features = None
        if adapter.image_encoder is not None:
            features = self._image_features(adapter, torch.cat([unit, unit.flip(-1)]))
        if not adapter.uses_face:
            assert features is not None
            return dict(zip(_both(tensor_names.image_embeds(adapter.name)), features, strict=True))
        generator = torch.Generator().manual_seed(seed)
        faces = F.normalize(torch.randn(2, *adapter.embed_shape, generator=generator), dim=-1)
        tensors = dict(
            zip(_both(tensor_names.image_embeds(adapter.name)), (faces, torch.zeros_like(faces)), strict=True)
        )
        if features is not None:
            tensors |= zip(_both(tensor_names.clip_embeds(adapter.name)), features, strict=True)
        return tensors

    def _image_features(self, adapter: Adapter, unit: Tensor) -> tuple[Tensor, Tensor]:
        """Return the features of the pictures, and those of the unconditional branch."""
        assert adapter.image_encoder is not None
        engine = self._engine(f"image_encoder_{adapter.image_encoder}")
        processor = self._checkpoints.feature_extractors[adapter.image_encoder]
        pixels = processor(unit.clamp(0, 1), do_rescale=False, return_tensors="np").pixel_values
        if not adapter.uses_hidden_states:
            embeds = torch.from_numpy(engine.run({"pixel_values": pixels})["image_embeds"])
            return embeds, torch.zeros_like(embeds)
        states = [engine.run({"pixel_values": p})["hidden_states"] for p in (pixels, np.zeros_like(pixels))]
        return torch.from_numpy(states[0]), torch.from_numpy(states[1])

    def _mask(self, unit: Tensor) -> dict[str, Tensor]:
        """Return the inputs of inpainting: the mask covers the left half of the picture."""
        factor = self.bundle.vae_scale_factor
        kept = torch.ones_like(unit)
        kept[..., : unit.shape[-1] // 2] = 0
        moments = self._engine("vae_encoder").run({"sample": ((2 * unit - 1) * kept).numpy()})["moments"]
        return {"mask": 1 - kept[:, :1, ::factor, ::factor], "masked_image_moments": torch.from_numpy(moments)}


def _both(name: str) -> tuple[str, str]:
    """Return the names of a tensor in the conditional and the unconditional branch."""
    return name, tensor_names.NEGATIVE + name
