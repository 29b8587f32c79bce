"""The command line, against the fake server."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import grpc
import numpy as np
import pytest
from fake_triton import Call, FakeTriton, clips, encoded, opened, picture, refuse, texts
from PIL import Image
from rich.console import Console
from typer.testing import CliRunner
from typer.testing import Result as Outcome

from imprompt import __version__, cli
from imprompt_serving.launcher import Addresses


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with a few pictures."""
    monkeypatch.chdir(tmp_path)
    Path("folder.png").mkdir()
    for name in ("a.png", "b.png", "mask.png"):
        Image.new("RGB", (4, 4), "red").save(name)
    return tmp_path


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, folder: Path) -> Any:
    def run(*arguments: str, url: str | None = None) -> Outcome:
        # The consoles hold on to the streams of the first import.
        monkeypatch.setattr(cli, "out", Console(width=100))
        monkeypatch.setattr(cli, "err", Console(stderr=True, width=100))
        return CliRunner(env={"IMPROMPT_URL": url} if url else None).invoke(cli.app, arguments)

    return run


@pytest.fixture
def generate(run: Any, url: str) -> Any:
    return lambda *options, model="two": run("generate", "--model", model, "--prompt", "a cat", *options, url=url)


def test_a_picture_is_saved_and_named(generate: Any, folder: Path) -> None:
    outcome = generate("-o", "cat.png")
    assert (outcome.exit_code, outcome.stdout) == (0, "cat.png\n"), outcome.output
    assert opened(folder / "cat.png").size == (16, 8)


def test_seed_seconds_and_warnings_go_to_stderr(generate: Any, triton: FakeTriton, folder: Path) -> None:
    triton.answer = lambda call: iter(
        [{**picture(), "seeds": np.array([2**40]), "warnings": texts("cut at [77] tokens")}]
    )
    outcome = generate("-o", "cat.png")
    assert outcome.stdout == "cat.png\n"
    assert re.search(rf"^warning: cut at \[77\] tokens\nseed {2**40}, \d+\.\d s\n$", outcome.stderr, re.MULTILINE)
    triton.answer = lambda call: iter([picture(2)])
    assert re.search(r"^seeds 0, 1, \d+\.\d s$", generate().stderr, re.MULTILINE)
    triton.answer = lambda call: iter([{**picture(2), "seeds": np.array([], np.int64)}])
    assert re.search(r"^\d+\.\d s$", generate().stderr, re.MULTILINE)


def test_several_pictures_get_a_number(generate: Any, triton: FakeTriton, folder: Path) -> None:
    triton.answer = lambda call: iter([picture(2)])
    outcome = generate("--prompt", "a dog", "-o", "out.webp")
    assert outcome.stdout.split() == ["out-0.webp", "out-1.webp"]
    assert triton.calls[0].texts("prompt") == ["a cat", "a dog"]


@pytest.mark.parametrize(
    ("options", "parameter", "expected"),
    [
        ("--negative-prompt x --negative-prompt y", "negative_prompt", [b"x", b"y"]),
        ("--ip-adapter-image a.png --ip-adapter-image b.png", "ip_adapter_image_adapter", [b"plus", b"face"]),
        ("--ip-adapter-image face=a.png --ip-adapter-image face=b.png", "ip_adapter_image_adapter", [b"face", b"face"]),
        ("--negative-ip-adapter-image face=a.png", "negative_ip_adapter_image_adapter", [b"face"]),
        ("--ip-adapter-mask plus=mask.png", "ip_adapter_masks_adapter", [b"plus"]),
        ("--ip-adapter-scale 0.4", "ip_adapter_scale", [0.4]),
        ("--ip-adapter-scale [0.4,0.5]", "ip_adapter_scale", [0.4, 0.5]),
        ('--ip-adapter-scale {"up":1}', "ip_adapter_scale_config", [b'[{"up": 1.0}, {"up": 1.0}]']),
        ("--controlnet depth --controlnet canny", "controlnet", [b"depth", b"canny"]),
        ("--controlnet-conditioning-scale 0.5", "controlnet_conditioning_scale", [0.5]),
        ("--guess-mode", "guess_mode", [True]),
        ("--num-frames 8", "num_frames", [8]),
        ("--height 64", "height", [64]),
        ("--num-inference-steps 3", "num_inference_steps", [3]),
        ("--steps 3", "num_inference_steps", [3]),
        ("--guidance-scale 0", "guidance_scale", [0.0]),
        ("--seed 1 --seed 2", "seed", [1, 2]),
        ("--seed 0", "seed", [0]),
        ("--scheduler DDIMScheduler", "scheduler", [b"DDIMScheduler"]),
        ('--scheduler-config {"steps_offset":1}', "scheduler_config", [b'{"steps_offset": 1}']),
        ("--param original_size=[64,128]", "original_size", [64, 128]),
        ("--param ip_adapter_weight_type=style", "ip_adapter_weight_type", [b"style"]),
    ],
)
def test_options_become_parameters(
    generate: Any, triton: FakeTriton, options: str, parameter: str, expected: list[Any]
) -> None:
    outcome = generate(*options.split())
    assert outcome.exit_code == 0, outcome.output
    assert triton.calls[0].inputs[parameter].tolist() == expected


@pytest.mark.parametrize("option", ["--image", "--mask-image", "--control-image", "--video"])
def test_files_are_sent(generate: Any, triton: FakeTriton, folder: Path, option: str) -> None:
    generate(option, "a.png")
    assert triton.calls[0].inputs[option[2:].replace("-", "_")].tolist() == [(folder / "a.png").read_bytes()]


def test_what_is_not_given_is_not_sent(generate: Any, triton: FakeTriton) -> None:
    generate()
    assert triton.calls[0].inputs.keys() == {"prompt"}


def test_timeout_is_sent(generate: Any, triton: FakeTriton) -> None:
    generate("--timeout", "9")
    assert 8 < triton.calls[0].inputs["timeout"].item() <= 9


def test_a_preview_is_kept_up_to_date(generate: Any, triton: FakeTriton, folder: Path) -> None:
    def answer(call: Call) -> Any:
        step = {"step": np.array([1], np.int32), "steps": np.array([1], np.int32)}
        yield {**step, "preview": texts(encoded("JPEG", "red"))}
        yield picture()

    triton.answer = answer
    assert generate("--preview", "now.png").exit_code == 0
    assert triton.calls[0].inputs["preview"].tolist() == [True]
    assert opened(folder / "now.png").size == (16, 8)


def test_a_clip_is_saved(generate: Any, triton: FakeTriton, folder: Path) -> None:
    triton.answer = lambda call: iter([clips()])
    assert generate("-o", "out.gif").exit_code == 0
    saved = opened(folder / "out.gif")
    assert saved.n_frames == 3


def test_the_only_bundle_needs_no_name(run: Any, url: str, triton: FakeTriton) -> None:
    outcome = run("generate", "--prompt", "a", url=url)
    assert outcome.exit_code == 2
    assert "--model: which one? Served: none, one, two" in outcome.stderr
    del triton.configs["one"], triton.configs["none"]
    assert run("generate", "--prompt", "a", url=url).exit_code == 0
    assert triton.calls[0].model == "two_stream"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--image nowhere.png", "image: no such file: nowhere.png"),
        ("--param hight=64", "hight: two has no such parameter; did you mean height"),
        ("--ip-adapter-image x=a.png", "ip_adapter_image: no adapter 'x'"),
        ("-o nowhere/out.png", "--output: no such folder: nowhere"),
        ("-o out.txt", "out.txt: pictures are saved as .png, .jpg or .webp"),
        ("-o out.mp4", "out.mp4: pictures are saved as .png, .jpg or .webp"),
        ("-o out.psd", "out.psd: pictures are saved as"),
        ("-o out", "out: pictures are saved as"),
        ("-o folder.png", "--output: folder.png cannot be written"),
        ("--num-frames 8 -o out.png", "out.png: clips are saved as .gif, .webp or .mp4"),
        ("--param num_frames=8 -o out.jpg", "out.jpg: clips are saved as"),
        ("--video a.png -o out.png", "out.png: clips are saved as"),
        ("--num-frames 8 --param output_format=png -o out.png", "out.png: clips are saved as"),
        ("--preview now.mp4", "now.mp4: pictures are saved as"),
        ("--num-frames 8 --preview now.txt", "now.txt: pictures are saved as"),
        ("--param output_type=latent", "output_type: latents are not saved"),
        ("--num-frames 8 --fps 0", "fps: frames per second, above 0 to 1000; got 0"),
        ("--fps nan", "fps: frames per second"),
        (f"--ip-adapter-image {'x' * 5000}", "ip_adapter_image: an entry for each"),
        ("--image \udcff.png", "image: no such file: \\udcff.png"),
        ("-p \udcff", "prompt: takes text; character 0 ('\\udcff') is half of one: a lone surrogate (item 2 of 2)"),
        (f"--param height={'[' * 100_000}", "height: takes whole numbers, got '[[["),
        ("--timeout 0", "timeout: seconds, more than 0"),
        ("--param prompt_3=x", "prompt_3: two has no such parameter"),
    ],
)
def test_a_wrong_request_is_one_line_and_status_1(
    generate: Any, triton: FakeTriton, options: str, message: str
) -> None:
    outcome = generate(*options.split())
    assert outcome.exit_code == 1
    assert f"error: {message}" in outcome.stderr
    assert "Traceback" not in outcome.output
    assert not triton.calls


def test_video_without_a_package_for_it_is_refused_first(
    generate: Any, triton: FakeTriton, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "imageio", None)
    outcome = generate("--num-frames", "8", "-o", "out.mp4")
    assert outcome.exit_code == 1
    assert 'error: .mp4 needs: pip install "imageio[pyav]"; .gif and .webp do not\n' in outcome.stderr
    assert not triton.calls


def test_without_a_name_the_file_fits_the_answer(generate: Any, triton: FakeTriton) -> None:
    assert generate().stdout == "out.png\n"
    triton.answer = lambda call: iter([clips()])
    assert generate("--num-frames", "3").stdout == "out.gif\n"


@pytest.mark.parametrize(
    "options",
    [
        "--scheduler-config {",
        "--height tall",
        "--param height",
        f"--scheduler-config {'[' * 100_000}",
        f"--ip-adapter-scale {'9' * 5000}",
        "--nonsense",
        "--ip-adapter-image plus=a.png --ip-adapter-image b.png",
    ],
)
def test_a_wrong_command_line_is_status_2(generate: Any, triton: FakeTriton, options: str) -> None:
    assert generate(*options.split()).exit_code == 2
    assert not triton.calls


def test_errors_of_the_server_are_one_line(generate: Any, triton: FakeTriton) -> None:
    triton.answer = refuse(grpc.StatusCode.INVALID_ARGUMENT, "height: [64, 512] allowed")
    outcome = generate()
    assert outcome.exit_code == 1
    assert "error: height: [64, 512] allowed\n" in outcome.stderr


def test_nobody_there(run: Any) -> None:
    outcome = run("models", "--url", "127.0.0.1:1")
    assert outcome.exit_code == 1
    assert "error: 127.0.0.1:1: " in outcome.stderr


def test_models_as_a_table_and_as_json(run: Any, url: str) -> None:
    table = run("models", url=url).stdout
    assert "plus (plain, 4 tokens), face (plain, 4 tokens)" in table
    assert "height 64 to 512, rows 16" in table
    described = json.loads(run("models", "--json", url=url).stdout)
    assert list(described) == ["none", "one", "two"]
    assert described["two"]["ip_adapters"][1]["name"] == "face"


def test_version(run: Any) -> None:
    assert run("--version").stdout == f"{__version__}\n"


# Commands of the other packages


@pytest.mark.parametrize(
    ("arguments", "module", "extra"),
    [
        (["export", "bundle.toml", "-o", "repo"], "imprompt_export", "export"),
        (["serve", "repo"], "imprompt_serving.launcher", "server"),
        (["bench", "--help"], "imprompt_bench.cli", "bench"),
    ],
)
def test_a_missing_package_is_named_with_what_to_install(
    run: Any, monkeypatch: pytest.MonkeyPatch, arguments: list[str], module: str, extra: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    outcome = run(*arguments)
    assert outcome.exit_code == 1
    assert f'pip install "imprompt[{extra}]"' in outcome.stderr.replace("\n", "")


def test_the_demo_is_a_package_of_its_own(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "imprompt_demo", None)
    outcome = run("demo")
    assert outcome.exit_code == 1
    assert "in a checkout, run `make demo` or `pip install ./demo`" in outcome.stderr.replace("\n", " ")


def in_a_fresh_python(*arguments: str, without: str = "", code: str = "") -> subprocess.CompletedProcess[str]:
    """`imprompt` in a process that has imported nothing yet, and cannot import the package `without`."""
    script = f"import sys; sys.modules.update({dict.fromkeys(filter(None, [without]))}); {code}\n"
    script += f"from imprompt.cli import app; app({list(arguments)}, prog_name='imprompt')"
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("arguments", "without", "extra"),
    [
        (["demo"], "torch", "cpu,export,server"),
        (["bench", "--help"], "psutil", "bench"),
        (["bench"], "torch", "bench,cpu,export,server"),
    ],
)
def test_a_package_that_is_missed_deep_inside_is_named_too(arguments: list[str], without: str, extra: str) -> None:
    outcome = in_a_fresh_python(*arguments, without=without)
    assert outcome.returncode == 1
    assert "Traceback" not in outcome.stderr
    assert without in outcome.stderr
    assert outcome.stderr.endswith(f'This command needs more packages: pip install "imprompt[{extra}]"\n')


@pytest.mark.parametrize(
    "bug",
    [
        "from imprompt_serving.errors import Nothing",
        "import imprompt_serving.nothing",
        "from json import nothing",
    ],
)
def test_a_bug_of_our_own_is_not_called_a_missing_package(run: Any, monkeypatch: pytest.MonkeyPatch, bug: str) -> None:
    module = ModuleType("imprompt_demo")
    exec(f"def main(arguments):\n    {bug}", vars(module))
    monkeypatch.setitem(sys.modules, "imprompt_demo", module)
    outcome = run("demo")
    assert isinstance(outcome.exception, ImportError)
    assert "pip install" not in outcome.output


def install(monkeypatch: pytest.MonkeyPatch, **modules: dict[str, Any]) -> None:
    for name, content in modules.items():
        module = ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name.replace("__", "."), module)


@pytest.fixture
def exporter(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    class BundleError(Exception):
        pass

    class ParityError(Exception):
        pass

    class EngineError(Exception):
        """As in `imprompt_export`."""

    content: dict[str, Any] = {"BundleError": BundleError, "EngineError": EngineError}
    content["export"] = lambda bundle, repository, refit_from: ["row"]
    parity = {"ParityError": ParityError}
    report = {"table": lambda rows: f"table of {rows}"}
    install(monkeypatch, imprompt_export__parity=parity, imprompt_export__report=report)
    module = SimpleNamespace(**content)
    monkeypatch.setitem(sys.modules, "imprompt_export", module)
    return {"module": module, **content, **parity}


def test_export_prints_its_table(run: Any, exporter: dict[str, Any]) -> None:
    outcome = run("export", "bundle.toml", "-o", "repo")
    assert (outcome.exit_code, outcome.stdout) == (0, "table of ['row']\n")


@pytest.mark.parametrize("kind", ["BundleError", "EngineError", "ParityError"])
def test_export_that_fails_says_why(run: Any, exporter: dict[str, Any], kind: str) -> None:
    def fail(bundle: Path, repository: Path, refit_from: Path | None) -> None:
        raise exporter[kind](f"{bundle}: [engine] is wrong")

    exporter["module"].export = fail
    outcome = run("export", "bundle.toml", "-o", "repo")
    assert outcome.exit_code == 1
    assert "error: bundle.toml: [engine] is wrong" in outcome.stderr


def test_serve_prints_ready_and_the_addresses(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {}

    def serve(repository: Path, *, on_ready: Any, **options: Any) -> int:
        given.update(options, repository=repository)
        on_ready(Addresses(grpc="h:1", metrics="h:3"))
        return 1

    install(monkeypatch, imprompt_serving__launcher={"serve": serve, "LaunchError": RuntimeError})
    outcome = run("serve", "repo", "--grpc-port", "1", "--host", "0.0.0.0", "--drain-timeout", "5")
    assert outcome.stdout == "ready grpc=h:1 metrics=h:3\n"
    assert outcome.exit_code == 1
    assert given == {
        "repository": Path("repo"),
        "grpc_port": 1,
        "http_port": None,
        "metrics_port": 8002,
        "host": "0.0.0.0",
        "drain_timeout": 5.0,
        "verbose": False,
    }


def test_a_server_that_does_not_start_says_why(run: Any) -> None:
    outcome = run("serve", "nowhere")
    assert outcome.exit_code == 1
    assert "error: no model repository at nowhere" in outcome.stderr


@pytest.mark.parametrize(("command", "module"), [("demo", "imprompt_demo"), ("bench", "imprompt_bench__cli")])
def test_arguments_of_the_other_commands_are_passed_on(
    run: Any, monkeypatch: pytest.MonkeyPatch, command: str, module: str
) -> None:
    given: list[str] = []
    install(monkeypatch, **{module: {"main": lambda arguments: given.extend(arguments)}})
    assert run(command, "load", "--callers", "4", "--help").exit_code == 0
    assert given == ["load", "--callers", "4", "--help"]
