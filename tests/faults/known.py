"""Requests whose pictures are known, sent by callers that retry until they have them."""

from __future__ import annotations

import base64
import http.client
import io
import json
import random
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image

from imprompt import Client, ConnectionFailed, ImpromptError, Overloaded, Result

PATIENCE_S = 600.0
"""After this long without its picture, a request is lost."""
PAUSE_S = 0.5
MAX_LEVELS = 2
"""Pictures may differ by this much from those that were made alone, because rows of a call are summed differently."""
_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))
_BLOB = Image.fromarray((np.indices((64, 64, 3)).sum(0) % 256).astype(np.uint8))

REQUESTS: dict[str, dict[str, Any]] = {
    "text": {"prompt": "a red house"},
    "guided": {"prompt": "a blue fish", "guidance_scale": 4.0},
    "wide": {"prompt": "a green tree", "width": 96},
    "long": {"prompt": "a lake", "num_inference_steps": 40},
    "two": {"prompt": ["a tree", "a boat"], "num_inference_steps": 3},
    "image prompt": {"prompt": "a house", "ip_adapter_image": {"plain": _BLOB}, "ip_adapter_scale": 0.7},
    "start image": {"prompt": "a house", "image": _BLOB, "strength": 0.6},
}
"""Requests by name; all have a seed, and a few steps unless they say otherwise."""
OVER_HTTP = ("text", "guided", "wide", "long")
"""Those that are plain JSON."""


@dataclass
class Tally:
    """What callers saw."""

    pictures: int = 0
    """Requests that got their picture."""
    resent: Counter[str] = field(default_factory=Counter)
    """Errors after which a caller sent its request again."""
    lost: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    last_picture: float = 0.0
    """When the latest attempt began that got its picture."""


class KnownPictures:
    """The pictures of `REQUESTS`, as the server makes them when nothing else happens."""

    def __init__(self, address: str, bundle: str) -> None:
        self.bundle = bundle
        with Client(address) as client:
            self._pictures = {name: _array(client.generate(**self.arguments(name))) for name in REQUESTS}

    def arguments(self, name: str) -> dict[str, Any]:
        return {"model": self.bundle, "seed": 7, "num_inference_steps": 6, **REQUESTS[name]}

    def problem(self, name: str, pictures: np.ndarray) -> str | None:
        """Say how `pictures` differ from those of the request `name`, if they do."""
        known = self._pictures[name].astype(int)
        if pictures.shape != known.shape:
            return f"{name}: shape {pictures.shape}"
        levels = int(np.abs(pictures.astype(int) - known).max())
        return f"{name}: {levels} levels" if levels > MAX_LEVELS else None


class RetryingCallers:
    """Callers that request known pictures until they are stopped: by `generate`, by `stream`, and over HTTP."""

    def __init__(
        self, known: KnownPictures, address: str, gateway: str | None = None, *, count: int, seed: int
    ) -> None:
        self.tally = Tally()
        self._known, self._address, self._gateway = known, address, gateway
        self._stop, self._lock = threading.Event(), threading.Lock()
        self._threads = [
            threading.Thread(target=self._run, args=(index, random.Random(f"{seed}/{index}")), daemon=True)
            for index in range(count)
        ]
        for thread in self._threads:
            thread.start()

    def stop(self) -> int:
        """Let every caller finish its request; return how many did not."""
        self._stop.set()
        until = time.monotonic() + PATIENCE_S + 60
        for thread in self._threads:
            thread.join(max(until - time.monotonic(), 0.0))
        return sum(thread.is_alive() for thread in self._threads)

    def _run(self, index: int, choices: random.Random) -> None:
        with Client(self._address) as client:
            ways: list[Callable[[str], np.ndarray]] = [
                lambda name: _array(client.generate(**self._known.arguments(name))),
                lambda name: _array(list(client.stream(**self._known.arguments(name)))[-1]),
            ]
            if self._gateway is not None:
                ways.append(self.over_http)
            way = ways[index % len(ways)]
            names = OVER_HTTP if way == self.over_http else tuple(REQUESTS)
            while not self._stop.is_set():
                self._insist(choices.choice(names), way)

    def _insist(self, name: str, way: Callable[[str], np.ndarray]) -> None:
        """Send a request, again and again if need be, until it gets its picture."""
        first = time.monotonic()
        while True:
            began = time.monotonic()
            try:
                problem = self._known.problem(name, way(name))
            except (Overloaded, ConnectionFailed, OSError) as error:
                with self._lock:
                    self.tally.resent[type(error).__name__] += 1
                    if began - first > PATIENCE_S:
                        self.tally.lost.append(f"{name}: {error}")
                        return
                time.sleep(PAUSE_S)
            except ImpromptError as error:
                with self._lock:
                    self.tally.lost.append(f"{name}: {type(error).__name__}: {error}")
                return
            else:
                with self._lock:
                    self.tally.pictures += 1
                    self.tally.last_picture = max(self.tally.last_picture, began)
                    self.tally.wrong += [problem] if problem else []
                return

    def over_http(self, name: str) -> np.ndarray:
        """Send a request to the gateway once.

        Raises:
            OSError: the gateway, or the server behind it, is away.
        """
        body = json.dumps(self._known.arguments(name)).encode()
        url, headers = f"{self._gateway}/v1/images/generations", {"Content-Type": "application/json"}
        try:
            with _OPENER.open(urllib.request.Request(url, body, headers), timeout=PATIENCE_S) as answer:
                files = [base64.b64decode(item["b64_json"]) for item in json.load(answer)["data"]]
        except urllib.error.HTTPError as error:
            if error.code in (429, 503):
                raise OSError(error.code) from None
            raise ImpromptError(f"HTTP {error.code}: {error.read().decode()[:200]}") from None
        except (http.client.HTTPException, ValueError) as error:  # the answer broke off
            raise OSError(str(error)) from None
        return np.stack([np.asarray(Image.open(io.BytesIO(file)).convert("RGB")) for file in files])


def _array(result: Any) -> np.ndarray:
    assert isinstance(result, Result)
    return np.stack([np.asarray(image) for image in result.images or []])
