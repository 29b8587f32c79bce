"""Invalid requests to a server are refused, the errors name the parameter, and the server keeps serving."""

from __future__ import annotations

import io
import zlib
from typing import Any

import numpy as np
import pytest
from PIL import Image

from imprompt import InvalidRequest
from imprompt._errors import short_repr
from served import Served
from tiny import images

SMALL: dict[str, Any] = {"prompt": "a photo of a cat", "num_inference_steps": 2}


def png(image: Image.Image) -> bytes:
    data = io.BytesIO()
    image.save(data, "PNG")
    return data.getvalue()


def huge_png(side: int) -> bytes:
    """Make a PNG whose header claims `side` x `side` pixels, but which has almost no data."""
    header = b"IHDR" + side.to_bytes(4, "big") * 2 + bytes([8, 2, 0, 0, 0])
    end = b"IEND"
    chunks = [
        len(body[4:]).to_bytes(4, "big") + body + zlib.crc32(body).to_bytes(4, "big")
        for body in (header, b"IDAT" + zlib.compress(b"\0" * 1000), end)
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


@pytest.mark.parametrize(
    ("parameter", "arguments"),
    [
        ("prompt", {"prompt": []}),
        ("nonsense", {"nonsense": 1}),
        ("height", {"height": 100}),
        ("height", {"height": 8}),
        ("width", {"width": 4096}),
        ("num_inference_steps", {"num_inference_steps": 0}),
        ("num_inference_steps", {"num_inference_steps": 1000}),
        ("num_inference_steps", {"num_inference_steps": 100000}),
        ("guidance_scale", {"guidance_scale": float("inf")}),
        ("eta", {"eta": 2.0}),
        ("clip_skip", {"clip_skip": 40}),
        ("num_images_per_prompt", {"num_images_per_prompt": 1000}),
        ("negative_prompt", {"negative_prompt": ["a", "b", "c"]}),
        ("seed", {"seed": [1, 2, 3]}),
        ("scheduler", {"scheduler": "MagicScheduler"}),
        ("scheduler_config", {"scheduler_config": {"beta": 1}}),
        ("scheduler_config", {"scheduler_config": {"beta_schedule": "none such"}}),
        ("output_type", {"output_type": "pdf"}),
        ("timeout", {"timeout": -1.0}),
        ("ip_adapter_image", {"ip_adapter_image": {"plain": b"this is text"}}),
        ("ip_adapter_image", {"ip_adapter_image": {"plain": png(images.photo(1))[:200]}}),
        ("ip_adapter_image", {"ip_adapter_image": {"plain": huge_png(30_000)}}),
        ("ip_adapter_image", {"ip_adapter_image": {"plain": b""}}),
        ("ip_adapter_scale", {"ip_adapter_image": {"plain": images.photo(1)}, "ip_adapter_scale": float("nan")}),
    ],
    ids=short_repr,
)
def test_refusals_name_the_parameter(sd15: Served, parameter: str, arguments: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest) as caught:
        sd15.generate(**{**SMALL, **arguments})
    assert caught.value.parameter == parameter, caught.value
    assert str(caught.value).startswith(f"{parameter}: ")


def test_server_keeps_serving(sd15: Served) -> None:
    picture = np.asarray(sd15.generate(**SMALL, seed=0).images[0])
    assert picture.shape == (64, 64, 3)
    assert picture.std() > 5
