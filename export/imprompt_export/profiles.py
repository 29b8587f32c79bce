"""Ranges of every dynamic axis, from ``[shapes]``: what engines that are built for ranges must be told."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping

from imprompt_export.graphs import Axes, Graph, level_axes
from imprompt_serving.specs import Bundle, CallRows, Range, Shapes, level_size

Profile = dict[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]]
"""Smallest, usual and largest shape of each input."""

PICTURES_TOGETHER = 2
"""Largest batch of the VAE: a request has so many pictures decoded at a time, and each takes gigabytes."""
_LARGER = (64, 128)
"""Pixels of height and width by which a comparison is above the smallest size; not a square."""


def profiles(graph: Graph, bundle: Bundle) -> list[Profile]:
    """The optimization profiles of ``graph``; a call must fit one of them.

    An engine needs memory for the largest of all axes of a profile at once. Axes of which only one is ever large are
    therefore spread over profiles: frames and rows of clips, and groups and tokens of image prompts. In the networks
    of the denoiser each bucket of rows has a profile too, tuned for the rows that calls are padded to.
    """
    boxes = _boxes(graph, bundle)
    return [{tensor.name: _bounds(tensor.shape, box) for tensor in graph.inputs} for box in boxes]


def check_axes(graph: Graph, bundle: Bundle) -> tuple[Axes, ...]:
    """Axes at which an engine for these profiles is compared: the smallest of all, and some within each profile.

    Those of ``graph.checks`` are small, and outside of most profiles.
    """
    boxes = _boxes(graph, bundle)
    smallest, larger = (_areas(bundle, *_check_size(bundle, more)) for more in ((0, 0), _LARGER))
    points = [graph.checks[0] | {axis: size.min for axis, size in boxes[0].items()} | smallest]
    for box in boxes:
        prompts = {axis: size.opt for axis, size in box.items() if axis.startswith(("groups_", "tokens_"))}
        points.append(
            graph.checks[-1] | {axis: min(size.min + 1, size.max) for axis, size in box.items()} | prompts | larger
        )
    drawn = {"scale", *_axes(graph)}
    return tuple({axis: size for axis, size in point.items() if axis in drawn} for point in points)


def picture_sizes(shapes: Shapes) -> tuple[tuple[int, int], ...]:
    """Height and width of the pictures that `[shapes]` lists: the smallest, the usual and the largest ones."""
    return tuple(dict.fromkeys(zip(shapes.height, shapes.width, strict=True)))


def exact_axes(graph: Graph, bundle: Bundle) -> list[Axes]:
    """Sizes of the axes that engines without ranges have built in: of the picture, and the rows of a step.

    Axes that are not there touch small products alone (prompts), or belong to networks that run once a request.
    """
    axes = _axes(graph)
    rows = (
        CallRows(bundle.shapes.rows.max, bucketed=True).buckets
        if _runs_each_step(graph) and "frames" not in axes
        else (0,)
    )
    found: list[Axes] = []
    for size, count in itertools.product(picture_sizes(bundle.shapes), rows):
        found.append({axis: length for axis, length in _areas(bundle, *size).items() if axis in axes})
        if count:
            found[-1]["batch"] = count
    return [each for index, each in enumerate(found) if each not in found[:index]]


def _boxes(graph: Graph, bundle: Bundle) -> list[dict[str, Range]]:
    """The range of each axis in each profile."""
    axes = _axes(graph)
    common = {axis: sizes for axis, sizes in _sizes(bundle).items() if axis in axes}
    common |= {"batch": batch(graph, bundle)} if "batch" in axes else {}
    choices = [list(_clips(bundle)) if "frames" in axes else [{}], list(_image_prompts(axes, bundle))]
    boxes = [common | clips | prompts for clips, prompts in itertools.product(*choices)]
    if not _runs_each_step(graph):
        return boxes
    return [box | {"batch": rows} for box in boxes for rows in _buckets(box["batch"].max)]


def _buckets(most: int) -> list[Range]:
    """Ranges that make up 1 to `most` rows, each tuned for its largest, one of the buckets."""
    sizes = CallRows(most, bucketed=True).buckets
    return [Range(smaller + 1, size, size) for smaller, size in itertools.pairwise((0, *sizes))]


def _runs_each_step(graph: Graph) -> bool:
    """Whether `graph` is a network of the denoiser, and not one that encodes a prompt or picture once a request."""
    networks = ("unet", "controlnet_", "motion_unet")
    return graph.name.startswith(networks) and not graph.name.startswith("controlnet_emb")


def _axes(graph: Graph) -> set[str]:
    return {size for tensor in graph.inputs for size in tensor.shape if isinstance(size, str)}


def batch(graph: Graph, bundle: Bundle) -> Range:
    """The batch of ``graph``; one row is always among what an engine takes, whatever ``shapes.rows`` begins with."""
    _, opt, high = bundle.shapes.rows
    if graph.name.startswith("vae_"):
        high = min(high, PICTURES_TOGETHER)
    if not _runs_each_step(graph):
        opt = 1  # encoders are called for one picture or prompt
    return Range(1, min(opt, high), high)


def _sizes(bundle: Bundle) -> dict[str, Range]:
    """Axes that follow from the size of a picture, and those that have one size or one range for all graphs."""
    shapes = bundle.shapes
    areas = [_areas(bundle, *sizes) for sizes in zip(shapes.height, shapes.width, strict=True)]
    found = {axis: Range(*(area[axis] for area in areas)) for axis in areas[0]}
    length = bundle.text_encoders[0].max_length
    fewest = min((adapter.num_tokens for adapter in bundle.adapters), default=1)
    found["text"] = Range(length, length, length)
    found["images"] = Range(1, 1, max(shapes.image_tokens[-1] // fewest, shapes.regions))
    return found


def _areas(bundle: Bundle, height: int, width: int) -> dict[str, int]:
    """Pixels, latents at each halving, and positions of attention of one picture."""
    found = {"height": height, "width": width}
    for level in {0, *bundle.levels, *(shape.level for shape in (*bundle.residuals, *bundle.features))}:
        h, w = (level_size(size // bundle.vae_scale_factor, level) for size in (height, width))
        found |= dict(zip(level_axes(level), (h, w), strict=True)) | {f"q{level}": h * w}
    return found


def _check_size(bundle: Bundle, more: tuple[int, int]) -> list[int]:
    """Height and width by so many pixels above the smallest, as far as they are served; T2I-Adapters want multiples."""
    factor = max([bundle.vae_scale_factor, *(adapter.downscale_factor for adapter in bundle.t2i_adapters)])
    sizes = zip((bundle.shapes.height, bundle.shapes.width), more, strict=True)
    return [min(-(-size.min // factor) * factor + extra, size.max // factor * factor) for size, extra in sizes]


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
