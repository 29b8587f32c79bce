"""Make control images from photos, with annotators that need no model downloads."""

from __future__ import annotations

import numpy as np
from PIL import Image

from imprompt_serving.errors import InvalidRequest

_LOW, _HIGH = 100, 200
"""Thresholds from the ControlNet guide of diffusers."""


def annotate(image: Image.Image, annotator: str) -> Image.Image:
    """Turn `image` into a control image: unchanged (`none`), or its edges in white on black (`canny`).

    Raises:
        InvalidRequest: the server lacks the package for the annotator.
    """
    if annotator == "none":
        return image
    try:
        import cv2
    except ImportError:
        hint = (
            'the server lacks opencv; run `pip install "imprompt[annotators]"` there, or send the control image itself'
        )
        raise InvalidRequest("control_image_annotator", f"{annotator}: {hint}") from None
    edges = cv2.Canny(np.asarray(image.convert("RGB")), _LOW, _HIGH)
    return Image.fromarray(edges).convert("RGB")
