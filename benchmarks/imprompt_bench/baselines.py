"""Baselines that produce the same picture as the server: diffusers, eager or compiled, and the engines alone."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers import DiffusionPipeline
from torch._inductor import config as inductor

from imprompt_bench.checkpoints import ADAPTER, Checkpoints, require
from imprompt_bench.systems import Answer, Arguments, System
from imprompt_bench.workload import Workload
from imprompt_serving import tensor_names
from imprompt_serving.backends import Engine, get_backend
from imprompt_serving.denoiser.conditioning import Conditioner
from imprompt_serving.families import get_family
from imprompt_serving.job_request import AdapterOptions, JobRequest
from imprompt_serving.parameters import Settings
from imprompt_serving.pipeline.images import clip_pixels
from imprompt_serving.pipeline.text import PromptTokenizer
from imprompt_serving.specs import Bundle


class Diffusers:
    """The diffusers pipeline with the same checkpoints."""

    def __init__(self, folder: Path, dtype: torch.dtype = torch.float32) -> None:
        checkpoints = Checkpoints(folder=folder)
        self._pipeline: Any = DiffusionPipeline.from_pretrained(checkpoints.base, dtype=dtype, local_files_only=True)
        self._pipeline.load_ip_adapter(
            str(folder), subfolder="models", weight_name=checkpoints.weight_name, local_files_only=True
        )
        self._pipeline.set_progress_bar_config(disable=True)

    def choose_threads(self, arguments: Arguments) -> None:
        """Set torch to one thread or all cores, whichever generates this picture faster."""

        def seconds(threads: int) -> float:
            torch.set_num_threads(threads)
            began = time.perf_counter()
            self(arguments)
            return time.perf_counter() - began

        self(arguments)  # warm-up: the first call allocates memory
        torch.set_num_threads(min((1, os.cpu_count() or 1), key=seconds))

    def compile(self) -> None:
        """Compile the UNet at its next call, for the current number of threads and with its weights frozen."""
        inductor.freezing = True
        self._pipeline.unet = torch.compile(self._pipeline.unet)

    def __call__(self, arguments: Arguments) -> Answer:
        given = {name: value for name, value in arguments.items() if name not in ("model", "seed", "ip_adapter_image")}
        generator = torch.Generator("cpu").manual_seed(arguments["seed"])
        pictures = self._pipeline(
            **given, ip_adapter_image=arguments["ip_adapter_image"][ADAPTER], generator=generator, output_type="pil"
        ).images
        return Answer(np.asarray(pictures[0]), {})


class BareLoop:
    """The exported engines and a diffusers scheduler in this process, called in sequence without a server."""

    def __init__(self, repository: Path, name: str) -> None:
        self._folder = repository / f"{name}_denoiser" / "1"
        bundle = self._bundle = Bundle.load(self._folder)

        load = partial(get_backend(bundle.backend).load, threads=bundle.threads)

        def model(part: str) -> Engine:
            return load(repository / f"{name}_{part}" / "1" / "model.onnx")

        self._text = [
            (PromptTokenizer(repository / name / "1", encoder), model(encoder.engine))
            for encoder in bundle.text_encoders
        ]
        (self._image_encoder,) = bundle.image_encoders
        self._image = model(f"image_encoder_{self._image_encoder.name}")
        self._vae = model("vae_decoder")
        self._unet = load(self._folder / "unet.onnx")
        projection = load(self._folder / f"image_projection_{ADAPTER}.onnx")
        self._conditioner = Conditioner(bundle, {ADAPTER: projection})

    @torch.inference_mode()
    def __call__(self, arguments: Arguments) -> Answer:
        latents = self._denoise(arguments, self._conditioning(arguments))
        return Answer(self._vae.run({"latents": latents.numpy()})["images"][0], {})

    def _conditioning(self, arguments: Arguments) -> dict[str, np.ndarray]:
        """Compute all UNet inputs except latents and timestep, with one row per guidance branch."""
        tensors: dict[str, torch.Tensor] = {}
        for prefix in (tensor_names.NEGATIVE, ""):
            embeds = self._embeds(arguments[f"{prefix}prompt"])
            tensors |= {f"{prefix}{name}": torch.from_numpy(value) for name, value in embeds.items()}
        pixels = [clip_pixels(image, self._image_encoder) for image in arguments["ip_adapter_image"][ADAPTER]]
        features = torch.from_numpy(self._image.run({"pixel_values": np.stack(pixels)})["image_embeds"])
        tensors |= {
            tensor_names.image_embeds(ADAPTER): features,
            tensor_names.NEGATIVE + tensor_names.image_embeds(ADAPTER): torch.zeros_like(features),
        }
        conditioning = self._conditioner(_job(arguments), tensors).at(0, 1)
        return {name: tensor.numpy() for name, tensor in conditioning.items()}

    def _embeds(self, prompt: str) -> dict[str, np.ndarray]:
        answers = [
            engine.run({"input_ids": tokenizer.chunks(prompt, 1)[0][0].ids, "clip_skip": np.zeros((1, 1), np.int64)})
            for tokenizer, engine in self._text
        ]
        return get_family(self._bundle.family).join_text(answers)

    def _denoise(self, arguments: Arguments, conditioning: dict[str, np.ndarray]) -> torch.Tensor:
        bundle = self._bundle
        scheduler = getattr(diffusers, bundle.scheduler).from_config(bundle.scheduler_config)
        scheduler.set_timesteps(arguments["num_inference_steps"])
        generator = torch.Generator("cpu").manual_seed(arguments["seed"])
        size = (arguments["height"] // bundle.vae_scale_factor, arguments["width"] // bundle.vae_scale_factor)
        latents = torch.randn(1, bundle.latent_channels, *size, generator=generator) * scheduler.init_noise_sigma
        for timestep in scheduler.timesteps:
            sample = scheduler.scale_model_input(torch.cat([latents] * 2), timestep)
            inputs = {"sample": sample.numpy(), "timestep": np.full(2, timestep, np.float32), **conditioning}
            unconditional, conditional = torch.from_numpy(self._unet.run(inputs)["noise_pred"]).chunk(2)
            noise = unconditional + arguments["guidance_scale"] * (conditional - unconditional)
            latents = scheduler.step(noise, timestep, latents).prev_sample
        return latents


def _job(arguments: Arguments) -> JobRequest:
    """Build the job request that the conditioner needs."""
    return JobRequest(
        id="bare",
        settings=Settings.with_defaults(
            height=arguments["height"],
            width=arguments["width"],
            num_inference_steps=arguments["num_inference_steps"],
            guidance_scale=arguments["guidance_scale"],
            strength=1.0,
        ),
        seeds=(arguments["seed"],),
        adapters=(AdapterOptions(name=ADAPTER),),
    )


def check_memory(name: str, parameters: Mapping[str, int], size: int, precision: str = "fp32") -> None:
    """Check that a baseline, next to a bundle of this precision, fits into the memory that is free.

    Its needs are its weights (twice for `compiled`, because freezing copies them), and its largest activations: the
    attention of both guidance branches and eight heads over all latent positions.

    Raises:
        BenchError: less memory than that is free.
    """
    weights = sum(parameters.values()) * (2 if name == "compiled" else 1)
    attention = 2 * 8 * (size // 8) ** 4
    require(f"baseline {name}", _dtype(precision).itemsize * (weights + 2 * attention) / 2**30)


def _dtype(precision: str) -> torch.dtype:
    """Return the type in which diffusers computes next to a bundle of this precision."""
    return torch.bfloat16 if precision == "bf16" else torch.float32


def load_baseline(name: str, folder: Path, model: str, precision: str, workload: Workload) -> System:
    """Load a baseline, `eager`, `compiled` or `bare`, from the checkpoints and engines in `folder`.

    diffusers computes in bf16 if that is the `precision` of the bundle, and otherwise in fp32.
    """
    if name == "bare":
        return BareLoop(folder / "repository", model)
    system = Diffusers(folder, _dtype(precision))
    system.choose_threads(workload.request(0, num_inference_steps=1))
    if name == "compiled":
        system.compile()
    return system
