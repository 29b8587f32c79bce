"""The servers of a measured fleet, their outstanding rows, and the load reports that Envoy reads."""

from __future__ import annotations

import struct
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import grpc
import numpy as np

from imprompt_bench.fleet.envoy import free_port
from imprompt_bench.fleet.routings import REPORT_S
from imprompt_bench.observe import read_page
from imprompt_serving.launcher import Server

_SERVICE, _METHOD = "xds.service.orca.v3.OpenRcaService", "StreamCoreMetrics"
_RPS, _UTILIZATION = b"\x31", b"\x49"
"""Tags of `rps_fractional` and `application_utilization` in `xds.data.orca.v3.OrcaLoadReport`: fields 6 and 9."""
_IDLE_ROWS = 1.0
"""Rows that an idle member reports: Envoy ignores a utilization of zero."""


@contextmanager
def serve_members(repository: Path, count: int) -> Iterator[list[Server]]:
    """Serve `repository` on 127.0.0.2, 127.0.0.3, ..."""
    with ExitStack() as stack:
        yield [stack.enter_context(Server(repository, host=f"127.0.0.{index + 2}")) for index in range(count)]


class RowsWatcher:
    """Reads the outstanding rows of each member every `REPORT_S`, and reports them to Envoy (ORCA).

    Args:
        members: gRPC address and metrics address of each.
    """

    def __init__(self, members: Sequence[tuple[str, str]]) -> None:
        self._pages, self._stop = [metrics for _, metrics in members], threading.Event()
        self._rows = np.zeros(len(members))
        self._series: list[np.ndarray] = []
        self._thread = threading.Thread(target=self._watch, daemon=True)
        # A stream of reports for each member and Envoy occupies a thread.
        self._services = [grpc.server(ThreadPoolExecutor(8)) for _ in members]
        self.port = free_port()
        for index, ((address, _), service) in enumerate(zip(members, self._services, strict=True)):
            handler = grpc.unary_stream_rpc_method_handler(partial(self._reports, index))
            service.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(_SERVICE, {_METHOD: handler}),))
            service.add_insecure_port(f"{address.rpartition(':')[0]}:{self.port}")

    def __enter__(self) -> Self:
        self._thread.start()
        for service in self._services:
            service.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()
        for service in self._services:
            service.stop(0).wait()

    @contextmanager
    def record(self) -> Iterator[list[np.ndarray]]:
        """Collect the outstanding rows of all members, one array each time they are read."""
        series: list[np.ndarray] = []
        self._series = series
        yield series
        self._series = []

    def _watch(self) -> None:
        while not self._stop.wait(REPORT_S):
            self._rows = np.array([outstanding_rows(page) for page in self._pages])
            self._series.append(self._rows)

    def _reports(self, index: int, _: bytes, context: Any) -> Iterator[bytes]:
        """Report the rows as utilization at a constant rate, so that Envoy's weights are inversely proportional."""
        while context.is_active() and not self._stop.is_set():
            rows = max(float(self._rows[index]), _IDLE_ROWS)
            yield _RPS + struct.pack("<d", 1.0) + _UTILIZATION + struct.pack("<d", rows)
            time.sleep(REPORT_S)


def outstanding_rows(metrics_address: str) -> float:
    """Sum the running and waiting rows on a page of metrics."""
    lines = [line for line in read_page(metrics_address).splitlines() if line.startswith("imprompt_rows{")]
    return sum(float(line.rpartition(" ")[2]) for line in lines)
