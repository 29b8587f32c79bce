"""Parse the options of clips: their frames, and the windows that they run in."""

from __future__ import annotations

from dataclasses import dataclass

from imprompt_serving.errors import InvalidRequest
from imprompt_serving.job_request import ContextWindow
from imprompt_serving.parameters import PARAMETERS
from imprompt_serving.pipeline.reader import Reader
from imprompt_serving.specs import Bundle

MAX_FRAMES = 256
"""Largest number of frames in a request for several clips, over all clips."""
_CONTEXT_LENGTH = 16
"""Number of frames that AnimateDiff's motion modules were trained on; also AnimateDiff-Evolved's default."""
_PARAMETERS = ("context_length", "context_stride", "context_overlap")


@dataclass(frozen=True, kw_only=True, slots=True)
class VideoOptions:
    """The number of frames per clip, and the windows that they run in."""

    frames: int
    context: ContextWindow


def parse_video(read: Reader, bundle: Bundle, clips: int) -> VideoOptions | None:
    """Parse the clip options of a request; None if it asks for pictures."""
    video = read.pictures("video")
    if not video and "num_frames" not in read:
        for name in _PARAMETERS:
            if name in read:
                raise InvalidRequest(name, "needs num_frames or video")
        return None
    if bundle.motion is None:
        raise InvalidRequest("num_frames", f"{bundle.name} has no motion adapter")
    for name in ("image", "mask_image", "padding_mask_crop"):
        if name in read:
            raise InvalidRequest(name, "does not apply to clips, which start from video")
    low, _, high = bundle.shapes.frames
    frames = read.integer("num_frames", default=len(video), low=low, high=high)
    if video and len(video) != frames:
        raise InvalidRequest("video", f"has {len(video)} frames, but num_frames is {frames}")
    if not low <= frames <= high:
        raise InvalidRequest("video", f"must have {low} to {high} frames, got {frames}")
    if clips > 1 and clips * frames > MAX_FRAMES:
        raise InvalidRequest(
            "num_images_per_prompt",
            f"{clips} clips of {frames} frames exceed the limit of {MAX_FRAMES} frames per request",
        )
    return VideoOptions(
        frames=frames,
        context=_context(read, frames, bundle.motion.window),
    )


def _context(read: Reader, frames: int, window: int) -> ContextWindow:
    """Parse the windows. By default, a clip that fits the motion modules runs in a single window."""
    length = window if frames <= window else min(_CONTEXT_LENGTH, window)
    length = read.integer("context_length", default=length, high=window)
    overlap = PARAMETERS["context_overlap"].default
    return ContextWindow(
        length=length,
        stride=read.integer("context_stride"),
        overlap=read.integer("context_overlap", default=min(overlap, length - 1), high=length - 1),
    )
