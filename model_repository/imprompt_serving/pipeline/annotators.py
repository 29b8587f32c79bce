"""Control images from photos, where a well-kept package makes them without further downloads."""

from __future__ import annotations

import numpy as np
from PIL import Image

from imprompt_serving.errors import InvalidRequest

_LOW, _HIGH = 100, 200
"""Thresholds of the guide to ControlNet in diffusers' documentation."""


def annotate(image: Image.Image, annotator: str) -> Image.Image:
    """``image`` as a control image: as it is (``none``), or its edges, white on black (``canny``).

    Raises:
        InvalidRequest: the package for it is not installed where the server runs.
    """
    if annotator == "none":
        return image
    try:
        import cv2
    except ImportError:
        hint = 'the server lacks opencv; there: pip install "imprompt[annotators]", or send the control image itself'
        raise InvalidRequest("control_image_annotator", f"{annotator}: {hint}") from None
    edges = cv2.Canny(np.asarray(image.convert("RGB")), _LOW, _HIGH)
    return Image.fromarray(edges).convert("RGB")
