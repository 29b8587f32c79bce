"""Results as decoded from responses, and the files they are saved to."""

from __future__ import annotations

import builtins
import io
import pickle
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_triton import Call, FakeTriton, clips, encoded, opened, picture, texts
from PIL import Image

from imprompt import Client, InvalidRequest, Overloaded, Progress, Result
from imprompt._images import decode


@pytest.fixture
def answered(client: Client, triton: FakeTriton) -> Any:
    """Return the result of a request for which the server returns these tensors."""

    def ask(outputs: dict[str, np.ndarray], **parameters: Any) -> Result:
        triton.answer = lambda call: iter([outputs])
        return client.generate(model="one", prompt="a", **parameters)

    return ask


def test_pictures_as_pil_and_as_arrays(answered: Any) -> None:
    as_pil, as_np = answered(picture(2)), answered(picture(2), output_type="np")
    assert [image.size for image in as_pil.images] == [(16, 8), (16, 8)]
    assert all(isinstance(image, Image.Image) for image in as_pil.images)
    assert np.array_equal(np.stack(as_np.images), picture(2)["images"])
    as_np.images[0][:] = 0  # the array is writable
    assert as_pil.frames is None
    assert as_pil.latents is None
    assert as_pil.nsfw_content_detected is None


def test_repr_tells_what_came_back_without_the_pixels(answered: Any) -> None:
    shown = repr(answered({**picture(2), "seeds": np.array([5, 6])}, output_type="np"))
    assert "model='one'" in shown
    assert "seeds=[5, 6]" in shown
    assert "array" not in shown
    assert not re.search(r"\b_\w+=", shown)


def test_latents(answered: Any, tmp_path: Path) -> None:
    latents = np.random.default_rng(0).normal(size=(2, 4, 1, 2)).astype(np.float32)
    result = answered({"latents": latents, "seeds": np.array([5, 6])}, output_type="latent")
    assert np.array_equal(result.latents, latents)
    assert (result.images, result.seeds, result.timings) == ([], [5, 6], {})
    with pytest.raises(ValueError, match=r"out\.png: latents must be saved as \.npy"):
        result.save("out.png")
    assert np.array_equal(np.load(*result.save(tmp_path / "out.npy")), latents)


def test_seeds_are_returned_as_given(answered: Any) -> None:
    given = [2**64 - 1, 2**63, 5, -1 - 2**40]
    wire = np.array([-1, -(2**63), 5, -1 - 2**40])
    for seeds in (given, tuple(given[:3]), np.array(given[:3], np.uint64)):
        assert answered({**picture(4), "seeds": wire[: len(seeds)]}, seed=seeds).seeds == list(seeds)
    assert answered({**picture(), "seeds": np.array([-1])}, seed=-1).seeds == [-1]
    assert answered({**picture(2), "seeds": np.array([], np.int64)}, seed=7).seeds == []


def test_warnings(answered: Any) -> None:
    assert answered(picture()).warnings == []
    assert answered({**picture(), "warnings": texts("cut: ä", "b")}).warnings == ["cut: ä", "b"]


def test_nsfw_content_detected(answered: Any) -> None:
    result = answered({**picture(2), "nsfw_content_detected": np.array([False, True])})
    assert result.nsfw_content_detected == [False, True]


def test_clips(answered: Any) -> None:
    result = answered(clips(2))
    assert [[frame.getpixel((0, 0))[0] for frame in clip] for clip in result.frames] == [[0, 100, 200]] * 2
    assert result.images == []
    as_np = answered(clips(), output_type="np")
    assert [frame.shape for frame in as_np.frames[0]] == [(8, 16, 3)] * 3


def test_encoded_pictures(answered: Any) -> None:
    result = answered({"encoded": texts(encoded("PNG", "red"), encoded("PNG", "blue"))})
    assert [image.getpixel((0, 0)) for image in result.images] == [(255, 0, 0), (0, 0, 255)]
    assert result.frames is None
    as_np = answered({"encoded": texts(encoded("PNG", "red"))}, output_type="np")
    assert as_np.images[0].shape == (8, 16, 3)


def test_encoded_clips(answered: Any) -> None:
    for colors in ({"red": (255, 0, 0), "blue": (0, 0, 255)}, {"red": (255, 0, 0)}):
        result = answered({"encoded": texts(encoded("GIF", *colors))}, num_frames=len(colors))
        assert [frame.getpixel((0, 0)) for frame in result.frames[0]] == list(colors.values())
        assert result.images == []


def test_previews(client: Client, triton: FakeTriton) -> None:
    def answer(call: Call) -> Any:
        step = {"step": np.array([1], np.int32), "steps": np.array([1], np.int32)}
        yield {**step, "preview": texts(encoded("JPEG", "red"))}
        yield picture()

    triton.answer = answer
    progress, _ = client.stream(model="one", prompt="a", preview=True)
    assert isinstance(progress, Progress)
    assert progress.preview is not None
    assert progress.preview.size == (16, 8)


# Files


@pytest.mark.parametrize("extension", ["png", "jpg", "webp"])
def test_file_extension_selects_the_picture_format(answered: Any, tmp_path: Path, extension: str) -> None:
    path = tmp_path / f"out.{extension}"
    assert answered(picture()).save(path) == [path]
    assert opened(path).size == (16, 8)


def test_several_pictures_are_numbered(answered: Any, tmp_path: Path) -> None:
    paths = answered(picture(2), output_type="np").save(str(tmp_path / "out.png"))
    assert [path.name for path in paths] == ["out-0.png", "out-1.png"]
    assert np.array_equal(np.asarray(opened(paths[1])), picture(2)["images"][1])


@pytest.mark.parametrize("extension", ["gif", "webp"])
@pytest.mark.parametrize("output_type", ["pil", "np"])
def test_clip_is_saved_as_an_animation(answered: Any, tmp_path: Path, extension: str, output_type: str) -> None:
    (path,) = answered(clips(), output_type=output_type).save(tmp_path / f"out.{extension}", fps=4)
    saved = opened(path)
    assert saved.n_frames == 3
    saved.load()
    assert saved.info["duration"] == 250


def test_clip_is_saved_as_mp4(answered: Any, tmp_path: Path) -> None:
    imageio = pytest.importorskip("imageio.v3")
    pytest.importorskip("av")
    (path,) = answered(clips()).save(tmp_path / "out.mp4")
    frames = imageio.imread(path, plugin="pyav")
    assert frames.shape[0] == 3
    assert abs(int(frames[2].mean()) - 200) < 20


def test_saving_mp4_without_imageio_says_what_to_install(
    answered: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = builtins.__import__

    def without_imageio(name: str, *arguments: Any) -> Any:
        if name.startswith("imageio"):
            raise ImportError(name)
        return original(name, *arguments)

    monkeypatch.setattr(builtins, "__import__", without_imageio)
    with pytest.raises(ValueError, match=r'pip install "imageio\[pyav\]"'):
        answered(clips()).save(tmp_path / "out.mp4")


@pytest.mark.parametrize(
    ("outputs", "extension", "message"),
    [
        (clips(), "png", "out.png: clips must be saved as .gif, .webp or .mp4"),
        (clips(), "txt", "out.txt: clips must be saved as .gif, .webp or .mp4"),
        (picture(), "mp4", "out.mp4: pictures must be saved as .png, .jpg or .webp"),
        (picture(), "txt", "out.txt: pictures must be saved as"),
        (picture(), "psd", "out.psd: pictures must be saved as"),  # pillow only reads this format
        (picture(), "xbm", "out.xbm: pictures must be saved as"),  # this format has no colors
    ],
)
def test_file_extension_must_fit_the_result(
    answered: Any, tmp_path: Path, outputs: Any, extension: str, message: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        answered(outputs).save(tmp_path / f"out.{extension}")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("fps", [0, -1, float("nan"), float("inf"), 10**400, "8", None, True])
def test_invalid_fps(answered: Any, tmp_path: Path, fps: Any) -> None:
    with pytest.raises(InvalidRequest, match="fps: must be a number above 0, at most 1000"):
        answered(clips()).save(tmp_path / "out.gif", fps=fps)


def test_invalid_path(answered: Any) -> None:
    with pytest.raises(InvalidRequest, match="path: must be a file path, got 3"):
        answered(picture()).save(3)


@pytest.mark.parametrize("data", [encoded("JPEG", "red"), encoded("GIF", "red", "blue"), b"....ftypisom..."])
def test_encoded_results_are_written_unchanged(answered: Any, tmp_path: Path, data: bytes) -> None:
    extension = "mp4" if b"ftyp" in data else "gif" if data.startswith(b"GIF") else "jpg"
    (path,) = answered({"encoded": texts(data)}).save(tmp_path / f"out.{extension}")
    assert path.read_bytes() == data


def test_encoded_results_are_converted_to_another_format(answered: Any, tmp_path: Path) -> None:
    (path,) = answered({"encoded": texts(encoded("JPEG", "red"))}).save(tmp_path / "out.png")
    assert opened(path).format == "PNG"


def test_exceptions_can_be_pickled() -> None:
    for error in (InvalidRequest("a: b", parameter="a", request_id="7"), Overloaded("full", retry_after=2.0)):
        copy = pickle.loads(pickle.dumps(error))
        assert (type(copy), str(copy), vars(copy)) == (type(error), str(error), vars(error))


def test_pictures_that_the_server_cut_off_are_noticed_at_once() -> None:
    """PIL decodes lazily, so the error would otherwise come from whatever touches the picture first."""
    file = io.BytesIO()
    Image.effect_noise((64, 64), 50).save(file, "PNG")
    with pytest.raises(OSError, match="truncated"):
        decode(file.getvalue()[:1000])
