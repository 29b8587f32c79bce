"""Compare what makes pictures faster with what it changes in them: `python -m imprompt_demo.quality`.

Needs a server with both embedded bundles at `--url`, and a server for each `--variant NAME=URL`: the same bundles,
exported with another backend or precision. Requests have a prompt and an image prompt. All variants take turns, request
by request, so that a busy machine slows down all of them. Prints a Markdown table.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np
from skimage.metrics import structural_similarity

from imprompt import Client
from imprompt_demo import metrics
from imprompt_demo.measure import other_thing, unseen
from imprompt_demo.metrics import Pixels
from imprompt_demo.use_cases import LCM_MODEL, MODEL, SETTINGS

_LCM: dict[str, Any] = {"scheduler": "LCMScheduler", "num_inference_steps": 4, "guidance_scale": 1.0}
_OPTIONS: dict[str, dict[str, Any]] = {
    "fp32, 25 steps": {},
    "`guidance_end=0.5`": {"guidance_end": 0.5},
    "12 steps": {"num_inference_steps": 12},
    "LCM-LoRA, 4 steps": {"model": LCM_MODEL, **_LCM},
}


@dataclass(kw_only=True)
class Variant:
    """A way to make the same pictures, and what it made."""

    client: Client
    options: dict[str, Any]
    pictures: list[Pixels] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    def generate(self, request: dict[str, Any]) -> tuple[Pixels, float]:
        """Return the picture [64, 64, 3], and the seconds that it took."""
        arguments: dict[str, Any] = {"model": MODEL, "output_type": "np", **SETTINGS, **request, **self.options}
        begun = perf_counter()
        result = self.client.generate(**arguments)
        return result.images[0], perf_counter() - begun


def server_variants(client: Client) -> dict[str, Variant]:
    """The variants that need no other server; the first is what all are compared with."""
    return {name: Variant(client=client, options=options) for name, options in _OPTIONS.items()}


def compare(variants: dict[str, Variant], count: int) -> list[list[str]]:
    """Generate `count` pictures per variant, and return a row of the table for each."""
    references = unseen(count)
    things = [other_thing(reference, index) for index, reference in enumerate(references)]
    for index, (thing, reference) in enumerate(zip(things, references, strict=True)):
        request = {
            "prompt": f"a {thing}",
            "ip_adapter_image": {"plain": reference.image()},
            "ip_adapter_scale": 0.8,
            "seed": index,
        }
        for variant in variants.values():
            if index == 0:
                variant.generate(request)  # not counted: it may compile or warm up
            picture, seconds = variant.generate(request)
            variant.pictures.append(picture)
            variant.seconds.append(seconds)
    classifier = metrics.ThingClassifier()
    first = next(iter(variants.values()))
    rows = []
    for name, variant in variants.items():
        pairs = list(zip(variant.pictures, first.pictures, strict=True))
        difference = np.mean([np.abs(a.astype(int) - b.astype(int)).mean() for a, b in pairs])
        similarity = np.mean([structural_similarity(a, b, channel_axis=-1) for a, b in pairs])
        right = np.mean([a == b for a, b in zip(classifier(variant.pictures), things, strict=True)])
        looks = zip(variant.pictures, references, strict=True)
        palette = np.mean([metrics.palette_distance(made, reference.pixels) for made, reference in looks])
        seconds = median(variant.seconds)
        speed = median(first.seconds) / seconds
        numbers = (f"{seconds:.3f}", f"{speed:.2f}", f"{difference:.1f}", f"{similarity:.3f}")
        rows.append([name, *numbers, f"{100 * right:.0f} %", f"{palette:.2f}"])
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="localhost:8001", help="gRPC address of a server with the embedded bundles")
    parser.add_argument("--variant", action="append", default=[], metavar="NAME=URL", help="may be repeated")
    parser.add_argument("--count", type=int, default=24, help="pictures per variant (default: 24)")
    options = parser.parse_args(arguments)
    with ExitStack() as stack:
        client = stack.enter_context(Client(options.url))
        variants = server_variants(client)
        for name, _, url in (entry.partition("=") for entry in options.variant):
            variants[name] = Variant(client=stack.enter_context(Client(url)), options={})
        rows = compare(variants, options.count)
    header = ["variant", "seconds", "speed-up", "difference, levels of 255", "SSIM", "thing matches the prompt"]
    header += ["palette distance to the image prompt"]
    for row in (header, ["---", *["---:"] * (len(header) - 1)], *rows):
        print(f"| {' | '.join(row)} |")


if __name__ == "__main__":
    main()
