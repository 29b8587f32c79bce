"""Quantize the networks of a denoising step, the VAE's decoder, and image encoders to int8 after training.

Weights and activations of convolutions and matrix products become 8-bit integers (NNCF, with SmoothQuant:
https://arxiv.org/abs/2211.10438). Their ranges come from denoising runs of the bundle itself, over all timesteps.
Servers whose CPU has arithmetic for bf16 round everything else to bf16.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from enum import IntEnum
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import msgspec
import numpy as np
from torch import Tensor

from imprompt_export.calibration import HELD_OUT, RUNS, Arrays, CalibrationRunner, Calls, Recorder
from imprompt_export.checkpoints import Checkpoints
from imprompt_export.mixed_precision import save_for_bf16
from imprompt_export.quality import Quality, measure, picture_distance, step_networks
from imprompt_export.stages import Stages
from imprompt_serving.backends import Engine
from imprompt_serving.backends.openvino import OpenVinoEngine, has_bf16
from imprompt_serving.specs import Bundle

SAMPLES = 8
"""Largest number of calls that determine the ranges, spread over all calibration runs. 12 were not better."""
SMOOTHING = 0.25
"""Share of the activations' range that SmoothQuant moves into the weights; the paper's 0.5 gave 2 dB less."""
MIN_SNR_DB = 20.0
"""Minimum quality of networks that run once per request: there is little to gain, so an error of 10 % is too large."""
LATENTS_MARGIN = 1.5
"""Factor by which latents may exceed those of calibration before the VAE clips them.

There is one picture per calibration run, and requests with more guidance have larger latents. It costs 2 dB of 41.
"""
_PICTURE_INPUTS = ("sample", "latents", "pixel_values")
"""The inputs that hold a picture or its latents."""


class _Origin(IntEnum):
    """What a tensor depends on. The highest value of its inputs wins."""

    CONSTANT = 0
    PROMPT = 1
    """Prompts, time, sizes, or scales."""
    SAMPLE = 2


def quantize_bundle(
    bundle: Bundle,
    checkpoints: Checkpoints,
    files: Mapping[str, Path],
    min_snr_db: float,
    stages: Stages,
) -> tuple[dict[str, Path], list[Quality]]:
    """Quantize the networks among `files` that take the most time.

    Those that run once per request stay in fp32 if they would lose too much.

    Returns:
        The files with these replaced, and the quality of each network.
    """
    steps = step_networks(bundle)
    names = (*steps, "vae_decoder", *(f"image_encoder_{encoder.name}" for encoder in bundle.image_encoders))
    with stages.time("recording calls"):
        samples, prompt = _calibration_calls(bundle, checkpoints, files, names)
    with stages.time("running in fp32"):
        held_out = _run_held_out(bundle, checkpoints, files, names, prompt)
    for encoder, _ in checkpoints.family.text_encoders:
        getattr(checkpoints.pipeline, encoder).to("meta")  # all prompts are encoded, and NNCF needs the memory
    made, rows = dict(files), []
    for name in names:
        with stages.time(f"quantizing {name}"):
            smoothing = -1 if name == "vae_decoder" else SMOOTHING  # its few matrix products gain nothing
            made[name] = quantize(files[name], samples.pop(name), smoothing)
    with stages.time("comparing int8 with fp32"):
        for name in names:
            limit = min_snr_db if name in steps else max(min_snr_db, MIN_SNR_DB)
            row = measure(name, "int8", held_out.calls[name], OpenVinoEngine(made[name]), limit)
            if name not in steps and not row.snr_db >= limit:
                made[name], row = files[name], msgspec.structs.replace(row, used=False)
            rows.append(row)
        runner = CalibrationRunner(bundle, checkpoints, lambda name: OpenVinoEngine(made[name]))
        pictures = runner.encode_pictures(HELD_OUT, prompt)
        distance = picture_distance(runner.picture(HELD_OUT, held_out.tensors | pictures), held_out.picture)
    return made, [msgspec.structs.replace(row, picture_distance=distance) for row in rows]


def _calibration_calls(
    bundle: Bundle, checkpoints: Checkpoints, files: Mapping[str, Path], names: Sequence[str]
) -> tuple[dict[str, list[Arrays]], np.ndarray]:
    """Do the calibration runs, in bf16 on CPUs that are faster with it, which hardly changes the ranges.

    Returns:
        The inputs of all calls of the networks `names`, and a picture for the image prompt of the held-out run.
    """
    calls = {name: Calls() for name in names}
    runner = _recording_runner(bundle, checkpoints, files, calls, round_to_bf16=True)
    picture = runner.pictures(RUNS)
    samples = {name: recorded.inputs for name, recorded in calls.items()}
    samples["vae_decoder"] = [{"latents": LATENTS_MARGIN * call["latents"]} for call in samples["vae_decoder"]]
    return samples, picture


class _HeldOut(NamedTuple):
    """What happened in the held-out run in fp32."""

    calls: dict[str, Calls]
    """Calls of the networks that become int8."""
    tensors: dict[str, Tensor]
    """Encoded prompts and image prompts, and control images."""
    picture: np.ndarray
    """The result, uint8 [H, W, 3]."""


def _run_held_out(
    bundle: Bundle, checkpoints: Checkpoints, files: Mapping[str, Path], names: Sequence[str], prompt: np.ndarray
) -> _HeldOut:
    """Do the held-out run in fp32, with the image prompt `prompt`; record the calls of the networks `names`."""
    calls = {name: Calls() for name in names}
    runner = _recording_runner(bundle, checkpoints, files, calls, round_to_bf16=False)
    tensors = runner.encode(HELD_OUT, prompt)
    return _HeldOut(calls, tensors, runner.picture(HELD_OUT, tensors))


def _recording_runner(
    bundle: Bundle,
    checkpoints: Checkpoints,
    files: Mapping[str, Path],
    calls: Mapping[str, Calls],
    *,
    round_to_bf16: bool,
) -> CalibrationRunner:
    """Return a runner that adds the calls of each network in `calls` to its entry."""

    def engine(name: str) -> Engine:
        loaded = OpenVinoEngine(files[name], round_to_bf16=round_to_bf16)
        return Recorder(loaded, calls[name]) if name in calls else loaded

    return CalibrationRunner(bundle, checkpoints, engine)


def quantize(file: Path, samples: Sequence[Arrays], smoothing: float = SMOOTHING) -> Path:
    """Write an int8 version of the OpenVINO model `file` to a folder next to its own.

    The ranges of activations are those that occur with the inputs `samples`. `smoothing` is as in `SMOOTHING`; -1
    disables SmoothQuant and saves half of the calls.
    """
    os.environ.setdefault("NNCF_CI", "1")  # otherwise NNCF reports its use over the network
    import nncf
    import openvino
    from nncf.openvino import engine
    from nncf.quantization.range_estimator import RangeEstimatorParametersSet

    nncf.set_log_level("ERROR")
    model = openvino.Core().read_model(file)
    known = {port.any_name for port in model.inputs}
    chosen = samples[:: math.ceil(len(samples) / SAMPLES)]
    # Collect ranges in bf16 on CPUs that are faster with it. NNCF has no option for that.
    statistics_engine = partial(engine.OVNativeEngine, use_fp32_precision=not has_bf16())
    with mock.patch.object(engine, "OVNativeEngine", statistics_engine):
        quantized = nncf.quantize(
            model,
            nncf.Dataset([{name: value for name, value in sample.items() if name in known} for sample in chosen]),
            subset_size=len(chosen),
            model_type=nncf.ModelType.TRANSFORMER,
            ignored_scope=nncf.IgnoredScope(names=_not_quantized(model)),
            advanced_parameters=nncf.AdvancedQuantizationParameters(
                # Use 7-bit weights: CPUs without VNNI add pairs of products in 16 bits, which 8-bit weights overflow.
                overflow_fix=nncf.OverflowFix.ENABLE,
                disable_bias_correction=True,  # it is slow and brought no gain
                # By default NNCF averages the extremes of the samples, and so clips those of half of them.
                activations_range_estimator_params=RangeEstimatorParametersSet.MINMAX,
                smooth_quant_alphas=nncf.AdvancedSmoothQuantParameters(matmul=smoothing, convolution=-1),
            ),
        )
    target = file.parent.with_name(f"{file.parent.name}-int8") / file.name
    save_for_bf16(quantized, target)
    return target


def _not_quantized(model: Any) -> list[str]:
    """List the operations that do not become int8, at little cost in time.

    These are the first and last convolutions, those that read the residual stream without a norm (shortcuts and
    downsampling), products that depend only on prompts or time, attention to prompts (whose first tokens are far larger
    than the others), and the scores of self-attention.
    """
    origins: dict[str, _Origin] = {}
    convolutions, kept = [], []
    for op in model.get_ordered_ops():
        name, kind = op.get_friendly_name(), op.get_type_name()
        sources = [port.get_source_output().get_node() for port in op.inputs()]
        inputs = [origins[source.get_friendly_name()] for source in sources]
        if kind == "Parameter":
            origins[name] = _Origin.SAMPLE if op.output(0).any_name in _PICTURE_INPUTS else _Origin.PROMPT
        else:
            origins[name] = _Origin.CONSTANT if kind == "ShapeOf" else max(inputs, default=_Origin.CONSTANT)
        if kind == "Convolution":
            convolutions.append(name)
            if sources[0].get_type_name() in ("Add", "Concat"):
                kept.append(name)
        elif kind == "MatMul" and (
            _Origin.PROMPT in inputs
            or (inputs == [_Origin.SAMPLE, _Origin.SAMPLE] and sources[0].get_type_name() != "Softmax")
        ):
            kept.append(name)
    return list(dict.fromkeys((convolutions[0], convolutions[-1], *kept)))
