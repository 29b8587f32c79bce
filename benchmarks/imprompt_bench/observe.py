"""Observe a server: counters from its metrics page, CPU time and memory of its processes (psutil)."""

from __future__ import annotations

import re
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.client import HTTPException
from typing import NamedTuple

import psutil

from imprompt_bench.results import BenchError, ServerUse

SETTLE_S = 0.3
"""Models update their metrics from a background thread, so wait this long before reading them."""
_LINE = re.compile(r"(?P<name>\w+)(?:\{(?P<labels>.*)\})? (?P<value>\S+)$", re.MULTILINE)
COUNTERS = {
    "unet_calls": "imprompt_tick_rows_count",
    "rows": "imprompt_tick_rows_sum",
    "cache_hits": "nv_cache_num_hits_per_model",
    "cache_misses": "nv_cache_num_misses_per_model",
    "refused": "imprompt_jobs_refused_total",
}


class Snapshot(NamedTuple):
    """Counters of a bundle's models, total CPU seconds, and resident MiB per process, at one point in time."""

    at: float
    counters: dict[str, float]
    cpu: float
    memory_mib: dict[str, float]


def count(page: str, bundle: str) -> dict[str, float]:
    """Sum `COUNTERS` over the denoiser and the encoders of `bundle`, from a page in Prometheus format."""
    totals = dict.fromkeys(COUNTERS, 0.0)
    named = {metric: name for name, metric in COUNTERS.items()}
    for line in _LINE.finditer(page):
        model = re.search(
            rf'model="{bundle}_(denoiser(_\d+)?|text_encoder|text_encoder_2|image_encoder_\w+)"', line["labels"] or ""
        )
        if line["name"] in named and model:
            totals[named[line["name"]]] += float(line["value"])
    return totals


def read_page(address: str | None) -> str:
    """Read the metrics page at `address`.

    Raises:
        BenchError: there is none.
    """
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(f"http://{address}/metrics", timeout=10) as answer:
            return str(answer.read().decode())
    except (OSError, HTTPException, ValueError) as error:
        raise BenchError(f"no metrics at {address}: {error}; set --metrics") from error


@dataclass(frozen=True, kw_only=True, slots=True)
class Observer:
    """Observes the server of `bundle`. `pids` are its processes by name, if they run on this machine."""

    bundle: str
    metrics_address: str | None
    """If None, nothing is observed."""
    pids: dict[str, int] = field(default_factory=dict)

    def check(self) -> None:
        """Check that the metrics are available.

        Raises:
            BenchError: they are not, or they belong to another server.
        """
        if f'model="{self.bundle}"' not in read_page(self.metrics_address):
            raise BenchError(f"the metrics at {self.metrics_address} do not belong to {self.bundle}")

    def snapshot(self) -> Snapshot:
        """Read counters and processes now.

        Raises:
            BenchError: the metrics are not available.
        """
        time.sleep(SETTLE_S)
        counters = count(read_page(self.metrics_address), self.bundle)
        cpu, memory = 0.0, dict[str, float]()
        for name, pid in self.pids.items():
            with suppress(psutil.NoSuchProcess):
                process = psutil.Process(pid)
                times = process.cpu_times()
                cpu += times.user + times.system
                memory[name] = process.memory_info().rss / 2**20
        return Snapshot(time.perf_counter(), counters, cpu, memory)

    @contextmanager
    def watch(self) -> Iterator[Callable[[], ServerUse | None]]:
        """Observe the server until the yielded function is called; it returns None if the counters are unavailable.

        Never raises `BenchError`: the samples taken meanwhile are worth more than the counters.
        """
        before = self._snapshot_or_none()

        def use() -> ServerUse | None:
            after = self._snapshot_or_none()
            if before is None or after is None:
                return None
            change = {name: value - before.counters[name] for name, value in after.counters.items()}
            rows = change.pop("rows")
            seconds = after.at - before.at - SETTLE_S
            return ServerUse(
                **change,
                rows_per_call=rows / max(change["unet_calls"], 1),
                cores=(after.cpu - before.cpu) / seconds if self.pids else None,
                memory_mib=after.memory_mib,
            )

        yield use

    def _snapshot_or_none(self) -> Snapshot | None:
        if self.metrics_address is None:
            return None
        with suppress(BenchError):
            return self.snapshot()
        return None
