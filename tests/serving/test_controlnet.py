"""ControlNets, through a running Triton, compared with diffusers' ControlNet pipelines."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import diffusers
import pytest
from diffusers import ControlNetModel, T2IAdapter
from PIL import Image

from imprompt import InvalidRequest
from parity import assert_different, assert_same
from served import Served
from tiny import images, oracle

DEPTH, CANNY = images.control_image("depth"), images.control_image("canny", 1)
STATUE = images.photo(1)
PHOTO = images.photo(3, size=(64, 64))
SCHEDULER = "DDIMScheduler"
PROMPT = "a photo of a cat"
TWO: dict[str, Any] = {"controlnet": ["depth", "canny"], "ip_adapter_image": STATUE}
EVERY: dict[str, Any] = {"control_image": [DEPTH, CANNY, DEPTH]}


@pytest.fixture
def control(served: Callable[[str], Served]) -> Served:
    return served("control")


@pytest.fixture
def sdxl(served: Callable[[str], Served]) -> Served:
    return served("sdxl_control")


@cache
def pipeline(served: Served, task: str, nets: tuple[str, ...]) -> Any:
    """Load diffusers' ControlNet pipeline with the bundle's checkpoints."""
    family = "StableDiffusionXL" if served.bundle.name.startswith("sdxl") else "StableDiffusion"
    loaded = [ControlNetModel.from_pretrained(served.bundle.checkpoints / net) for net in nets]
    return served.bundle.oracle(
        getattr(diffusers, f"{family}ControlNet{task}Pipeline"),
        scheduler=SCHEDULER,
        controlnet=loaded if len(loaded) > 1 else loaded[0],
    )


def both(served: Served, control_image: Any, nets: tuple[str, ...] = ("depth",), task: str = "", **arguments: Any):  # type: ignore[no-untyped-def]
    """Return the pictures of the server and of diffusers, with the IP-Adapter if the bundle has one."""
    pipe = pipeline(served, task, nets)
    arguments = {"prompt": PROMPT, "num_inference_steps": 4, **arguments}
    if served.bundle.adapters:
        pipe.set_ip_adapter_scale(0.6)
        arguments["ip_adapter_image"] = STATUE
    # Text-to-image pipelines call the control image `image`.
    control_argument: dict[str, Any] = {"control_image" if task else "image": control_image}
    expected = oracle.generate(pipe, **control_argument, **arguments)
    if served.bundle.adapters:
        arguments["ip_adapter_scale"] = 0.6
    arguments["seed"] = arguments.get("seed", 0)
    result = served.generate(control_image=control_image, controlnet=list(nets), scheduler=SCHEDULER, **arguments)
    return result, expected


def test_one_controlnet(control: Served) -> None:
    result, expected = both(control, DEPTH)
    assert_same(result, expected)
    for other in ({"control_image": CANNY}, {"controlnet": "canny"}, {"controlnet_conditioning_scale": 0.5}):
        arguments = {"control_image": DEPTH, "controlnet": "depth"} | other
        changed = control.generate(
            prompt=PROMPT, num_inference_steps=4, seed=0, scheduler=SCHEDULER, ip_adapter_image=STATUE,
            ip_adapter_scale=0.6, **arguments,
        )  # fmt: skip
        assert_different(result, changed)


def test_two_controlnets_in_either_order(control: Served) -> None:
    scales = [1.0, 0.4]
    result, expected = both(control, [DEPTH, CANNY], ("depth", "canny"), controlnet_conditioning_scale=scales)
    assert_same(result, expected)
    turned, expected = both(control, [CANNY, DEPTH], ("canny", "depth"), controlnet_conditioning_scale=scales)
    assert_same(turned, expected)
    assert_different(result, turned)


def test_all_nets_of_the_bundle_by_default(control: Served) -> None:
    pictures = [DEPTH, CANNY, DEPTH]
    arguments: dict[str, Any] = {"prompt": PROMPT, "num_inference_steps": 2, "seed": 0, "control_image": pictures}
    named = control.generate(controlnet=["depth", "canny", "sketch"], **arguments)
    assert_same(control.generate(**arguments), oracle.as_array(named.images))


@pytest.mark.parametrize("net", ["depth", "canny"])
def test_a_net_is_active_within_its_steps(control: Served, net: str) -> None:
    window: dict[str, Any] = {"control_guidance_start": 0.2, "control_guidance_end": 0.7}
    result, expected = both(control, DEPTH, (net,), num_inference_steps=6, **window)
    assert_same(result, expected)
    whole, _ = both(control, DEPTH, (net,), num_inference_steps=6)
    assert_different(result, whole)


def test_each_net_has_its_own_steps(control: Served) -> None:
    window: dict[str, Any] = {"control_guidance_start": [0.0, 0.5], "control_guidance_end": [0.5, 1.0]}
    assert_same(*both(control, [DEPTH, CANNY], ("depth", "canny"), **window))


@pytest.mark.parametrize("guidance_scale", [4.0, 1.0])
def test_guess_mode(control: Served, guidance_scale: float) -> None:
    result, expected = both(control, DEPTH, guess_mode=True, guidance_scale=guidance_scale)
    assert_same(result, expected)
    assert_different(result, both(control, DEPTH, guidance_scale=guidance_scale)[0])


def test_guess_mode_with_two_nets(control: Served) -> None:
    assert_same(*both(control, [DEPTH, CANNY], ("depth", "canny"), guess_mode=True))


def test_image_to_image(control: Served) -> None:
    result, expected = both(control, DEPTH, task="Img2Img", image=PHOTO, strength=0.6)
    assert_same(result, expected)
    assert_same(*both(control, DEPTH, task="Img2Img", image=PHOTO))  # with the defaults of diffusers


def test_inpainting(control: Served) -> None:
    arguments: dict[str, Any] = {"task": "Inpaint", "image": PHOTO, "mask_image": images.mask("left")}
    result, expected = both(control, DEPTH, **arguments)
    assert_same(result, expected)
    assert_different(result, both(control, CANNY, **arguments)[0])
    assert_same(*both(control, DEPTH, strength=0.5, controlnet_conditioning_scale=1.2, **arguments))


def test_inpainting_of_a_crop(control: Served) -> None:
    mask = Image.new("L", (96, 96))
    mask.paste(255, (20, 30, 60, 70))
    arguments: dict[str, Any] = {"image": images.photo(3), "mask_image": mask, "padding_mask_crop": 8}
    relief = images.control_image("depth", size=(96, 96))
    assert_same(*both(control, relief, task="Inpaint", height=64, width=64, **arguments))


def test_the_control_image_determines_the_size(control: Served) -> None:
    result, expected = both(control, images.control_image("depth", size=(99, 76)))
    assert result.images[0].size == (96, 72)
    assert_same(result, expected)


def test_the_control_image_is_resized_to_the_requested_size(control: Served) -> None:
    assert_same(*both(control, images.control_image("depth", size=(100, 70)), height=72, width=64))


def test_an_image_for_each_prompt(control: Served) -> None:
    prompts = [PROMPT, "a red house"]
    arguments: dict[str, Any] = {"prompt": prompts, "num_images_per_prompt": 2}
    assert_same(*both(control, [DEPTH, CANNY], **arguments))
    assert_same(*both(control, DEPTH, **arguments))


def test_sdxl(sdxl: Served) -> None:
    result, expected = both(sdxl, DEPTH)
    assert_same(result, expected)
    assert_different(result, both(sdxl, CANNY)[0])
    assert_same(*both(sdxl, DEPTH, guess_mode=True))


def test_sdxl_image_to_image_and_inpainting(sdxl: Served) -> None:
    assert_same(*both(sdxl, DEPTH, task="Img2Img", image=PHOTO))
    assert_same(*both(sdxl, DEPTH, task="Inpaint", image=PHOTO, mask_image=images.mask("circle")))


@pytest.mark.parametrize("name", ["control", "sdxl_control"])
def test_t2i_adapter(served: Callable[[str], Served], name: str) -> None:
    one = served(name)
    adapter = T2IAdapter.from_pretrained(one.bundle.checkpoints / "sketch")
    family = "StableDiffusionXL" if name.startswith("sdxl") else "StableDiffusion"
    cls = getattr(diffusers, f"{family}AdapterPipeline")  # the pipeline for SD 1.5 takes no IP-Adapter
    pipe = oracle.pipeline(one.bundle.checkpoints / "base", (), cls, scheduler=SCHEDULER, adapter=adapter)
    arguments: dict[str, Any] = {"prompt": PROMPT, "num_inference_steps": 6}
    expected = oracle.generate(pipe, image=DEPTH, adapter_conditioning_scale=0.8, **arguments)
    arguments |= {"seed": 0, "scheduler": SCHEDULER, "controlnet": "sketch"}
    arguments["controlnet_conditioning_scale"] = 0.8
    result = one.generate(control_image=DEPTH, **arguments)
    assert_same(result, expected)
    assert_different(result, one.generate(control_image=CANNY, **arguments))
    if name == "sdxl_control":  # the pipeline for SD 1.5 has no such parameter
        half = oracle.generate(
            pipe,
            image=DEPTH,
            prompt=PROMPT,
            num_inference_steps=6,
            adapter_conditioning_scale=0.8,
            adapter_conditioning_factor=0.5,
        )
        ended = one.generate(control_image=DEPTH, control_guidance_end=0.5, **arguments)
        assert_same(ended, half)
        assert_different(ended, result)


def test_t2i_adapter_with_a_controlnet(control: Served) -> None:
    """Both have an effect: leaving either out changes the picture."""
    arguments: dict[str, Any] = {"prompt": PROMPT, "num_inference_steps": 3, "seed": 0}
    both_nets = control.generate(controlnet=["depth", "sketch"], control_image=[DEPTH, CANNY], **arguments)
    for net, image in (("depth", DEPTH), ("sketch", CANNY)):
        assert_different(both_nets, control.generate(controlnet=net, control_image=image, **arguments))


def test_pictures_do_not_depend_on_their_neighbors_in_the_batch(control: Served) -> None:
    """Requests with one net, two nets, some steps, guess mode, or no net give the same pictures together as alone."""
    common: dict[str, Any] = {"prompt": PROMPT, "height": 64, "width": 64, "scheduler": SCHEDULER}
    requests: list[dict[str, Any]] = [
        {"seed": 1, "num_inference_steps": 6, "control_image": DEPTH, "controlnet": "depth"},
        {"seed": 2, "num_inference_steps": 8},
        {"seed": 3, "num_inference_steps": 5, "control_image": [DEPTH, CANNY], **TWO},
        {"seed": 4, "num_inference_steps": 7, "control_image": CANNY, "controlnet": "depth", "guess_mode": True},
        {
            "seed": 5,
            "num_inference_steps": 8,
            "control_image": CANNY,
            "controlnet": "canny",
            "control_guidance_end": 0.5,
        },
    ]
    alone = [control.generate(**common, **request) for request in requests]
    with ThreadPoolExecutor(len(requests)) as threads:
        together = list(threads.map(lambda request: control.generate(**common, **request), requests))
    for one, other in zip(together, alone, strict=True):
        assert_same(one, oracle.as_array(other.images))


@pytest.mark.parametrize(
    ("parameter", "arguments"),
    [
        ("controlnet", {"controlnet": "pose", "control_image": DEPTH}),
        ("controlnet", {"controlnet": ["depth", "depth"], "control_image": [DEPTH, DEPTH]}),
        ("control_image", {"controlnet": ["depth", "canny"], "control_image": DEPTH}),
        ("control_image", {"control_image": [DEPTH, CANNY]}),
        ("control_image", {"controlnet": "depth"}),
        ("control_image", {"controlnet": "depth", "control_image": images.control_image(size=(1000, 64))}),
        ("controlnet_conditioning_scale", EVERY | {"controlnet_conditioning_scale": [1, 2]}),
        ("control_guidance_start", EVERY | {"control_guidance_start": 1.5}),
        ("control_guidance_start", EVERY | {"control_guidance_start": 0.7, "control_guidance_end": 0.2}),
    ],
)  # fmt: skip
def test_bad_parameters_are_refused_by_name(control: Served, parameter: str, arguments: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest) as caught:
        control.generate(prompt=PROMPT, num_inference_steps=1, **arguments)
    assert caught.value.parameter == parameter, caught.value
