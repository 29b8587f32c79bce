"""Tensors of a request -> a checked ``Request``; whatever is wrong is refused here, by the parameter's name."""

from __future__ import annotations

import json
import math
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from imprompt_serving.errors import InvalidRequest
from imprompt_serving.pipeline import images
from imprompt_serving.specs import Adapter, Bundle

MAX_STEPS = 1000
MAX_PICTURES = 64


@dataclass(frozen=True, kw_only=True, slots=True)
class ImagePrompt:
    """An adapter that a request uses: pictures or embeddings, and its scale."""

    adapter: Adapter
    images: tuple[Any, ...] = ()
    embeds: np.ndarray | None = None
    scale: float | dict[str, Any] | list[float] = 1.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """What a caller wants, checked, with defaults filled in (those of diffusers' pipelines)."""

    prompt: tuple[str, ...]
    negative_prompt: tuple[str, ...]
    image_prompts: tuple[ImagePrompt, ...]
    height: int
    width: int
    num_inference_steps: int
    guidance_scale: float
    guidance_rescale: float
    eta: float
    clip_skip: int
    num_images_per_prompt: int
    seeds: tuple[int, ...]
    one_generator: bool
    scheduler: str | None
    scheduler_config: dict[str, Any]
    output_type: str
    timeout: float | None
    encode_image: str | None
    progress_every: int

    @property
    def pictures(self) -> int:
        return len(self.prompt) * self.num_images_per_prompt


class Reader:
    """Typed access to the tensors of a request; every error names its parameter."""

    def __init__(self, tensors: Mapping[str, np.ndarray]) -> None:
        self._tensors = tensors

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def array(self, name: str) -> np.ndarray | None:
        return self._tensors.get(name)

    def data(self, name: str) -> list[bytes]:
        return [] if name not in self else [bytes(value) for value in self._tensors[name].ravel()]

    def texts(self, name: str) -> tuple[str, ...]:
        try:
            return tuple(value.decode() for value in self.data(name))
        except UnicodeDecodeError:
            raise InvalidRequest(name, "must be UTF-8 text") from None

    def text(self, name: str, default: str | None = None) -> str | None:
        texts = self.texts(name)
        return self._single(name, texts) if name in self else default

    def integer(self, name: str, default: int, low: int, high: int) -> int:
        if name not in self:
            return default
        value = int(self._single(name, self._tensors[name].ravel()))
        if not low <= value <= high:
            raise InvalidRequest(name, f"must be {low} to {high}, got {value}")
        return value

    def numbers(self, name: str, low: float = -math.inf, high: float = math.inf) -> tuple[float, ...]:
        values = tuple(float(value) for value in self._tensors[name].ravel()) if name in self else ()
        for value in values:
            if not math.isfinite(value):
                raise InvalidRequest(name, f"must be finite, got {value}")
            if not low <= value <= high:
                raise InvalidRequest(name, f"must be {low:g} to {high:g}, got {value:g}")
        return values

    def number(self, name: str, default: float, low: float = -math.inf, high: float = math.inf) -> float:
        return self._single(name, self.numbers(name, low, high)) if name in self else default

    def json_object(self, name: str) -> dict[str, Any]:
        text = self.text(name)
        try:
            value = json.loads(text) if text else {}
        except json.JSONDecodeError as error:
            raise InvalidRequest(name, f"must be a JSON object: {error}") from None
        if not isinstance(value, dict):
            raise InvalidRequest(name, f"must be a JSON object, got {type(value).__name__}")
        return value

    @staticmethod
    def _single(name: str, values: Any) -> Any:
        if len(values) != 1:
            raise InvalidRequest(name, f"takes one value, got {len(values)}")
        return values[0]


def parse(tensors: Mapping[str, np.ndarray], bundle: Bundle) -> Request:
    """Check everything that can be checked before any engine runs.

    Raises:
        InvalidRequest: the first parameter that is wrong, and what is allowed.
    """
    read = Reader(tensors)
    prompt = read.texts("prompt")
    if not prompt:
        raise InvalidRequest("prompt", "at least one prompt is needed")
    num_images = read.integer("num_images_per_prompt", 1, 1, MAX_PICTURES)
    pictures = len(prompt) * num_images
    if pictures > MAX_PICTURES:
        raise InvalidRequest("num_images_per_prompt", f"{pictures} pictures asked for; at most {MAX_PICTURES} a request")
    timeout = read.number("timeout", math.inf, 1e-3)
    output_type = read.text("output_type", "np")
    if output_type not in ("np", "latent"):
        raise InvalidRequest("output_type", f"must be 'np' or 'latent', got {output_type!r}")
    seeds = tuple(int(seed) for seed in read.array("seed").ravel()) if "seed" in read else ()  # type: ignore[union-attr]
    if len(seeds) not in (0, 1, pictures):
        raise InvalidRequest("seed", f"one for all or one for each of {pictures} pictures, got {len(seeds)}")
    return Request(
        prompt=prompt,
        negative_prompt=_negative(read, len(prompt)),
        image_prompts=_image_prompts(read, bundle),
        height=_size(read, "height", bundle.default_height, bundle),
        width=_size(read, "width", bundle.default_width, bundle),
        num_inference_steps=read.integer("num_inference_steps", 50, 1, MAX_STEPS),
        guidance_scale=read.number("guidance_scale", 7.5 if bundle.family == "sd15" else 5.0),
        guidance_rescale=read.number("guidance_rescale", 0.0, 0.0, 1.0),
        eta=read.number("eta", 0.0, 0.0, 1.0),
        clip_skip=read.integer("clip_skip", 0, 0, bundle.max_clip_skip),
        num_images_per_prompt=num_images,
        seeds=seeds or tuple(secrets.randbelow(2**63) for _ in range(pictures)),
        one_generator=len(seeds) == 1,
        scheduler=read.text("scheduler"),
        scheduler_config=read.json_object("scheduler_config"),
        output_type=output_type,
        timeout=timeout if math.isfinite(timeout) else None,
        encode_image=_adapter_name(read.text("encode_image"), bundle, "encode_image"),
        progress_every=read.integer("progress_every", 1, 1, MAX_STEPS),
    )


def _negative(read: Reader, prompts: int) -> tuple[str, ...]:
    negative = read.texts("negative_prompt") or ("",)
    if len(negative) not in (1, prompts):
        raise InvalidRequest("negative_prompt", f"one, or one for each of {prompts} prompts; got {len(negative)}")
    return negative * prompts if len(negative) == 1 else negative


def _size(read: Reader, name: str, default: int, bundle: Bundle) -> int:
    low, _, high = getattr(bundle.shapes, name)
    value = read.integer(name, default, low, high)
    if value % 8:
        raise InvalidRequest(name, f"must be a multiple of 8, got {value}")
    return value


def _adapter_name(name: str | None, bundle: Bundle, parameter: str) -> str | None:
    known = [adapter.name for adapter in bundle.adapters]
    if name is not None and name not in known:
        raise InvalidRequest(parameter, f"no adapter {name!r}; {bundle.name} has {', '.join(known) or 'none'}")
    return name


def _image_prompts(read: Reader, bundle: Bundle) -> tuple[ImagePrompt, ...]:
    """Pictures, embeddings and scale of each adapter that the request names, in the order of the bundle."""
    pictures: dict[str, list[Any]] = {adapter.name: [] for adapter in bundle.adapters}
    for name, data in _by_adapter(read, "ip_adapter_image", bundle):
        pictures[name].append(images.decode(data, "ip_adapter_image"))
    embeds = {a.name: _embeds(read, a) for a in bundle.adapters if f"ip_adapter_image_embeds_{a.name}" in read}
    used = [adapter for adapter in bundle.adapters if pictures[adapter.name] or adapter.name in embeds]
    scales = read.numbers("ip_adapter_scale") or (1.0,)
    if len(scales) not in (1, len(used)) and (used or len(scales) != len(bundle.adapters)):
        raise InvalidRequest(
            "ip_adapter_scale", f"one, or one for each of the {len(used)} adapters in use; got {len(scales)}"
        )
    for adapter in used:
        if pictures[adapter.name] and adapter.name in embeds:
            raise InvalidRequest("ip_adapter_image_embeds", f"{adapter.name} has both pictures and embeddings")
    return tuple(
        ImagePrompt(
            adapter=adapter,
            images=tuple(pictures[adapter.name]),
            embeds=embeds.get(adapter.name),
            scale=scales[index if len(scales) > 1 else 0],
        )
        for index, adapter in enumerate(used)
    )


def _by_adapter(read: Reader, name: str, bundle: Bundle) -> list[tuple[str, bytes]]:
    """The pictures of ``name`` with their adapters: named by ``<name>_adapter``, or the bundle's in order."""
    data, names = read.data(name), read.texts(f"{name}_adapter")
    if not data:
        return []
    known = [adapter.name for adapter in bundle.adapters]
    if not known:
        raise InvalidRequest(name, f"{bundle.name} has no IP-Adapter")
    if not names:
        if len(known) > 1 and len(data) != len(known):
            raise InvalidRequest(
                name, f"{len(data)} pictures for {len(known)} adapters; say which belongs where by {name}_adapter"
            )
        names = tuple(known) if len(known) > 1 else (known[0],) * len(data)
    if len(names) != len(data):
        raise InvalidRequest(f"{name}_adapter", f"{len(names)} names for {len(data)} pictures")
    for adapter in names:
        _adapter_name(adapter, bundle, name)
    return list(zip(names, data, strict=True))


def _embeds(read: Reader, adapter: Adapter) -> np.ndarray:
    parameter = "ip_adapter_image_embeds"
    embeds = read.array(f"{parameter}_{adapter.name}")
    assert embeds is not None
    if embeds.ndim != 2 + len(adapter.embed_shape) or embeds.shape[2:] != adapter.embed_shape:
        wanted = ", ".join(map(str, adapter.embed_shape))
        raise InvalidRequest(parameter, f"{adapter.name} takes [2, pictures, {wanted}], got {list(embeds.shape)}")
    if embeds.shape[0] not in (1, 2) or not embeds.shape[1]:
        raise InvalidRequest(
            parameter, f"{adapter.name}: the first axis is negative and positive, or positive; got {list(embeds.shape)}"
        )
    if not np.isfinite(embeds).all():
        raise InvalidRequest(parameter, f"{adapter.name}: must be finite")
    return embeds
