"""Quantize the networks of a denoising step to int8 after training, and measure the loss of quality.

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

import msgspec
import numpy as np

from imprompt_export.calibration import GUIDANCE_SCALE, HELD_OUT, RUNS, Arrays, CalibrationRunner, Recorder
from imprompt_export.checkpoints import Checkpoints
from imprompt_export.parity import ParityError
from imprompt_serving.backends import Engine, get_backend
from imprompt_serving.specs import Bundle

SAMPLES = 12
"""Number of calls that determine the ranges, spread over all calibration runs; three times as many gained 1 dB."""
SMOOTHING = 0.25
"""Share of the activations' range that SmoothQuant moves into the weights; the paper's 0.5 gave 2 dB less."""


class Quality(msgspec.Struct, frozen=True, kw_only=True):
    """Quality of an int8 engine against fp32, over the steps of a run that calibration did not see.

    `snr_db` is the power of the network's prediction over the power of the error, for the same inputs; for a UNet with
    guidance, of the guided prediction. `worst_snr_db` is that of the worst call. `picture_distance` compares the final
    pictures, each from a complete run: mean difference in levels of 255.
    """

    engine: str
    calls: int
    snr_db: float
    worst_snr_db: float
    min_snr_db: float
    picture_distance: float


class _Origin(IntEnum):
    """What a tensor depends on. The highest value of its inputs wins."""

    CONSTANT = 0
    PROMPT = 1
    """Prompts, time, sizes, or scales."""
    SAMPLE = 2


class QualityError(ParityError):
    """The predictions of an int8 engine differ too much from fp32."""


def quantized_networks(bundle: Bundle) -> tuple[str, ...]:
    """List the graphs to quantize: the UNet and ControlNets for pictures.

    The others run once per request, or are for clips, which stay in fp32.
    """
    return ("unet", *(f"controlnet_{net.name}" for net in bundle.controlnets))


def quantize_bundle(
    bundle: Bundle, checkpoints: Checkpoints, files: Mapping[str, Path], min_snr_db: float
) -> tuple[dict[str, Path], list[Quality]]:
    """Quantize the networks among `files`; return the files with these replaced, and the quality of each network."""
    names = quantized_networks(bundle)
    samples, references, inputs, picture, prompt = _record(bundle, checkpoints, files, names)
    made = dict(files)
    for name in names:
        made[name] = quantize(files[name], samples.pop(name))
    load = get_backend(bundle.backend).load
    engines = {name: load(made[name]) for name in names}
    rows = []
    runner = CalibrationRunner(bundle, checkpoints, lambda name: engines.get(name) or load(files[name]))
    distance = float(np.abs(runner.picture(HELD_OUT, prompt).astype(int) - picture).mean())
    for name in names:
        answers = [engines[name].run(tensors) for tensors in inputs[name]]
        rows.append(_compare(name, references[name], answers, min_snr_db, distance))
    return made, rows


def check_quality(rows: Sequence[Quality]) -> None:
    """Raise for the first network whose quality is below the bundle's `engine.min_snr_db`.

    Raises:
        QualityError: names the network and its signal-to-noise ratio.
    """
    for row in rows:
        if not row.snr_db >= row.min_snr_db:
            raise QualityError(
                f"{row.engine} in int8: its predictions have a signal-to-noise ratio of {row.snr_db:.1f} dB against "
                f"fp32, but engine.min_snr_db is {row.min_snr_db:g}"
            )


def _record(
    bundle: Bundle, checkpoints: Checkpoints, files: Mapping[str, Path], names: Sequence[str]
) -> tuple[dict[str, list[Arrays]], dict[str, list[Arrays]], dict[str, list[Arrays]], np.ndarray, np.ndarray]:
    """Run the calibration runs and the held-out run in fp32, and record the calls of the networks `names`.

    Returns:
        Inputs of the calibration runs; outputs, inputs, picture, and image prompt of the held-out run.
    """
    recorders: dict[str, Recorder] = {}

    def engine(name: str) -> Engine:
        loaded = get_backend(bundle.backend).load(files[name])
        if name not in names:
            return loaded
        recorders[name] = Recorder(loaded)
        return recorders[name]

    runner = CalibrationRunner(bundle, checkpoints, engine)
    prompt = runner.picture(RUNS[0])
    for run in RUNS[1:]:
        prompt = runner.picture(run, prompt)
    samples = {name: recorder.inputs for name, recorder in recorders.items()}
    for recorder in recorders.values():
        recorder.inputs, recorder.outputs = [], []
    picture = runner.picture(HELD_OUT, prompt)
    outputs = {name: recorder.outputs for name, recorder in recorders.items()}
    return samples, outputs, {name: recorder.inputs for name, recorder in recorders.items()}, picture, prompt


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


def _compare(
    name: str, references: Sequence[Arrays], answers: Sequence[Arrays], limit: float, distance: float
) -> Quality:
    powers = []
    for reference, answer in zip(references, answers, strict=True):
        pairs: list[tuple[Any, Any]] = [(reference[key], answer[key]) for key in reference]
        if name == "unet" and len(pairs[0][0]) == 2:  # both branches
            pairs = [(_guided(exact), _guided(rounded)) for exact, rounded in pairs]
        powers.append((sum(float((e**2).sum()) for e, _ in pairs), sum(float(((e - r) ** 2).sum()) for e, r in pairs)))
    signal, noise = map(sum, zip(*powers, strict=True))
    return Quality(
        engine=name,
        calls=len(powers),
        snr_db=_db(signal, noise),
        worst_snr_db=min(_db(*step) for step in powers),
        min_snr_db=limit,
        picture_distance=distance,
    )


def _guided(prediction: np.ndarray) -> np.ndarray:
    unconditional, conditional = np.split(prediction, 2)
    return np.asarray(unconditional + GUIDANCE_SCALE * (conditional - unconditional))


def _db(signal: float, noise: float) -> float:
    return 10 * math.log10(signal / noise) if noise else math.inf
