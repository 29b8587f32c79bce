"""How results show in notebooks, and what PNG files say about how they were made."""

from __future__ import annotations

import base64
import io
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_triton import FakeTriton, clips, encoded, opened, picture, texts
from PIL import Image

from imprompt import Client, Result, __version__


@pytest.fixture
def answered(client: Client, triton: FakeTriton) -> Any:
    """Return the result of a request for which the server returns these tensors."""

    def ask(outputs: dict[str, np.ndarray], prompt: Any = "a", **parameters: Any) -> Result:
        triton.answer = lambda call: iter([outputs])
        return client.generate(model="one", prompt=prompt, **parameters)

    return ask


def shown(html: str) -> list[Image.Image]:
    """The pictures in HTML."""
    return [Image.open(io.BytesIO(base64.b64decode(data))) for data in re.findall(r'base64,([^"]+)"', html)]


@pytest.mark.parametrize("output_type", ["pil", "np"])
def test_one_picture_shows_as_png(answered: Any, output_type: str) -> None:
    result = answered(picture(), output_type=output_type)
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(result._repr_png_()))), picture()["images"][0])
    assert result._repr_html_() is None


@pytest.mark.parametrize("output_type", ["pil", "np"])
def test_several_pictures_show_in_a_row(answered: Any, output_type: str) -> None:
    result = answered(picture(3), output_type=output_type)
    html = result._repr_html_()
    assert result._repr_png_() is None
    assert [image.size for image in shown(html)] == [(16, 8)] * 3
    assert re.findall(r"<figcaption>(.*?)</figcaption>", html) == ["seed 0", "seed 1", "seed 2"]
    together = answered({**picture(2), "seeds": np.array([], np.int64)})._repr_html_()
    assert "1 of 2" in together


def test_large_pictures_are_shown_small(answered: Any) -> None:
    result = answered({"images": np.zeros((2, 500, 1000, 3), np.uint8), "seeds": np.arange(2)})
    assert [image.size for image in shown(result._repr_html_())] == [(384, 192)] * 2
    assert result.images[0].size == (1000, 500)


def test_clips_show_as_animations(answered: Any) -> None:
    result = answered(clips(2))
    assert [image.n_frames for image in shown(result._repr_html_())] == [3, 3]  # type: ignore[attr-defined]
    assert result._repr_png_() is None


def test_latents_have_nothing_to_show(answered: Any) -> None:
    result = answered({"latents": np.zeros((1, 4, 1, 2), np.float32)}, output_type="latent")
    assert result._repr_png_() is None
    assert result._repr_html_() is None


def saved_texts(result: Result, folder: Path, **options: Any) -> list[tuple[str, dict[str, Any]]]:
    saved = [opened(path).text for path in result.save(folder / "out.png", **options)]
    return [(text["parameters"], json.loads(text["imprompt"])) for text in saved]


def test_png_files_hold_seed_and_parameters(answered: Any, tmp_path: Path) -> None:
    result = answered(
        picture(),
        "a cat",
        negative_prompt="a dog",
        seed=0,
        num_inference_steps=4,
        guidance_scale=7.5,
        scheduler="DDIMScheduler",
        strength=None,
        ip_adapter_scale=[0.5],
        ip_adapter_image=Image.new("RGB", (4, 4)),
        timeout=60,
    )
    ((parameters, values),) = saved_texts(result, tmp_path)
    assert parameters == (
        "a cat\nNegative prompt: a dog\nSteps: 4, Sampler: DDIMScheduler, CFG scale: 7.5, Seed: 0, Size: 16x8, "
        f"Model: one, Version: imprompt {__version__}"
    )
    assert values == {
        "model": "one",
        "prompt": "a cat",
        "negative_prompt": "a dog",
        "seed": 0,
        "num_inference_steps": 4,
        "guidance_scale": 7.5,
        "scheduler": "DDIMScheduler",
        "ip_adapter_scale": [0.5],
    }


def test_each_picture_has_its_own_prompt_and_seed(answered: Any, tmp_path: Path) -> None:
    many = answered({**picture(4), "seeds": np.array([7, 8, 9, 10])}, ["a cat", "a dog"], negative_prompt=["x", "y"])
    saved = saved_texts(many, tmp_path)
    found = [(values["prompt"], values["negative_prompt"], values["seed"]) for _, values in saved]
    assert found == [("a cat", "x", 7), ("a cat", "x", 8), ("a dog", "y", 9), ("a dog", "y", 10)]
    assert not any("Batch" in parameters or "picture" in values for parameters, values in saved)
    shared = answered({**picture(2), "seeds": np.array([7, 8])}, ["a cat", "a dog"], negative_prompt=["x"])
    assert [values["negative_prompt"] for _, values in saved_texts(shared, tmp_path)] == ["x", "x"]


def test_pictures_that_share_a_seed_say_which_one_they_are(answered: Any, tmp_path: Path) -> None:
    batch = answered({**picture(2), "seeds": np.array([], np.int64)}, ["a", "b"], seed=7)
    (_, (parameters, values)) = saved_texts(batch, tmp_path)
    assert "Seed: 7, Size: 16x8, Model: one, Batch size: 2, Batch pos: 1, " in parameters
    assert (values["seed"], values["prompt"], values["picture"]) == (7, "b", 1)


def test_prompts_in_any_script_survive(answered: Any, tmp_path: Path) -> None:
    asked: dict[str, Any] = {"seed": np.array([3]), "num_inference_steps": np.array(4)}
    ((parameters, values),) = saved_texts(answered(picture(), "eine Katze, 猫 🐈", **asked), tmp_path)
    assert values["num_inference_steps"] == 4
    assert parameters.startswith("eine Katze, 猫 🐈\n")
    assert values["prompt"] == "eine Katze, 猫 🐈"


def test_encoded_png_files_keep_their_pixels(answered: Any, tmp_path: Path) -> None:
    data = encoded("PNG", "red")
    result = answered({"encoded": texts(data), "seeds": np.array([5])}, output_format="png")
    (path,) = result.save(tmp_path / "out.png")
    assert "Seed: 5" in opened(path).text["parameters"]
    assert path.read_bytes().endswith(data[33:])
    (path,) = result.save(tmp_path / "out.png", metadata=False)
    assert path.read_bytes() == data


def test_metadata_can_be_switched_off(answered: Any, tmp_path: Path) -> None:
    (path,) = answered(picture()).save(tmp_path / "out.png", metadata=False)
    assert not opened(path).text
