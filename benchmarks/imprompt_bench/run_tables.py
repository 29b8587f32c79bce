"""Format the measurements of one run as tables, one for each scenario."""

from __future__ import annotations

from collections.abc import Callable
from statistics import median

from imprompt_bench.markdown import interval, table
from imprompt_bench.results import Measurement, Run
from imprompt_bench.stats import percentile, ratio

SYSTEMS = {
    "imprompt": "imprompt (served)",
    "eager": "diffusers (eager)",
    "compiled": "diffusers (`torch.compile`, frozen)",
    "bare": "the same engines, no server",
}
_STAGES = ("total", "admission", "text_encoder", "preprocess", "image_encoder", "queue", "denoise", "vae_decoder")
_PERCENTILES = ("p50, s", "p90, s", "p99, s")
_SERVER = ("rows per UNet call", "CPU cores used", "memory, MiB")


def _percentiles(measurement: Measurement) -> list[str]:
    values = measurement.latencies()
    return [interval(percentile(values, q)) for q in (50, 90, 99)] if values else ["-"] * 3


def _stable(measurement: Measurement) -> str:
    return "yes" if measurement.stable else "**no**"


def _latency(run: Run) -> str:
    measured = {measurement.label: measurement for measurement in run.of("latency")}
    if not measured:
        return ""
    own, rows = measured["imprompt"].latencies(), []
    for name, measurement in measured.items():
        speedup = "" if name == "imprompt" else interval(ratio(measurement.latencies(), own), 2)
        difference = " / ".join(f"{value:.2g}" for value in run.parity.get(name, ()))
        count = str(len(measurement.samples))
        rows.append([SYSTEMS[name], *_percentiles(measurement), speedup, difference, count, _stable(measurement)])
    columns = ["speed-up of imprompt over it", "difference in levels of 255, max / mean", "samples", "stable"]
    return table(["system", *_PERCENTILES, *columns], rows)


def _stages(run: Run) -> str:
    samples = [sample for measurement in run.of("latency") for sample in measurement.samples if sample.timings]
    if not samples:
        return ""
    rows = []
    for stage in _STAGES:
        values = [sample.timings.get(stage, 0.0) for sample in samples]
        share = median(values) / median([sample.latency for sample in samples])
        rows.append([f"`{stage}`", interval(percentile(values, 50), 4), f"{100 * share:.1f}"])
    return table(["stage", "p50, s", "% of the request's latency"], rows)


def _arithmetic(run: Run) -> str:
    samples = [sample for measurement in run.of("latency") for sample in measurement.samples if sample.timings]
    if not run.arithmetic or not samples:
        return ""
    flop, rate = run.arithmetic["unet_flop"], run.arithmetic["gemm_flops"]
    limit = flop * run.bundle["steps"] / rate
    denoise = median([sample.timings["denoise"] for sample in samples])
    rows = [
        ["one UNet call, both guidance branches, TFLOP", f"{flop / 1e12:.4g}"],
        ["float32 matrix product on this machine, GFLOP/s", f"{rate / 1e9:.0f}"],
        ["hardware limit: all UNet calls at that rate, s", f"{limit:.3f}"],
        ["measured: median of `denoise`, s", f"{denoise:.3f}"],
        ["measured / limit", f"{denoise / limit:.2f}"],
    ]
    return table(["quantity", "value"], rows)


def _closed(run: Run) -> str:
    measured = run.of("closed")
    others = {other.label: 1 / median(other.latencies()) for other in run.of("latency") if other.label != "imprompt"}
    rows = []
    for point in measured:
        rate = point.pictures_per_second
        times = [f"{rate / other:.2f}" for other in (measured[0].pictures_per_second, *others.values())]
        rows.append([f"{point.value:g}", f"{rate:.3f}", *times, *_percentiles(point), *_server(point), _stable(point)])
    relative = ["relative to one caller", *(f"relative to sequential {SYSTEMS[name]}" for name in others)]
    header = ["callers", "pictures/s", *relative, *_PERCENTILES, *_SERVER, "stable"]
    return table(header, rows) if rows else ""


def _server(measurement: Measurement) -> list[str]:
    server = measurement.server
    if server is None:
        return ["", "", ""]
    cores = "" if server.cores is None else f"{server.cores:.2f}"
    memory = f"{sum(server.memory_mib.values()):.0f}" if server.memory_mib else ""
    return [f"{server.rows_per_call:.2f}", cores, memory]


def _open(run: Run) -> str:
    rows = [
        [f"{point.value:g}", f"{point.pictures_per_second:.3f}", *_percentiles(point), *_server(point), _stable(point)]
        for point in run.of("open")
    ]
    header = ["arrival rate / capacity", "pictures/s", *_PERCENTILES, *_SERVER, "stable"]
    return table(header, rows) if rows else ""


def _overload(run: Run) -> str:
    rows = []
    for point in run.of("overload"):
        refusals = point.latencies("refused")
        refused = f"{100 * len(refusals) / len(point.samples):.0f}"
        refusal_time = f"{median(refusals):.3f}" if refusals else ""
        recovery = f"{point.notes['recovery_s']:.1f}" if "recovery_s" in point.notes else ""
        if point.label == "after" and not recovery:
            recovery = f"more than {point.seconds:.0f}"
        phase = f"{point.label} overload"
        rows.append([phase, str(len(point.samples)), refused, refusal_time, *_percentiles(point), recovery])
    header = ["phase", "requests", "% refused", "time to refuse, s", *_PERCENTILES, "time to recover, s"]
    return table(header, rows) if rows else ""


def _mixed(run: Run) -> str:
    rows = []
    for point in run.of("mixed"):
        for kind in ("all", *sorted({sample.kind for sample in point.samples})):
            own = [sample for sample in point.samples if kind in ("all", sample.kind)]
            statuses = [str(sum(sample.status == status for sample in own)) for status in ("ok", "left", "refused")]
            values = [sample.latency for sample in own if sample.status == "ok"]
            rows.append(
                [kind, *statuses, *([interval(percentile(values, q)) for q in (50, 90)] if values else ["", ""])]
            )
        if point.server is not None:
            looked = point.server.cache_hits + point.server.cache_misses
            hits = f"{point.server.cache_hits:.0f} of {looked:.0f}"
            text = f"Response cache hits: {hits}. Rows per UNet call: {point.server.rows_per_call:.2f}."
            header = ["image prompt", "served", "canceled by the caller", "refused", *_PERCENTILES[:2]]
            return table(header, rows) + f"\n\n{text}"
    return ""


def _growth(run: Run) -> str:
    rows = []
    first: dict[str, Measurement] = {}
    for point in run.of("growth"):
        base = first.setdefault(point.label, point)
        times = ratio(point.latencies(), base.latencies())
        latency = interval(percentile(point.latencies(), 50))
        rows.append([f"{point.label}: {point.value:g}", latency, interval(times, 2), _stable(point)])
    return table(["varied parameter", "p50, s", "relative to the first", "stable"], rows) if rows else ""


def _setup(run: Run) -> str:
    setup = run.setup
    if not setup:
        return ""
    rows = [
        ["weights, millions", ", ".join(f"{name} {count / 1e6:.4g}" for name, count in setup["parameters"].items())],
        ["export time, s", f"{setup['export_s']:.0f}"],
        ["peak memory of the export, MiB", f"{setup['export_peak_mib']:.0f}"],
        ["time from start to ready, s", f"{setup['ready_s']:.1f}"],
        ["memory when ready, MiB", f"{sum(setup['memory_mib'].values()):.0f}"],
        *([f"memory of `{name}`, MiB", f"{mib:.0f}"] for name, mib in setup["memory_mib"].items()),
        *([f"engine `{name}`, MiB", f"{mib:.1f}"] for name, mib in sorted(setup["engines_mib"].items())),
    ]
    return table(["quantity", "value"], rows)


TABLES: tuple[tuple[str, Callable[[Run], str]], ...] = (
    ("One request at a time", _latency),
    ("Where the time of a request goes", _stages),
    ("Comparison with the hardware limit", _arithmetic),
    ("Throughput by number of callers", _closed),
    ("Random arrivals", _open),
    ("Overload and recovery", _overload),
    ("Mixed traffic", _mixed),
    ("Cost of larger requests", _growth),
    ("Export and startup", _setup),
)
"""Titles, and functions that return a table, which is empty if the run has no such measurements."""
