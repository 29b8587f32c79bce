"""`imprompt models`: list the served bundles."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from imprompt import Capabilities, Client
from imprompt.cli import console
from imprompt.cli.options import CONNECTION, with_options


@with_options(CONNECTION)
def models(
    context: typer.Context,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
    **connection: Any,
) -> None:
    """List the served bundles with their adapters, ControlNets, schedulers, sizes and limits."""
    with console.reported_errors(context), Client(**connection) as client:
        capabilities = {name: client.describe(name) for name in client.models()}
    if as_json:
        print(json.dumps(capabilities, indent=2))
        return
    for name, described in capabilities.items():
        console.out.print(_table(name, described))
    if not capabilities:
        console.out.print("no bundles")


def _table(name: str, capabilities: Capabilities) -> Table:
    table = Table(title=name, title_justify="left", show_header=False)
    for key, value in capabilities.items():
        if key == "ip_adapters":
            value = [f"{a['name']} ({a['kind']}, {a['image_tokens']} tokens)" for a in capabilities["ip_adapters"]]
        if isinstance(value, dict):
            value = [f"{entry} {_format(limits)}" for entry, limits in value.items()]
        if key != "name":
            table.add_row(key.replace("_", " "), escape(_format(value)))
    return table


def _format(value: object) -> str:
    if isinstance(value, list) and len(value) == 2 and all(isinstance(entry, int) for entry in value):
        return f"{value[0]} to {value[1]}"
    if isinstance(value, list):
        return ", ".join(map(_format, value)) or "none"
    return value if isinstance(value, str) else json.dumps(value)
