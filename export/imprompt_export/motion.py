"""AnimateDiff: build the motion UNet of a bundle from its UNet and a motion adapter."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from diffusers import MotionAdapter, UNetMotionModel

from imprompt_export.base import load_network
from imprompt_export.bundle import BundleFile
from imprompt_export.checks import check_motion_adapter
from imprompt_export.errors import refusing
from imprompt_export.families import ExportFamily


def load_motion_unet(bundle: BundleFile, unet: Any, family: ExportFamily) -> Any | None:
    """Insert the motion modules of the bundle's adapter between the layers of `unet`; None without an adapter.

    The layers of IP-Adapters are kept. Fuse LoRAs first, because a motion UNet numbers its layers differently.

    Raises:
        BundleError: the adapter cannot be loaded, or is made for another UNet.
    """
    if bundle.motion_adapter is None:
        return None
    path, source = bundle.motion_adapter.path, bundle.source("motion_adapter")
    assert source is not None  # the section has one
    what = f"motion_adapter: {path}"
    adapter = load_network("motion_adapter", MotionAdapter, source)
    check_motion_adapter(path, adapter.config, unet.config, family)
    with refusing(f"{what} does not fit the base"), _without_projections(unet):
        return UNetMotionModel.from_unet2d(unet, adapter).eval()


@contextmanager
def _without_projections(unet: Any) -> Iterator[None]:
    """Hide the image projections: `from_unet2d` mistakes attention inside those of plus adapters for UNet layers."""
    projections, unet.encoder_hid_proj = unet.encoder_hid_proj, None
    try:
        yield
    finally:
        unet.encoder_hid_proj = projections
