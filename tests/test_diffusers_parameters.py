"""The page on diffusers' parameters lists each one of its pipelines, and says truly what becomes of it."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

import diffusers
import pytest

from imprompt import Client
from imprompt._request import _DIFFUSERS_EQUIVALENTS

PAGE = Path(__file__).parents[1] / "docs/diffusers.md"
PIPELINES = (
    *(f"StableDiffusion{family}{task}Pipeline" for family in ("", "XL") for task in ("", "Img2Img", "Inpaint")),
    *(
        f"StableDiffusion{family}ControlNet{task}Pipeline"
        for family in ("", "XL")
        for task in ("", "Img2Img", "Inpaint")
    ),
    *(f"StableDiffusion{family}AdapterPipeline" for family in ("", "XL")),
    *(f"AnimateDiff{task}Pipeline" for task in ("", "ControlNet", "VideoToVideo", "VideoToVideoControlNet")),
)
ROWS = dict(re.findall(r"^\| `(\w+)` \| (.+?) \|", PAGE.read_text(encoding="utf-8"), re.MULTILINE))
KEYWORDS = {*inspect.signature(Client.stream).parameters} - {"self", "unknown"}


def parameters(pipeline: str) -> set[str]:
    call: Any = getattr(diffusers, pipeline).__call__
    return {*inspect.signature(call).parameters} - {"self", "kwargs"}


@pytest.mark.parametrize("pipeline", PIPELINES)
def test_the_page_lists_every_parameter(pipeline: str) -> None:
    assert parameters(pipeline) - ROWS.keys() == set()


def test_the_page_lists_nothing_else() -> None:
    assert ROWS.keys() - set().union(*map(parameters, PIPELINES)) == set()


@pytest.mark.parametrize(("name", "here"), ROWS.items())
def test_rows_are_true(name: str, here: str) -> None:
    """A parameter of the same name exists; the client says what replaces any other one, or why it is refused."""
    named = re.findall(r"`(\w+)`", here)
    assert named or here == "refused"
    if named == [name]:
        assert name in KEYWORDS
        return
    assert name not in KEYWORDS
    assert name in _DIFFUSERS_EQUIVALENTS
    for other in named:
        assert other in KEYWORDS or hasattr(Client, other)
    if named:
        assert any(f"`{other}`" in _DIFFUSERS_EQUIVALENTS[name] for other in named)
