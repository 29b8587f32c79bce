"""Load ControlNets, check that they fit the base, and build their graphs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from tempfile import TemporaryDirectory
from typing import Any

from diffusers import ControlNetModel
from torch import Tensor, nn

from imprompt_export.base import load_network
from imprompt_export.bundle import BundleFile
from imprompt_export.checks import check_controlnet
from imprompt_export.graphs import WITH_FP8, Axes, Graph, Input, added_conditions, added_input, level_axes, level_sizes
from imprompt_export.sources import Source
from imprompt_serving.specs import Residual, residual_names


def load_controlnets(bundle: BundleFile, unet: Any) -> dict[str, Any]:
    """Load the ControlNets of `bundle` by name, in float32.

    Raises:
        BundleError: a folder holds no ControlNet, or one for another base.
    """
    nets = {}
    for section in bundle.controlnet:
        what = f"controlnet {section.name}"
        source = bundle.source(what)
        assert source is not None  # every section has one
        with _configured(source, unet) as configured:
            nets[section.name] = load_network(what, ControlNetModel, configured)
        check_controlnet(what, nets[section.name].config, unet.config)
    return nets


@contextmanager
def _configured(source: Source, unet: Any) -> Iterator[Source]:
    """Add the configuration of an ordinary ControlNet for `unet` to a single file that comes without one."""
    if source.config is not None:
        yield source
        return
    with TemporaryDirectory() as folder:
        ControlNetModel.from_unet(unet, load_weights_from_unet=False).save_config(folder)
        yield source._replace(config=folder)


def residuals(unet: Any) -> tuple[Residual, ...]:
    """List the residuals that a ControlNet adds to `unet`: one per skip connection, then that of the middle block."""
    channels, layers = unet.config.block_out_channels, unet.config.layers_per_block
    skips = [Residual(channels[0], 0)]
    for level, count in enumerate(channels):
        skips += [Residual(count, level)] * (layers if isinstance(layers, int) else layers[level])
        if level < len(channels) - 1:
            skips.append(Residual(count, level + 1))
    return (*skips, Residual(channels[-1], len(channels) - 1))


def controlnet(name: str, model: Any) -> tuple[Graph, Graph]:
    """Build the two graphs of a ControlNet: the embedding of control images, and the network of a denoising step.

    The embedding runs once per request. It is removed from `model`, so that the network takes its output as an input.
    """
    layer, order = model.controlnet_cond_embedding, model.config.controlnet_conditioning_channel_order
    model.controlnet_cond_embedding = nn.Identity()
    model.register_to_config(controlnet_conditioning_channel_order="rgb")
    return _embedding(name, layer, model.config, reverse=order == "bgr"), _net(name, model)


def _embedding(name: str, layer: nn.Module, config: Any, *, reverse: bool) -> Graph:
    """Build the graph from control images (0 to 1) to the tensor that is added to the network's first features."""

    def run(tensors: dict[str, Tensor]) -> tuple[Tensor, ...]:
        image = tensors["control_image"]
        return (layer(image.flip(1) if reverse else image),)

    return Graph(
        name=f"controlnet_embedding_{name}",
        module=layer,
        run=run,
        inputs=(
            Input(
                name="control_image", shape=("batch", config.conditioning_channels, "height", "width"), values="unit"
            ),
        ),
        outputs={"control_embedding": ("batch", config.block_out_channels[0], "h", "w")},
        checks=({"batch": 1, "height": 64, "width": 64}, {"batch": 2, "height": 72, "width": 96}),
        tolerance=1e-3,
    )


def _net(name: str, model: Any) -> Graph:
    """Build the graph of the residuals of one step.

    Each residual has a factor for each row: the conditioning scale, times the ramp over the residuals in guess mode.
    """
    config = model.config
    added = added_conditions(model)
    shapes = residuals(model)
    names = residual_names(len(shapes))
    inputs = [
        Input(name="sample", shape=("batch", config.in_channels, "h", "w")),
        Input(name="timestep", shape=("batch",), values="timestep", exact=True),
        Input(name="encoder_hidden_states", shape=("batch", "text", config.cross_attention_dim)),
        *(added_input(key, size) for key, size in added.items()),
        Input(name="control_embedding", shape=("batch", config.block_out_channels[0], "h", "w")),
        Input(name="conditioning_scale", shape=("batch", len(shapes)), values="scale"),
    ]

    def run(tensors: dict[str, Tensor]) -> tuple[Tensor, ...]:
        down, middle = model(
            tensors["sample"],
            tensors["timestep"],
            tensors["encoder_hidden_states"],
            tensors["control_embedding"],
            added_cond_kwargs={key: tensors[key] for key in added},
            return_dict=False,
        )
        scales = tensors["conditioning_scale"][:, :, None, None, None].unbind(1)
        return tuple(residual * scale for residual, scale in zip((*down, middle), scales, strict=True))

    def size(residual: Residual) -> tuple[int | str, int | str]:
        return (1, 1) if config.global_pool_conditions else level_axes(residual.level)

    def axes(batch: int, h: int, w: int, scale: float) -> Axes:
        return {"batch": batch, "text": 77, "scale": scale} | level_sizes(shapes, h, w)

    return Graph(
        name=f"controlnet_{name}",
        module=model,
        run=run,
        inputs=tuple(inputs),
        outputs={key: ("batch", shape.channels, *size(shape)) for key, shape in zip(names, shapes, strict=True)},
        precisions=WITH_FP8,
        internal=frozenset(names),
        checks=(axes(2, 8, 8, 1.0), axes(3, 9, 12, 0.8)),
        tolerance=1e-3,
    )
