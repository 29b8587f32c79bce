"""Write the request parameters as JSON Schema: `python -m imprompt_serving.json_schema gateway/imprompt_gateway`.

The gateway reads the file to tell pictures from texts and numbers, and to describe its routes in OpenAPI. It imports
nothing from this package.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

from imprompt_serving.parameters import ROWS, Group, Parameter, Type

FILE = "parameters.json"
_LEFT_OUT = ("output_type",)
"""Keywords that only make sense in Python: over HTTP, every result is a file."""

_PICTURE = {"type": "string", "description": "base64, or a data URI"}
_SINGLE: dict[Type, dict[str, Any]] = {
    Type.TEXT: {"type": "string"},
    Type.CHOICE: {"type": "string"},
    Type.INTEGER: {"type": "integer"},
    Type.NUMBER: {"type": "number"},
    Type.FLAG: {"type": "boolean"},
    Type.OBJECT: {"type": "object"},
    Type.PAIR: {"type": "array", "items": {"type": "integer"}, "minItems": 2, "maxItems": 2},
    Type.EMBEDS: {"type": ["array", "object"]},
    Type.TENSOR: {"type": "array"},
}
_ITEM: dict[Type, dict[str, Any]] = {
    Type.TEXTS: {"type": "string"},
    Type.CHOICES: {"type": "string"},
    Type.SEEDS: {"type": "integer"},
    Type.INTEGERS: {"type": "integer"},
    Type.NUMBERS: {"type": "number"},
    Type.PICTURES: _PICTURE,
}
"""One value of a type that takes several."""
_BY_ADAPTER = ("Mapping", "PerAdapterImages")
"""Parts of a Python annotation that allow a dict."""


def schema(row: Parameter) -> dict[str, Any]:
    """Return the JSON Schema of a parameter; `x-type` is its type in the table, `x-stream` marks those of streams."""
    described: dict[str, Any] = {"description": row.python_doc or row.doc, "x-type": row.type.value}
    if row.group is Group.STREAM:
        described["x-stream"] = True
    if row.default not in (None, {}, ()) and not row.set_by_bundles:
        described["default"] = row.default
    if row.type is Type.OBJECT and (limits := _limits(row)):
        return {"type": "object", "additionalProperties": {"type": "number"} | limits} | described
    if row.type in _SINGLE:
        return _SINGLE[row.type] | _limits(row) | described
    item = _ITEM[row.type] | _limits(row)
    forms = [item, {"type": "array"} if row.python else {"type": "array", "items": item}]
    if any(name in (row.python or "") for name in _BY_ADAPTER):
        forms.append({"type": "object"})
    return {"anyOf": forms} | described


def _limits(row: Parameter) -> dict[str, Any]:
    limits: dict[str, Any] = {"enum": row.choices} if row.choices else {}
    if math.isfinite(row.low):
        limits["minimum"] = row.low
    if math.isfinite(row.high):
        limits["maximum"] = row.high
    return limits


def text() -> str:
    """Return the content of the file: the schema of every parameter that an HTTP caller may send, one per line."""
    rows = (row for row in ROWS if (row.sdk or row.name == "prompt") and row.name not in _LEFT_OUT)
    lines = (f"  {json.dumps(row.name)}: {json.dumps(schema(row))}" for row in rows)
    return "{\n" + ",\n".join(lines) + "\n}\n"


if __name__ == "__main__":
    Path(sys.argv[1], FILE).write_text(text(), encoding="utf-8")
