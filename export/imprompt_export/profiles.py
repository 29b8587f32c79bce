"""Ranges of every dynamic axis, from ``[shapes]``: what engines that are built for ranges must be told."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping

from imprompt_export.graphs import Graph, level_axes
from imprompt_serving.specs import Bundle, Range, level_size

Profile = dict[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]]
"""Smallest, usual and largest shape of each input."""

PICTURES_TOGETHER = 2
"""Largest batch of the VAE: a request has so many pictures decoded at a time, and each takes gigabytes."""


def profiles(graph: Graph, bundle: Bundle) -> list[Profile]:
    """The optimization profiles of ``graph``; a call must fit one of them.

    An engine needs memory for the largest of all axes of a profile at once. Axes of which only one is ever large are
    therefore spread over profiles: frames and rows of clips, and groups and tokens of image prompts.
    """
    axes = {size for tensor in graph.inputs for size in tensor.shape if isinstance(size, str)}
    common = {axis: rows for axis, rows in _sizes(bundle).items() if axis in axes}
    common |= {"batch": batch(graph, bundle)} if "batch" in axes else {}
    choices = [list(_clips(bundle)) if "frames" in axes else [{}], list(_image_prompts(axes, bundle))]
    boxes = [common | clips | prompts for clips, prompts in itertools.product(*choices)]
    return [{tensor.name: _bounds(tensor.shape, box) for tensor in graph.inputs} for box in boxes]


def batch(graph: Graph, bundle: Bundle) -> Range:
    """The batch of ``graph``; one row is always among what an engine takes, whatever ``shapes.rows`` begins with."""
    _, opt, high = bundle.shapes.rows
    if graph.name.startswith("vae_"):
        high = min(high, PICTURES_TOGETHER)
    if not graph.name.startswith(("unet", "controlnet_", "motion_unet")) or graph.name.startswith("controlnet_emb"):
        opt = 1  # encoders are called for one picture or prompt
    return Range(1, min(opt, high), high)


def _sizes(bundle: Bundle) -> dict[str, Range]:
    """Pixels, latents at each halving, positions of attention, and what has one size only."""
    shapes, factor = bundle.shapes, bundle.vae_scale_factor
    length = bundle.text_encoders[0].max_length
    found = {"height": shapes.height, "width": shapes.width, "text": Range(length, length, length)}
    fewest = min((adapter.num_tokens for adapter in bundle.adapters), default=1)
    found["images"] = Range(1, 1, max(shapes.image_tokens[-1] // fewest, shapes.regions))
    height, width = (Range(*(size // factor for size in sizes)) for sizes in (shapes.height, shapes.width))
    levels = {0, *bundle.levels, *(shape.level for shape in (*bundle.residuals, *bundle.features))}
    for level in levels:
        halved = [Range(*(level_size(size, level) for size in sizes)) for sizes in (height, width)]
        found |= dict(zip(level_axes(level), halved, strict=True))
        found[f"q{level}"] = Range(*(h * w for h, w in zip(*halved, strict=True)))
    return found


def _clips(bundle: Bundle) -> Iterator[dict[str, Range]]:
    """Frames, four times as many from profile to profile, and the rows of so many frames that a call may have."""
    window = bundle.motion.window if bundle.motion else 1
    low, usual, most = (min(count, window) for count in bundle.shapes.frames)
    while low <= most:
        high = min(4 * low - 1, most)
        rows = max(bundle.shapes.rows.max // low, 1)
        yield {
            "frames": Range(low, min(max(usual, low), high), high),
            "batch": Range(1, min(bundle.shapes.rows.opt, rows), rows),
        }
        low = high + 1


def _image_prompts(axes: set[str], bundle: Bundle) -> Iterator[dict[str, Range]]:
    """One group of any number of tokens; or region masks, with the tokens of one picture in each group."""
    adapters = [adapter for adapter in bundle.adapters if f"groups_{adapter.name}" in axes]
    if not adapters:
        yield {}
        return
    kinds = ((1, bundle.shapes.image_tokens[-1]), (bundle.shapes.regions, bundle.region_tokens))
    for groups, most in kinds[: 1 if bundle.shapes.regions == 1 else 2]:
        box = {}
        for adapter in adapters:
            usual = min(bundle.shapes.bucket(adapter.num_tokens), most)
            box[f"groups_{adapter.name}"] = Range(1, min(groups, 2), groups)
            box[f"tokens_{adapter.name}"] = Range(1, usual, most)
        yield box


def _bounds(
    shape: tuple[int | str, ...], box: Mapping[str, Range]
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    ranges = [box[size] if isinstance(size, str) else Range(size, size, size) for size in shape]
    smallest, usual, largest = zip(*ranges, strict=True)
    return smallest, usual, largest
