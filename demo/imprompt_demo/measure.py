"""`python -m imprompt_demo.train.measure BUNDLE --sheet FILE`: pictures and semantic metrics, with diffusers.

References come from seeds that training never saw. Metrics are printed as one JSON object.
"""

import argparse
import json
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import (
    AnimateDiffPipeline,
    ControlNetModel,
    LCMScheduler,
    MotionAdapter,
    StableDiffusionControlNetPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
)
from PIL import Image

from .. import metrics
from ..world import THINGS, Picture, picture, render, sample_layout, sample_look

STEPS, GUIDANCE = 25, 4.0
SCALES = (0.0, 0.4, 0.8)
_UNSEEN = 9_000_000
Pixels = metrics.Pixels


class Studio:
    """The bundle's pipelines."""

    def __init__(self, bundle: Path) -> None:
        self.place = bundle / "checkpoints"
        self.pipe = StableDiffusionPipeline.from_pretrained(str(self.place / "base"), torch_dtype=torch.float32)
        self.pipe.set_progress_bar_config(disable=True)
        self.classify = metrics.ThingClassifier(bundle)

    def use_adapter(self, kind: str) -> None:
        """Load one of the two IP-Adapters."""
        weights = {"plain": "ip-adapter_world.safetensors", "plus": "ip-adapter-plus_world.safetensors"}[kind]
        self.pipe.unload_ip_adapter()
        self.pipe.load_ip_adapter(str(self.place / "ip-adapter"), subfolder="models", weight_name=weights)

    def draw(self, prompts: list[str], seed: int = 0, pipe: Any = None, **options: Any) -> Pixels:
        """One picture for each prompt, [B, 64, 64, 3]; picture i has seed `seed + i`."""
        generators = [torch.Generator().manual_seed(seed + i) for i in range(len(prompts))]
        settings = {"num_inference_steps": STEPS, "guidance_scale": GUIDANCE, "output_type": "np"} | options
        out = (pipe or self.pipe)(prompts, generator=generators, **settings).images
        return (out * 255).round().astype(np.uint8)

    def draw_like(self, prompts: list[str], references: list[Image.Image], scale: float, **options: Any) -> Pixels:
        """The same with an image prompt for each picture."""
        self.pipe.set_ip_adapter_scale(scale)
        embeds = [
            self.pipe.prepare_ip_adapter_image_embeds([image], None, "cpu", 1, True)[0].chunk(2) for image in references
        ]
        both = [torch.cat([torch.cat([e[i] for e in embeds]) for i in (0, 1)])]
        return self.draw(prompts, ip_adapter_image_embeds=both, **options)


def unseen(count: int) -> list[Picture]:
    """Reference pictures outside the training set."""
    return [picture(_UNSEEN + i) for i in range(count)]


def other_thing(reference: Picture, index: int) -> str:
    """A thing that the reference does not show."""
    names = [name for name in THINGS if name != reference.layout.thing]
    return names[index % len(names)]


def text_metrics(studio: Studio, count: int = 48) -> dict[str, Any]:
    """How often the picture shows the thing that the caption names; the classifier's own accuracy beside it."""
    names = (list(THINGS) * count)[:count]
    drawn = studio.draw([f"a {name}" for name in names])
    real = unseen(200)
    told = studio.classify([p.pixels for p in real])
    return {
        "thing_is_text": _share(a == b for a, b in zip(names, studio.classify(list(drawn)), strict=True)),
        "classifier_on_world": _share(a == p.layout.thing for a, p in zip(told, real, strict=True)),
    }


def image_metrics(studio: Studio, kind: str, count: int = 20) -> dict[str, Any]:
    """Palette and texture distance to the reference at three scales, and whether the text still decides the thing."""
    studio.use_adapter(kind)
    references = unseen(count)
    asked = [other_thing(p, i) for i, p in enumerate(references)]
    palettes, textures, things = [], [], []
    for scale in SCALES:
        drawn = studio.draw_like([f"a {name}" for name in asked], [p.image() for p in references], scale, seed=100)
        pairs = list(zip(drawn, references, strict=True))
        palettes.append([metrics.palette_distance(a, p.pixels) for a, p in pairs])
        textures.append([metrics.texture_distance(a, p.pixels) for a, p in pairs])
        things.append(_share(a == b for a, b in zip(asked, studio.classify(list(drawn)), strict=True)))
    colours, grain = np.array(palettes), np.array(textures)
    return {
        "palette_distance": _means(colours),
        "texture_distance": _means(grain),
        "palette_nearer_at_0.8": _share(colours[2] < colours[0]),
        "palette_nearer_at_0.4": _share(colours[1] < colours[0]),
        "palette_grows_with_scale": _share((colours[2] < colours[1]) & (colours[1] < colours[0])),
        "thing_is_text": things,
    }


def edge_metrics(studio: Studio, count: int = 16) -> dict[str, Any]:
    """Gradients on the asked lines over gradients elsewhere, with and without the ControlNet; the caption is empty."""
    net = ControlNetModel.from_pretrained(str(studio.place / "controlnet-edges"), torch_dtype=torch.float32)
    studio.pipe.unload_ip_adapter()
    pipe = StableDiffusionControlNetPipeline(**studio.pipe.components, controlnet=net)
    pipe.set_progress_bar_config(disable=True)
    layouts = unseen(count)
    images = [p.edge_image() for p in layouts]
    agreement = {}
    for scale in (0.0, 1.0):
        drawn = studio.draw(
            [""] * count, pipe=pipe, image=images, guidance_scale=1.0, controlnet_conditioning_scale=scale
        )
        pairs = zip(drawn, layouts, strict=True)
        agreement[f"edge_agreement_{scale}"] = float(np.mean([metrics.edge_agreement(d, p.edges) for d, p in pairs]))
    told = studio.classify(list(drawn))
    return agreement | {"thing_is_edges": _share(a == p.layout.thing for a, p in zip(told, layouts, strict=True))}


def lcm_metrics(studio: Studio, count: int = 24) -> dict[str, Any]:
    """LCM-LoRA in 4 steps against 25 steps, and against 4 plain steps: distance of CLIP embeddings, and the thing."""
    studio.pipe.unload_ip_adapter()
    names = (list(THINGS) * count)[:count]
    prompts = [f"a {name}" for name in names]
    many, few = studio.draw(prompts), studio.draw(prompts, num_inference_steps=4)
    usual = studio.pipe.scheduler
    studio.pipe.load_lora_weights(str(studio.place / "lcm-lora"), weight_name="pytorch_lora_weights.safetensors")
    studio.pipe.scheduler = LCMScheduler.from_config(usual.config)
    fast = studio.draw(prompts, num_inference_steps=4, guidance_scale=1.0)
    studio.pipe.unload_lora_weights()
    studio.pipe.scheduler = usual
    told = {"lcm_4": fast, "ddim_4": few, "ddim_25": many}
    found = {
        f"{key}_thing": _share(a == b for a, b in zip(names, studio.classify(list(drawn)), strict=True))
        for key, drawn in told.items()
    }
    target = studio.classify.embeds(list(many))
    for key in ("lcm_4", "ddim_4"):
        cosine = (studio.classify.embeds(list(told[key])) * target).sum(1)
        found[f"{key}_clip_distance"] = round(float(1 - cosine.mean()), 3)
    return found


def moving_pipe(studio: Studio) -> AnimateDiffPipeline:
    """The AnimateDiff pipeline; call it after loading the adapter that it should use."""
    adapter = MotionAdapter.from_pretrained(str(studio.place / "motion"), torch_dtype=torch.float32)
    pipe = AnimateDiffPipeline(
        **{k: v for k, v in studio.pipe.components.items() if k != "safety_checker"}, motion_adapter=adapter
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def motion_metrics(studio: Studio, count: int = 6) -> dict[str, Any]:
    """Smoothness of clips, beside that of rendered clips, and palette distance of the frames to the reference."""
    from ..world import clip

    studio.use_adapter("plain")
    pipe = moving_pipe(studio)
    smooth, palettes = [], []
    for i, reference in enumerate(unseen(count)):
        frames = film(pipe, f"a {other_thing(reference, i)}", reference.image(), 0.8, i)
        smooth.append(metrics.smoothness(frames))
        palettes.append(np.mean([metrics.palette_distance(f, reference.pixels) for f in frames]))
    rng = random.Random(1)
    real = [metrics.smoothness(clip(sample_look(rng), sample_layout(rng))) for _ in range(count)]
    return {
        "smoothness": round(float(np.mean(smooth)), 3),
        "smoothness_of_world": round(float(np.mean(real)), 3),
        "palette_distance_to_reference": round(float(np.mean(palettes)), 3),
    }


def film(pipe: AnimateDiffPipeline, prompt: str, reference: Image.Image, scale: float, seed: int) -> Pixels:
    """A clip of 16 frames, [16, 64, 64, 3]."""
    pipe.set_ip_adapter_scale(scale)
    generator = torch.Generator().manual_seed(seed)
    frames = pipe(
        prompt,
        num_frames=16,
        ip_adapter_image=reference,
        num_inference_steps=STEPS,
        guidance_scale=GUIDANCE,
        generator=generator,
        output_type="np",
        height=64,
        width=64,
    ).frames[0]
    return (np.asarray(frames) * 255).round().astype(np.uint8)


def sheet(studio: Studio, kinds: list[str], columns: int = 16) -> Image.Image:
    """Text alone; then for each adapter the references and the pictures at three scales; then inpainting."""
    names = (list(THINGS) * 2)[:columns]
    rows: list[Iterable[Pixels]] = [studio.draw([f"a {name}" for name in names])]
    described = ["a red star on a white background", "a blue fish with yellow stripes on a pink background"]
    rows.append(studio.draw((described * columns)[:columns]))
    references = unseen(columns)
    asked = [f"a {other_thing(p, i)}" for i, p in enumerate(references)]
    for kind in kinds:
        studio.use_adapter(kind)
        rows.append([p.pixels for p in references])
        rows += [studio.draw_like(asked, [p.image() for p in references], scale, seed=100) for scale in SCALES]
    return tile(rows)


def tile(rows: list[Iterable[Pixels]], zoom: int = 2) -> Image.Image:
    """Pictures in rows on white."""
    lines = [np.concatenate([np.pad(p, ((1, 1), (1, 1), (0, 0)), constant_values=255) for p in row], 1) for row in rows]
    image = Image.fromarray(np.concatenate(lines, 0))
    return image.resize((image.width * zoom, image.height * zoom), Image.Resampling.NEAREST)


def inpaint_metrics(studio: Studio, count: int = 8) -> dict[str, Any]:
    """Change outside the mask in levels of 255, and whether the new thing shows inside."""
    studio.pipe.unload_ip_adapter()
    pipe = StableDiffusionInpaintPipeline(**studio.pipe.components, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    rng = random.Random(3)
    outside, asked, drawn = [], [], []
    for i in range(count):
        look, names = sample_look(rng), list(THINGS)
        before = render(look, sample_layout(rng, names[i]))
        grown = np.array(before.mask_image().resize((16, 16), Image.Resampling.BOX)) > 0
        mask = Image.fromarray(grown.astype(np.uint8) * 255).resize((64, 64), Image.Resampling.NEAREST)
        asked.append(names[(i + 5) % len(names)])
        after = studio.draw([f"a {asked[-1]}"], i, pipe, image=before.image(), mask_image=mask, strength=1.0)[0]
        outside.append(metrics.outside_change(after, before.pixels, np.asarray(mask) > 0))
        drawn.append(after)
    told = studio.classify(drawn)
    return {
        "outside_change": float(np.mean(outside)),
        "thing_is_text": _share(a == b for a, b in zip(asked, told, strict=True)),
    }


def main() -> None:
    """Measure what the bundle holds."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--sheet", type=Path)
    parser.add_argument("--only", default="text,plain,plus,edges,lcm,motion,inpaint")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    studio = Studio(args.bundle)
    has = {
        kind: (studio.place / "ip-adapter/models" / name).exists()
        for kind, name in (("plain", "ip-adapter_world.safetensors"), ("plus", "ip-adapter-plus_world.safetensors"))
    }
    if args.sheet:
        sheet(studio, [kind for kind, there in has.items() if there]).save(args.sheet)
    measures = {
        "text": lambda: text_metrics(studio),
        "plain": lambda: image_metrics(studio, "plain"),
        "plus": lambda: image_metrics(studio, "plus"),
        "edges": lambda: edge_metrics(studio),
        "lcm": lambda: lcm_metrics(studio),
        "motion": lambda: motion_metrics(studio),
        "inpaint": lambda: inpaint_metrics(studio),
    }
    for name in filter(None, args.only.split(",")):
        print(json.dumps({name: measures[name]()}), flush=True)


def _share(truths: Iterable[bool]) -> float:
    return round(float(np.mean(list(truths))), 3)


def _means(rows: np.ndarray[Any, Any]) -> list[float]:
    return [round(float(value), 3) for value in rows.mean(1)]


if __name__ == "__main__":
    main()
