"""The clip that a request asks for: its frames, and the windows it runs in."""

from __future__ import annotations

from dataclasses import dataclass

from imprompt_serving.errors import InvalidRequest
from imprompt_serving.job_request import ContextWindow
from imprompt_serving.parameters import PARAMETERS
from imprompt_serving.pipeline.reader import Reader
from imprompt_serving.specs import Bundle

MAX_FRAMES = 256
"""Frames of all clips of a request that asks for several."""
_CONTEXT_LENGTH = 16
"""What AnimateDiff's motion modules are trained for, and AnimateDiff-Evolved's default."""
_PARAMETERS = ("context_length", "context_stride", "context_overlap")


@dataclass(frozen=True, kw_only=True, slots=True)
class VideoOptions:
    """Frames of each clip, and the windows they are computed in."""

    frames: int
    context: ContextWindow


def parse_video(read: Reader, bundle: Bundle, clips: int) -> VideoOptions | None:
    """What a request says of its clips; None when it asks for pictures."""
    video = read.data("video")
    if not video and "num_frames" not in read:
        for name in _PARAMETERS:
            if name in read:
                raise InvalidRequest(name, "needs num_frames or video")
        return None
    if bundle.motion is None:
        raise InvalidRequest("num_frames", f"{bundle.name} has no motion adapter")
    for name in ("image", "mask_image", "padding_mask_crop"):
        if name in read:
            raise InvalidRequest(name, "is for pictures; clips start from video")
    low, _, high = bundle.shapes.frames
    frames = read.integer("num_frames", default=len(video), low=low, high=high)
    if video and len(video) != frames:
        raise InvalidRequest("video", f"{len(video)} frames for a clip of {frames}")
    if not low <= frames <= high:
        raise InvalidRequest("video", f"must have {low} to {high} frames, got {frames}")
    if clips > 1 and clips * frames > MAX_FRAMES:
        raise InvalidRequest(
            "num_images_per_prompt",
            f"{clips} clips of {frames} frames asked for; at most {MAX_FRAMES} frames in all",
        )
    return VideoOptions(
        frames=frames,
        context=_context(read, frames, bundle.motion.window),
    )


def _context(read: Reader, frames: int, window: int) -> ContextWindow:
    """Windows for a clip; without a word of the caller one that fits the motion modules has a single window."""
    length = window if frames <= window else min(_CONTEXT_LENGTH, window)
    length = read.integer("context_length", default=length, high=window)
    overlap = PARAMETERS["context_overlap"].default
    return ContextWindow(
        length=length,
        stride=read.integer("context_stride"),
        overlap=read.integer("context_overlap", default=min(overlap, length - 1), high=length - 1),
    )
