"""Request parameters as the server receives them."""

from __future__ import annotations

import base64
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler
from diffusers.image_processor import VaeImageProcessor
from fake_triton import FakeTriton, encoded
from PIL import Image

from imprompt import InvalidRequest

RED = Image.new("RGB", (4, 2), "red")
BLUE = Image.new("RGB", (4, 2), "blue")
GREY = Image.new("L", (4, 2), 100)


@pytest.mark.parametrize(
    ("parameter", "value", "dtype", "expected"),
    [
        ("prompt", "ein Garten für dich", "BYTES", ["ein Garten für dich".encode()]),
        ("prompt", ["a", "b"], "BYTES", [b"a", b"b"]),
        ("prompt", [], "BYTES", []),
        ("scheduler", "DDIMScheduler", "BYTES", [b"DDIMScheduler"]),
        ("controlnet", ["depth", "canny"], "BYTES", [b"depth", b"canny"]),
        ("height", 64, "INT32", [64]),
        ("height", np.int64(64), "INT32", [64]),
        ("original_size", (64, 128), "INT32", [64, 128]),
        ("guidance_scale", 7, "FP64", [7.0]),
        ("guidance_scale", np.float32(0.5), "FP64", [0.5]),
        ("guidance_scale", float("inf"), "FP64", [float("inf")]),  # left to the server to reject
        ("controlnet_conditioning_scale", [0.5, 1], "FP64", [0.5, 1.0]),
        ("guess_mode", True, "BOOL", [True]),
        ("seed", 3, "INT64", [3]),
        ("seed", [1, -2], "INT64", [1, -2]),
        ("seed", 2**64 - 1, "INT64", [-1]),  # the same 64 bits for torch's manual_seed
        ("ip_adapter_start", 0.2, "FP64", [0.2]),
        ("ip_adapter_weight_type", ["style", "linear"], "BYTES", [b"style", b"linear"]),
    ],
)
def test_values_are_sent_in_the_data_type_of_the_input(
    sent: Any, parameter: str, value: Any, dtype: str, expected: list[Any]
) -> None:
    call = sent(**{parameter: value})
    assert call.dtypes[parameter] == dtype
    assert call.inputs[parameter].tolist() == expected


def test_dicts_are_sent_as_json(sent: Any) -> None:
    call = sent(scheduler_config={"use_karras_sigmas": True, "steps_offset": np.int64(1)})
    assert json.loads(call.inputs["scheduler_config"][0]) == {"use_karras_sigmas": True, "steps_offset": 1}


def test_scheduler_configs_of_diffusers_are_sent_unchanged(sent: Any) -> None:
    config = dict(DPMSolverMultistepScheduler(trained_betas=np.linspace(1e-4, 0.02, 10)).config)
    assert config["lambda_min_clipped"] == -math.inf
    given = {**config, "a": (np.float32(0.5), None), "b": np.float64("inf")}
    received = json.loads(sent(scheduler_config=given).inputs["scheduler_config"][0])
    assert received.pop("trained_betas") == config.pop("trained_betas").tolist()
    assert received.pop("a") == [0.5, None]
    assert received.pop("b") == math.inf
    assert received == json.loads(json.dumps(config))


def test_latents_of_clips_have_their_channels_and_frames_joined(sent: Any) -> None:
    latents = np.arange(2 * 4 * 3 * 5 * 6, dtype=np.float32).reshape(2, 4, 3, 5, 6)
    received = sent(latents=latents).inputs["latents"]
    assert received.shape == (2, 12, 5, 6)
    assert np.array_equal(received.ravel(), latents.ravel())


def test_none_is_not_sent(sent: Any) -> None:
    assert sent(height=None, ip_adapter_image=None, timeout=None).inputs.keys() == {"prompt"}


@pytest.mark.parametrize(("output_type", "wire"), [("pil", None), ("np", None), ("latent", b"latent")])
def test_output_type_is_sent_only_for_latents(sent: Any, output_type: str, wire: bytes | None) -> None:
    assert sent(output_type=output_type).inputs.get("output_type", [None])[0] == wire


# Invalid values


@pytest.mark.parametrize(
    ("parameter", "value", "message"),
    [
        ("height", "64", "height: must be an integer, got '64'"),
        ("height", 64.0, "height: must be an integer, got 64.0"),
        ("height", True, "height: must be an integer, got True"),
        ("height", [64, 64], "height: must be a single value, got 2"),
        ("height", 2**40, "height: must be -2147483648 to 2147483647"),
        ("height", 2**70, "height: must be -2147483648 to 2147483647"),
        ("original_size", [64], "original_size: must have shape [2], got [1]"),
        ("guidance_scale", "strong", "guidance_scale: must be a number, got 'strong'"),
        ("guidance_scale", {"a": 1}, "guidance_scale: must be a number"),
        ("controlnet_conditioning_scale", [[1.0], [1.0, 2.0]], "controlnet_conditioning_scale: must be numbers"),
        ("guess_mode", 1, "guess_mode: must be True or False, got 1"),
        ("seed", 2**64, "seed: must be -2**63 to 2**64 - 1"),
        ("seed", 0.5, "seed: must be integers"),
        ("prompt", 3, "prompt: must be a string or a list of strings, got int"),
        ("scheduler", ["A", "B"], "scheduler: must be a single value, got 2"),
        ("scheduler_config", {"a": float("nan")}, "scheduler_config: must contain only JSON values"),
        ("scheduler_config", {"a": object()}, "scheduler_config: must contain only JSON values"),
        ("output_type", "pt", "output_type: must be one of pil, np, latent; got 'pt'"),
        ("timeout", 0, "timeout: must be a number of seconds above 0; got 0"),
        ("timeout", "1", "timeout: must be a number of seconds above 0; got '1'"),
        ("timeout", float("nan"), "timeout: must be a number of seconds above 0"),
        ("image", 3, "image: must be a PIL image, a path"),
        ("image", "nowhere.png", "image: no such file: nowhere.png"),
        ("image", "data:image/png,abc", "image: a data URI must start like `data:image/png;base64,`"),
        ("image", "data:image/png;base64,a", "image: the data URI is not valid base64"),
        ("image", "data:image/png;base64,iVBO*Rw0", "image: the data URI is not valid base64"),
        ("image", "data:text/plain;base64,aGVsbG8=", "image: the data URI is not a PNG, JPEG"),
        ("image", np.full((4, 4, 3), 2.0), "image: values of a float array must be 0 to 1, not 2 to 2; rescale it"),
        ("image", np.full((4, 4, 3), np.nan), "image: values of a float array must be 0 to 1, not nan to nan"),
        ("image", torch.full((3, 4, 4), -1.0), "image: values of a float array must be 0 to 1, not -1 to -1"),
        ("image", torch.zeros(2, 5, 5), "image: an array must be uint8, or float from 0 to 1"),
        ("video", "clip.MP4", "video: 'clip.MP4' cannot be read: PNG, JPEG, WebP, GIF, BMP or AVIF files are"),
        ("video", b"\0\0\0\x20ftypisom" + bytes(20), "video: the data is not a PNG, JPEG"),
        ("video", encoded("WEBP", "red", "blue")[:60], "video: the clip cannot be read"),
        ("image", "/", "image: cannot read /"),
        ("image", np.zeros((4, 4, 3), np.int64), "image: an array must be uint8"),
        ("image", np.zeros((3, 5, 5), np.uint8), "image: an array must be uint8"),
        ("image", np.zeros((0, 4, 3), np.uint8), "image: an array must be uint8"),
        ("mask_image", np.full((4, 4), 2.0), "mask_image: values of a float array must be 0 to 1"),
        ("ip_adapter_image", [RED], "ip_adapter_image: expected one entry for each adapter (plus, face), or a dict"),
        ("ip_adapter_image", {"pluss": RED}, "ip_adapter_image: no adapter 'pluss'; the bundle has plus, face"),
        ("ip_adapter_image_embeds", {"plus": np.zeros((2, 1, 5), np.float32)}, "plus: must have shape [any, any, 8]"),
        ("ip_adapter_image_embeds", {"plus": ["a"]}, "ip_adapter_image_embeds: plus: must be numbers"),
        ("ip_adapter_scale", "strong", "ip_adapter_scale: must be a number, a dict of scales by block, or a list"),
        ("ip_adapter_scale", {"up": "a"}, "a list of these; got 'a'"),
        ("ip_adapter_scale", [{}, {}, {}], "expected one value, or one for each of the 2 adapters in use; got 3"),
        ("ip_adapter_scale", {"up": float("nan")}, "ip_adapter_scale: must contain only JSON values"),
        ("ip_adapter_start", {"plus": 0.5}, "ip_adapter_start: missing a value for face"),
        ("ip_adapter_start", {"up": 0.5}, "ip_adapter_start: no adapter 'up'"),
    ],
)
def test_invalid_value_is_rejected_before_sending(
    sent: Any, triton: FakeTriton, parameter: str, value: Any, message: str
) -> None:
    with pytest.raises(InvalidRequest) as caught:
        sent(**{parameter: value})
    assert message in str(caught.value)
    assert caught.value.parameter == parameter
    assert not triton.calls


@pytest.mark.parametrize(
    ("parameter", "hint"),
    [
        ("guidance", "did you mean guidance_scale"),
        ("ip_adapter_imge", "did you mean ip_adapter_image"),
        ("hight", "did you mean height?"),
        ("step", "did you mean num_inference_steps?"),
        ("inference_steps", "did you mean num_inference_steps?"),
        ("cfg_scale", "did you mean guidance_scale?"),
        ("sampler", "did you mean scheduler?"),
        ("seeds", "did you mean seed?"),
        ("frame", "did you mean num_frames?"),
        ("prompts", "did you mean prompt"),
        ("size", "did you mean height or width"),
        ("ip_adapter_image_embedding", "did you mean ip_adapter_image_embeds"),
        ("generator", "`seed`"),
        ("cross_attention_kwargs", "`ip_adapter_masks`"),
        ("zzz", "two has no such parameter; `help(imprompt.Client)` and docs/protocol.md list them all"),
        ("time", "has no such parameter; `help(imprompt.Client)`"),
        ("ip_adapter_image_adapter", "has no such parameter"),
        ("encode_image", "has no such parameter"),
    ],
)
def test_error_for_an_unknown_parameter_suggests_known_ones(
    sent: Any, triton: FakeTriton, parameter: str, hint: str
) -> None:
    with pytest.raises(InvalidRequest) as caught:
        sent(**{parameter: 1})
    assert caught.value.parameter == parameter
    assert hint in str(caught.value)
    assert not triton.calls


def test_parameters_missing_from_the_model_are_rejected(triton: FakeTriton, sent: Any) -> None:
    for name in ("ip_adapter_scale_config", "output_type"):
        known = [tensor for tensor in triton.configs["one"].input if tensor.name != name]
        del triton.configs["one"].input[:]
        triton.configs["one"].input.extend(known)
    with pytest.raises(InvalidRequest, match="ip_adapter_scale: one accepts numbers only"):
        sent("one", ip_adapter_scale={"up": 1.0})
    with pytest.raises(InvalidRequest, match="output_type: one cannot return latents"):
        sent("one", output_type="latent")


# Pictures


def test_files_and_bytes_are_sent_unchanged(sent: Any, tmp_path: Path) -> None:
    path = tmp_path / "red.jpg"
    RED.save(path)
    call = sent(image=[path, str(path), path.read_bytes()])
    assert call.inputs["image"].tolist() == [path.read_bytes()] * 3


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "P", "1"])
def test_pil_images_keep_their_mode(sent: Any, mode: str) -> None:
    (image,) = sent(image=RED.convert(mode)).pictures("image")
    assert (image.format, image.mode, image.size) == ("BMP" if mode == "RGB" else "PNG", mode, RED.size)


@pytest.mark.parametrize(("width", "format"), [(512, "BMP"), (513, "PNG")])
def test_only_small_pictures_are_sent_without_compression(sent: Any, width: int, format: str) -> None:
    picture = Image.effect_noise((width, 512), 50).convert("RGB")
    (image,) = sent(image=picture).pictures("image")
    assert image.format == format
    assert np.array_equal(np.asarray(image), np.asarray(picture))


def test_transparent_color_of_an_rgb_image_is_kept(sent: Any) -> None:
    picture = RED.copy()
    picture.info["transparency"] = (255, 0, 0)
    (image,) = sent(image=picture).pictures("image")
    assert image.info["transparency"] == (255, 0, 0)


def test_other_pil_modes_become_rgb(sent: Any) -> None:
    (image,) = sent(image=RED.convert("CMYK")).pictures("image")
    assert image.mode == "RGB"


@pytest.mark.parametrize(
    ("array", "mode"),
    [
        (np.full((2, 4, 3), 9, np.uint8), "RGB"),
        (np.full((2, 4, 4), 9, np.uint8), "RGBA"),
        (np.full((2, 4, 1), 9, np.uint8), "L"),
        (np.full((2, 4), 9, np.uint8), "L"),
        (torch.full((2, 4, 3), 9, dtype=torch.uint8), "RGB"),
    ],
)
def test_arrays_are_height_width_channels(sent: Any, array: Any, mode: str) -> None:
    (image,) = sent(image=array).pictures("image")
    assert (image.mode, image.size) == (mode, (4, 2))
    assert np.array_equal(np.asarray(image), np.asarray(array).reshape(np.asarray(image).shape))


def test_stacked_tensors_may_have_channels_last(sent: Any) -> None:
    images = sent(image=torch.full((2, 2, 4, 3), 9, dtype=torch.uint8)).pictures("image")
    assert [(image.mode, image.size) for image in images] == [("RGB", (4, 2))] * 2


RAMP = np.linspace(0, 1, 2 * 4 * 3).reshape(2, 4, 3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_tensors_have_channels_first_and_values_up_to_1(sent: Any, dtype: torch.dtype) -> None:
    tensor = torch.tensor(RAMP, dtype=dtype).permute(2, 0, 1)
    expected = (tensor.float() * 255).round().permute(1, 2, 0).numpy()
    for given in (tensor, tensor[None], [tensor], [tensor[None]]):
        (image,) = sent(image=given).pictures("image")
        assert np.array_equal(np.asarray(image), expected)
    assert len(sent(image=torch.stack([tensor] * 3)).inputs["image"]) == 3
    assert len(sent(video=torch.stack([tensor] * 3), num_frames=3).inputs["video"]) == 3
    whole = (tensor.float() * 255).round().to(torch.uint8)
    assert np.array_equal(np.asarray(sent(image=whole).pictures("image")[0]), expected)


def test_tensors_mean_what_diffusers_takes_them_for(sent: Any) -> None:
    tensor = torch.tensor(RAMP, dtype=torch.float32).permute(2, 0, 1)[None]
    (image,) = sent(image=tensor).pictures("image")
    read = VaeImageProcessor(do_resize=False)
    assert (read.preprocess(image) - read.preprocess(tensor)).abs().max() <= 1 / 255


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_float_arrays_have_values_up_to_1(sent: Any, dtype: Any) -> None:
    for given, count in ((RAMP.astype(dtype), 1), (np.stack([RAMP, RAMP]).astype(dtype), 2)):
        first, *_ = images = sent(image=given).pictures("image")
        assert len(images) == count
        assert np.array_equal(np.asarray(first), (RAMP.astype(dtype) * 255).round())


def test_tensor_masks_become_grayscale(sent: Any) -> None:
    mask = torch.zeros(1, 1, 2, 4)
    mask[..., 0] = 1
    (image,) = sent(mask_image=mask).pictures("mask_image")
    assert (image.mode, image.size) == ("L", (4, 2))
    assert np.asarray(image).tolist() == [[255, 0, 0, 0]] * 2


@pytest.mark.parametrize("form", [Path, str, Path.read_bytes, Image.open], ids=["path", "text", "bytes", "pil"])
@pytest.mark.parametrize("format", ["GIF", "WEBP"])
def test_animated_files_are_videos(sent: Any, tmp_path: Path, format: str, form: Any) -> None:
    file = tmp_path / f"clip.{format.lower()}"
    file.write_bytes(encoded(format, "red", "lime", "blue"))
    frames = sent(video=form(file)).colors("video")
    assert np.abs(np.array(frames) - [(255, 0, 0), (0, 255, 0), (0, 0, 255)]).max() < 10


def test_a_single_picture_is_a_video_of_one_frame(sent: Any, tmp_path: Path) -> None:
    file = tmp_path / "a.png"
    RED.save(file)
    assert sent(video=file).inputs["video"].tolist() == [file.read_bytes()]


def test_data_uris_are_pictures(sent: Any) -> None:
    data = encoded("BMP", "red")
    text = base64.encodebytes(data).decode()  # with line breaks
    assert sent(image=f"DATA:image/bmp;charset=x;base64,{text}").inputs["image"].tolist() == [data]


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "AVIF"])
def test_picture_files_are_sent_unchanged(sent: Any, format: str) -> None:
    data = encoded(format, "red")
    assert sent(image=data).inputs["image"].tolist() == [data]


def test_lists_and_stacked_arrays_hold_several_pictures(sent: Any) -> None:
    frames = np.stack([np.asarray(RED), np.asarray(BLUE)])
    assert sent(video=frames).colors("video") == sent(video=[RED, BLUE]).colors("video") == [(255, 0, 0), (0, 0, 255)]


def test_nested_control_images_are_flattened(sent: Any) -> None:
    """As in diffusers, inner lists hold a ControlNet's frames for clips, and a prompt's images for pictures."""
    frames = sent(control_image=[[RED, RED, BLUE], [BLUE, BLUE, RED]], num_frames=3)
    prompts = sent(control_image=[[RED, BLUE], [RED, BLUE], [BLUE, RED]])
    red, blue = (255, 0, 0), (0, 0, 255)
    assert frames.colors("control_image") == prompts.colors("control_image") == [red, red, blue, blue, blue, red]
    with pytest.raises(InvalidRequest, match=r"control_image: every inner list must .* got lengths \[2, 1\]"):
        sent(control_image=[[RED, BLUE], [RED]])


def test_masks_keep_their_mode(sent: Any) -> None:
    for mode in ("1", "L", "P", "RGB"):
        (image,) = sent(mask_image=Image.new("L", (4, 2), 255).convert(mode)).pictures("mask_image")
        assert image.mode == mode


def test_array_masks_become_grayscale(sent: Any) -> None:
    for mask in (np.full((2, 4), 255, np.uint8), np.ones((2, 4), np.float32), np.ones((2, 4), bool)):
        (image,) = sent(mask_image=mask).pictures("mask_image")
        assert (image.mode, image.getpixel((0, 0))) == ("L", 255)
