"""Parse the image prompts of a request: pictures, embeddings, masks, and scale of each adapter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from PIL import Image

from imprompt_serving import tensor_names
from imprompt_serving.backends import get_backend
from imprompt_serving.errors import InvalidRequest, shown
from imprompt_serving.job_request import AdapterOptions
from imprompt_serving.parameters import MAX_SCALE
from imprompt_serving.pipeline.adapter_scales import parse_scales, scale_leaves
from imprompt_serving.pipeline.images import decode_all
from imprompt_serving.pipeline.reader import Reader
from imprompt_serving.specs import Adapter, Bundle


@dataclass(frozen=True, kw_only=True, slots=True)
class ImagePrompt:
    """An adapter that a request uses: its pictures or embeddings, masks, and options.

    `photos` are pictures of people, still encoded, in which faces have not been detected yet.
    """

    adapter: Adapter
    images: tuple[Image.Image, ...]
    photos: tuple[bytes, ...]
    negative_images: tuple[Image.Image, ...]
    embeds: np.ndarray | None
    masks: tuple[Image.Image, ...]
    groups: int
    """Groups of image tokens in each row: without masks, all pictures of a row form one."""
    options: AdapterOptions


@dataclass(frozen=True, kw_only=True, slots=True)
class Targets:
    """What pictures and masks can be divided among: the prompts of a request, and the frames of a clip."""

    prompts: int
    frames: int | None


@dataclass(frozen=True, kw_only=True, slots=True)
class ImagePromptPlan:
    """A validated `ImagePrompt` whose pictures are not decoded yet. Each row gets one of `shares` of the pictures."""

    adapter: Adapter
    files: tuple[bytes, ...]
    negatives: tuple[bytes, ...]
    embeds: np.ndarray | None
    masks: tuple[bytes, ...]
    shares: int
    options: AdapterOptions

    @property
    def count(self) -> int:
        """Number of pictures or embeddings."""
        return len(self.files) if self.embeds is None else self.embeds.shape[1]

    @property
    def row_count(self) -> int:
        """Number of pictures or embeddings that a row gets."""
        return self.count // self.shares

    @property
    def groups(self) -> int:
        """Groups of image tokens per row: one for each picture if there are masks."""
        return self.row_count if self.masks else 1

    @property
    def tokens(self) -> int:
        """Image tokens per group."""
        return self.adapter.num_tokens * (self.row_count // self.groups)


def plan_image_prompts(
    read: Reader, bundle: Bundle, encode_image: str | None, targets: Targets
) -> tuple[ImagePromptPlan, ...]:
    """Parse the image prompts of a request, in the order of the bundle's adapters.

    If `encode_image` names an adapter, the request only asks for its embeddings.
    """
    files, negatives, masks = (
        _by_adapter(read, name, bundle)
        for name in ("ip_adapter_image", "negative_ip_adapter_image", "ip_adapter_masks")
    )
    embeds = {a.name: _embeds(read, a) for a in bundle.adapters if tensor_names.request_embeds(a.name) in read}
    used = [adapter for adapter in bundle.adapters if files[adapter.name] or adapter.name in embeds]
    for parameter, items_by_adapter in (("ip_adapter_masks", masks), ("negative_ip_adapter_image", negatives)):
        idle = [
            name for name, items in items_by_adapter.items() if items and name not in {adapter.name for adapter in used}
        ]
        if idle:
            raise InvalidRequest(parameter, f"{', '.join(idle)} has no ip_adapter_image")
    if encode_image is not None and not files[encode_image]:
        raise InvalidRequest("ip_adapter_image", f"no picture for adapter {encode_image}")
    plans = tuple(
        ImagePromptPlan(
            adapter=adapter,
            files=tuple(files[n]),
            negatives=tuple(negatives[n]),
            embeds=embeds.get(n),
            masks=tuple(masks[n]),
            shares=options.shares(targets.prompts),
            options=options,
        )
        for adapter, options in zip(used, _options(read, bundle, used, targets), strict=True)
        for n in [adapter.name]
    )
    for plan in plans:
        _check_plan(plan, bundle, targets)
    if encode_image is None:
        check_tokens(plans, bundle)
    return plans


def load_image_prompt(plan: ImagePromptPlan) -> ImagePrompt:
    """Decode the pictures of an image prompt; pictures of people stay encoded."""
    photos = plan.files if _needs_face_detection(plan) else ()
    negatives = decode_all(plan.negatives, "negative_ip_adapter_image")
    return ImagePrompt(
        adapter=plan.adapter,
        images=() if photos else decode_all(plan.files, "ip_adapter_image"),
        photos=photos,
        negative_images=negatives * plan.count if len(negatives) == 1 else negatives,
        embeds=plan.embeds,
        masks=decode_all(plan.masks, "ip_adapter_masks"),
        groups=plan.groups,
        options=plan.options,
    )


def _needs_face_detection(plan: ImagePromptPlan) -> bool:
    """Return whether the face embeddings must be computed from the pictures."""
    return plan.adapter.uses_face and plan.embeds is None


def _check_plan(plan: ImagePromptPlan, bundle: Bundle, targets: Targets) -> None:
    adapter, name, count, embeds = plan.adapter, plan.adapter.name, plan.count, plan.embeds
    if _needs_face_detection(plan) and not bundle.finds_faces(adapter):
        raise InvalidRequest("ip_adapter_image_embeds", f"{name} needs face embeddings: the bundle has no face_encoder")
    if plan.files and adapter.image_encoder is None and not adapter.uses_face:
        message = f"{name} only takes embeddings (ip_adapter_image_embeds): the bundle has no image encoder for it"
        raise InvalidRequest("ip_adapter_image", message)
    if adapter.clip_shape and not plan.files:
        raise InvalidRequest("ip_adapter_image", f"{name} needs the picture of the face in addition to its embedding")
    if embeds is not None and plan.files and not adapter.clip_shape:
        raise InvalidRequest("ip_adapter_image_embeds", f"{name} has both pictures and embeddings")
    if embeds is not None and adapter.clip_shape and len(plan.files) != count:
        raise InvalidRequest("ip_adapter_image", f"{name}: {len(plan.files)} pictures for {count} face embeddings")
    if count % plan.shares:
        parameter = "ip_adapter_image" if embeds is None else "ip_adapter_image_embeds"
        what = "prompts" if plan.options.per == "prompt" else "frames" if plan.shares == targets.frames else "keyframes"
        raise InvalidRequest(
            parameter, f"{name}: {count} pictures cannot be divided equally among {plan.shares} {what}"
        )
    _check_masks(plan, targets)
    if plan.negatives and embeds is not None:
        raise InvalidRequest("negative_ip_adapter_image", f"{name}: embeddings already include negative ones")
    if plan.negatives and _needs_face_detection(plan):
        raise InvalidRequest("negative_ip_adapter_image", f"{name}: a face embedding always has zeros as its negative")
    if plan.negatives and len(plan.negatives) not in (1, count):
        raise InvalidRequest(
            "negative_ip_adapter_image", f"{name}: {len(plan.negatives)} pictures for {count} image prompts"
        )
    if any(isinstance(value, list) and len(value) != plan.groups for value in scale_leaves(plan.options.scale)):
        raise InvalidRequest("ip_adapter_scale", f"{name}: a list needs masks, and one number per masked image")


def _check_masks(plan: ImagePromptPlan, targets: Targets) -> None:
    """Check that there is one mask for each picture of a row, or as many for each prompt or frame."""
    count, what, each = plan.row_count, "prompt", targets.prompts
    if targets.frames is not None:
        what, each = "frame", targets.frames
    if plan.masks and len(plan.masks) not in (count, count * each):
        problem = f"{plan.adapter.name}: {len(plan.masks)} masks for {count} image prompts"
        if plan.shares > 1 or each > 1:
            problem += f" at a time; expected {count}, or {count * each} ({count} for each {what})"
        raise InvalidRequest("ip_adapter_masks", problem)


def check_tokens(plans: tuple[ImagePromptPlan, ...], bundle: Bundle) -> None:
    """Refuse more pictures or masks than the engines support."""
    limit, regions = bundle.shapes.image_tokens[-1], bundle.shapes.regions
    for plan in plans:
        name = plan.adapter.name
        if plan.groups > regions:
            raise InvalidRequest("ip_adapter_masks", f"{name}: {plan.groups} masks; at most {regions} are supported")
        if plan.tokens > limit:
            raise InvalidRequest(
                "ip_adapter_image",
                f"{plan.row_count} pictures for {name} make {plan.tokens} image tokens; at most {limit} are supported",
            )
    # Engines built for ranges have no profile for several masks of one adapter with many pictures of another.
    if get_backend(bundle.backend).builds_for_ranges and any(plan.groups > 1 for plan in plans):
        for plan in plans:
            if plan.tokens > bundle.region_tokens:
                raise InvalidRequest(
                    "ip_adapter_image",
                    f"the pictures for {plan.adapter.name} make {plan.tokens} image tokens; "
                    f"at most {bundle.region_tokens} are supported next to several masks of another adapter",
                )


def _options(read: Reader, bundle: Bundle, used: list[Adapter], targets: Targets) -> list[AdapterOptions]:
    count, what = len(used), "adapters in use"
    starts = read.one_or_each("ip_adapter_start", count, what)
    ends = read.one_or_each("ip_adapter_end", count, what)
    for start, end in zip(starts, ends, strict=True):
        if start > end:
            raise InvalidRequest("ip_adapter_start", f"{start:g} is after ip_adapter_end {end:g}")
    types = read.one_or_each("ip_adapter_weight_type", count, what)
    scopes = read.one_or_each("ip_adapter_image_per", count, what)
    keyframes = _keyframes(read, targets.frames, scopes)
    return [
        AdapterOptions(
            name=adapter.name,
            scale=scale,
            start=start,
            end=end,
            weight_type=weight_type,
            per=scope,
            keyframes=keyframes if scope == "frame" else (),
        )
        for adapter, scale, start, end, weight_type, scope in zip(
            used, parse_scales(read, bundle, used), starts, ends, types, scopes, strict=True
        )
    ]


def _keyframes(read: Reader, frames: int | None, scopes: Sequence[str]) -> tuple[int, ...]:
    """Return the frames that have image prompts, for adapters with pictures per frame."""
    name = "ip_adapter_keyframes"
    keyframes = read.integers(name)
    if keyframes[:1] not in ((), (0,)) or any(later <= earlier for earlier, later in pairwise(keyframes)):
        raise InvalidRequest(name, f"must be in ascending order from 0, got {shown(list(keyframes))}")
    if "frame" not in scopes:
        if keyframes:
            raise InvalidRequest(name, "needs an adapter with ip_adapter_image_per frame")
        return ()
    if frames is None:
        raise InvalidRequest("ip_adapter_image_per", "frame needs num_frames or video")
    if not keyframes:
        return tuple(range(frames))
    if keyframes[-1] >= frames:
        raise InvalidRequest(name, f"must be below the number of frames, {frames}; got {keyframes[-1]}")
    return keyframes


def adapter_name(name: str | None, bundle: Bundle, parameter: str) -> str | None:
    """Check that the bundle has an adapter `name`, if one is given."""
    known = [adapter.name for adapter in bundle.adapters]
    if name is not None and name not in known:
        raise InvalidRequest(parameter, f"no adapter {shown(name)}; {bundle.name} has {', '.join(known) or 'none'}")
    return name


def _by_adapter(read: Reader, name: str, bundle: Bundle) -> dict[str, list[bytes]]:
    """Assign the encoded pictures of `name` to adapters by `<name>_adapter`, or else to the adapters in order."""
    data, names = read.pictures(name), read.texts(f"{name}_adapter")
    known = [adapter.name for adapter in bundle.adapters]
    by_adapter: dict[str, list[bytes]] = {adapter: [] for adapter in known}
    if not data:
        return by_adapter
    if not known:
        raise InvalidRequest(name, f"{bundle.name} has no IP-Adapter")
    if not names:
        if len(known) > 1 and len(data) != len(known):
            message = f"{len(data)} pictures for {len(known)} adapters; assign them with {name}_adapter"
            raise InvalidRequest(name, message)
        names = tuple(known) if len(known) > 1 else (known[0],) * len(data)
    if len(names) != len(data):
        raise InvalidRequest(f"{name}_adapter", f"{len(names)} names for {len(data)} pictures")
    for adapter, picture in zip(names, data, strict=True):
        adapter_name(adapter, bundle, name)
        by_adapter[adapter].append(picture)
    return by_adapter


def _embeds(read: Reader, adapter: Adapter) -> np.ndarray:
    parameter = "ip_adapter_image_embeds"
    embeds = read.floats(tensor_names.request_embeds(adapter.name))
    if embeds.ndim != 2 + len(adapter.embed_shape) or embeds.shape[2:] != adapter.embed_shape:
        expected = ", ".join(map(str, adapter.embed_shape))
        raise InvalidRequest(parameter, f"{adapter.name} takes [2, pictures, {expected}], got {list(embeds.shape)}")
    if embeds.shape[0] not in (1, 2) or not embeds.shape[1]:
        message = (
            f"{adapter.name}: the first axis must be 2 (negative, positive) or 1 (positive); got {list(embeds.shape)}"
        )
        raise InvalidRequest(parameter, message)
    if not (np.abs(embeds) <= MAX_SCALE).all():
        raise InvalidRequest(parameter, f"{adapter.name}: must be finite, from {-MAX_SCALE:g} to {MAX_SCALE:g}")
    return embeds
