"""JSON and forms become named fields."""

from __future__ import annotations

import json
from typing import Any

import pytest
from starlette.exceptions import HTTPException

from imprompt import InvalidRequest
from imprompt_gateway.bodies import MAX_DEPTH, nested, read_json


@pytest.mark.parametrize(
    ("parts", "fields"),
    [
        ([("prompt", "12"), ("seed", "12")], {"prompt": "12", "seed": 12}),
        (
            [("eta", "0.5"), ("guess_mode", "true"), ("size", "64x64")],
            {"eta": 0.5, "guess_mode": True, "size": "64x64"},
        ),
        ([("image", b"a")], {"image": b"a"}),
        ([("image[]", b"a")], {"image": [b"a"]}),
        ([("image[]", b"a"), ("image[]", b"b")], {"image": [b"a", b"b"]}),
        ([("image", b"a"), ("image", b"b"), ("image", b"c")], {"image": [b"a", b"b", b"c"]}),
        ([("ip_adapter_image[plain]", b"a")], {"ip_adapter_image": {"plain": b"a"}}),
        (
            [
                ("ip_adapter_image[plain][]", b"a"),
                ("ip_adapter_image[plain][]", b"b"),
                ("ip_adapter_image[plus]", b"c"),
            ],
            {"ip_adapter_image": {"plain": [b"a", b"b"], "plus": b"c"}},
        ),
        ([("ip_adapter_scale[up][block_0][]", n) for n in "012"], {"ip_adapter_scale": {"up": {"block_0": [0, 1, 2]}}}),
        ([("ip_adapter_scale", '{"up": 0.5}')], {"ip_adapter_scale": {"up": 0.5}}),
        ([("scheduler_config[timestep_spacing]", "trailing")], {"scheduler_config": {"timestep_spacing": "trailing"}}),
        ([("l[][]", "1"), ("l[][]", "2")], {"l": [1, 2]}),
        ([("image", "aGk=")], {"image": "aGk="}),
        ([("eta", "abc"), ("seed", "")], {"eta": "abc", "seed": ""}),
    ],
    ids=str,
)
def test_form_fields_are_nested_by_their_names(parts: list[tuple[str, Any]], fields: dict[str, Any]) -> None:
    assert nested(parts) == fields


@pytest.mark.parametrize(
    "names",
    [["a["], ["[b]"], [""], ["a]b"], ["a[b]c"], ["a", "a[b]"], ["a[b]", "a"], ["a[][b]"], ["a[b]", "a[b][c]"]],
    ids=str,
)
def test_wrong_names_of_form_fields_are_refused(names: list[str]) -> None:
    with pytest.raises(InvalidRequest):
        nested([(name, "x") for name in names])


def test_names_of_form_fields_are_nested_to_a_limit() -> None:
    assert nested([("a" + "[b]" * (MAX_DEPTH - 1), "x")])
    with pytest.raises(InvalidRequest):
        nested([("a" + "[b]" * MAX_DEPTH, "x")])


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"\xff",
        b"[1]",
        b'"a"',
        b"null",
        b'{"a": ' + b"9" * 5000 + b"}",
        b"[" * 90_000,
        b'{"a":' * 90_000,
        b"[" * 200_000,
    ],
    ids=lambda body: repr(body[:8]),
)
def test_bodies_that_are_not_json_objects_are_refused(body: bytes) -> None:
    with pytest.raises(HTTPException) as caught:
        read_json(body)
    assert caught.value.status_code == 400
    assert len(caught.value.detail) < 300


@pytest.mark.parametrize("part", [b"[],", b"{},", b"0,"])
def test_json_with_too_many_values_is_not_parsed(part: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json, "loads", lambda _: pytest.fail("parsed"))
    with pytest.raises(HTTPException, match="too many values"):
        read_json(b'{"a": [' + part * 4_000_001 + b"0]}")


def test_json_is_nested_to_a_limit() -> None:
    def value(depth: int) -> Any:
        return [value(depth - 1)] if depth else 0

    deepest = {"a": value(MAX_DEPTH - 1)}
    assert read_json(json.dumps(deepest).encode()) == deepest
    with pytest.raises(HTTPException, match="levels"):
        read_json(json.dumps({"a": value(MAX_DEPTH)}).encode())
