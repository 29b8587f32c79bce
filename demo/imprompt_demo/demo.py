"""The whole round: bundle -> engines -> Triton -> pictures. What `imprompt demo` runs."""

from __future__ import annotations

import argparse
import hashlib
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

from diffusers.utils import logging as diffusers_logging
from PIL import Image, ImageDraw, ImageFont
from rich.console import Console
from rich.table import Table
from transformers.utils import logging as transformers_logging

from imprompt import Client, Result
from imprompt_demo import bundle_path, world
from imprompt_export import export
from imprompt_export.report import table
from imprompt_serving.launcher import Server

SCALES = (0.0, 0.4, 0.8)
REFERENCES = (3, 11, 28)
"""Seeds of the world's pictures that serve as image prompts."""
PROMPTS = ("a fish", "a house", "a star")
STEPS = 25
CELL, GAP, TITLE = 160, 8, 24

console = Console(highlight=False)


@dataclass(frozen=True, kw_only=True)
class Row:
    """A line of the sheet: the image prompt, what was asked for, and a result for each scale."""

    reference: Image.Image
    prompt: str
    results: list[Result]


def run(arguments: Sequence[str]) -> int:
    """`imprompt demo`; returns the exit status."""
    parser = argparse.ArgumentParser(prog="imprompt demo", description="The whole round on the embedded bundle.")
    parser.add_argument("-o", "--output", type=Path, default=Path("imprompt-demo.png"), help="picture to write")
    parser.add_argument("--work", type=Path, default=Path(".demo"), help="where the model repository is kept")
    parser.add_argument("--verbose", action="store_true", help="show the table of the export")
    options = parser.parse_args(arguments)
    main(options.output, work=options.work, verbose=options.verbose)
    return 0


def main(output: Path, *, work: Path = Path(".demo"), verbose: bool = False) -> None:
    """Export the bundle unless that was done before, serve it, and write the sheet to `output`."""
    seconds: dict[str, float] = {}
    with _timed("export", seconds):
        repository = exported(work, verbose=verbose)
    with _timed("start the server", seconds):
        server = Server(repository)
        server.start()
    try:
        with Client(server.grpc_address) as client:
            (model,) = client.models()
            console.print(f"serving {model!r} on {server.grpc_address}")
            with _timed("pictures", seconds):
                rows = [ask(client, model, *pair) for pair in zip(REFERENCES, PROMPTS, strict=True)]
    finally:
        server.stop()
    sheet(rows).save(output)
    console.print(_timings(seconds, rows))
    console.print(f"[bold]{output.resolve()}[/bold]: what the image prompt adds as its scale grows")
    console.print(
        "\nBy hand:\n"
        f"  {sys.argv[0]} serve {repository}\n"
        f'  {sys.argv[0]} generate --model {model} --prompt "{PROMPTS[0]}" --ip-adapter-image PICTURE -o out.png',
        soft_wrap=True,
    )


def exported(work: Path, *, verbose: bool = False) -> Path:
    """The model repository of the bundle under `work`, made anew when the bundle or the code has changed."""
    _quiet_libraries()
    bundle = bundle_path() / "bundle.toml"
    if not bundle.is_file():
        from imprompt_demo import random_bundle  # needs diffusers, and only until there is a trained bundle

        console.print("[yellow]no trained bundle in this version: random weights, the pictures mean nothing[/yellow]")
        bundle = work / "bundle" / "bundle.toml"
        if not bundle.is_file():
            random_bundle.write(bundle.parent)
    repository, key_file, key = work / "repository", work / "key", _key(bundle)
    if key_file.is_file() and key_file.read_text() == key:
        console.print(f"exported before: {repository}")
        return repository
    key_file.unlink(missing_ok=True)
    shutil.rmtree(repository, ignore_errors=True)
    rows = export(bundle, repository)
    key_file.write_text(key)
    if verbose:
        console.print(table(rows))
    return repository


def ask(client: Client, model: str, seed: int, prompt: str) -> Row:
    """The same prompt and seed with the image prompt at each scale."""
    reference = world.picture(seed).image()
    results = [
        client.generate(
            model=model,
            prompt=prompt,
            ip_adapter_image={"plain": reference},
            ip_adapter_scale=scale,
            num_inference_steps=STEPS,
            seed=seed,
        )
        for scale in SCALES
    ]
    return Row(reference=reference, prompt=prompt, results=results)


def sheet(rows: Sequence[Row]) -> Image.Image:
    """A grid: reference, then a column for each scale."""
    columns = ["image prompt", *(f"scale {scale:g}" for scale in SCALES)]
    width = GAP + len(columns) * (CELL + GAP)
    canvas = Image.new("RGB", (width, TITLE + len(rows) * (CELL + TITLE + GAP)), "white")
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(14)
    for column, title in enumerate(columns):
        draw.text((GAP + column * (CELL + GAP), 4), title, fill="black", font=font)
    for index, row in enumerate(rows):
        top = TITLE + index * (CELL + TITLE + GAP)
        for column, picture in enumerate([row.reference, *(result.images[0] for result in row.results)]):
            canvas.paste(picture.resize((CELL, CELL), Image.Resampling.BICUBIC), (GAP + column * (CELL + GAP), top))
        draw.text((GAP + CELL + GAP, top + CELL + 2), f'prompt: "{row.prompt}"', fill="black", font=font)
    return canvas


def _quiet_libraries() -> None:
    """Their notes and progress bars would bury the demo's own."""
    for library in (diffusers_logging, transformers_logging):
        library.set_verbosity_error()
        library.disable_progress_bar()


@contextmanager
def _timed(stage: str, seconds: dict[str, float]) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds[stage] = time.perf_counter() - start


def _timings(seconds: dict[str, float], rows: Sequence[Row]) -> Table:
    """Seconds of the stages of the demo, and of those of a request (mean)."""
    shown = Table("stage", "seconds", title="timings", title_justify="left")
    results = [result for row in rows for result in row.results]
    for stage, value in seconds.items():
        shown.add_row(stage, f"{value:.1f}")
    for stage in results[0].timings:
        mean = sum(result.timings.get(stage, 0.0) for result in results) / len(results)
        shown.add_row(f"  one request: {stage}", f"{mean:.3f}")
    return shown


def _key(bundle: Path) -> str:
    """Changes with the checkpoints, the version, and (in a checkout) the code that exports and serves."""
    digest = hashlib.sha256(version("imprompt").encode())
    files = [file for file in bundle.parent.rglob("*") if file.is_file()]
    for package in ("imprompt_export", "imprompt_serving"):
        spec = find_spec(package)
        for folder in (spec.submodule_search_locations or ()) if spec else ():
            files += Path(folder).rglob("*.py")
    for file in sorted(files):
        digest.update(file.read_bytes())
    return digest.hexdigest()
