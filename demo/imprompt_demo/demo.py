"""`imprompt demo`: from the embedded bundle to engines, a Triton server, and pictures."""

from __future__ import annotations

import argparse
import hashlib
import multiprocessing
import shutil
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import torch
from diffusers.utils import logging as diffusers_logging
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from transformers.utils import logging as transformers_logging

from imprompt import Client, ImpromptError, Result
from imprompt_demo import bundle_path, sheet
from imprompt_demo.use_cases import MODEL, STYLES, UseCases
from imprompt_export import BundleError, EngineError, export
from imprompt_export.report import Report, table
from imprompt_serving.launcher import LaunchError, Server

BUNDLES = ("bundle.toml", "bundle-lcm.toml")
FRAME_MS = 90
_EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp")

console = Console(highlight=False)


def run(arguments: Sequence[str]) -> int:
    """Parse the command line and run the demo; return the exit status."""
    parser = argparse.ArgumentParser(
        prog="imprompt demo", description="Export and serve the embedded bundle, and show what image prompts do."
    )
    parser.add_argument("-o", "--output", type=Path, default=Path("imprompt-demo.png"), help="picture to write")
    parser.add_argument("--work", type=Path, default=Path(".demo"), help="folder that keeps the model repository")
    parser.add_argument("--verbose", action="store_true", help="print the export reports")
    options = parser.parse_args(arguments)
    if options.output.suffix.lower() not in _EXTENSIONS or options.output.is_dir():
        expected = f"must be a file with one of the extensions {', '.join(_EXTENSIONS)}"
        parser.error(f"argument -o/--output: {expected}; got {str(options.output)!r}")
    try:
        options.output.absolute().parent.mkdir(parents=True, exist_ok=True)
        main(options.output, work=options.work, verbose=options.verbose)
    except (BundleError, EngineError, ImpromptError, LaunchError, OSError) as error:
        console.print(f"[red]error:[/red] {escape(str(error))}", soft_wrap=True)
        return 1
    return 0


def main(output: Path, *, work: Path = Path(".demo"), verbose: bool = False) -> None:
    """Export the bundles unless they are up to date, serve them, and write a contact sheet with a clip next to it."""
    seconds: dict[str, float] = {}
    with _timed("export", seconds):
        repository = export_once(work, verbose=verbose)
    with _timed("start the server", seconds):
        server = Server(repository)
        server.start()
    try:
        with Client(server.grpc_address) as client, _timed("pictures", seconds):
            console.print(f"serving {client.models()} on {server.grpc_address}")
            results = write_sheet(client, output)
    finally:
        server.stop()
    console.print(_timings(seconds, results))
    clip = output.with_suffix(".gif").name
    console.print(f"[bold]{output.resolve()}[/bold] shows what image prompts do, and {clip} next to it is a clip")
    console.print(
        "\nTo try it yourself:\n"
        f"  {sys.argv[0]} serve {repository}\n"
        f'  {sys.argv[0]} generate --model {MODEL} --prompt "a {STYLES[0][1]}" --ip-adapter-image PICTURE -o out.png',
        soft_wrap=True,
    )


def write_sheet(client: Client, output: Path) -> list[Result]:
    """Run every use case; write the contact sheet to `output` and the clip as a GIF next to it."""
    use_cases = UseCases(client)
    rows = list(use_cases.rows())
    moving, frames = use_cases.clip()
    sheet.draw([*rows, moving]).save(output)
    first, *others = frames
    first.save(output.with_suffix(".gif"), save_all=True, append_images=others, duration=FRAME_MS, loop=0)
    return use_cases.results


def export_once(work: Path, *, verbose: bool = False) -> Path:
    """Return the bundles' model repository under `work`, exporting again if a bundle or the code has changed."""
    repository, key_file, key = work / "repository", work / "key", _key()
    if key_file.is_file() and key_file.read_text() == key:
        console.print(f"already exported: {repository}")
        return repository
    key_file.unlink(missing_ok=True)
    shutil.rmtree(repository, ignore_errors=True)
    with ProcessPoolExecutor(len(BUNDLES), multiprocessing.get_context("spawn")) as processes:
        exports = [processes.submit(_export, bundle_path() / name, repository) for name in BUNDLES]
        for report in [future.result() for future in exports]:
            if verbose:
                console.print(table(report))
    key_file.write_text(key)
    return repository


def _export(bundle: Path, repository: Path) -> Report:
    """Export one bundle in its own process, on one core; only the larger bundle shows progress."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", module="peft")
    for library in (diffusers_logging, transformers_logging):  # keep their messages from burying the demo's
        library.set_verbosity_error()
        library.disable_progress_bar()
    return export(bundle, repository, Console(stderr=True, quiet=bundle.name != BUNDLES[0]))


@contextmanager
def _timed(stage: str, seconds: dict[str, float]) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds[stage] = time.perf_counter() - start


def _timings(seconds: dict[str, float], results: Sequence[Result]) -> Table:
    """Tabulate the seconds per stage of the demo, and the mean seconds per stage of a request."""
    shown = Table("stage", "seconds", title="timings", title_justify="left")
    for stage, value in seconds.items():
        shown.add_row(stage, f"{value:.1f}")
    for stage in results[0].timings:
        mean = sum(result.timings.get(stage, 0.0) for result in results) / len(results)
        shown.add_row(f"  request (mean): {stage}", f"{mean:.3f}")
    return shown


def _key() -> str:
    """Hash the checkpoints, the version, and (in a checkout) the code that exports and serves."""
    digest = hashlib.sha256(version("imprompt").encode())
    files = [file for file in bundle_path().rglob("*") if file.is_file()]
    for package in ("imprompt_export", "imprompt_serving"):
        spec = find_spec(package)
        for folder in (spec.submodule_search_locations or ()) if spec else ():
            files += Path(folder).rglob("*.py")
    for file in sorted(files):
        digest.update(file.read_bytes())
    return digest.hexdigest()
