"""Decode responses into results. Only `Result.save` does I/O."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import grpc
import numpy as np
from PIL import Image, ImageSequence
from tritonclient.utils import deserialize_bytes_tensor, triton_to_np_dtype

from imprompt import _notebook as notebook
from imprompt._errors import ServerError, triton_status
from imprompt._images import decode
from imprompt._output_files import (
    FPS,
    check_extension,
    check_fps,
    check_path,
    container,
    encode_picture,
    format_of,
    save_clip,
    with_png_text,
)
from imprompt._provenance import provenance
from imprompt._request import Request
from imprompt._transport import StreamError

Array = np.ndarray[Any, Any]

TEXT_EMBEDS = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
"""Outputs of `encode_prompt`; not all models have pooled ones."""


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
    _parameters: Mapping[str, Any] = field(default_factory=dict, repr=False)

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

    def save(self, path: str | Path, *, fps: float = FPS, metadata: bool = True) -> list[Path]:
        """Save the pictures or clips in the format of the file's extension, numbered if several (`out-0.png`).

        Clips are saved as `.gif` or `.webp` with pillow, or as `.mp4` (requires `pip install "imageio[pyav]"`), and
        latents as `.npy`.

        Args:
            metadata: write seed, prompt, and the other parameters of the request into PNG files, as text chunks.

        Returns:
            The paths of the written files.

        Raises:
            ValueError: the extension does not fit the result, or `path` or `fps` is invalid.
        """
        path = check_path(path)
        check_fps(fps)
        files = self._encoded_as(format_of(path)) if self.encoded is not None else None
        if files is None:
            check_extension(path, clip=self.frames is not None, latents=self.latents is not None)
        if self.latents is not None:
            np.save(path, self.latents)
            return [path]
        if files is None and self.frames is not None:
            paths = _numbered(path, len(self.frames))
            for clip, target in zip(self.frames, paths, strict=True):
                save_clip(clip, target, fps)
            return paths
        if files is None:
            files = [encode_picture(image, format_of(path)) for image in self.images]
        if metadata and format_of(path) == "PNG":
            files = [with_png_text(data, self._provenance(index, len(files))) for index, data in enumerate(files)]
        paths = _numbered(path, len(files))
        for data, target in zip(files, paths, strict=True):
            target.write_bytes(data)
        return paths

    def _encoded_as(self, format: str | None) -> list[bytes] | None:
        """Return the encoded files if all of them have this format."""
        files = self.encoded or []
        return files if all(container(data) == format for data in files) else None

    def _provenance(self, index: int, count: int) -> dict[str, str]:
        image = self.images[index]
        return provenance(
            model=self.model,
            parameters=self._parameters,
            seeds=self.seeds,
            index=index,
            count=count,
            size=image.size if isinstance(image, Image.Image) else (image.shape[1], image.shape[0]),
            version=version("imprompt"),
        )

    def _repr_png_(self) -> bytes | None:
        """Show a single picture in a notebook."""
        return notebook.png(self.images)

    def _repr_html_(self) -> str | None:
        """Show several pictures, or clips, in a notebook."""
        return notebook.row(self.images, self.frames, self.seeds)

    def _picture(self, image: Array) -> Any:
        return image.copy() if self.output_type == "np" else Image.fromarray(image)

    def _unpacked(self, clip: Image.Image) -> list[Any]:
        frames = [frame.convert("RGB") for frame in ImageSequence.Iterator(clip)]
        return [np.asarray(frame) for frame in frames] if self.output_type == "np" else frames


def _numbered(path: Path, count: int) -> list[Path]:
    return [path] if count == 1 else [path.with_stem(f"{path.stem}-{index}") for index in range(count)]


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
        _parameters=request.parameters,
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
