"""The `imprompt` command.

Exit status: 0 on success, 1 when the request or the work failed (stderr says why), 2 for an invalid command line.
Results go to stdout, progress and errors to stderr.
"""

from __future__ import annotations

from typing import Annotated

import typer

from imprompt import __version__
from imprompt.cli import console, packages
from imprompt.cli.batch import batch
from imprompt.cli.encode import encode
from imprompt.cli.gateway import gateway
from imprompt.cli.generate import generate
from imprompt.cli.models import models

app = typer.Typer(
    name="imprompt",
    help="Serve Stable Diffusion with image prompts on Triton, and generate pictures and clips with it.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)

_FORWARD_ARGUMENTS = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}


@app.callback(invoke_without_command=True)
def main(version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False) -> None:
    if version:
        console.out.print(__version__)
        raise typer.Exit


app.command(rich_help_panel="Server")(packages.export)
app.command(rich_help_panel="Server")(packages.serve)
app.command(rich_help_panel="Server")(packages.doctor)
app.command(rich_help_panel="Server")(gateway)
app.command(rich_help_panel="Client")(generate)
app.command(rich_help_panel="Client")(encode)
app.command(rich_help_panel="Client")(models)
app.command(rich_help_panel="Client")(batch)
app.command(rich_help_panel="More", context_settings=_FORWARD_ARGUMENTS)(packages.demo)
app.command(rich_help_panel="More", context_settings=_FORWARD_ARGUMENTS)(packages.bench)
