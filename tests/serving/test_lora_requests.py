"""Compare pictures of requests that choose LoRAs with those of diffusers' `set_adapters`, through a running Triton."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from bundles import LORAS
from imprompt import InvalidRequest
from parity import assert_different, assert_same
from served import Served
from tiny import images, oracle

CAT: dict[str, Any] = {"prompt": "a photo of a cat", "num_inference_steps": 4, "height": 64, "width": 64}
STATUE = images.photo(1)


@pytest.fixture
def inductor(served: Callable[[str], Served]) -> Served:
    return served("inductor")


@pytest.fixture(scope="module")
def pipe(served: Callable[[str], Served]) -> Any:
    """Load both LoRAs into the diffusers pipeline, and turn image prompts off."""
    made = served("inductor").bundle
    pipe = made.oracle(scheduler="DDIMScheduler")
    pipe.set_ip_adapter_scale([0.0, 0.0])
    for name in LORAS:
        pipe.load_lora_weights(made.checkpoints / "loras", weight_name=f"{name}.safetensors", adapter_name=name)
    return pipe


def expected(pipe: Any, lora: Mapping[str, float], **changes: Any) -> np.ndarray:
    pipe.set_adapters(list(lora), list(lora.values())) if lora else pipe.disable_lora()
    try:
        return oracle.generate(pipe, ip_adapter_image=[STATUE, STATUE], **CAT | changes)
    finally:
        pipe.enable_lora()


def pictures(inductor: Served, **arguments: Any) -> np.ndarray:
    result = inductor.generate(**CAT | {"scheduler": "DDIMScheduler", "seed": 0} | arguments)
    return np.stack([np.asarray(image) for image in result.images])


@pytest.mark.parametrize("lora", [{"soft": 0.7}, {"bold": -0.6}, {"bold": 0.4, "soft": 0.9}, {}])
def test_same_picture(inductor: Served, pipe: Any, lora: dict[str, float]) -> None:
    arguments = CAT | {"scheduler": "DDIMScheduler", "seed": 0}
    result = inductor.generate(**arguments, lora=lora)
    assert_same(result, expected(pipe, lora))
    assert_different(result, inductor.generate(**arguments, lora=lora | {"soft": lora.get("soft", 0.0) + 0.3}))


def test_same_picture_with_an_image_prompt(inductor: Served, pipe: Any) -> None:
    pipe.set_ip_adapter_scale([0.6, 0.0])
    try:
        picture = expected(pipe, {"soft": 0.7})
    finally:
        pipe.set_ip_adapter_scale([0.0, 0.0])
    arguments = CAT | {"scheduler": "DDIMScheduler", "seed": 0, "ip_adapter_image": {"plain": STATUE}}
    assert_same(inductor.generate(**arguments, ip_adapter_scale=0.6, lora={"soft": 0.7}), picture)


def test_going_back_and_forth_gives_the_same_bits(inductor: Served) -> None:
    sets: list[dict[str, float]] = [{}, {"soft": 0.8}, {"bold": 0.5, "soft": 1.0}, {"bold": 1.5}]
    first = [pictures(inductor, lora=lora) for lora in sets]
    for index in (2, 0, 1, 3, 1, 2, 0):
        assert np.array_equal(pictures(inductor, lora=sets[index]), first[index])
    assert np.array_equal(pictures(inductor, lora={"soft": 0.0, "bold": 0.0}), first[0])
    assert np.array_equal(pictures(inductor, lora={"soft": 1.0, "bold": 0.5}), first[2]), "the order of names matters"


def test_callers_with_different_loras_get_their_own_pictures(inductor: Served) -> None:
    """Their jobs take turns on one network, between their steps."""
    requests = [{"lora": lora, "seed": seed} for seed in (1, 2) for lora in ({}, {"soft": 0.8}, {"bold": -1.0})]
    alone = [pictures(inductor, **request) for request in requests]
    with ThreadPoolExecutor(len(requests)) as pool:
        together = list(pool.map(lambda request: pictures(inductor, **request), requests))
    for one, other in zip(alone, together, strict=True):
        largest, mean = oracle.picture_distance(one, other)
        assert largest <= 2
        assert mean <= 0.1
    for one, other in pairwise(alone):
        assert_different(one, other)


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        ({"loud": 1.0}, "lora: 'loud' is not one of soft, bold"),
        ({"soft": 11.0}, r"lora: the scale of soft must be -10 to 10, got 11\.0"),
        ({"soft": "1"}, "lora: the scale of soft must be a number, got '1'"),
    ],
)
def test_invalid_loras_are_refused(inductor: Served, lora: Any, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message) as caught:
        inductor.generate(**CAT, lora=lora)
    assert caught.value.parameter == "lora"


def test_capabilities_list_the_loras(inductor: Served) -> None:
    assert inductor.client.describe("inductor")["loras"] == list(LORAS)
