"""Post-training quantization of the networks of a denoising step to int8.

Weights and activations of convolutions and matrix products become 8-bit integers (NNCF, with SmoothQuant:
https://arxiv.org/abs/2211.10438), with ranges taken from the bundle's own denoising runs over all timesteps.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from enum import IntEnum
from pathlib import Path
from typing import Any

import numpy as np

from imprompt_export.calibration import HELD_OUT, RUNS, Arrays, Recorder, Studio
from imprompt_export.checkpoints import Checkpoints
from imprompt_export.quality import Quality, measure, picture_distance, quantized_networks
from imprompt_serving.backends import Engine, get_backend
from imprompt_serving.specs import Bundle

SAMPLES = 12
"""Calls that ranges are taken from, spread over all calibration runs: three times as many gained 1 dB."""
SMOOTHING = 0.25
"""How much of the activations' spread SmoothQuant moves into the weights; the paper's 0.5 gave 2 dB less."""


class _Origin(IntEnum):
    """What a tensor depends on; most of all on the last of these."""

    CONSTANT = 0
    PROMPT = 1
    """Or on time, sizes and scales."""
    SAMPLE = 2


def quantize_bundle(
    bundle: Bundle, checkpoints: Checkpoints, files: Mapping[str, Path], min_snr_db: float
) -> tuple[dict[str, Path], list[Quality]]:
    """Quantize the networks among ``files``; returns the files with these replaced, and how good they are."""
    names = quantized_networks(bundle)
    samples, references, inputs, picture, prompt = _record(bundle, checkpoints, files, names)
    made = dict(files)
    for name in names:
        made[name] = quantize(files[name], samples.pop(name))
    load = get_backend(bundle.backend).load
    engines = {name: load(made[name]) for name in names}
    rows = []
    studio = Studio(bundle, checkpoints, lambda name: engines.get(name) or load(files[name]))
    distance = picture_distance(studio.picture(HELD_OUT, prompt), picture)
    for name in names:
        answers = [engines[name].run(tensors) for tensors in inputs[name]]
        rows.append(measure(name, "int8", references[name], answers, min_snr_db, distance))
    return made, rows


def _record(
    bundle: Bundle, checkpoints: Checkpoints, files: Mapping[str, Path], names: Sequence[str]
) -> tuple[dict[str, list[Arrays]], dict[str, list[Arrays]], dict[str, list[Arrays]], np.ndarray, np.ndarray]:
    """Samples for calibration; outputs and inputs of the held-out run, its picture, and its image prompt; in fp32."""
    recorders: dict[str, Recorder] = {}

    def engine(name: str) -> Engine:
        loaded = get_backend(bundle.backend).load(files[name])
        if name not in names:
            return loaded
        recorders[name] = Recorder(loaded)
        return recorders[name]

    studio = Studio(bundle, checkpoints, engine)
    prompt = studio.picture(RUNS[0])
    for run in RUNS[1:]:
        prompt = studio.picture(run, prompt)
    samples = {name: recorder.inputs for name, recorder in recorders.items()}
    for recorder in recorders.values():
        recorder.inputs, recorder.outputs = [], []
    picture = studio.picture(HELD_OUT, prompt)
    outputs = {name: recorder.outputs for name, recorder in recorders.items()}
    return samples, outputs, {name: recorder.inputs for name, recorder in recorders.items()}, picture, prompt


def quantize(file: Path, samples: Sequence[Arrays]) -> Path:
    """Write the OpenVINO model ``file`` in int8 to a folder beside its own; activations range as in ``samples``."""
    os.environ.setdefault("NNCF_CI", "1")  # or it reports its use over the network, unasked
    import nncf
    import openvino

    nncf.set_log_level("ERROR")
    model = openvino.Core().read_model(file)
    known = {port.any_name for port in model.inputs}
    spread = samples[:: math.ceil(len(samples) / SAMPLES)]
    quantized = nncf.quantize(
        model,
        nncf.Dataset([{name: value for name, value in sample.items() if name in known} for sample in spread]),
        subset_size=len(spread),
        model_type=nncf.ModelType.TRANSFORMER,
        ignored_scope=nncf.IgnoredScope(names=_exact(model)),
        advanced_parameters=nncf.AdvancedQuantizationParameters(
            # Weights of 7 bits: CPUs without VNNI add pairs of products in 16 bits, which those of 8 bits overflow.
            # Full range would make pictures depend on the CPU that serves.
            overflow_fix=nncf.OverflowFix.ENABLE,
            disable_bias_correction=True,  # no gain was seen, and it takes long
            smooth_quant_alphas=nncf.AdvancedSmoothQuantParameters(matmul=SMOOTHING, convolution=-1),
        ),
    )
    target = file.parent.with_name(f"{file.parent.name}-int8") / file.name
    openvino.save_model(quantized, target, compress_to_fp16=False)
    return target


def _exact(model: Any) -> list[str]:
    """What stays in fp32, for little time: the first and the last convolution; what depends on prompts or time alone,
    attention to prompts (their first tokens are far larger than the others), and the scores of self-attention."""
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
