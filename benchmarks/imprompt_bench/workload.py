"""The requests of a measurement: each has a prompt and a picture of its own, so that no cache answers for it."""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from PIL import Image

from imprompt_bench.load import Planned

REFERENCE_SIZE = 256
POOL = 3
"""Prompts and pictures that mixed traffic repeats."""
LEAVING_SHARE = 0.15
GUIDANCE = 7.5


@lru_cache(maxsize=64)
def reference(seed: int) -> Image.Image:
    """A soft picture of random colors."""
    colors = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    return Image.fromarray(colors).resize((REFERENCE_SIZE, REFERENCE_SIZE), Image.Resampling.BICUBIC)


@dataclass(frozen=True, kw_only=True, slots=True)
class Workload:
    """Guided pictures of ``size`` x ``size`` with an image prompt, when the bundle has an adapter that takes one."""

    model: str
    adapter: str | None
    size: int
    steps: int
    smallest: int
    """Of the heights that are served."""

    def request(self, index: int, *, references: int = 1, **changes: Any) -> dict[str, Any]:
        """Arguments of ``Client.generate`` for request ``index``."""
        arguments: dict[str, Any] = {
            "model": self.model,
            "prompt": f"a photo of thing number {index}",
            "negative_prompt": f"blurry number {index}",
            "height": self.size,
            "width": self.size,
            "num_inference_steps": self.steps,
            "guidance_scale": GUIDANCE,
            "seed": index,
        }
        if self.adapter and references:
            pictures = [reference(100 * index + number) for number in range(references)]
            arguments["ip_adapter_image"] = {self.adapter: pictures}
        return arguments | changes

    def plain(self, index: int) -> Planned:
        return Planned(arguments=self.request(index))

    def mixed(self, index: int, seconds: float) -> Planned:
        """What a day brings: other sizes and step counts, with and without image prompt, some of them seen before.

        Args:
            seconds: median latency of a plain request; those who leave do so within it.
        """
        chance = random.Random(index)
        changes: dict[str, Any] = {
            "height": chance.choice([self.size, self.size, max(self.size // 16 * 8, self.smallest)]),
            "num_inference_steps": chance.choice([max(self.steps // 2, 1), self.steps, self.steps, 2 * self.steps]),
        }
        kind = chance.choice(["text", "image", "image", "repeated"])
        seen = chance.randrange(POOL) if kind == "repeated" else POOL + index
        arguments = self.request(seen, references=int(kind != "text"), **changes, seed=index)
        leaves = chance.random() < LEAVING_SHARE
        return Planned(
            arguments=arguments, kind=kind, leaves_after=chance.uniform(0.1, 0.9) * seconds if leaves else None
        )
