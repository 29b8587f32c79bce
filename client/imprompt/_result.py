"""Decode responses into results. Only `Result.save` does I/O."""

from __future__ import annotations

import io
import json
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import grpc
import numpy as np
from PIL import Image, ImageSequence
from tritonclient.utils import deserialize_bytes_tensor, triton_to_np_dtype

from imprompt._errors import ServerError, invalid, short_repr, triton_status
from imprompt._images import decode
from imprompt._request import Request
from imprompt._tensors import is_number
from imprompt._transport import StreamError

Array = np.ndarray[Any, Any]

FPS = 8
"""Default frame rate of saved clips, which AnimateDiff's motion modules were trained for."""
_MAX_FPS = 1000
"""Animation formats store the duration of a frame in whole milliseconds."""
TEXT_EMBEDS = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
"""Outputs of `encode_prompt`; not all models have pooled ones."""
_ANIMATIONS = (".gif", ".webp")
_VIDEO = ".mp4"
_PICTURE_FILES = "pictures must be saved as .png, .jpg or .webp"
_CLIP_FILES = "clips must be saved as .gif, .webp or .mp4"


@dataclass(frozen=True, kw_only=True, slots=True)
class Progress:
    """`step` of `steps` is done. `preview` is a small picture of the current state, if requested and available."""

    step: int
    steps: int
    preview: Image.Image | None = None


@dataclass(frozen=True, kw_only=True)
class Result:
    """The result of a request: pictures, clips or latents."""

    model: str
    """Name of the bundle."""
    request_id: str
    output_type: str
    seeds: list[int]
    """The seed that reproduces each picture, even if the server chose it. Empty if several pictures share one seed's
    generator, because then no seed reproduces a single one of them."""
    timings: dict[str, float]
    """Seconds per stage on the server; stages may overlap. `total` is the total time there."""
    warnings: list[str] = field(default_factory=list)
    """Anything unexpected that the server did, such as truncating a long prompt."""
    nsfw_content_detected: list[bool] | None = None
    """For each picture, whether the safety checker blacked it out; None if the bundle has no safety checker."""
    latents: Array | None = None
    """float32 [pictures, channels, height / 8, width / 8], if `output_type` is `latent`."""
    encoded: list[bytes] | None = None
    """The pictures or clips as encoded by the server, if `output_format` was given."""
    _images: Array | None = field(default=None, repr=False)
    _frames: Array | None = field(default=None, repr=False)
    _clip: bool = field(default=False, repr=False)

    @cached_property
    def images(self) -> list[Any]:
        """The pictures: PIL images, or uint8 arrays [height, width, 3] if `output_type` is `np`. Empty for clips."""
        if self.encoded is not None:
            pictures = [] if self._clip else [decode(data) for data in self.encoded]
            return [np.asarray(image.convert("RGB")) for image in pictures] if self.output_type == "np" else pictures
        return [] if self._images is None else [self._picture(image) for image in self._images]

    @cached_property
    def frames(self) -> list[list[Any]] | None:
        """The clips, each a list of frames of the same types as `images`; None for pictures."""
        if self.encoded is not None:
            return [self._unpacked(decode(data)) for data in self.encoded] if self._clip else None
        return None if self._frames is None else [[self._picture(frame) for frame in clip] for clip in self._frames]

    def save(self, path: str | Path, *, fps: float = FPS) -> list[Path]:
        """Save the pictures or clips in the format of the file's extension, numbered if several (`out-0.png`).

        Clips are saved as `.gif` or `.webp` with pillow, or as `.mp4` (requires `pip install "imageio[pyav]"`).

        Returns:
            The paths of the written files.

        Raises:
            ValueError: the result has no pictures (only latents), or `path` or `fps` is invalid.
        """
        path = check_path(path)
        check_fps(fps)
        if self.encoded is not None and all(_container(data) == _format_of(path) for data in self.encoded):
            return self._write(path, self.encoded, lambda data, target: target.write_bytes(data))
        items: Sequence[Any] = self.frames if self.frames is not None else self.images
        if not items:
            raise ValueError(f"there are no pictures to save; output_type was {self.output_type!r}")
        check_extension(path, clip=self.frames is not None)
        if self.frames is None:
            return self._write(path, items, _save_picture)
        return self._write(path, items, lambda clip, target: _save_clip(clip, target, fps))

    @staticmethod
    def _write(path: Path, items: Sequence[Any], save: Callable[[Any, Path], Any]) -> list[Path]:
        paths = [path] if len(items) == 1 else [path.with_stem(f"{path.stem}-{index}") for index in range(len(items))]
        for item, target in zip(items, paths, strict=True):
            save(item, target)
        return paths

    def _picture(self, image: Array) -> Any:
        return image.copy() if self.output_type == "np" else Image.fromarray(image)

    def _unpacked(self, clip: Image.Image) -> list[Any]:
        frames = [frame.convert("RGB") for frame in ImageSequence.Iterator(clip)]
        return [np.asarray(frame) for frame in frames] if self.output_type == "np" else frames


def read_outputs(response: Any) -> dict[str, Array]:
    """Return the tensors of a `ModelInferResponse` by name; BYTES tensors become object arrays."""
    outputs: dict[str, Array] = {}
    for index, output in enumerate(response.outputs):
        raw = response.raw_output_contents[index]
        if output.datatype == "BYTES":
            values = deserialize_bytes_tensor(raw)
        else:
            values = np.frombuffer(raw, dtype=triton_to_np_dtype(output.datatype))
        outputs[output.name] = values.reshape(tuple(output.shape))
    return outputs


def read_event(answer: Any, request: Request) -> Progress | Result:
    """Decode one `ModelStreamInferResponse`.

    Raises:
        StreamError: the model, or Triton itself, reports that the request failed. Triton's own errors have no status.
    """
    if answer.error_message:
        raise StreamError(triton_status(answer.error_message), answer.error_message)
    outputs = read_outputs(answer.infer_response)
    if "error" in outputs:
        status, message = (text.decode(errors="replace") for text in outputs["error"].ravel())
        raise StreamError(grpc.StatusCode.__members__.get(status, grpc.StatusCode.UNKNOWN), message)
    if "step" in outputs and "seeds" not in outputs:
        previews = outputs.get("preview")
        preview = None if previews is None or not previews.size else decode(previews.ravel()[0])
        return Progress(step=int(outputs["step"].item()), steps=int(outputs["steps"].item()), preview=preview)
    return read_result(outputs, request)


def read_result(outputs: Mapping[str, Array], request: Request) -> Result:
    """Decode the final response.

    Raises:
        ServerError: the response contains no output that this client knows.
    """
    if not outputs.keys() & {"images", "frames", "latents", "encoded"}:
        raise ServerError(f"the response has no pictures: {sorted(outputs)}", request_id=request.id)
    encoded, flags = outputs.get("encoded"), outputs.get("nsfw_content_detected")
    return Result(
        model=request.bundle,
        request_id=request.id,
        output_type=request.output_type,
        seeds=[request.seeds.get(int(seed), int(seed)) for seed in _values(outputs, "seeds")],
        warnings=[text.decode(errors="replace") for text in _values(outputs, "warnings")],
        timings=json.loads(outputs["timings"].ravel()[0]) if "timings" in outputs else {},
        nsfw_content_detected=None if flags is None else [bool(flag) for flag in flags.ravel()],
        latents=outputs["latents"].copy() if "latents" in outputs else None,
        encoded=None if encoded is None else [bytes(data) for data in encoded.ravel()],
        _images=outputs.get("images"),
        _frames=outputs.get("frames"),
        _clip=request.clip,
    )


def _values(outputs: Mapping[str, Array], name: str) -> list[Any]:
    """List the values of an output; empty if the output is absent."""
    return outputs[name].ravel().tolist() if name in outputs else []


def read_embeds(outputs: Mapping[str, Array], adapter: str, request: Request) -> Array:
    """Decode the response to `encode_image`."""
    name = f"image_embeds_{adapter}"
    if name not in outputs:
        raise ServerError(f"the response has no {name}: {sorted(outputs)}", request_id=request.id)
    return outputs[name].copy()


def read_text_embeds(outputs: Mapping[str, Array], request: Request) -> dict[str, Array]:
    """Decode the response to `encode_prompt`, and emit the server's warnings as Python warnings."""
    found = {name: outputs[name].copy() for name in TEXT_EMBEDS if name in outputs}
    if not found:
        raise ServerError(f"the response has no text embeddings: {sorted(outputs)}", request_id=request.id)
    for text in _values(outputs, "warnings"):
        warnings.warn(text.decode(errors="replace"), stacklevel=3)
    return found


def _pil(image: Any) -> Image.Image:
    return image if isinstance(image, Image.Image) else Image.fromarray(image)


def check_path(path: object) -> Path:
    """Return `path` as a `Path`, or raise `InvalidRequest`."""
    if not isinstance(path, str | os.PathLike):
        raise invalid("path", f"must be a file path, got {short_repr(path)}")
    return Path(path)


def check_fps(fps: object) -> None:
    """Raise `InvalidRequest` if `fps` is not a possible frame rate."""
    if not is_number(fps) or not 0 < fps <= _MAX_FPS:
        raise invalid("fps", f"must be a number above 0, at most {_MAX_FPS}; got {short_repr(fps)}")


def check_extension(path: Path, *, clip: bool = False) -> None:
    """Check that pictures, or clips, can be saved in the format of the file's extension.

    Raises:
        ValueError: they cannot, or the package for this format is missing.
    """
    if not clip:
        if not _pillow_writes(_format_of(path)):
            raise ValueError(f"{path.name}: {_PICTURE_FILES}")
    elif path.suffix.lower() == _VIDEO:
        _imageio()
    elif path.suffix.lower() not in _ANIMATIONS:
        raise ValueError(f"{path.name}: {_CLIP_FILES}")


def _pillow_writes(format: str | None) -> bool:
    """Whether pillow can write pictures in `format`; some formats are read-only, and some need a plugin."""
    try:
        Image.new("RGB", (64, 64)).save(io.BytesIO(), format or "")
        return True
    except (KeyError, OSError, ValueError):
        return False


def _format_of(path: Path) -> str | None:
    """Return pillow's name for the format of the file's extension, or None."""
    return Image.registered_extensions().get(path.suffix.lower(), "MP4" if path.suffix.lower() == _VIDEO else None)


def _container(data: bytes) -> str | None:
    """Detect the format of an encoded picture or clip."""
    return "MP4" if data[4:8] == b"ftyp" else Image.open(io.BytesIO(data)).format


def _save_picture(image: Any, path: Path) -> None:
    _pil(image).save(path)


def _save_clip(clip: Sequence[Any], path: Path, fps: float) -> None:
    frames = [_pil(frame) for frame in clip]
    if path.suffix.lower() == _VIDEO:
        # PyAV encodes in this process. The ffmpeg plugin would fork it, which is unsafe with gRPC's threads running.
        pixels = np.stack([np.asarray(frame) for frame in frames])
        _imageio().imwrite(path, pixels, fps=fps, plugin="pyav", codec="libx264")
    else:
        first, *rest = frames
        first.save(path, save_all=True, append_images=rest, duration=round(1000 / fps), loop=0)


def _imageio() -> Any:
    try:
        from imageio import v3
        from imageio.plugins import pyav  # noqa: F401
    except ImportError:
        raise ValueError(
            f'saving {_VIDEO} requires: pip install "imageio[pyav]" (.gif and .webp work without it)'
        ) from None
    return v3
