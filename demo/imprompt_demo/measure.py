"""What prompts do to pictures, measured through a running server: `python -m imprompt_demo.measure`.

Image prompts come from seeds that training never saw. Each measurement is a small function that the tests call, too.
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
Found = dict[str, Any]


class Sitter:
    """Asks the server for many pictures at once and says what they show."""

    def __init__(self, client: Client) -> None:
        self._client = client

    @cached_property
    def classify(self) -> metrics.ThingClassifier:
        """Looks at the pictures."""
        return metrics.ThingClassifier()

    def draw(self, requests: Iterable[dict[str, Any]], model: str = MODEL) -> list[Pixels]:
        """A picture [64, 64, 3] for each request; request i has seed i unless it brings one."""
        return self._all(requests, model, lambda result: result.images[0])

    def film(self, requests: Iterable[dict[str, Any]]) -> list[Pixels]:
        """A clip [16, 64, 64, 3] for each request."""
        size = {"num_frames": 16, "height": SIZE, "width": SIZE}
        return self._all((size | request for request in requests), MODEL, lambda result: np.stack(result.frames[0]))

    def shows(self, pictures: Iterable[Pixels], things: Iterable[str]) -> float:
        """The share of pictures that show the thing beside them."""
        return _share(a == b for a, b in zip(self.classify(list(pictures)), things, strict=True))

    def _all(self, requests: Iterable[dict[str, Any]], model: str, part: Callable[[Any], Pixels]) -> list[Pixels]:
        def one(numbered: tuple[int, dict[str, Any]]) -> Pixels:
            seed, request = numbered
            return part(self._client.generate(model=model, output_type="np", **SETTINGS | {"seed": seed} | request))

        with ThreadPoolExecutor(_CALLERS) as callers:
            return list(callers.map(one, enumerate(requests)))


def unseen(count: int) -> list[Picture]:
    """Pictures of the world outside the training set."""
    return [picture(_UNSEEN + i) for i in range(count)]


def other_thing(reference: Picture, index: int) -> str:
    """A thing that the reference does not show."""
    names = [name for name in THINGS if name != reference.layout.thing]
    return names[index % len(names)]


def text(sitter: Sitter, count: int = 24) -> Found:
    """How often the picture shows what the text names; the classifier's own accuracy beside it."""
    names = (list(THINGS) * count)[:count]
    real = unseen(120)
    return {
        "thing_is_text": sitter.shows(sitter.draw({"prompt": f"a {name}"} for name in names), names),
        "classifier_on_world": sitter.shows([p.pixels for p in real], [p.layout.thing for p in real]),
    }


def image_prompt(sitter: Sitter, adapter: str, count: int = 20) -> Found:
    """Distance of palette and texture to the reference at each scale, and whether the text still decides the thing."""
    references = unseen(count)
    asked = [other_thing(reference, i) for i, reference in enumerate(references)]
    palettes, textures, things = [], [], []
    for scale in SCALES:
        drawn = sitter.draw(
            {"prompt": f"a {thing}", "ip_adapter_image": {adapter: p.image()}, "ip_adapter_scale": scale}
            for thing, p in zip(asked, references, strict=True)
        )
        pairs = list(zip(drawn, references, strict=True))
        palettes.append([metrics.palette_distance(a, p.pixels) for a, p in pairs])
        textures.append([metrics.texture_distance(a, p.pixels) for a, p in pairs])
        things.append(sitter.shows(drawn, asked))
    none, some, much = np.array(palettes)
    return {
        "palette_distance": [round(float(row.mean()), 3) for row in (none, some, much)],
        "texture_distance": [round(float(np.mean(row)), 3) for row in textures],
        "palette_nearer": [_share(some < none), _share(much < none)],
        "thing_is_text": things,
    }


def inpainting(sitter: Sitter, count: int = 8) -> Found:
    """Change outside the mask in levels of 255, and whether the new thing shows inside."""
    rng, names = random.Random(3), list(THINGS)
    before = [render(sample_look(rng), sample_layout(rng, names[i])) for i in range(count)]
    masks = [_whole_cells(p) for p in before]
    asked = [names[(i + 5) % len(names)] for i in range(count)]
    after = sitter.draw(
        {"prompt": f"a {thing}", "image": p.image(), "mask_image": mask, "strength": 1.0}
        for thing, p, mask in zip(asked, before, masks, strict=True)
    )
    changes = [
        metrics.outside_change(b, p.pixels, np.asarray(m) > 0) for b, p, m in zip(after, before, masks, strict=True)
    ]
    return {"outside_change": round(float(np.mean(changes)), 2), "thing_is_text": sitter.shows(after, asked)}


def _whole_cells(shown: Picture, cell: int = 4) -> Image.Image:
    """The object's mask grown to whole cells of the latents."""
    covered = np.array(shown.mask_image().resize((SIZE // cell,) * 2, Image.Resampling.BOX)) > 0
    return Image.fromarray(covered.astype(np.uint8) * 255).resize((SIZE, SIZE), Image.Resampling.NEAREST)


def edges(sitter: Sitter, count: int = 12) -> Found:
    """Gradients on the asked lines over gradients elsewhere, without and with the ControlNet; there is no text."""
    layouts = unseen(count)
    found: Found = {}
    for scale in (0.0, 1.0):
        drawn = sitter.draw(
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
        found[f"thing_is_edges_{scale:g}"] = sitter.shows(drawn, [p.layout.thing for p in layouts])
    return found


def lcm(sitter: Sitter, count: int = 16) -> Found:
    """Four steps with the LCM-LoRA beside 25 plain steps of the same prompts: distance of palettes, and the thing."""
    references = unseen(count)
    asked = [other_thing(reference, i) for i, reference in enumerate(references)]
    requests = [
        {"prompt": f"a {thing}", "ip_adapter_image": {"plain": p.image()}, "ip_adapter_scale": 0.8}
        for thing, p in zip(asked, references, strict=True)
    ]
    many = sitter.draw(requests)
    fast = {"scheduler": "LCMScheduler", "num_inference_steps": 4, "guidance_scale": 1.0}
    few = sitter.draw((request | fast for request in requests), LCM_MODEL)
    shifted = [*many[1:], many[0]]
    near, far = (
        [metrics.palette_distance(a, b) for a, b in zip(few, others, strict=True)] for others in (many, shifted)
    )
    return {
        "palette_distance": round(float(np.mean(near)), 3),
        "palette_distance_to_others": round(float(np.mean(far)), 3),
        "thing_is_text": [sitter.shows(many, asked), sitter.shows(few, asked)],
    }


def motion(sitter: Sitter, count: int = 4) -> Found:
    """Smoothness of clips beside that of rendered ones, and distance of the frames' palette to the reference."""
    references = unseen(count)
    found: Found = {}
    for scale in (0.0, 0.8):
        clips = sitter.film(
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


MEASUREMENTS: dict[str, Callable[[Sitter], Found]] = {
    "text": text,
    "plain": lambda sitter: image_prompt(sitter, "plain"),
    "plus": lambda sitter: image_prompt(sitter, "plus"),
    "inpainting": inpainting,
    "edges": edges,
    "lcm": lcm,
    "motion": motion,
}


def main() -> None:
    """Print one JSON object for each measurement."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", default="localhost:8001", help="a server with the models of the embedded bundle")
    parser.add_argument("--only", default=",".join(MEASUREMENTS), help="comma separated")
    options = parser.parse_args()
    with Client(options.url) as client:
        sitter = Sitter(client)
        for name in options.only.split(","):
            print(json.dumps({name: MEASUREMENTS[name](sitter)}), flush=True)


if __name__ == "__main__":
    main()
