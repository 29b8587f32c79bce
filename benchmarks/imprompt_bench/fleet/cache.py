"""What a shared cache of embeddings saves: `imprompt bench cache`."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

from imprompt import Client
from imprompt_bench.workload import Workload

STAGES = ("text_encoder", "image_encoder", "total")
_FIRST_NUMBER = 1_000_000
"""Requests that no other measurement sends."""


def compare(urls: Sequence[str], workload: Workload, requests: int) -> list[dict[str, float]]:
    """Send the same requests to each server in turn; return the median seconds of `STAGES` on each.

    With a shared cache, the first server computes the embeddings, and the others look them up.
    """
    found = []
    for url in urls:
        with Client(url) as client:
            client.generate(**workload.request(_FIRST_NUMBER - 1))  # warm-up
            numbers = range(_FIRST_NUMBER, _FIRST_NUMBER + requests)
            timings = [client.generate(**workload.request(number)).timings for number in numbers]
        found.append({stage: median(each.get(stage, 0.0) for each in timings) for stage in STAGES})
    return found
