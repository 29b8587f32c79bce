"""Quantize the networks of a denoising step to int8 after training.

Weights and activations of convolutions and matrix products become 8-bit integers (NNCF, with SmoothQuant:
https://arxiv.org/abs/2211.10438). Their ranges come from denoising runs of the bundle itself, over all timesteps.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from enum import IntEnum
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from imprompt_export.calibration import HELD_OUT, RUNS, Arrays, CalibrationRunner, Recorder
from imprompt_export.checkpoints import Checkpoints
from imprompt_export.quality import Quality, measure, picture_distance, quantized_networks
from imprompt_serving.backends import Engine, get_backend
from imprompt_serving.specs import Bundle

SAMPLES = 12
"""Number of calls that determine the ranges, spread over all calibration runs; three times as many gained 1 dB."""
SMOOTHING = 0.25
"""Share of the activations' range that SmoothQuant moves into the weights; the paper's 0.5 gave 2 dB less."""


class _Origin(IntEnum):
    """What a tensor depends on. The highest value of its inputs wins."""

    CONSTANT = 0
    PROMPT = 1
    """Prompts, time, sizes, or scales."""
    SAMPLE = 2


def quantize_bundle(
    bundle: Bundle, checkpoints: Checkpoints, files: Mapping[str, Path], min_snr_db: float
) -> tuple[dict[str, Path], list[Quality]]:
    """Quantize the networks among `files`; return the files with these replaced, and the quality of each network."""
    names = quantized_networks(bundle)
    samples, references, inputs, picture, held_out = _record(bundle, checkpoints, files, names)
    encoders = [getattr(checkpoints.pipeline, encoder) for encoder, _ in checkpoints.family.text_encoders]
    for model in (*encoders, *checkpoints.image_encoders.values()):
        model.to("meta")  # all prompts are encoded, and NNCF needs the memory
    made = dict(files)
    for name in names:
        made[name] = quantize(files[name], samples.pop(name))
    load = get_backend(bundle.backend).load
    engines = {name: load(made[name]) for name in names}
    rows = []
    runner = CalibrationRunner(bundle, checkpoints, lambda name: engines.get(name) or load(files[name]))
    distance = picture_distance(runner.picture(HELD_OUT, held_out), picture)
    for name in names:
        answers = [engines[name].run(tensors) for tensors in inputs[name]]
        rows.append(measure(name, "int8", references[name], answers, min_snr_db, distance))
    return made, rows


def _record(
    bundle: Bundle, checkpoints: Checkpoints, files: Mapping[str, Path], names: Sequence[str]
) -> tuple[dict[str, list[Arrays]], dict[str, list[Arrays]], dict[str, list[Arrays]], np.ndarray, dict[str, Tensor]]:
    """Run the calibration runs and the held-out run in fp32, and record the calls of the networks `names`.

    Returns:
        Inputs of the calibration runs; outputs, inputs, picture, and encoded prompts of the held-out run.
    """
    recorders: dict[str, Recorder] = {}

    def engine(name: str) -> Engine:
        loaded = get_backend(bundle.backend).load(files[name])
        if name not in names:
            return loaded
        recorders[name] = Recorder(loaded)
        return recorders[name]

    runner = CalibrationRunner(bundle, checkpoints, engine)
    prompt = None
    for run in RUNS:
        prompt = runner.picture(run, runner.encode(run, prompt))
    samples = {name: recorder.inputs for name, recorder in recorders.items()}
    for recorder in recorders.values():
        recorder.inputs, recorder.outputs = [], []
    held_out = runner.encode(HELD_OUT, prompt)
    picture = runner.picture(HELD_OUT, held_out)
    outputs = {name: recorder.outputs for name, recorder in recorders.items()}
    return samples, outputs, {name: recorder.inputs for name, recorder in recorders.items()}, picture, held_out


def quantize(file: Path, samples: Sequence[Arrays]) -> Path:
    """Write an int8 version of the OpenVINO model `file` to a folder next to its own.

    The ranges of activations are those that occur with the inputs `samples`.
    """
    os.environ.setdefault("NNCF_CI", "1")  # otherwise NNCF reports its use over the network
    import nncf
    import openvino

    nncf.set_log_level("ERROR")
    model = openvino.Core().read_model(file)
    known = {port.any_name for port in model.inputs}
    chosen = samples[:: math.ceil(len(samples) / SAMPLES)]
    quantized = nncf.quantize(
        model,
        nncf.Dataset([{name: value for name, value in sample.items() if name in known} for sample in chosen]),
        subset_size=len(chosen),
        model_type=nncf.ModelType.TRANSFORMER,
        ignored_scope=nncf.IgnoredScope(names=_keep_in_fp32(model)),
        advanced_parameters=nncf.AdvancedQuantizationParameters(
            # Use 7-bit weights: CPUs without VNNI add pairs of products in 16 bits, which 8-bit weights overflow.
            # With the full range, pictures would depend on the server's CPU.
            overflow_fix=nncf.OverflowFix.ENABLE,
            disable_bias_correction=True,  # it is slow and brought no gain
            smooth_quant_alphas=nncf.AdvancedSmoothQuantParameters(matmul=SMOOTHING, convolution=-1),
        ),
    )
    target = file.parent.with_name(f"{file.parent.name}-int8") / file.name
    openvino.save_model(quantized, target, compress_to_fp16=False)
    return target


def _keep_in_fp32(model: Any) -> list[str]:
    """List the operations that stay in fp32, at little cost in time.

    These are the first and last convolutions, products that depend only on prompts or time, attention to prompts (whose
    first tokens are far larger than the others), and the scores of self-attention.
    """
    origins: dict[str, _Origin] = {}
    convolutions, products = [], []
    for op in model.get_ordered_ops():
        name, kind = op.get_friendly_name(), op.get_type_name()
        sources = [port.get_source_output().get_node() for port in op.inputs()]
        inputs = [origins[source.get_friendly_name()] for source in sources]
        if kind == "Parameter":
            origins[name] = _Origin.SAMPLE if op.output(0).any_name == "sample" else _Origin.PROMPT
        else:
            origins[name] = _Origin.CONSTANT if kind == "ShapeOf" else max(inputs, default=_Origin.CONSTANT)
        if kind == "Convolution":
            convolutions.append(name)
        elif kind == "MatMul" and (
            _Origin.PROMPT in inputs
            or (inputs == [_Origin.SAMPLE, _Origin.SAMPLE] and sources[0].get_type_name() != "Softmax")
        ):
            products.append(name)
    return [convolutions[0], convolutions[-1], *products]
