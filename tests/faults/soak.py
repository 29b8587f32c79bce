"""A soak: faults at random for as long as you like, while callers insist on pictures that are known."""

from __future__ import annotations

import random
import signal
import statistics
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import msgspec
import psutil

from faults.cases import MODELS, RECOVERY_LIMIT_S, Inject, idle_connections, killed_clients, send, slow_readers
from faults.known import KnownPictures, RetryingCallers
from faults.server import Foreground, wait_for
from imprompt import Client, ImpromptError

CALLERS = 6
NOTICE_LIMIT_S = 30.0
CALM_S = (2.0, 15.0)
"""The pause between two faults is chosen from this range."""
GATEWAY_FAILURE = r"imprompt: the gateway .*; restarting it in "
GATEWAY_AGAIN = "imprompt: the gateway is serving again"

Noticed = Callable[[Foreground, float], float | None]
"""Says when the launcher noticed a fault after a time; None if it has not."""


class Figures(msgspec.Struct, kw_only=True):
    """What a soak measured. Times are in seconds, and memory in megabytes."""

    minutes: float
    seed: int
    faults: Counter[str] = msgspec.field(default_factory=Counter)
    noticed: list[float] = []
    recovered: list[float] = []
    pictures: int = 0
    resent: dict[str, int] = {}
    lost: list[str] = []
    wrong: list[str] = []
    unanswered: int = 0
    problems: list[str] = []
    """Faults that were not noticed, or after which no pictures came."""
    memory: list[dict[str, float]] = []
    """Before the first fault, and after the last one."""
    leftovers: int = 0
    """Shared memory regions of processes that no longer exist."""

    @property
    def good(self) -> bool:
        return not (self.lost or self.wrong or self.unanswered or self.problems or self.leftovers)

    def table(self) -> str:
        """Return the lines of the table in docs/operations.md."""
        memory = {name: f"{self.memory[0][name]:.0f} MB, {self.memory[-1][name]:.0f} MB" for name in self.memory[0]}
        rows = {
            "duration": f"{self.minutes:g} minutes",
            "faults": f"{sum(self.faults.values())}, of which {len(self.recovered)} took a restart",
            "noticed after (median, longest)": _spread(self.noticed),
            "pictures again after (median, longest)": _spread(self.recovered),
            "requests that got their picture": str(self.pictures),
            "requests that their callers sent again": str(sum(self.resent.values())),
            "requests lost": str(len(self.lost) + self.unanswered),
            "pictures that differed": str(len(self.wrong)),
            "memory of the launcher (before, after)": memory["launcher"],
            "memory of all processes (before, after)": memory["all"],
        }
        return "\n".join(f"| {name} | {value} |" for name, value in rows.items())


def soak(repository: Path, bundle: str, *, minutes: float, seed: int) -> Figures:
    """Inject faults for this long. Which faults and requests are chosen only depends on `seed`."""
    choices, known_faults = random.Random(seed), faults(bundle)
    figures = Figures(minutes=minutes, seed=seed)
    with Foreground(repository, "--gateway-port", "0", "--request-log", "/dev/null") as server:
        server.wait_until_ready()
        grpc, http = server.addresses["grpc"], server.addresses["gateway"]
        callers = RetryingCallers(KnownPictures(grpc, bundle), grpc, http, count=CALLERS, seed=seed)
        wait_for(lambda: callers.tally.pictures >= 3 * CALLERS, 120, "pictures before the first fault")
        figures.memory.append(_memory(server))
        end = time.monotonic() + 60 * minutes
        while time.monotonic() < end:
            name, inject, noticed = choices.choice(known_faults)
            figures.faults[name] += 1
            print(f"{time.strftime('%H:%M:%S')} {name}", flush=True)
            with ExitStack() as held:
                try:
                    _inject(server, callers, figures, inject, noticed, held)
                except AssertionError as error:
                    figures.problems.append(f"{name}: {str(error)[:500]}")
                    if server.process.poll() is not None:
                        break
                time.sleep(choices.uniform(*CALM_S))
        figures.unanswered = callers.stop()
        figures.memory.append(_memory(server))
        figures.leftovers = max(len(server.leftovers()) - (len(server.processes()) - 1), 0)
    tally = callers.tally
    figures.pictures, figures.resent = tally.pictures, dict(tally.resent)
    figures.lost, figures.wrong = tally.lost, tally.wrong
    return figures


def faults(bundle: str) -> list[tuple[str, Inject, Noticed | None]]:
    """List the faults: their names, what causes them, and who notices them."""
    signals = {"kill -9": signal.SIGKILL, "SIGSTOP": signal.SIGSTOP}
    found: list[tuple[str, Inject, Noticed | None]] = []
    for word, number in signals.items():
        for name in ("tritonserver", *(bundle + model for model in MODELS)):
            found.append((f"{word} {name}", send(number, name), _server_failure))
        found.append((f"{word} gateway", gateway(number), gateway_failure))
    harmless = (killed_clients, slow_readers, bad_requests, idle_connections)
    # As frequent as the others together.
    return found + [(inject.__name__, inject, None) for inject in harmless] * 4


def gateway(number: int) -> Inject:
    """Send a signal to the gateway."""

    def inject(server: Foreground, held: ExitStack) -> None:
        next(child for child in server.launcher.children() if "gateway" in child.cmdline()).send_signal(number)

    return inject


def bad_requests(server: Foreground, held: ExitStack) -> None:
    """Send requests that are refused, or run out of time."""
    wrong: list[dict[str, Any]] = [{"height": 7}, {"scheduler": "x"}, {"image": b"no picture"}, {"timeout": 0.05}]
    bundle = next(iter(server.health()[1]["bundles"]))
    with Client(server.addresses["grpc"], max_retries=0) as client:
        for arguments in wrong * 5:
            with suppress(ImpromptError):
                client.generate(model=bundle, prompt="x", num_inference_steps=200, **arguments)


def _server_failure(server: Foreground, since: float) -> float | None:
    found = server.failure(since)
    return found and found[0]


def gateway_failure(server: Foreground, since: float) -> float | None:
    return server.said(GATEWAY_FAILURE, since)


def _inject(
    server: Foreground,
    callers: RetryingCallers,
    figures: Figures,
    inject: Inject,
    noticed: Noticed | None,
    held: ExitStack,
) -> None:
    """Inject one fault. If it takes a restart, wait until pictures come again."""
    began = time.monotonic()
    inject(server, held)
    if noticed is None:
        assert server.failure(began) is None, server.failure(began)
        return
    at = wait_for(lambda: noticed(server, began), NOTICE_LIMIT_S, "noticed")
    figures.noticed.append(at - began)
    if noticed is gateway_failure:
        wait_for(lambda: server.said(GATEWAY_AGAIN, at), RECOVERY_LIMIT_S, "the gateway again")
    else:
        wait_for(lambda: server.health()[0] == 200, RECOVERY_LIMIT_S, "ready again")
        wait_for(lambda: callers.tally.last_picture > at, RECOVERY_LIMIT_S, "pictures again")
    figures.recovered.append(time.monotonic() - began)


def _memory(server: Foreground) -> dict[str, float]:
    """Return the memory of the launcher and of all processes, as their proportional set size."""
    launcher, sizes = server.launcher, {}
    for process in [launcher, *launcher.children(recursive=True)]:
        with suppress(psutil.NoSuchProcess):
            sizes[process.pid] = process.memory_full_info().pss / 2**20
    return {"launcher": sizes[launcher.pid], "all": sum(sizes.values())}


def _spread(seconds: list[float]) -> str:
    return f"{statistics.median(seconds):.1f} s, {max(seconds):.1f} s" if seconds else "-"
