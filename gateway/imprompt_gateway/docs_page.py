"""`/docs`: the OpenAPI description as a page, without scripts."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache
from html import escape
from typing import Any

from starlette.requests import Request
from starlette.responses import HTMLResponse

from imprompt_gateway.openapi import document
from imprompt_gateway.pages import SECURITY_HEADERS

_CODE = re.compile(r"`([^`]+)`")
_HEAD = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>imprompt API</title>
<link rel="stylesheet" href="docs.css">
</head>
<body>
<main>"""


async def docs(request: Request) -> HTMLResponse:
    """Answer `GET /docs`."""
    return HTMLResponse(page(), headers=SECURITY_HEADERS)


@cache
def page() -> str:
    """Render the description."""
    described = document()
    info, schemas = described["info"], described["components"]["schemas"]
    parts = [
        _HEAD,
        f"<h1>{escape(info['title'])} {escape(info['version'])}</h1>",
        f"<p>{_text(info['description'])} <a href='openapi.json'>OpenAPI</a></p>",
    ]
    for path, methods in described["paths"].items():
        parts += [_route(path, method, route) for method, route in methods.items()]
    errors = described["paths"]["/livez"]["get"]["responses"]["default"]["description"]
    parts.append(f"<h2 id='errors'>Errors</h2>\n<p>{_text(errors)}.</p>")
    parts += [_schema(name, schema) for name, schema in schemas.items() if name != "EditRequest"]
    return "\n".join([*parts, "</main>\n</body>\n</html>"])


def _route(path: str, method: str, route: dict[str, Any]) -> str:
    answer = route["responses"]["200"]
    media_types = ", ".join(f"<code>{escape(kind)}</code>" for kind in answer["content"])
    taken = "".join(
        f"<li>takes <code>{escape(kind)}</code>: {_reference(content['schema'])}</li>"
        for kind, content in route.get("requestBody", {}).get("content", {}).items()
    )
    return (
        f"<h2><code>{method.upper()} {escape(path)}</code></h2>\n<p>{_text(route['summary'])}.</p>\n"
        f"<ul>{taken}<li>answers {media_types}: {_text(answer['description'])}</li></ul>"
    )


def _reference(schema: dict[str, Any]) -> str:
    name = schema["$ref"].rpartition("/")[2]
    required = ", ".join(f"<code>{field}</code>" for field in document()["components"]["schemas"][name]["required"])
    prompt = "<code>prompt</code> or <code>prompt_embeds</code>"
    return f"<a href='#ImageRequest'>the parameters</a>, of which {required}, and {prompt} are required"


def _schema(name: str, schema: dict[str, Any]) -> str:
    rows = [("name", "type", "description", "th")]
    rows += [
        (f"<code>{escape(field)}</code>", escape(", ".join(_types(value))), _detail(value), "td")
        for field, value in schema["properties"].items()
    ]
    lines = (f"<tr><{t}>{name}</{t}><{t}>{types}</{t}><{t}>{detail}</{t}></tr>" for name, types, detail, t in rows)
    return "\n".join([f"<h3 id='{name}'>{name}</h3>\n<table>", *lines, "</table>"])


def _types(schema: dict[str, Any]) -> Iterator[str]:
    if "$ref" in schema:
        yield schema["$ref"].rpartition("/")[2]
    for form in schema.get("anyOf", ()):
        yield from _types(form)
    kind = schema.get("type", ())
    for name in [kind] if isinstance(kind, str) else kind:
        inner = list(_types(schema["items"])) if "items" in schema else []
        yield f"{name} of {' or '.join(inner)}" if inner else name


def _detail(schema: dict[str, Any]) -> str:
    forms = [schema, *schema.get("anyOf", ())]
    text = _text(schema.get("description", ""))
    choices = next((form["enum"] for form in forms if "enum" in form), ())
    bounds: dict[str, Any] = next((form for form in forms if "minimum" in form or "maximum" in form), {})
    facts = []
    if choices:
        facts.append("one of " + ", ".join(f"<code>{escape(str(choice))}</code>" for choice in choices))
    if bounds:
        facts.append(" ".join(f"{name} {bounds[name]:g}" for name in ("minimum", "maximum") if name in bounds))
    if "default" in schema:
        facts.append(f"default <code>{escape(str(schema['default']))}</code>")
    return text + (f" ({'; '.join(facts)})" if facts else "")


def _text(text: str) -> str:
    return _CODE.sub(r"<code>\1</code>", escape(text))
