"""The image prompts of a request: which adapter gets which pictures, embeddings, masks and scale."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from imprompt_serving.errors import InvalidRequest
from imprompt_serving.job import AdapterUse
from imprompt_serving.pipeline import images
from imprompt_serving.pipeline.reader import Reader, spread
from imprompt_serving.specs import Adapter, Bundle
from imprompt_serving.weight_types import WEIGHT_TYPES


@dataclass(frozen=True, kw_only=True, slots=True)
class ImagePrompt:
    """An adapter that a request uses: its pictures or embeddings, masks, and how it acts.

    ``photos`` are encoded pictures of people, whose faces are yet to be found.
    """

    adapter: Adapter
    images: tuple[Image.Image, ...]
    photos: tuple[bytes, ...]
    negative_images: tuple[Image.Image, ...]
    embeds: np.ndarray | None
    masks: tuple[Image.Image, ...]
    use: AdapterUse


def parse_image_prompts(read: Reader, bundle: Bundle) -> tuple[ImagePrompt, ...]:
    """The adapters that a request names, in the order of the bundle; none when it has no image prompt."""
    pictures = _by_adapter(read, "ip_adapter_image", bundle)
    negatives = _decoded(read, "negative_ip_adapter_image", bundle)
    masks = _decoded(read, "ip_adapter_masks", bundle)
    embeds = {a.name: _embeds(read, a) for a in bundle.adapters if f"ip_adapter_image_embeds_{a.name}" in read}
    used = [adapter for adapter in bundle.adapters if pictures[adapter.name] or adapter.name in embeds]
    for parameter, given in (("ip_adapter_masks", masks), ("negative_ip_adapter_image", negatives)):
        idle = [name for name, items in given.items() if items and name not in {adapter.name for adapter in used}]
        if idle:
            raise InvalidRequest(parameter, f"{', '.join(idle)} has no ip_adapter_image")
    uses = _uses(read, bundle, used)
    return tuple(
        _image_prompt(bundle, adapter, use, pictures[n], negatives[n], embeds.get(n), masks[n])
        for adapter, use in zip(used, uses, strict=True)
        for n in [adapter.name]
    )


def _image_prompt(
    bundle: Bundle,
    adapter: Adapter,
    use: AdapterUse,
    pictures: list[bytes],
    negatives: list[Image.Image],
    embeds: np.ndarray | None,
    masks: list[Image.Image],
) -> ImagePrompt:
    name = adapter.name
    photos: list[bytes] = []
    if adapter.uses_face and embeds is None:
        if not bundle.finds_faces(adapter):
            raise InvalidRequest("ip_adapter_image_embeds", f"{name} needs face embeddings: no face_encoder is served")
        photos = pictures
    if adapter.clip_shape and not pictures:
        raise InvalidRequest("ip_adapter_image", f"{name} needs the face's picture beside its embedding")
    if embeds is not None and pictures and not adapter.clip_shape:
        raise InvalidRequest("ip_adapter_image_embeds", f"{name} has both pictures and embeddings")
    count = len(pictures) if embeds is None else embeds.shape[1]
    if embeds is not None and adapter.clip_shape and len(pictures) != count:
        raise InvalidRequest("ip_adapter_image", f"{name}: {len(pictures)} pictures for {count} face embeddings")
    if masks and len(masks) != count:
        raise InvalidRequest("ip_adapter_masks", f"{name}: {len(masks)} masks for {count} image prompts")
    if negatives and embeds is not None:
        raise InvalidRequest("negative_ip_adapter_image", f"{name}: embeddings carry their negative ones")
    if negatives and photos:
        raise InvalidRequest("negative_ip_adapter_image", f"{name}: the negative of a face is zeros")
    if negatives and len(negatives) not in (1, count):
        raise InvalidRequest(
            "negative_ip_adapter_image", f"{name}: {len(negatives)} pictures for {count} image prompts"
        )
    return ImagePrompt(
        adapter=adapter,
        images=() if photos else tuple(images.decode(picture, "ip_adapter_image") for picture in pictures),
        photos=tuple(photos),
        negative_images=tuple(negatives * count if len(negatives) == 1 else negatives),
        embeds=embeds,
        masks=tuple(masks),
        use=use,
    )


def _uses(read: Reader, bundle: Bundle, used: list[Adapter]) -> list[AdapterUse]:
    count, what = len(used), "adapters in use"
    starts = spread("ip_adapter_start", read.numbers("ip_adapter_start", 0, 1), count, 0.0, what)
    ends = spread("ip_adapter_end", read.numbers("ip_adapter_end", 0, 1), count, 1.0, what)
    for start, end in zip(starts, ends, strict=True):
        if start > end:
            raise InvalidRequest("ip_adapter_start", f"{start:g} lies after ip_adapter_end {end:g}")
    types = read.choices("ip_adapter_weight_type", WEIGHT_TYPES)
    types = spread("ip_adapter_weight_type", types, count, "linear", what)
    return [
        AdapterUse(name=adapter.name, scale=scale, start=start, end=end, weight_type=weight_type)
        for adapter, scale, start, end, weight_type in zip(
            used, _scales(read, bundle, used), starts, ends, types, strict=True
        )
    ]


def _scales(read: Reader, bundle: Bundle, used: list[Adapter]) -> tuple[Any, ...]:
    """A scale for each adapter in use; a list may also have one for each adapter of the bundle."""
    name = "ip_adapter_scale"
    if f"{name}_config" in read:
        if name in read:
            raise InvalidRequest(name, f"give either this or {name}_config")
        scales = read.json(f"{name}_config", list | dict)  # type: ignore[arg-type]
        scales = tuple(scales) if isinstance(scales, list) else (scales,)
    else:
        scales = read.numbers(name)
    if len(scales) not in (0, 1, len(used)) and len(scales) == len(bundle.adapters):
        by_name = dict(zip((adapter.name for adapter in bundle.adapters), scales, strict=True))
        return tuple(by_name[adapter.name] for adapter in used)
    return spread(name, scales, len(used), 1.0, "adapters in use")


def adapter_name(name: str | None, bundle: Bundle, parameter: str) -> str | None:
    known = [adapter.name for adapter in bundle.adapters]
    if name is not None and name not in known:
        raise InvalidRequest(parameter, f"no adapter {name!r}; {bundle.name} has {', '.join(known) or 'none'}")
    return name


def _decoded(read: Reader, name: str, bundle: Bundle) -> dict[str, list[Image.Image]]:
    by_adapter = _by_adapter(read, name, bundle).items()
    return {adapter: [images.decode(picture, name) for picture in pictures] for adapter, pictures in by_adapter}


def _by_adapter(read: Reader, name: str, bundle: Bundle) -> dict[str, list[bytes]]:
    """Encoded pictures of ``name`` by adapter: as ``<name>_adapter`` says, or else the bundle's adapters in order."""
    data, names = read.data(name), read.texts(f"{name}_adapter")
    known = [adapter.name for adapter in bundle.adapters]
    found: dict[str, list[bytes]] = {adapter: [] for adapter in known}
    if not data:
        return found
    if not known:
        raise InvalidRequest(name, f"{bundle.name} has no IP-Adapter")
    if not names:
        if len(known) > 1 and len(data) != len(known):
            message = f"{len(data)} pictures for {len(known)} adapters; say which belongs where by {name}_adapter"
            raise InvalidRequest(name, message)
        names = tuple(known) if len(known) > 1 else (known[0],) * len(data)
    if len(names) != len(data):
        raise InvalidRequest(f"{name}_adapter", f"{len(names)} names for {len(data)} pictures")
    for adapter, picture in zip(names, data, strict=True):
        adapter_name(adapter, bundle, name)
        found[adapter].append(picture)
    return found


def _embeds(read: Reader, adapter: Adapter) -> np.ndarray:
    parameter = "ip_adapter_image_embeds"
    embeds = read.array(f"{parameter}_{adapter.name}")
    if embeds.ndim != 2 + len(adapter.embed_shape) or embeds.shape[2:] != adapter.embed_shape:
        wanted = ", ".join(map(str, adapter.embed_shape))
        raise InvalidRequest(parameter, f"{adapter.name} takes [2, pictures, {wanted}], got {list(embeds.shape)}")
    if embeds.shape[0] not in (1, 2) or not embeds.shape[1]:
        message = f"{adapter.name}: the first axis is negative and positive, or positive; got {list(embeds.shape)}"
        raise InvalidRequest(parameter, message)
    if not np.isfinite(embeds).all():
        raise InvalidRequest(parameter, f"{adapter.name}: must be finite")
    return embeds
