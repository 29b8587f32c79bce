"""Measure through a running server what prompts do to pictures: `python -m imprompt_demo.measure`.

Image prompts come from seeds that were not in the training set. Tests call the measurement functions as well.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from typing import Any

import numpy as np
from PIL import Image

from imprompt import Client
from imprompt_demo import metrics
from imprompt_demo.metrics import Pixels
from imprompt_demo.use_cases import LCM_MODEL, MODEL, SCALES, SETTINGS
from imprompt_demo.world import SIZE, THINGS, Picture, clip, picture, render, sample_layout, sample_look

_UNSEEN, _CALLERS = 9_000_000, 8
Metrics = dict[str, Any]


class Evaluator:
    """Generates many pictures concurrently and classifies what they show.

    Args:
        client: a client of the server.
        settings: overrides `SETTINGS` in all requests.
    """

    def __init__(self, client: Client, **settings: Any) -> None:
        self._client, self._settings = client, SETTINGS | settings

    @cached_property
    def classifier(self) -> metrics.ThingClassifier:
        """The classifier of pictures."""
        return metrics.ThingClassifier()

    def generate(self, requests: Iterable[dict[str, Any]], model: str = MODEL) -> list[Pixels]:
        """Generate one picture [64, 64, 3] per request; request i has seed i unless it sets one."""
        return self._all(requests, model, lambda result: result.images[0])

    def generate_clips(self, requests: Iterable[dict[str, Any]]) -> list[Pixels]:
        """Generate one clip [16, 64, 64, 3] per request."""
        size = {"num_frames": 16, "height": SIZE, "width": SIZE}
        return self._all((size | request for request in requests), MODEL, lambda result: np.stack(result.frames[0]))

    def accuracy(self, pictures: Iterable[Pixels], things: Iterable[str]) -> float:
        """Return the fraction of pictures that show the corresponding thing."""
        return _share(a == b for a, b in zip(self.classifier(list(pictures)), things, strict=True))

    def _all(self, requests: Iterable[dict[str, Any]], model: str, part: Callable[[Any], Pixels]) -> list[Pixels]:
        def one(numbered: tuple[int, dict[str, Any]]) -> Pixels:
            seed, request = numbered
            arguments = self._settings | {"seed": seed} | request
            return part(self._client.generate(model=model, output_type="np", **arguments))

        with ThreadPoolExecutor(_CALLERS) as callers:
            return list(callers.map(one, enumerate(requests)))


def unseen(count: int) -> list[Picture]:
    """Render pictures that are not in the training set."""
    return [picture(_UNSEEN + i) for i in range(count)]


def other_thing(reference: Picture, index: int) -> str:
    """Pick a thing that the reference does not show."""
    names = [name for name in THINGS if name != reference.layout.thing]
    return names[index % len(names)]


def text(evaluator: Evaluator, count: int = 24) -> Metrics:
    """Measure how often a picture shows what the text names, and the accuracy of the classifier itself."""
    names = (list(THINGS) * count)[:count]
    real = unseen(120)
    return {
        "thing_is_text": evaluator.accuracy(evaluator.generate({"prompt": f"a {name}"} for name in names), names),
        "classifier_on_world": evaluator.accuracy([p.pixels for p in real], [p.layout.thing for p in real]),
    }


def image_prompt(evaluator: Evaluator, adapter: str, count: int = 20) -> Metrics:
    """Measure the distance to the reference at each scale, and how often the picture shows what the text names."""
    references = unseen(count)
    asked = [other_thing(reference, i) for i, reference in enumerate(references)]
    palettes, textures, things = [], [], []
    for scale in SCALES:
        drawn = evaluator.generate(
            {"prompt": f"a {thing}", "ip_adapter_image": {adapter: p.image()}, "ip_adapter_scale": scale}
            for thing, p in zip(asked, references, strict=True)
        )
        pairs = list(zip(drawn, references, strict=True))
        palettes.append([metrics.palette_distance(a, p.pixels) for a, p in pairs])
        textures.append([metrics.texture_distance(a, p.pixels) for a, p in pairs])
        things.append(evaluator.accuracy(drawn, asked))
    none, some, much = np.array(palettes)
    return {
        "palette_distance": [round(float(row.mean()), 3) for row in (none, some, much)],
        "texture_distance": [round(float(np.mean(row)), 3) for row in textures],
        "palette_nearer": [_share(some < none), _share(much < none)],
        "thing_is_text": things,
    }


def inpainting(evaluator: Evaluator, count: int = 24) -> Metrics:
    """Replace the thing in a picture by another one, within a rectangle around it and within its own outline.

    Measures the change outside the mask (levels of 255), and whether the requested thing appears inside. Within the old
    thing's outline, many things cannot: a crescent has no room for a face.
    """
    rng, names = random.Random(3), list(THINGS)
    before = [render(sample_look(rng), sample_layout(rng, names[i % len(names)])) for i in range(count)]
    asked = [names[(i + 5 + i // len(names)) % len(names)] for i in range(count)]
    found: Metrics = {}
    for room, draw in (("rectangle", Picture.region_image), ("outline", Picture.mask_image)):
        masks = [_whole_cells(draw(p)) for p in before]
        after = evaluator.generate(
            {"prompt": f"a {thing}", "image": p.image(), "mask_image": mask, "strength": 1.0}
            for thing, p, mask in zip(asked, before, masks, strict=True)
        )
        changes = [
            metrics.outside_change(b, p.pixels, np.asarray(m) > 0) for b, p, m in zip(after, before, masks, strict=True)
        ]
        found[f"outside_change_{room}"] = round(float(np.mean(changes)), 2)
        found[f"thing_is_text_{room}"] = evaluator.accuracy(after, asked)
    return found


def _whole_cells(mask: Image.Image, cell: int = 4) -> Image.Image:
    """Grow a mask to whole latent pixels."""
    covered = np.array(mask.resize((SIZE // cell,) * 2, Image.Resampling.BOX)) > 0
    return Image.fromarray(covered.astype(np.uint8) * 255).resize((SIZE, SIZE), Image.Resampling.NEAREST)


def edges(evaluator: Evaluator, count: int = 12) -> Metrics:
    """Measure the ratio of gradients on the control lines to gradients elsewhere, without and with the ControlNet."""
    layouts = unseen(count)
    found: Metrics = {}
    for scale in (0.0, 1.0):
        drawn = evaluator.generate(
            {
                "prompt": "",
                "guidance_scale": 1.0,
                "control_image": p.edge_image(),
                "controlnet_conditioning_scale": scale,
            }
            for p in layouts
        )
        agreement = [metrics.edge_agreement(d, p.edges) for d, p in zip(drawn, layouts, strict=True)]
        found[f"edge_agreement_{scale:g}"] = round(float(np.mean(agreement)), 2)
        found[f"thing_is_edges_{scale:g}"] = evaluator.accuracy(drawn, [p.layout.thing for p in layouts])
    return found


def lcm(evaluator: Evaluator, count: int = 16) -> Metrics:
    """Compare 4 steps with the LCM-LoRA to 25 regular steps of the same prompts: palette distance, and the thing."""
    references = unseen(count)
    asked = [other_thing(reference, i) for i, reference in enumerate(references)]
    requests = [
        {"prompt": f"a {thing}", "ip_adapter_image": {"plain": p.image()}, "ip_adapter_scale": 0.8}
        for thing, p in zip(asked, references, strict=True)
    ]
    many = evaluator.generate(requests)
    fast = {"scheduler": "LCMScheduler", "num_inference_steps": 4, "guidance_scale": 1.0}
    few = evaluator.generate((request | fast for request in requests), LCM_MODEL)
    shifted = [*many[1:], many[0]]
    near, far = (
        [metrics.palette_distance(a, b) for a, b in zip(few, others, strict=True)] for others in (many, shifted)
    )
    return {
        "palette_distance": round(float(np.mean(near)), 3),
        "palette_distance_to_others": round(float(np.mean(far)), 3),
        "thing_is_text": [evaluator.accuracy(many, asked), evaluator.accuracy(few, asked)],
    }


def motion(evaluator: Evaluator, count: int = 4) -> Metrics:
    """Measure the smoothness of generated and rendered clips, and the palette distance of frames to the reference."""
    references = unseen(count)
    found: Metrics = {}
    for scale in (0.0, 0.8):
        clips = evaluator.generate_clips(
            {"prompt": f"a {other_thing(p, i)}", "ip_adapter_image": {"plain": p.image()}, "ip_adapter_scale": scale}
            for i, p in enumerate(references)
        )
        palettes = [
            metrics.palette_distance(f, p.pixels) for c, p in zip(clips, references, strict=True) for f in c[::4]
        ]
        found[f"palette_distance_{scale:g}"] = round(float(np.mean(palettes)), 3)
    rng = random.Random(1)
    real = [clip(sample_look(rng), sample_layout(rng)) for _ in range(count)]
    found["smoothness"] = round(float(np.mean([metrics.smoothness(frames) for frames in clips])), 3)
    found["smoothness_of_world"] = round(float(np.mean([metrics.smoothness(frames) for frames in real])), 3)
    return found


def _share(truths: Iterable[Any]) -> float:
    return round(float(np.mean(list(truths))), 3)


MEASUREMENTS: dict[str, Callable[[Evaluator], Metrics]] = {
    "text": text,
    "plain": lambda evaluator: image_prompt(evaluator, "plain"),
    "plus": lambda evaluator: image_prompt(evaluator, "plus"),
    "inpainting": inpainting,
    "edges": edges,
    "lcm": lcm,
    "motion": motion,
}


def main() -> None:
    """Print one JSON object per measurement."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", default="localhost:8001", help="gRPC address of a server with the embedded bundle")
    parser.add_argument("--only", default=",".join(MEASUREMENTS), help="measurements to run, separated by commas")
    options = parser.parse_args()
    with Client(options.url) as client:
        evaluator = Evaluator(client)
        for name in options.only.split(","):
            print(json.dumps({name: MEASUREMENTS[name](evaluator)}), flush=True)


if __name__ == "__main__":
    main()
