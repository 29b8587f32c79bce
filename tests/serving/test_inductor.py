"""A bundle of AOTInductor packages, through a running Triton, compared with diffusers."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from diffusers import StableDiffusionImg2ImgPipeline

from parity import assert_different, assert_same
from served import Served
from tiny import images, oracle
from tiny.oracle import picture_distance

STATUE, OTHER = images.photo(1), images.photo(2, size=(120, 80))
CAT: dict[str, Any] = {"prompt": "a photo of a cat", "num_inference_steps": 4, "height": 64, "width": 64}


@pytest.fixture
def inductor(served: Callable[[str], Served]) -> Served:
    return served("inductor")


def test_the_repository_stores_code_and_weights_separately(inductor: Served) -> None:
    files = [file for file in inductor.bundle.repository.rglob("*") if file.is_file()]
    assert not [file for file in files if file.suffix in (".onnx", ".data")]
    denoiser = inductor.bundle.repository / "inductor_denoiser" / "1"
    described = json.loads((denoiser / "unet.json").read_text())
    assert [package["suffix"] for package in described["packages"]] == [".1.pt2"]
    assert (denoiser / "unet.safetensors").exists()
    assert (inductor.bundle.repository / "inductor_vae_decoder" / "1" / "model.1.pt2").exists()


def test_packages_are_unpacked_where_the_server_removes_them(inductor: Served) -> None:
    """Torch removes the folders itself, but not if the process is killed."""
    for pid in inductor.server.stub_pids.values():
        mapped = [line.split()[-1] for line in Path(f"/proc/{pid}/maps").read_text().splitlines()]
        assert all(file.startswith(f"{tempfile.gettempdir()}/imprompt-") for file in mapped if "/aotinductor_" in file)
    denoiser = Path(f"/proc/{inductor.server.stub_pids['inductor_denoiser_0_0']}/maps").read_text()
    assert "/aotinductor_" in denoiser


@pytest.mark.parametrize("size", [{}, {"height": 72, "width": 104}])
@pytest.mark.parametrize("adapter", ["plain", "plus"])
def test_same_picture(inductor: Served, size: dict[str, int], adapter: str) -> None:
    pipe = inductor.bundle.oracle(scheduler="DDIMScheduler")
    scales = [0.6 if adapter == name else 0.0 for name in ("plain", "plus")]
    pipe.set_ip_adapter_scale(scales)
    arguments = CAT | size
    expected = oracle.generate(pipe, ip_adapter_image=[STATUE, STATUE], **arguments)
    arguments |= {"scheduler": "DDIMScheduler", "ip_adapter_scale": 0.6, "seed": 0}
    result = inductor.generate(**arguments, ip_adapter_image={adapter: STATUE})
    assert_same(result, expected)
    assert_different(result, inductor.generate(**arguments, ip_adapter_image={adapter: OTHER}))


def test_same_picture_with_a_start_picture(inductor: Served) -> None:
    """This also runs the VAE encoder."""
    pipe = inductor.bundle.oracle(StableDiffusionImg2ImgPipeline, scheduler="DDIMScheduler")
    pipe.set_ip_adapter_scale([0.6, 0.0])
    arguments: dict[str, Any] = {"prompt": "a cat", "num_inference_steps": 6, "image": OTHER.resize((64, 64))}
    expected = oracle.generate(pipe, ip_adapter_image=[STATUE, STATUE], **arguments)
    arguments |= {"scheduler": "DDIMScheduler", "ip_adapter_scale": 0.6, "seed": 0}
    assert_same(inductor.generate(**arguments, ip_adapter_image={"plain": STATUE}), expected)


def test_callers_that_share_calls_get_their_own_pictures(inductor: Served) -> None:
    requests: list[dict[str, Any]] = [
        CAT | {"seed": 1, "ip_adapter_image": {"plain": STATUE}},
        CAT | {"seed": 2, "ip_adapter_image": {"plus": [STATUE, OTHER]}, "ip_adapter_scale": 0.5},
        CAT | {"seed": 3, "num_inference_steps": 6},
        CAT | {"seed": 4, "guidance_scale": 1.0, "ip_adapter_image": {"plain": OTHER}},
    ]

    def pictures(arguments: dict[str, Any]) -> np.ndarray:
        return np.stack([np.asarray(image) for image in inductor.generate(**arguments).images])

    alone = [pictures(arguments) for arguments in requests]
    with ThreadPoolExecutor(len(requests)) as pool:
        together = list(pool.map(pictures, requests))
    for one, other in zip(alone, together, strict=True):
        largest, mean = picture_distance(one, other)
        assert largest <= 2
        assert mean <= 0.1
    assert_different(alone[0], alone[3])
