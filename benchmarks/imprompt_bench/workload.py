"""The requests of a measurement. Each has a unique prompt and picture, so that caches do not answer it."""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from PIL import Image

from imprompt_bench.load import PlannedRequest

REFERENCE_SIZE = 256
POOL = 3
"""Number of prompts and pictures that mixed traffic repeats."""
LEAVING_SHARE = 0.15
GUIDANCE = 7.5


@lru_cache(maxsize=64)
def reference(seed: int) -> Image.Image:
    """Draw a blurred picture of random colors."""
    colors = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    return Image.fromarray(colors).resize((REFERENCE_SIZE, REFERENCE_SIZE), Image.Resampling.BICUBIC)


@dataclass(frozen=True, kw_only=True, slots=True)
class Workload:
    """Requests for guided `size` x `size` pictures, with an image prompt if the bundle has an adapter for it."""

    model: str
    adapter: str | None
    size: int
    steps: int
    smallest: int
    """The smallest height that the server accepts."""

    def request(self, index: int, *, references: int = 1, **changes: Any) -> dict[str, Any]:
        """Build the arguments of `Client.generate` for request `index`."""
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

    def plain(self, index: int) -> PlannedRequest:
        return PlannedRequest(arguments=self.request(index))

    def mixed(self, index: int, seconds: float) -> PlannedRequest:
        """Build a request of mixed traffic: varying sizes and steps, with, without, or with a repeated image prompt.

        Args:
            seconds: median latency of a plain request; callers that cancel do so within this time.
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
        return PlannedRequest(
            arguments=arguments, kind=kind, leaves_after=chance.uniform(0.1, 0.9) * seconds if leaves else None
        )
