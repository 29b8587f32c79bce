"""`imprompt generate` and `imprompt models`, against the fake server."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from fake_triton import Call, FakeTriton, clips, encoded, opened, picture, refuse, texts

from imprompt import __version__


@pytest.fixture
def generate(run: Any, url: str) -> Any:
    return lambda *options, model="two": run("generate", "--model", model, "--prompt", "a cat", *options, url=url)


def test_saved_picture_is_printed(generate: Any, folder: Path) -> None:
    outcome = generate("-o", "cat.png")
    assert (outcome.exit_code, outcome.stdout) == (0, "cat.png\n"), outcome.output
    assert opened(folder / "cat.png").size == (16, 8)


def test_seeds_time_and_warnings_go_to_stderr(generate: Any, triton: FakeTriton, folder: Path) -> None:
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


def test_several_pictures_are_numbered(generate: Any, triton: FakeTriton, folder: Path) -> None:
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
        ("--lora soft=0.8 --lora bold=-1", "lora", [b'{"soft": 0.8, "bold": -1.0}']),
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
def test_picture_files_are_sent(generate: Any, triton: FakeTriton, folder: Path, option: str) -> None:
    generate(option, "a.png")
    assert triton.calls[0].inputs[option[2:].replace("-", "_")].tolist() == [(folder / "a.png").read_bytes()]


def test_missing_options_are_not_sent(generate: Any, triton: FakeTriton) -> None:
    generate()
    assert triton.calls[0].inputs.keys() == {"prompt"}


def test_timeout_is_sent(generate: Any, triton: FakeTriton) -> None:
    generate("--timeout", "9")
    assert 8 < triton.calls[0].inputs["timeout"].item() <= 9


def test_preview_file_is_updated(generate: Any, triton: FakeTriton, folder: Path) -> None:
    def answer(call: Call) -> Any:
        step = {"step": np.array([1], np.int32), "steps": np.array([1], np.int32)}
        yield {**step, "preview": texts(encoded("JPEG", "red"))}
        yield picture()

    triton.answer = answer
    assert generate("--preview", "now.png").exit_code == 0
    assert triton.calls[0].inputs["preview"].tolist() == [True]
    assert opened(folder / "now.png").size == (16, 8)


def test_clip_is_saved(generate: Any, triton: FakeTriton, folder: Path) -> None:
    triton.answer = lambda call: iter([clips()])
    assert generate("-o", "out.gif").exit_code == 0
    saved = opened(folder / "out.gif")
    assert saved.n_frames == 3


def test_model_may_be_omitted_if_one_bundle_is_served(run: Any, url: str, triton: FakeTriton) -> None:
    outcome = run("generate", "--prompt", "a", url=url)
    assert outcome.exit_code == 2
    assert "--model: name one of the served bundles: none, one, two" in outcome.stderr
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
        ("-o out.txt", "out.txt: pictures must be saved as .png, .jpg or .webp"),
        ("-o out.mp4", "out.mp4: pictures must be saved as .png, .jpg or .webp"),
        ("-o out.psd", "out.psd: pictures must be saved as"),
        ("-o out", "out: pictures must be saved as"),
        ("-o folder.png", "--output: cannot write to folder.png"),
        ("--num-frames 8 -o out.png", "out.png: clips must be saved as .gif, .webp or .mp4"),
        ("--param num_frames=8 -o out.jpg", "out.jpg: clips must be saved as"),
        ("--video a.png -o out.png", "out.png: clips must be saved as"),
        ("--num-frames 8 --param output_format=png -o out.png", "out.png: clips must be saved as"),
        ("--preview now.mp4", "now.mp4: pictures must be saved as"),
        ("--num-frames 8 --preview now.txt", "now.txt: pictures must be saved as"),
        ("--param output_type=latent", "output_type: latents cannot be saved"),
        ("--num-frames 8 --fps 0", "fps: must be a number above 0, at most 1000; got 0"),
        ("--fps nan", "fps: must be a number above 0"),
        (f"--ip-adapter-image {'x' * 5000}", "ip_adapter_image: expected one entry for each adapter (plus, face)"),
        ("--image \udcff.png", "image: no such file: \\udcff.png"),
        ("-p \udcff", "prompt: must be valid Unicode; character 0 ('\\udcff') is a lone surrogate (item 2 of 2)"),
        (f"--param height={'[' * 100_000}", "height: must be an integer, got '[[["),
        ("--timeout 0", "timeout: must be a number of seconds above 0"),
        ("--param prompt_3=x", "prompt_3: two has no such parameter"),
    ],
)
def test_invalid_request_prints_one_line_and_exits_with_1(
    generate: Any, triton: FakeTriton, options: str, message: str
) -> None:
    outcome = generate(*options.split())
    assert outcome.exit_code == 1
    assert f"error: {message}" in outcome.stderr
    assert "Traceback" not in outcome.output
    assert not triton.calls


def test_mp4_without_imageio_fails_before_sending(
    generate: Any, triton: FakeTriton, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "imageio", None)
    outcome = generate("--num-frames", "8", "-o", "out.mp4")
    assert outcome.exit_code == 1
    assert 'error: saving .mp4 requires: pip install "imageio[pyav]"' in outcome.stderr
    assert not triton.calls


def test_default_output_file_depends_on_the_result(generate: Any, triton: FakeTriton) -> None:
    assert generate().stdout == "out.png\n"
    triton.answer = lambda call: iter([clips()])
    assert generate("--num-frames", "3").stdout == "out.gif\n"


@pytest.mark.parametrize(
    "options",
    [
        "--scheduler-config {",
        "--lora soft",
        "--lora soft=much",
        "--height tall",
        "--param height",
        f"--scheduler-config {'[' * 100_000}",
        f"--ip-adapter-scale {'9' * 5000}",
        "--nonsense",
        "--ip-adapter-image plus=a.png --ip-adapter-image b.png",
    ],
)
def test_invalid_command_line_exits_with_2(generate: Any, triton: FakeTriton, options: str) -> None:
    assert generate(*options.split()).exit_code == 2
    assert not triton.calls


def test_server_errors_print_one_line(generate: Any, triton: FakeTriton) -> None:
    triton.answer = refuse(grpc.StatusCode.INVALID_ARGUMENT, "height: [64, 512] allowed")
    outcome = generate()
    assert outcome.exit_code == 1
    assert "error: height: [64, 512] allowed\n" in outcome.stderr


def test_unreachable_server(run: Any) -> None:
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
