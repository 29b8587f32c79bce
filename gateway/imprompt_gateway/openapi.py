"""The OpenAPI description of the routes (`/openapi.json`)."""

from __future__ import annotations

from functools import cache
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse

import imprompt
from imprompt_gateway.parameters import KNOWN, PARAMETERS

Schema = dict[str, Any]

_REQUEST: Schema = {"type": "object", "properties": KNOWN, "additionalProperties": False}
_SEEDS: Schema = {"type": "array", "items": {"type": "integer"}, "description": "the seed that repeats each picture"}
_FACTS: Schema = {
    "model": {"type": "string"},
    "request_id": {"type": "string", "description": "finds the request in the server's log"},
    "seeds": _SEEDS,
    "timings": {
        "type": "object",
        "additionalProperties": {"type": "number"},
        "description": "seconds per stage on the server; stages may overlap",
    },
    "warnings": {"type": "array", "items": {"type": "string"}},
    "nsfw_content_detected": {"type": "array", "items": {"type": "boolean"}},
}
_PROMPT: list[Schema] = [{"required": ["prompt"]}, {"required": ["prompt_embeds"]}]
_SCHEMAS: dict[str, Schema] = {
    "ImageRequest": _REQUEST | {"required": ["model"], "anyOf": _PROMPT},
    "EditRequest": _REQUEST | {"required": ["model", "image"], "anyOf": _PROMPT},
    "Images": {
        "type": "object",
        "properties": {
            "created": {"type": "integer", "description": "seconds since the epoch"},
            "background": {"const": "opaque"},
            "output_format": PARAMETERS["output_format"],
            "size": {"type": "string", "description": "`WIDTHxHEIGHT`"},
            "data": {"type": "array", "items": {"type": "object", "properties": {"b64_json": {"type": "string"}}}},
            **_FACTS,
        },
    },
    "Model": {
        "type": "object",
        "properties": {
            "id": {"type": "string"},
            "object": {"const": "model"},
            "created": {"type": "integer"},
            "owned_by": {"type": "string"},
            "capabilities": {"type": "object", "description": "adapters, ControlNets, schedulers, sizes, and limits"},
        },
    },
    "Models": {
        "type": "object",
        "properties": {
            "object": {"const": "list"},
            "data": {"type": "array", "items": {"$ref": "#/components/schemas/Model"}},
        },
    },
    "Error": {
        "type": "object",
        "properties": {
            "error": {
                "type": "object",
                "properties": {
                    "message": {"type": "string"},
                    "type": {"type": "string"},
                    "param": {"type": ["string", "null"], "description": "the parameter at fault"},
                    "code": {"type": "string"},
                },
            }
        },
    },
}


def _json(name: str) -> Schema:
    return {"application/json": {"schema": {"$ref": f"#/components/schemas/{name}"}}}


def _answer(description: str, content: Schema) -> Schema:
    return {"200": {"description": description, "content": content}, "default": _ERROR}


_ERROR: Schema = {
    "description": "400: a parameter is invalid; 401: no valid key; 404: unknown model; 413: the body is too large; "
    "429 and 503: send it again after `Retry-After` seconds; 504: `timeout` has passed",
    "content": _json("Error"),
}
_FILE: Schema = {"schema": {"type": "string", "format": "binary"}}
_FILES: Schema = {
    **{f"image/{kind}": _FILE for kind in PARAMETERS["output_format"]["enum"]},
    "text/event-stream": {"schema": {"type": "string", "description": "events, if `stream` is true"}},
}
_NAME: Schema = {"name": "name", "in": "path", "required": True, "schema": {"type": "string"}}


def _images(summary: str, schema: str) -> Schema:
    form = {"multipart/form-data": {"schema": {"$ref": f"#/components/schemas/{schema}"}}}
    return {
        "post": {
            "summary": summary,
            "requestBody": {"required": True, "content": _json(schema) | form},
            "responses": _answer("the pictures or clips, in the form that `Accept` asks for", _json("Images") | _FILES),
        }
    }


def _get(summary: str, description: str, content: Schema, **more: Any) -> Schema:
    return {"get": {"summary": summary, "responses": _answer(description, content), **more}}


@cache
def document() -> Schema:
    """Return the whole description."""
    text: Schema = {"text/plain": {"schema": {"type": "string"}}}
    status: Schema = {"application/json": {"schema": {"type": "object"}}}
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "imprompt",
            "version": imprompt.__version__,
            "description": "Stable Diffusion with image prompts, in the form of OpenAI's images API.",
        },
        "security": [{"key": []}, {}],
        "paths": {
            "/v1/images/generations": _images("Make pictures or a clip", "ImageRequest"),
            "/v1/images/edits": _images("Repaint pictures, whole or where a mask says so", "EditRequest"),
            "/v1/models": _get("List the models", "the models with their capabilities", _json("Models")),
            "/v1/models/{name}": _get("Describe a model", "the model", _json("Model"), parameters=[_NAME]),
            "/livez": _get("Check the gateway", "the gateway responds", status),
            "/readyz": _get("Check the server", "the server and all of its models are ready", status),
            "/metrics": _get("Read the metrics", "Prometheus' text format", text),
        },
        "components": {
            "schemas": _SCHEMAS,
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
    }


async def openapi(request: Request) -> JSONResponse:
    """Answer `GET /openapi.json`."""
    return JSONResponse(document())
