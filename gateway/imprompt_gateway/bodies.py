"""Read the body of a request, JSON or a multipart form, into named fields."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Sequence
from typing import Any

from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import Request

from imprompt_gateway.errors import refuse
from imprompt_gateway.parameters import PICTURES, TEXTS

MAX_DEPTH = 16
"""Levels of nesting in JSON or in the name of a form field; embeddings, the deepest values, need six."""
MAX_CONTAINERS, MAX_VALUES = 100_000, 4_000_000
"""Lists and objects in JSON, and all values. Python needs up to 64 bytes for each, or 30 times the size of the body.

The embeddings of a picture for a full-face adapter, the largest values, are 514 lists and 660,000 numbers.
"""
MAX_FORM_PARTS = 1000
"""Fields, and files, of a form."""
_FIELD = re.compile(r"(?P<name>[^\[\]]+)(?P<keys>(\[[^\[\]]*\])*)")


async def read_fields(request: Request, *, max_bytes: int) -> dict[str, Any]:
    """Return the fields of a request; the files of a form are bytes.

    Raises:
        InvalidRequest: the name of a form field is invalid.
        HTTPException: the body is not JSON or a form, too large, or too slow.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == "application/json":
        return await asyncio.to_thread(read_json, await request.body())
    if kind == "multipart/form-data":
        return await _read_form(request, max_bytes)
    raise HTTPException(415, "send application/json or multipart/form-data")


def read_json(body: bytes) -> dict[str, Any]:
    """Parse a JSON object of limited depth."""
    if body.count(b"[") + body.count(b"{") > MAX_CONTAINERS or body.count(b",") > MAX_VALUES:
        raise HTTPException(400, "the body has too many values; send pictures in base64")
    try:
        fields = json.loads(body)
    except RecursionError:
        raise _nested_too_deeply() from None
    except ValueError as error:  # also wrong UTF-8, and integers of thousands of digits
        raise HTTPException(400, f"the body is not JSON: {str(error)[:200]}") from None
    if not isinstance(fields, dict):
        raise HTTPException(400, "the body must be a JSON object")
    level: list[Any] = [fields]
    for _ in range(MAX_DEPTH):
        level = [item for value in level for item in _items(value) if isinstance(item, dict | list)]
    if level:
        raise _nested_too_deeply()
    return fields


def _items(value: Any) -> Sequence[Any]:
    return list(value.values()) if isinstance(value, dict) else value


def _nested_too_deeply() -> HTTPException:
    return HTTPException(400, f"the body is nested more than {MAX_DEPTH} levels deep")


async def _read_form(request: Request, max_bytes: int) -> dict[str, Any]:
    async with request.form(max_files=MAX_FORM_PARTS, max_fields=MAX_FORM_PARTS, max_part_size=max_bytes) as form:
        parts = [
            (name, await value.read() if isinstance(value, UploadFile) else value) for name, value in form.multi_items()
        ]
    return nested(parts)


def nested(parts: Sequence[tuple[str, str | bytes]]) -> dict[str, Any]:
    """Nest the parts of a form by their names: `a[b]` is an entry of an object, `a[]` and a repeated `a` of a list."""
    fields: dict[str, Any] = {}
    for part, value in parts:
        match = _FIELD.fullmatch(part)
        if match is None:
            raise refuse(part[:100], "is not a valid name of a field")
        name = match["name"]
        keys = match["keys"][1:-1].split("][") if match["keys"] else []
        while keys and not keys[-1]:
            keys.pop()
        if "" in keys or len(keys) >= MAX_DEPTH:
            raise refuse(name, "lists can only be the innermost values of a form; send JSON for others")
        target, path = fields, [name, *keys]
        for key in path[:-1]:
            target = target.setdefault(key, {})
            if not isinstance(target, dict):
                raise refuse(name, "has values of its own and values by key")
        _add(target, path[-1], _value(name, value), name, to_list=match["keys"].endswith("[]"))
    return fields


def _add(target: dict[str, Any], key: str, value: Any, name: str, *, to_list: bool) -> None:
    if isinstance(target.get(key), dict):
        raise refuse(name, "has values of its own and values by key")
    if key in target or to_list:
        given = target.get(key, [])
        target[key] = [*(given if isinstance(given, list) else [given]), value]
    else:
        target[key] = value


def _value(name: str, value: str | bytes) -> Any:
    """Read the text of a form field as JSON, unless it is one of a parameter that takes text or pictures."""
    if isinstance(value, bytes) or name in TEXTS or name in PICTURES:
        return value
    try:
        return read_json(b'{"value":' + value.encode() + b"}")["value"]
    except HTTPException:
        return value  # the SDK says which type it must have
