"""Plot latency against load and against the size of the request, and where the time of one request goes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib

from imprompt_bench.results import Measurement, Run, Sample
from imprompt_bench.stats import PERCENTILES, percentile

matplotlib.use("Agg")
# Keep text as text, and make the files reproducible.
matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "imprompt", "font.size": 9})

from matplotlib import pyplot as plt  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402

_BEFORE = ("admission",)
_ENCODERS = (("text_encoder",), ("preprocess", "image_encoder"), ("vae_encoder",))
_AFTER = ("queue", "denoise", "vae_decoder", "safety_checker", "postprocess")
_STAGE_NAMES = {
    "admission": "admission",
    "text_encoder": "text encoder",
    "preprocess": "decode and resize pictures",
    "image_encoder": "image encoder",
    "vae_encoder": "VAE encoder",
    "queue": "wait for a UNet call",
    "denoise": "denoise (all steps)",
    "vae_decoder": "VAE decoder",
    "safety_checker": "safety checker",
    "postprocess": "encode pictures",
}
_PERCENTILE_NAMES = {50: "median", 90: "90th percentile", 99: "99th percentile"}
_GROWTH = {
    "steps": "steps",
    "size": "height and width (pixels)",
    "image prompts": "image prompts",
    "pictures": "pictures per request",
    "frames": "frames of a clip",
}


def spans(timings: Mapping[str, float]) -> list[tuple[str, float, float]]:
    """Place stages in time: name, start and length in seconds. The encoders start together, the rest is sequential."""
    made, at = [], 0.0
    for stage in _BEFORE:
        made.append((stage, at, timings.get(stage, 0.0)))
        at += timings.get(stage, 0.0)
    ends = [at]
    for chain in _ENCODERS:
        begin = at
        for stage in chain:
            made.append((stage, begin, timings.get(stage, 0.0)))
            begin += timings.get(stage, 0.0)
        ends.append(begin)
    at = max(ends)
    for stage in _AFTER:
        made.append((stage, at, timings.get(stage, 0.0)))
        at += timings.get(stage, 0.0)
    return [span for span in made if span[0] in timings]


def typical(samples: Sequence[Sample]) -> Sample:
    """Return the sample with the median latency."""
    return sorted(samples, key=lambda sample: sample.latency)[len(samples) // 2]


def draw(run: Run, name: str, folder: Path) -> list[Path]:
    """Write the plots for the scenarios in `run` to `folder`, as SVG."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    if run.of("closed") and run.of("open"):
        figure, axes = plt.subplots(1, 2, figsize=(8, 3), layout="constrained")
        _latency(axes[0], run.of("closed"), "callers at a time")
        _latency(axes[1], run.of("open"), "random arrivals, as a share of the highest throughput")
        written.append(save(figure, folder / f"bench-{name}-load.svg"))
    if run.of("growth"):
        written.append(save(_growth(run.of("growth")), folder / f"bench-{name}-growth.svg"))
    served = [measurement for measurement in run.of("latency") if measurement.label == "imprompt"]
    if served:
        figure, axis = plt.subplots(figsize=(8, 2.4), layout="constrained")
        _waterfall(axis, typical(served[0].samples))
        written.append(save(figure, folder / f"bench-{name}-request.svg"))
    return written


def _latency(axis: Axes, measurements: Sequence[Measurement], label: str) -> None:
    values = [measurement.value or 0.0 for measurement in measurements]
    for q in PERCENTILES:
        estimates = [percentile(measurement.latencies(), q) for measurement in measurements]
        (line,) = axis.plot(
            values, [estimate.value for estimate in estimates], marker="o", ms=3, label=_PERCENTILE_NAMES[q]
        )
        low, high = [e.low for e in estimates], [e.high for e in estimates]
        axis.fill_between(values, low, high, color=line.get_color(), alpha=0.15, linewidth=0)
    axis.set(xlabel=label, ylabel="latency (s)", ylim=(0, None), xticks=values)
    axis.legend(frameon=False)


def _growth(measurements: Sequence[Measurement]) -> plt.Figure:
    """Plot the latency against every parameter that varies, with 95 % intervals; the axes share their scale."""
    varied = list(dict.fromkeys(measurement.label for measurement in measurements))
    figure, axes = plt.subplots(
        1, len(varied), figsize=(1.6 * len(varied), 2.6), sharey=True, squeeze=False, layout="constrained"
    )
    for axis, label in zip(axes[0], varied, strict=True):
        points = [measurement for measurement in measurements if measurement.label == label]
        values = [point.value or 0.0 for point in points]
        medians = [percentile(point.latencies(), 50) for point in points]
        errors = [[m.value - m.low for m in medians], [m.high - m.value for m in medians]]
        axis.errorbar(values, [m.value for m in medians], yerr=errors, marker="o", ms=3, capsize=2)
        axis.set(xlabel=_GROWTH[label], xticks=values)
    axes[0, 0].set(ylabel="median latency (s)", ylim=(0, None))
    return figure


def _waterfall(axis: Axes, sample: Sample) -> None:
    stages = spans(sample.timings)
    for row, (_, begin, length) in enumerate(stages):
        axis.barh(row, length, left=begin, height=0.7, color="C0")
        axis.annotate(f" {length:.3f} s", (begin + length, row), va="center", fontsize=7)
    axis.axvline(sample.latency, color="grey", linewidth=0.8, linestyle=":")
    axis.set(
        yticks=range(len(stages)),
        yticklabels=[_STAGE_NAMES[stage] for stage, _, _ in stages],
        xlabel="time since the request was sent (s); dotted line: the client has the result",
    )
    axis.set_xlim(0, 1.1 * sample.latency)
    axis.invert_yaxis()


def save(figure: plt.Figure, path: Path) -> Path:
    """Write `figure` to `path` and return `path`."""
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)
    return path
