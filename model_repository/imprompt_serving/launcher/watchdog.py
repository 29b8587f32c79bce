"""Notice within ten seconds that a server no longer makes pictures, and say why.

A process that has ended or is stopped is a failure at once. Otherwise a failure needs someone who waits: a canary
(`canary.py`), a pipeline that waits for a model, or a response that is being sent (`heartbeat.py`). If that takes long,
the process which is holding things up is found. If it computes, or waits for a core, the server is merely busy.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence

from imprompt_serving.heartbeat import Pulse, model_of
from imprompt_serving.launcher.activity import Activity
from imprompt_serving.launcher.canary import Canary, read_fronts
from imprompt_serving.launcher.install import LaunchError
from imprompt_serving.launcher.server import Server

INTERVAL_S = 0.5
PATIENCE_S = 5.0
"""How long to wait for something that takes milliseconds on an idle server. With the pause between canaries and the
window of `activity`, a failure is noticed within ten seconds."""
BUSY_PATIENCE_S = 300.0
"""How long to wait for a process that computes. Longer than the longest call: 16 rows of SDXL on a CPU."""
STOPPED_PATIENCE_S = 1.0
"""How long a process may be stopped: long enough for a debugger that attaches."""
OVERSLEPT_S = 2.0
"""If the watchdog itself ran this late, the machine was suspended or starved, and everything seems to have hung."""

TRITON = "tritonserver"


class Watchdog:
    """Watches one start of a server: call `check` regularly, and `close` before the server stops."""

    def __init__(self, server: Server, *, max_canary_age: float) -> None:
        self._server = server
        self._processes = {name: Activity(process) for name, process in server.processes.items()}
        self._stopped_since: dict[str, float] = {}
        self._next_look = self._patient_until = 0.0
        fronts = read_fronts(server.repository)
        self.canaries = [
            Canary(front, server.grpc_address, server.secret, max_interval=max_canary_age / 3) for front in fronts
        ]

    def close(self) -> None:
        for canary in self.canaries:
            canary.close()

    def has_seen_pictures(self) -> bool:
        """Return whether every bundle has made a picture since the start."""
        return all(canary.last_good is not None or canary.refused for canary in self.canaries)

    def check(self) -> None:
        """Check the server. Returns at once if it was checked a moment ago.

        Raises:
            LaunchError: it has failed and must be restarted; the message says why.
        """
        self._server.check()
        now = time.monotonic()
        if now < self._next_look:
            return
        if self._next_look and now > self._next_look + OVERSLEPT_S:
            self._patient_until = now + PATIENCE_S
        self._next_look = now + INTERVAL_S
        self._check_stopped(now)
        for process in self._processes.values():
            process.sample()
        pulses = self._server.pulses()
        for canary in self.canaries:
            for name in _instances(pulses, canary.front.model):
                canary.saw_picture(pulses[name].picture)
        if now >= self._patient_until:
            for name, pulse in pulses.items():
                self._check_pulse(name, pulse, now)
            for canary in self.canaries:
                self._check_canary(canary, pulses, now)

    def _check_stopped(self, now: float) -> None:
        for name, process in self._processes.items():
            if not process.is_stopped():
                self._stopped_since.pop(name, None)
            elif now - self._stopped_since.setdefault(name, now) >= STOPPED_PATIENCE_S:
                raise LaunchError(f"{name} (pid {process.pid}) is stopped (SIGSTOP)")

    def _check_pulse(self, name: str, pulse: Pulse, now: float) -> None:
        if now - pulse.at > PATIENCE_S:
            self._blame([name], now - pulse.at, f"{name} has been stuck")
        # This takes milliseconds, even if a caller does not read: Triton buffers responses.
        if pulse.sending is not None and pulse.at - pulse.sending > PATIENCE_S:
            raise LaunchError(f"{name} has been sending a response for {pulse.at - pulse.sending:.0f} s")
        for model, since in pulse.calls.items():
            if pulse.at - since > PATIENCE_S:
                holders = _instances(self._processes, model)
                self._blame(holders, pulse.at - since, f"{name} has been waiting for {model}")

    def _check_canary(self, canary: Canary, pulses: Mapping[str, Pulse], now: float) -> None:
        model = canary.front.model
        if canary.refused:
            return
        if canary.failing_since is not None and now - canary.failing_since > PATIENCE_S:
            raise LaunchError(f"{model} has failed to make a picture for {PATIENCE_S:g} s: {canary.error}")
        since = canary.waiting_since
        if since is not None and now - since > PATIENCE_S:
            self._blame(self._holders(canary, pulses), now - since, f"{model} has not made a picture")

    def _holders(self, canary: Canary, pulses: Mapping[str, Pulse]) -> list[str]:
        """Find the processes that hold a canary: a denoiser, a pipeline and the models it waits for, or Triton."""
        holding = [name for name, pulse in pulses.items() if pulse.canary is not None]
        fronts = _instances(holding, canary.front.model)
        denoisers = [name for name in holding if name.startswith(f"{canary.front.bundle}_denoiser_")]
        called = [name for front in fronts for model in pulses[front].calls for name in _instances(pulses, model)]
        return denoisers or fronts + called

    def _blame(self, holders: Sequence[str], seconds: float, complaint: str) -> None:
        """Raise an error, unless one of the processes that hold things up is busy."""
        holders = holders or [TRITON]
        if seconds <= BUSY_PATIENCE_S and any(self._processes[name].active for name in holders):
            return
        raise LaunchError(f"{complaint} for {seconds:.0f} s; held up by {' and '.join(holders)}")


def _instances(names: Iterable[str], model: str) -> list[str]:
    """Return those of `names` that are instances of `model`."""
    return [name for name in names if model_of(name) == model]
