"""Post-training quantization of the networks of a denoising step, and what it costs in quality.

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

import msgspec
import numpy as np

from imprompt_export.calibration import GUIDANCE_SCALE, HELD_OUT, RUNS, Arrays, Recorder, Studio
from imprompt_export.checkpoints import Checkpoints
from imprompt_export.parity import ParityError
from imprompt_serving.backends import Engine, get_backend
from imprompt_serving.specs import Bundle

SAMPLES = 12
"""Calls that ranges are taken from, spread over all calibration runs: three times as many gained 1 dB."""
SMOOTHING = 0.25
"""How much of the activations' spread SmoothQuant moves into the weights; the paper's 0.5 gave 2 dB less."""


class Quality(msgspec.Struct, frozen=True, kw_only=True):
    """int8 against fp32 over the steps of a run that calibration did not see.

    ``snr_db``: power of what the network predicts over the power of the difference, both for the same inputs; for a
    guided UNet that of the guided prediction. ``worst_snr_db``: of the call in which it is lowest.
    ``picture_distance``: of the final pictures, each from its own steps; mean difference in levels of 255.
    """

    engine: str
    calls: int
    snr_db: float
    worst_snr_db: float
    min_snr_db: float
    picture_distance: float


class _Origin(IntEnum):
    """What a tensor depends on; most of all on the last of these."""

    CONSTANT = 0
    PROMPT = 1
    """Or on time, sizes and scales."""
    SAMPLE = 2


class QualityError(ParityError):
    """An int8 engine is too far from the fp32 one."""


def quantized_networks(bundle: Bundle) -> tuple[str, ...]:
    """Graphs that become int8: UNet and ControlNets of pictures. Others run once a request, or (clips) stay exact."""
    return ("unet", *(f"controlnet_{net.name}" for net in bundle.controlnets))


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
    distance = float(np.abs(studio.picture(HELD_OUT, prompt).astype(int) - picture).mean())
    for name in names:
        answers = [engines[name].run(tensors) for tensors in inputs[name]]
        rows.append(_compare(name, references[name], answers, min_snr_db, distance))
    return made, rows


def check_quality(rows: Sequence[Quality]) -> None:
    """Raise for the first network that is further from fp32 than the bundle allows."""
    for row in rows:
        if not row.snr_db >= row.min_snr_db:
            raise QualityError(
                f"{row.engine} in int8: its predictions have {row.snr_db:.1f} dB of signal to noise against fp32, "
                f"and engine.min_snr_db is {row.min_snr_db:g}"
            )


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
