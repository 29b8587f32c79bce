"""`imprompt generate`: make pictures or a clip from the command line."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from PIL.Image import Image
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as ProgressBar

from imprompt import Client, Result
from imprompt._errors import short_repr
from imprompt._output_files import FPS, check_extension, check_fps
from imprompt._request import asks_for_clip
from imprompt.cli import console
from imprompt.cli.options import CONNECTION, given, only_bundle, with_options
from imprompt.cli.parameter_options import OPTIONS


def _parameter(text: str) -> tuple[str, Any]:
    """Parse `NAME=JSON`; a value that is not valid JSON is plain text."""
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise typer.BadParameter(f"must be NAME=JSON, got {short_repr(text)}")
    try:
        return name, json.loads(value)
    except (ValueError, RecursionError):
        return name, value


@with_options((*CONNECTION, *OPTIONS))
def generate(
    context: typer.Context,
    prompt: Annotated[
        list[str], typer.Option("--prompt", "-p", help="What to draw; repeat it for one picture per prompt.")
    ],
    model: Annotated[
        str | None, typer.Option(help="Bundle to use (default: the one being served, if it is the only one).")
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="File to write, numbered if there are several (default: out.png; out.gif for clips, out.npy for "
            "latents).",
        ),
    ] = None,
    preview: Annotated[
        Path | None, typer.Option(help="File to keep updated with a preview while the request runs.")
    ] = None,
    fps: Annotated[float, typer.Option(help="Frames per second of the saved clip.")] = FPS,
    metadata: Annotated[
        bool,
        typer.Option("--metadata/--no-metadata", help="Whether to write seed, prompt, and parameters into PNG files."),
    ] = True,
    param: Annotated[
        list[Any] | None,
        typer.Option(
            parser=_parameter, metavar="NAME=JSON", help="A parameter that only a newer server has; may be repeated."
        ),
    ] = None,
    **values: Any,
) -> None:
    """Generate pictures or a clip, and save them.

    Prints the written files to stdout, one per line; seeds, elapsed time and warnings go to stderr.
    """
    started = time.perf_counter()
    with console.reported_errors(context):
        parameters = given(OPTIONS, values)
        if preview is not None:
            parameters["preview"] = True
        parameters |= dict(param or ())
        clip, latents = asks_for_clip(parameters), parameters.get("output_type") == "latent"
        output = output or Path("out.npy" if latents else "out.gif" if clip else "out.png")
        check_extension(output, clip=clip, latents=latents)
        console.check_file("output", output)
        if preview is not None:
            check_extension(preview)
            console.check_file("preview", preview)
        check_fps(fps)
        with Client(**given(CONNECTION, values)) as client:
            result = _stream(client, model or only_bundle(client), prompt, parameters, preview)
        for path in result.save(output, fps=fps, metadata=metadata):
            console.print_path(path)
        _print_details(result, time.perf_counter() - started)


def _stream(client: Client, model: str, prompt: list[str], parameters: dict[str, Any], preview: Path | None) -> Result:
    """Send the request and show its progress until the result arrives."""
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn()
    )  # fmt: skip
    with ProgressBar(*columns, console=console.err, transient=True) as bar:
        task = bar.add_task("waiting", total=None)
        for event in client.stream(model=model, prompt=prompt, **parameters):
            if isinstance(event, Result):
                return event
            bar.update(task, description="denoising", completed=event.step, total=event.steps)
            if preview is not None and event.preview is not None:
                _save_atomically(preview, event.preview)
    raise AssertionError("a stream ends with a result or an error")


def _print_details(result: Result, seconds: float) -> None:
    """Print warnings, seeds and elapsed time."""
    for warning in result.warnings:
        console.err.print(f"[yellow]warning:[/yellow] {escape(warning)}", soft_wrap=True, highlight=False)
    seeds = ", ".join(map(str, result.seeds))
    prefix = f"seed{'s' if len(result.seeds) > 1 else ''} {seeds}, " if seeds else ""
    console.err.print(f"{prefix}{seconds:.1f} s", soft_wrap=True, highlight=False)


def _save_atomically(file: Path, picture: Image) -> None:
    """Write to a temporary file and rename it, so that a viewer never sees half a picture."""
    draft = file.with_stem(f".{file.stem}")
    picture.save(draft)
    draft.replace(file)
