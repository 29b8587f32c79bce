"""The tables and the plot of `docs/scale.md`."""

from __future__ import annotations

from pathlib import Path

from imprompt_bench.fleet.study import DETAIL_MEMBERS, DETAILS, ENVOYS, LOAD, Point, Study
from imprompt_bench.markdown import interval, table
from imprompt_bench.results import Run
from imprompt_bench.stats import percentile

ROUTING, STUDY = "fleet/routing.json", "fleet/simulation.json"
PLOT = "fleet.svg"


def tables(results: Path) -> dict[str, str]:
    """Return the tables from the files in `results`, by the name of their place."""
    made = {}
    if (results / ROUTING).exists():
        made["routing"] = routing(Run.load(results / ROUTING))
    if (results / STUDY).exists():
        found = Study.load(results / STUDY)
        made["fleet"] = fleet(found)
        made["details"] = details(found)
    return made


def routing(run: Run) -> str:
    """Compare the ways of routing, as measured."""
    rows = []
    for measurement in run.of("routing"):
        latencies = measurement.latencies()
        refused = sum(sample.status == "refused" for sample in measurement.samples)
        rows.append(
            [
                measurement.label,
                *(interval(percentile(latencies, q), 2) for q in (50, 99)),
                f"{measurement.pictures_per_second:.1f}",
                f"{measurement.notes['busiest']:.2f}",
                f"{100 * measurement.notes['idle']:.0f}",
                f"{100 * refused / len(measurement.samples):.1f}",
            ]
        )
    header = ["routing", "p50, s", "p99, s", "pictures/s", "busiest member", "idle, %", "refused, %"]
    machine = run.environment
    requests = len(run.of("routing")[0].samples)
    text = (
        f"{requests} requests each. {machine['cpu']}, {machine['cores']} cores for all {run.bundle['members']} members "
        f"and {run.bundle['callers']} callers, Envoy {machine['envoy']}, {machine['date']}; load average "
        f"{machine['load_average'][0]} before the run."
    )
    return f"{table(header, rows)}\n\n{text}\n"


def fleet(study: Study) -> str:
    """Compare the ways of routing in simulated fleets, by number of members."""
    rows = [[f"{point.members}, {point.arrivals}", point.policy, *_numbers(point)] for point in _usual(study)]
    return table(["members, arrivals", "routing", "p50, s", "p99, s", "refused, %", "idle, %"], rows) + "\n"


def details(study: Study) -> str:
    """Compare numbers of Envoys and loads."""
    points = {
        (point.policy, point.envoys, point.load): point
        for point in study.points
        if point.members == DETAIL_MEMBERS and point.arrivals == "poisson"
    }
    header = [f"{envoys} Envoy{'s'[: envoys > 1]}, load {load}" for envoys, load in DETAILS]
    policies = list(dict.fromkeys(policy for policy, _, _ in points))
    rows = [[policy, *(_p99(points[policy, *detail]) for detail in DETAILS)] for policy in policies]
    return table(["routing", *header], rows) + "\n"


def _p99(point: Point) -> str:
    return f"{point.p99:.2f}" + (f" ({100 * point.refused:.0f} % refused)" if point.refused >= 0.005 else "")


def _usual(study: Study) -> list[Point]:
    return [point for point in study.points if point.envoys == ENVOYS and point.load == LOAD]


def _numbers(point: Point) -> list[str]:
    return [f"{point.p50:.2f}", f"{point.p99:.2f}", f"{100 * point.refused:.1f}", f"{100 * point.idle:.0f}"]


def draw(results: Path, images: Path) -> None:
    """Plot p99 and idle time by number of members."""
    if not (results / STUDY).exists():
        return
    from imprompt_bench.plots import plt, save

    points = [point for point in _usual(Study.load(results / STUDY)) if point.arrivals == "poisson"]
    figure, axes = plt.subplots(1, 2, figsize=(8, 3.2), layout="constrained")
    for policy in dict.fromkeys(point.policy for point in points):
        own = [point for point in points if point.policy == policy]
        members = [point.members for point in own]
        axes[0].plot(members, [point.p99 for point in own], marker="o", ms=3, label=policy)
        axes[1].plot(members, [100 * point.idle for point in own], marker="o", ms=3)
    for axis, label in zip(axes, ("p99 of the latency (s)", "idle time of members (%)"), strict=True):
        axis.set(xlabel="members", ylabel=label, xscale="log", ylim=(0, None))
        axis.set_xticks(sorted({point.members for point in points}))
        axis.xaxis.set_major_formatter("{x:,.0f}")
        axis.minorticks_off()
    figure.legend(loc="outside upper center", ncols=3, frameon=False)
    save(figure, images / PLOT)
