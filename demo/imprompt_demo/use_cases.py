"""The use cases that the demo shows. Each is a row of the contact sheet, with its inputs and results."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from PIL import Image, ImageFilter

from imprompt import Client, Result
from imprompt_demo.sheet import Row
from imprompt_demo.world import SIZE, Picture, picture

MODEL, LCM_MODEL = "world", "world_lcm"
SETTINGS = {"num_inference_steps": 25, "guidance_scale": 4.0}
SCALES = (0.0, 0.4, 0.8)
STYLES = ((4, "fish"), (49, "star"), (65, "heart"))
"""Seeds of the pictures used as image prompts, and the thing that the text asks for."""
Cells = list[tuple[str, Image.Image]]


class UseCases:
    """Runs the use cases on a server, and keeps the results for their timings."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self.results: list[Result] = []

    def generate(self, model: str = MODEL, **arguments: Any) -> Result:
        """Send a request with the demo's default settings."""
        result = self._client.generate(model=model, **SETTINGS | arguments)
        self.results.append(result)
        return result

    def rows(self) -> Iterator[Row]:
        """Run every use case in turn."""
        for seed, thing in STYLES:
            yield self.text_to_image(picture(seed), thing, seed)
        yield self.adapters(picture(5), picture(32))
        yield self.image_to_image(picture(63), picture(0))
        yield self.inpainting(picture(9), picture(5), "fish")
        yield self.edges(picture(33), picture(53))
        yield self.fast(picture(12), "flower")

    def text_to_image(self, style: Picture, thing: str, seed: int) -> Row:
        """Generate the same prompt and seed with the image prompt at each scale."""
        cells: Cells = [("image prompt", style.image())]
        for scale in SCALES:
            result = self.generate(
                prompt=f"a {thing}", ip_adapter_image={"plain": style.image()}, ip_adapter_scale=scale, seed=seed
            )
            cells.append((f"scale {scale:g}", result.images[0]))
        return Row(title=f'text-to-image\n"a {thing}"', cells=cells)

    def adapters(self, first: Picture, second: Picture) -> Row:
        """Combine two adapters, each with its own picture."""
        result = self.generate(
            prompt="a moon",
            ip_adapter_image={"plain": first.image(), "plus": second.image()},
            ip_adapter_scale={"plain": 0.4, "plus": 0.4},
            seed=1,
        )
        cells = [("plain", first.image()), ("plus", second.image()), ("both, 0.4 each", result.images[0])]
        return Row(title='two adapters\n"a moon"', cells=cells)

    def image_to_image(self, start: Picture, style: Picture) -> Row:
        """Change a picture toward the look of another."""
        result = self.generate(
            prompt=f"a {start.layout.thing}",
            image=start.image(),
            strength=0.8,
            ip_adapter_image={"plain": style.image()},
            ip_adapter_scale=0.8,
            seed=2,
        )
        cells = [("image", start.image()), ("image prompt", style.image()), ("strength 0.8", result.images[0])]
        return Row(title=f'image-to-image\n"a {start.layout.thing}"', cells=cells)

    def inpainting(self, start: Picture, style: Picture, thing: str) -> Row:
        """Replace the thing in a picture and keep the rest. A rectangle has room for any thing."""
        mask = start.region_image().filter(ImageFilter.MaxFilter(5))  # with the border, which is not part of the thing
        result = self.generate(
            prompt=f"a {thing}",
            image=start.image(),
            mask_image=mask,
            strength=1.0,
            ip_adapter_image={"plain": style.image()},
            ip_adapter_scale=0.5,
            seed=3,
        )
        cells = [("image", start.image()), ("mask", mask), ("image prompt", style.image())]
        return Row(title=f'inpainting\n"a {thing}"', cells=[*cells, ("result", result.images[0])])

    def edges(self, drawing: Picture, style: Picture) -> Row:
        """Take the shape from lines and the look from the image prompt, without text."""
        result = self.generate(
            prompt="",
            control_image=drawing.edge_image(),
            ip_adapter_image={"plain": style.image()},
            ip_adapter_scale=0.8,
            seed=4,
        )
        cells = [("edges", drawing.edge_image()), ("image prompt", style.image()), ("result", result.images[0])]
        return Row(title="ControlNet\nno text", cells=cells)

    def fast(self, style: Picture, thing: str) -> Row:
        """Generate with the LCM-LoRA in four steps without guidance."""
        result = self.generate(
            LCM_MODEL,
            prompt=f"a {thing}",
            ip_adapter_image={"plain": style.image()},
            ip_adapter_scale=0.8,
            scheduler="LCMScheduler",
            num_inference_steps=4,
            guidance_scale=1.0,
            seed=5,
        )
        return Row(
            title=f'LCM-LoRA\n"a {thing}"', cells=[("image prompt", style.image()), ("4 steps", result.images[0])]
        )

    def clip(self) -> tuple[Row, list[Image.Image]]:
        """Generate a clip; return a row with some of its frames, and every frame next to the image prompt."""
        style = picture(39)
        result = self.generate(
            prompt="a star",
            num_frames=16,
            height=SIZE,
            width=SIZE,
            ip_adapter_image={"plain": style.image()},
            ip_adapter_scale=0.8,
            seed=6,
        )
        (frames,) = result.frames or [[]]
        shown = [(f"frame {index}", frames[index]) for index in (0, 4, 8, 12)]
        row = Row(title='AnimateDiff\n"a star"', cells=[("image prompt", style.image()), *shown])
        return row, [_beside(style.image(), frame) for frame in frames]


def _beside(left: Image.Image, right: Image.Image, zoom: int = 2, gap: int = 8) -> Image.Image:
    canvas = Image.new("RGB", (2 * SIZE * zoom + gap, SIZE * zoom), "white")
    for index, image in enumerate((left, right)):
        enlarged = image.resize((SIZE * zoom,) * 2, Image.Resampling.BICUBIC)
        canvas.paste(enlarged, (index * (SIZE * zoom + gap), 0))
    return canvas
