"""The canary: the smallest picture that a bundle can make, which the launcher requests to see whether it still can."""

from __future__ import annotations

import io
from dataclasses import replace

import msgspec
import numpy as np
from PIL import Image

from imprompt_serving.denoiser.policy import CANARY_PRIORITY
from imprompt_serving.pipeline.models import Tensors, strings
from imprompt_serving.pipeline.request import Request, parse
from imprompt_serving.specs import Bundle


def canary_request(bundle: Bundle) -> Request:
    """Make a request for one step at the smallest size, without guidance, ahead of all others."""
    height, width = bundle.shapes.height.min, bundle.shapes.width.min
    tensors: Tensors = {
        "prompt": strings(""),
        "height": np.array([height], np.int32),
        "width": np.array([width], np.int32),
        "num_inference_steps": np.array([1], np.int32),
        "guidance_scale": np.array([1.0]),
        "seed": np.array([0], np.int64),
    }
    if bundle.plain_task != "text-to-image":
        white = strings(_png(height, width))
        tensors |= {"image": white, "strength": np.array([1.0])}
        tensors |= {"mask_image": white} if bundle.plain_task == "inpainting" else {}
    request = parse(tensors, bundle)
    return replace(request, settings=msgspec.structs.replace(request.settings, priority=CANARY_PRIORITY))


def _png(height: int, width: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (width, height), "white").save(file, "PNG")
    return file.getvalue()
