"""Derive the range of every dynamic axis from `[shapes]`, for engines that are built for ranges or fixed sizes."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping

from imprompt_export.graphs import Axes, Graph, level_axes
from imprompt_serving.specs import Bundle, CallRows, Range, Shapes, level_size

Profile = dict[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]]
"""Smallest, usual, and largest shape of each input."""

PICTURES_TOGETHER = 2
"""Largest batch of the VAE: a request decodes this many pictures at a time, and each takes gigabytes."""
_LARGER = (64, 128)
"""Pixels of height and width that comparisons add to the smallest size; different, so that pictures are not square."""


def profiles(graph: Graph, bundle: Bundle) -> list[Profile]:
    """Return the optimization profiles of `graph`; every call fits one of them.

    An engine needs memory for the maxima of all axes of a profile at once. So axes that are never large at the same
    time are split over profiles: frames and rows of clips, groups and tokens of image prompts. The denoiser's networks
    also have one profile per bucket of rows, tuned for the number of rows that calls are padded to.
    """
    ranges = _profile_ranges(graph, bundle)
    return [{tensor.name: _bounds(tensor.shape, axis_ranges) for tensor in graph.inputs} for axis_ranges in ranges]


def check_axes(graph: Graph, bundle: Bundle) -> tuple[Axes, ...]:
    """Return the sizes at which an engine with these profiles is compared: the smallest, and one within each profile.

    The sizes in `graph.checks` are small and outside most profiles.
    """
    ranges = _profile_ranges(graph, bundle)
    smallest, larger = (_picture_axes(bundle, *_comparison_size(bundle, more)) for more in ((0, 0), _LARGER))
    points = [graph.checks[0] | {axis: size.min for axis, size in ranges[0].items()} | smallest]
    for axis_ranges in ranges:
        prompts = {axis: size.opt for axis, size in axis_ranges.items() if axis.startswith(("groups_", "tokens_"))}
        points.append(
            graph.checks[-1]
            | {axis: min(size.min + 1, size.max) for axis, size in axis_ranges.items()}
            | prompts
            | larger
        )
    drawn = {"scale", *_axes(graph)}
    return tuple({axis: size for axis, size in point.items() if axis in drawn} for point in points)


def picture_sizes(shapes: Shapes) -> tuple[tuple[int, int], ...]:
    """Return the height and width of the smallest, usual, and largest picture in `[shapes]`, without duplicates."""
    return tuple(dict.fromkeys(zip(shapes.height, shapes.width, strict=True)))


def exact_axes(graph: Graph, bundle: Bundle) -> list[Axes]:
    """Return the combinations of sizes that engines without ranges are built for: picture sizes and rows of a step.

    Other axes stay dynamic: those of prompts only affect small products, and the rest belong to networks that run once
    per request.
    """
    axes = _axes(graph)
    rows = (
        CallRows(bundle.shapes.rows.max, bucketed=True).buckets
        if _runs_each_step(graph) and "frames" not in axes
        else (0,)
    )
    found: list[Axes] = []
    for size, count in itertools.product(picture_sizes(bundle.shapes), rows):
        found.append({axis: length for axis, length in _picture_axes(bundle, *size).items() if axis in axes})
        if count:
            found[-1]["batch"] = count
    return [each for index, each in enumerate(found) if each not in found[:index]]


def _profile_ranges(graph: Graph, bundle: Bundle) -> list[dict[str, Range]]:
    """Return the range of each axis, for each profile."""
    axes = _axes(graph)
    common = {axis: sizes for axis, sizes in _common_ranges(bundle).items() if axis in axes}
    common |= {"batch": batch_range(graph, bundle)} if "batch" in axes else {}
    choices = [list(_clip_ranges(bundle)) if "frames" in axes else [{}], list(_image_prompt_ranges(axes, bundle))]
    ranges = [common | clips | prompts for clips, prompts in itertools.product(*choices)]
    if not _runs_each_step(graph):
        return ranges
    return [axis_ranges | {"batch": rows} for axis_ranges in ranges for rows in _buckets(axis_ranges["batch"].max)]


def _buckets(most: int) -> list[Range]:
    """Split 1 to `most` rows into one range per bucket, each tuned for its maximum."""
    sizes = CallRows(most, bucketed=True).buckets
    return [Range(smaller + 1, size, size) for smaller, size in itertools.pairwise((0, *sizes))]


def _runs_each_step(graph: Graph) -> bool:
    """Return whether `graph` runs at each denoising step, and not once per request."""
    networks = ("unet", "controlnet_", "motion_unet")
    return graph.name.startswith(networks) and not graph.name.startswith("controlnet_emb")


def _axes(graph: Graph) -> set[str]:
    return {size for tensor in graph.inputs for size in tensor.shape if isinstance(size, str)}


def batch_range(graph: Graph, bundle: Bundle) -> Range:
    """Return the range of the batch of `graph`; it always starts at one row, even if `shapes.rows` does not."""
    _, opt, high = bundle.shapes.rows
    if graph.name.startswith("vae_"):
        high = min(high, PICTURES_TOGETHER)
    if not _runs_each_step(graph):
        opt = 1  # encoders usually process one picture or prompt
    return Range(1, min(opt, high), high)


def _common_ranges(bundle: Bundle) -> dict[str, Range]:
    """Return the ranges of the axes that depend on the picture size, and of those that are the same in all graphs."""
    shapes = bundle.shapes
    areas = [_picture_axes(bundle, *sizes) for sizes in zip(shapes.height, shapes.width, strict=True)]
    found = {axis: Range(*(area[axis] for area in areas)) for axis in areas[0]}
    length = bundle.text_encoders[0].max_length
    fewest = min((adapter.num_tokens for adapter in bundle.adapters), default=1)
    # The denoiser repeats the tokens of texts that are shorter than `length`, until they are not.
    found["text"] = Range(length, length, max(bundle.max_text_tokens, 2 * length))
    found["images"] = Range(1, 1, max(shapes.image_tokens[-1] // fewest, shapes.regions))
    return found


def _picture_axes(bundle: Bundle, height: int, width: int) -> dict[str, int]:
    """Return the sizes for one picture: pixels, latents at each level, and query positions at each level."""
    found = {"height": height, "width": width}
    for level in {0, *bundle.levels, *(shape.level for shape in (*bundle.residuals, *bundle.features))}:
        h, w = (level_size(size // bundle.vae_scale_factor, level) for size in (height, width))
        found |= dict(zip(level_axes(level), (h, w), strict=True)) | {f"q{level}": h * w}
    return found


def _comparison_size(bundle: Bundle, more: tuple[int, int]) -> list[int]:
    """Return a height and width `more` above the smallest, within the limits and in the multiples T2I-Adapters need."""
    factor = max([bundle.vae_scale_factor, *(adapter.downscale_factor for adapter in bundle.t2i_adapters)])
    sizes = zip((bundle.shapes.height, bundle.shapes.width), more, strict=True)
    return [min(-(-size.min // factor) * factor + extra, size.max // factor * factor) for size, extra in sizes]


def _clip_ranges(bundle: Bundle) -> Iterator[dict[str, Range]]:
    """Yield ranges of frames, each starting at four times the last, and the rows of clips that long in one call."""
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


def _image_prompt_ranges(axes: set[str], bundle: Bundle) -> Iterator[dict[str, Range]]:
    """Yield ranges for one group with any number of tokens, then for region masks: a group per picture."""
    adapters = [adapter for adapter in bundle.adapters if f"groups_{adapter.name}" in axes]
    if not adapters:
        yield {}
        return
    kinds = ((1, bundle.shapes.image_tokens[-1]), (bundle.shapes.regions, bundle.region_tokens))
    for groups, most in kinds[: 1 if bundle.shapes.regions == 1 else 2]:
        axis_ranges = {}
        for adapter in adapters:
            usual = min(bundle.shapes.bucket(adapter.num_tokens), most)
            axis_ranges[f"groups_{adapter.name}"] = Range(1, min(groups, 2), groups)
            axis_ranges[f"tokens_{adapter.name}"] = Range(1, usual, most)
        yield axis_ranges


def _bounds(
    shape: tuple[int | str, ...], axis_ranges: Mapping[str, Range]
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    ranges = [axis_ranges[size] if isinstance(size, str) else Range(size, size, size) for size in shape]
    smallest, usual, largest = zip(*ranges, strict=True)
    return smallest, usual, largest
