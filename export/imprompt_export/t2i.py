"""Load T2I-Adapters, check that they fit the base, and build their graphs, which run once per request."""

from __future__ import annotations

from typing import Any

from diffusers import T2IAdapter
from torch import Tensor

from imprompt_export.base import load_network
from imprompt_export.bundle import BundleFile
from imprompt_export.checks import check_t2i_adapter
from imprompt_export.families import ExportFamily
from imprompt_export.graphs import Axes, Graph, Input, level_axes, level_sizes
from imprompt_serving.specs import Residual, feature_names


def load_t2i_adapters(bundle: BundleFile, unet: Any, family: ExportFamily) -> dict[str, Any]:
    """Load the T2I-Adapters of `bundle` by name, in float32.

    Raises:
        BundleError: a folder holds no T2I-Adapter, or one for another base.
    """
    adapters = {}
    for section in bundle.t2i_adapter:
        what = f"t2i_adapter {section.name}"
        source = bundle.source(what)
        assert source is not None  # every section has one
        adapters[section.name] = load_network(what, T2IAdapter, source)
        check_t2i_adapter(what, adapters[section.name].config, unet.config, family)
    return adapters


def features(unet: Any, family: ExportFamily) -> tuple[Residual, ...]:
    """List the features that a T2I-Adapter adds inside the blocks of `unet` (`UNet2DConditionModel.forward`).

    They are added to the last layer of each down block with attention, to the output of each down block without, and in
    some families to the output of the middle block.
    """
    channels, last = unet.config.block_out_channels, len(unet.config.block_out_channels) - 1
    found = []
    for level, (count, block) in enumerate(zip(channels, unet.config.down_block_types, strict=True)):
        found.append(Residual(count, level if "CrossAttn" in block else min(level + 1, last)))
    if family.adapts_middle:
        found.append(Residual(channels[-1], last))
    return tuple(found)


def t2i_adapter(name: str, model: Any, shapes: tuple[Residual, ...]) -> Graph:
    """Build the graph from control images (0 to 1) to the features for the blocks of the UNet."""
    channels, factor = model.config.in_channels, model.config.downscale_factor

    def run(tensors: dict[str, Tensor]) -> tuple[Tensor, ...]:
        return tuple(model(tensors["control_image"]))

    def axes(batch: int, h: int, w: int) -> Axes:
        return {"batch": batch, "height": 8 * h, "width": 8 * w} | level_sizes(shapes, h, w)

    step, names = factor // 8, feature_names(len(shapes))
    return Graph(
        name=f"t2i_adapter_{name}",
        module=model,
        run=run,
        inputs=(Input(name="control_image", shape=("batch", channels, "height", "width"), values="unit"),),
        outputs={
            key: ("batch", shape.channels, *level_axes(shape.level)) for key, shape in zip(names, shapes, strict=True)
        },
        internal=frozenset(names),
        checks=(axes(1, 8, 8), axes(2, 10 * step, 12 * step)),
        tolerance=1e-3,
    )
