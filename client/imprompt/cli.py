"""The `imprompt` command. `export`, `serve`, `demo` and `bench` live in other packages, loaded when asked for.

Exit status: 0 when all went well, 1 when the request or the work failed (the reason is on stderr), 2 for a wrong
command line. Results go to stdout, progress and errors to stderr.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from PIL.Image import Image
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as ProgressBar
from rich.table import Table

from imprompt import Capabilities, Client, ImpromptError, Result, __version__
from imprompt._errors import shown
from imprompt._parameters import NAMES
from imprompt._request import asks_for_clip
from imprompt._result import FPS, check_ending, check_fps

app = typer.Typer(
    name="imprompt",
    help="Stable Diffusion with image prompts, served by Triton.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
out, err = Console(), Console(stderr=True)

_PASS_ON = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}
_ADAPTER_FILE = re.compile(r"(?P<adapter>[a-z][a-z0-9_-]*)=(?P<file>.+)")

_OWN = ("imprompt", "imprompt_bench", "imprompt_demo", "imprompt_export", "imprompt_serving")

Url = Annotated[str, typer.Option(envvar="IMPROMPT_URL", help="gRPC address of the server, host:port.")]


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except RecursionError:
        raise typer.BadParameter("not JSON that can be read: nested too deep") from None
    except ValueError as error:
        raise typer.BadParameter(f"not JSON: {error}") from None


def _parameter(text: str) -> tuple[str, Any]:
    """`NAME=JSON`; what is no JSON is text."""
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise typer.BadParameter(f"NAME=JSON, got {shown(text)}")
    try:
        return name, json.loads(value)
    except (ValueError, RecursionError):
        return name, value


def _json_option(help: str) -> Any:
    return typer.Option(parser=_json, metavar="JSON", help=help)


@app.callback(invoke_without_command=True)
def main(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        out.print(__version__)
        raise typer.Exit


@app.command(rich_help_panel="Server")
def export(
    bundle: Annotated[Path, typer.Argument(help="Bundle file (TOML).")],
    repository: Annotated[Path, typer.Option("--output", "-o", help="Model repository to write to.")],
    refit_from: Annotated[
        Path | None, typer.Option(help="Folder with TensorRT engines of the same architecture, to give new weights.")
    ] = None,
) -> None:
    """Turn a checkpoint set into models of a Triton repository, and check each against PyTorch."""
    package = _load("imprompt_export", "export")
    try:
        with _extra("export"):
            rows = package.export(bundle, repository, refit_from=refit_from)
    except (package.BundleError, package.EngineError, OSError) as error:
        _fail(str(error))
    # Loaded only after other failures: it takes seconds, as it brings torch.
    except _load("imprompt_export.parity", "export").ParityError as error:
        _fail(str(error))
    out.print(_load("imprompt_export.report", "export").table(rows))


@app.command(rich_help_panel="Server")
def serve(
    repository: Annotated[Path, typer.Argument(help="Model repository, as `imprompt export` writes it.")],
    grpc_port: Annotated[int, typer.Option(help="0: any free port.")] = 8001,
    http_port: Annotated[
        int | None, typer.Option(help="Open Triton's HTTP port, which is off by default. 0: any free port.")
    ] = None,
    metrics_port: Annotated[int, typer.Option(help="0: any free port.")] = 8002,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    drain_timeout: Annotated[float, typer.Option(help="Seconds that running requests get on shutdown.")] = 30.0,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Show everything that Triton prints.")] = False,
) -> None:
    """Start Triton in the foreground; prints a line that starts with `ready` when all models are. Ctrl-C drains."""
    launcher = _load("imprompt_serving.launcher", "server")

    def ready(addresses: Any) -> None:
        print(f"ready {addresses}", flush=True)

    try:
        status = launcher.serve(
            repository,
            grpc_port=grpc_port,
            http_port=http_port,
            metrics_port=metrics_port,
            host=host,
            on_ready=ready,
            drain_timeout=drain_timeout,
            verbose=verbose,
        )
    except launcher.LaunchError as error:
        _fail(str(error))
    raise typer.Exit(status)


@app.command(rich_help_panel="Client")
def generate(
    context: typer.Context,
    prompt: Annotated[list[str], typer.Option("--prompt", "-p", help="What to show; several make a picture each.")],
    model: Annotated[str | None, typer.Option(help="Bundle (default: the only one that is served).")] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", help="File to write; several get a number (default: out.png, or out.gif for a clip)."
        ),
    ] = None,
    url: Url = "localhost:8001",
    ip_adapter_image: Annotated[
        list[str] | None,
        typer.Option(metavar="[NAME=]FILE", help="Image prompt, of the adapter NAME; may be repeated."),
    ] = None,
    negative_ip_adapter_image: Annotated[
        list[str] | None, typer.Option(metavar="[NAME=]FILE", help="Picture to stay away from.")
    ] = None,
    ip_adapter_scale: Annotated[
        Any, _json_option("A number, a dict by block, a list with one for each adapter, or a dict by adapter name.")
    ] = None,
    ip_adapter_masks: Annotated[
        list[str] | None,
        typer.Option("--ip-adapter-mask", metavar="[NAME=]FILE", help="Region of each image prompt, in their order."),
    ] = None,
    # Made by imprompt_serving.signatures: options
    negative_prompt: Annotated[
        list[str] | None,
        typer.Option(
            help="What to avoid: one for all prompts, or one each.",
        ),
    ] = None,
    image: Annotated[
        list[Path] | None,
        typer.Option(
            help="Pictures to start from: image-to-image, or inpainting with mask_image.",
        ),
    ] = None,
    mask_image: Annotated[
        list[Path] | None,
        typer.Option(
            help="What to repaint (white): one, or one for each image.",
        ),
    ] = None,
    strength: Annotated[
        float | None,
        typer.Option(
            help="How much of image or video is replaced; above 0, default as diffusers (0 to 1).",
        ),
    ] = None,
    control_image: Annotated[
        list[Path] | None,
        typer.Option(
            help="Control images: one for each net, or one for each prompt (frame) of each net in turn.",
        ),
    ] = None,
    controlnet: Annotated[
        list[str] | None,
        typer.Option(
            help="Names of the ControlNets to use, in this order (default: all of the bundle).",
        ),
    ] = None,
    controlnet_conditioning_scale: Annotated[
        list[float] | None,
        typer.Option(
            help="Strength of the ControlNets: one for all nets, or one each; default as diffusers (-10000 to 10000).",
        ),
    ] = None,
    control_guidance_start: Annotated[
        list[float] | None,
        typer.Option(
            help="Share of the steps at which a net starts to act: one for all nets, or one each (0 to 1, default 0).",
        ),
    ] = None,
    control_guidance_end: Annotated[
        list[float] | None,
        typer.Option(
            help="Share of the steps at which a net stops acting: one for all nets, or one each (0 to 1, default 1).",
        ),
    ] = None,
    guess_mode: Annotated[
        bool | None,
        typer.Option(
            "--guess-mode",
            help="Let the nets act on the conditional branch only, and less on the finer residuals (default false).",
        ),
    ] = None,
    num_frames: Annotated[
        int | None,
        typer.Option(
            help="Frames of a clip; without it (and video) the answer is pictures.",
        ),
    ] = None,
    video: Annotated[
        list[Path] | None,
        typer.Option(
            help="Frames to start from: video-to-video with strength.",
        ),
    ] = None,
    height: Annotated[
        int | None,
        typer.Option(
            help="Pixels, a multiple of 8 (default: the bundle's, or that of the picture to start from).",
        ),
    ] = None,
    width: Annotated[
        int | None,
        typer.Option(
            help="Pixels, a multiple of 8 (default: the bundle's, or that of the picture to start from).",
        ),
    ] = None,
    num_inference_steps: Annotated[
        int | None,
        typer.Option(
            "--num-inference-steps",
            "--steps",
            help="Denoising steps (1 to 1000, default 50).",
        ),
    ] = None,
    guidance_scale: Annotated[
        float | None,
        typer.Option(
            help="Classifier-free guidance; at most 1 switches it off, default as diffusers (-10000 to 10000).",
        ),
    ] = None,
    guidance_rescale: Annotated[
        float | None,
        typer.Option(
            help="Rescaling of the guided noise as in arXiv 2305.08891 (0 to 1, default 0).",
        ),
    ] = None,
    guidance_end: Annotated[
        float | None,
        typer.Option(
            help="Share of the steps after which guidance stops; a step without it is half the work (0 to 1, default "
            "1).",
        ),
    ] = None,
    eta: Annotated[
        float | None,
        typer.Option(
            help="Share of noise in each step of DDIM and TCD (0 to 1, default 0).",
        ),
    ] = None,
    clip_skip: Annotated[
        int | None,
        typer.Option(
            help="Layers of the text encoder to leave out (default 0).",
        ),
    ] = None,
    num_images_per_prompt: Annotated[
        int | None,
        typer.Option(
            help="Pictures (or clips) for each prompt (1 to 64, default 1).",
        ),
    ] = None,
    seed: Annotated[
        list[int] | None,
        typer.Option(
            help="One for all pictures together, or one each; random when absent.",
        ),
    ] = None,
    scheduler: Annotated[
        str | None,
        typer.Option(
            help="Class name of a diffusers scheduler (default: the bundle's).",
        ),
    ] = None,
    scheduler_config: Annotated[
        Any,
        _json_option(
            "JSON object: values that replace the scheduler's configuration.",
        ),
    ] = None,
    timeout: Annotated[
        float | None,
        typer.Option(
            help="Seconds after which the work on this request stops.",
        ),
    ] = None,
    # End
    param: Annotated[
        list[Any] | None, typer.Option(parser=_parameter, metavar="NAME=JSON", help="Any other parameter.")
    ] = None,
    preview: Annotated[Path | None, typer.Option(help="Keep this file up to date with a preview.")] = None,
    fps: Annotated[float, typer.Option(help="Frames per second of a saved clip.")] = FPS,
) -> None:
    """Make pictures, or a clip, and save them.

    The files go to stdout, a line each; seeds, seconds and warnings to stderr.
    """
    began = time.perf_counter()
    with _reported_errors():
        # The options carry the names of the parameters: what is one goes on as it is.
        parameters: dict[str, Any] = {
            name: context.params[name] for name in NAMES if context.params.get(name) not in (None, [], ())
        }
        for name in ("ip_adapter_image", "negative_ip_adapter_image", "ip_adapter_masks"):
            if name in parameters:
                parameters[name] = _by_adapter(name, parameters[name])
        if preview is not None:
            parameters["preview"] = True
        parameters |= dict(param or ())
        clip = asks_for_clip(parameters)
        output = output or Path("out.gif" if clip else "out.png")
        _check_file("output", output, clip=clip)
        if preview is not None:
            _check_file("preview", preview)
        check_fps(fps)
        if parameters.get("output_type") == "latent":
            _fail("output_type: latents are not saved to files; the Python client gives them as an array")
        with Client(url) as client:
            result = _follow(client, model or _only_bundle(client), prompt, parameters, preview)
        for path in result.save(output, fps=fps):
            out.print(_printable(str(path)), soft_wrap=True, highlight=False, markup=False)
        _tell(result, time.perf_counter() - began)


@app.command(rich_help_panel="Client")
def models(
    url: Url = "localhost:8001", as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False
) -> None:
    """What is served: adapters, ControlNets, schedulers, sizes and limits of each bundle."""
    with _reported_errors(), Client(url) as client:
        described = {name: client.describe(name) for name in client.models()}
    if as_json:
        print(json.dumps(described, indent=2))
        return
    for name, capabilities in described.items():
        out.print(_table(name, capabilities))
    if not described:
        out.print("no bundles")


@app.command(context_settings=_PASS_ON, rich_help_panel="More")
def demo(context: typer.Context) -> None:
    """The whole round on the embedded bundle."""
    try:
        package = importlib.import_module("imprompt_demo")
    except ModuleNotFoundError as error:
        if error.name != "imprompt_demo":
            raise
        _fail("The demo is a package of its own: in a checkout, run `make demo` or `pip install ./demo`")
    with _extra("cpu,export,server"):
        raise typer.Exit(package.main(context.args))


@app.command(context_settings=_PASS_ON, rich_help_panel="More")
def bench(context: typer.Context) -> None:
    """Measure latency and throughput of a server."""
    package = _load("imprompt_bench.cli", "bench")
    with _extra("bench,cpu,export,server"):
        raise typer.Exit(package.main(context.args))


def _follow(client: Client, model: str, prompt: list[str], parameters: dict[str, Any], preview: Path | None) -> Result:
    """Send the request and show its progress."""
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn()
    )  # fmt: skip
    with ProgressBar(*columns, console=err, transient=True) as bar:
        task = bar.add_task("waiting", total=None)
        for event in client.stream(model=model, prompt=prompt, **parameters):
            if isinstance(event, Result):
                return event
            bar.update(task, description="denoising", completed=event.step, total=event.steps)
            if preview is not None and event.preview is not None:
                _replace(preview, event.preview)
    raise AssertionError("a stream ends with a result or an error")


def _tell(result: Result, seconds: float) -> None:
    """What else there is to know of pictures that were saved."""
    for warning in result.warnings:
        err.print(f"[yellow]warning:[/yellow] {escape(warning)}", soft_wrap=True, highlight=False)
    seeds = ", ".join(map(str, result.seeds))
    drawn = f"seed{'s' if len(result.seeds) > 1 else ''} {seeds}, " if seeds else ""
    err.print(f"{drawn}{seconds:.1f} s", soft_wrap=True, highlight=False)


def _check_file(option: str, file: Path, *, clip: bool = False) -> None:
    """Refuse, before anything is sent, a file that the answer could not be written to."""
    check_ending(file, clip=clip)
    folder = file.absolute().parent
    if not folder.is_dir():
        _fail(f"--{option}: no such folder: {file.parent}")
    if file.is_dir() or not os.access(file if file.exists() else folder, os.W_OK):
        _fail(f"--{option}: {file} cannot be written")


def _replace(file: Path, picture: Image) -> None:
    """Write beside and rename, so that a viewer sees all of a picture or the one before."""
    draft = file.with_stem(f".{file.stem}")
    picture.save(draft)
    draft.replace(file)


def _only_bundle(client: Client) -> str:
    served = client.models()
    if len(served) != 1:
        _fail(f"--model: which one? Served: {', '.join(served) or 'none'}", status=2)
    return served[0]


def _by_adapter(parameter: str, values: list[str]) -> list[str] | dict[str, list[str]]:
    """`NAME=FILE` options as a dict by adapter name, `FILE` ones as a list."""
    named = [None if os.path.exists(value) else _ADAPTER_FILE.fullmatch(value) for value in values]
    if not any(named):
        return values
    files: dict[str, list[str]] = {}
    for match in named:
        if match is None:
            option = parameter.replace("_", "-").removesuffix("s")
            _fail(f"--{option}: either all as NAME=FILE, or none", status=2)
        files.setdefault(match["adapter"], []).append(match["file"])
    return files


def _table(name: str, capabilities: Capabilities) -> Table:
    table = Table(title=name, title_justify="left", show_header=False)
    for key, value in capabilities.items():
        if key == "ip_adapters":
            value = [f"{a['name']} ({a['kind']}, {a['image_tokens']} tokens)" for a in capabilities["ip_adapters"]]
        if isinstance(value, dict):
            value = [f"{entry} {_short(limits)}" for entry, limits in value.items()]
        if key != "name":
            table.add_row(key.replace("_", " "), escape(_short(value)))
    return table


def _short(value: object) -> str:
    if isinstance(value, list) and len(value) == 2 and all(isinstance(entry, int) for entry in value):
        return f"{value[0]} to {value[1]}"
    if isinstance(value, list):
        return ", ".join(map(_short, value)) or "none"
    return value if isinstance(value, str) else json.dumps(value)


def _load(module: str, extra: str) -> Any:
    """Another package of the project, or a hint at what to install for it."""
    with _extra(extra, module):
        return importlib.import_module(module)


@contextmanager
def _extra(extra: str, package: str = "") -> Iterator[None]:
    """Where packages of `extra` are imported; one that is missing is named with what to install.

    Args:
        package: a package of the project itself that may be missing, too.
    """
    try:
        yield
    except ImportError as error:
        if error.name != package and _is_ours(error):
            raise  # a bug
        _fail(f'{error}. This command needs more packages: pip install "imprompt[{extra}]"')


def _is_ours(error: ImportError) -> bool:
    """Whether `error` is about the project's own modules, or about something that one of them took for there."""
    if (error.name or "").partition(".")[0] in _OWN:
        return True
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    module = frame.f_globals.get("__name__", "")
    return not isinstance(error, ModuleNotFoundError) and module.partition(".")[0] in _OWN


@contextmanager
def _reported_errors() -> Iterator[None]:
    """Errors that the user can do something about, as one line."""
    try:
        yield
    except (ImpromptError, ValueError, OSError) as error:
        _fail(str(error))


def _fail(message: str, *, status: int = 1) -> NoReturn:
    err.print(f"[red]error:[/red] {escape(_printable(message))}", soft_wrap=True, highlight=False)
    raise typer.Exit(status)


def _printable(text: str) -> str:
    """`text` with what a terminal cannot show escaped, such as bytes of a file name that are not UTF-8."""
    return text.encode(errors="backslashreplace").decode()
