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
from fake_triton import (
    EMBED_SIZE,
    Call,
    FakeTriton,
    clips,
    encoded,
    opened,
    picture,
    picture_answer,
    refuse,
    texts,
)
from typer.testing import CliRunner

from imprompt import __version__, cli


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
        ("--ip-adapter-image-per prompt", "ip_adapter_image_per", [b"prompt"]),
        ("--ip-adapter-keyframes 0 --ip-adapter-keyframes 8", "ip_adapter_keyframes", [0, 8]),
        ("--height 64", "height", [64]),
        ("--num-inference-steps 3", "num_inference_steps", [3]),
        ("--steps 3", "num_inference_steps", [3]),
        ("--guidance-scale 0", "guidance_scale", [0.0]),
        ("--seed 1 --seed 2", "seed", [1, 2]),
        ("--seed 0", "seed", [0]),
        ("--scheduler DDIMScheduler", "scheduler", [b"DDIMScheduler"]),
        ('--scheduler-config {"steps_offset":1}', "scheduler_config", [b'{"steps_offset": 1}']),
        ("--original-size 64 128", "original_size", [64, 128]),
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
        ("--image nowhere.png", "--image: no such file: nowhere.png"),
        ("--param hight=64", "hight: two has no such parameter; did you mean height? `imprompt generate --help`"),
        ("--ip-adapter-image x=a.png", "--ip-adapter-image: no adapter 'x'"),
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
        ("--output-type latent -o out.png", "out.png: latents must be saved as .npy"),
        ("--token a\u00e4", "--token: must be printable ASCII"),
        ("--client-key key.pem", "--client-key: needs a --client-certificate"),
        ("--url http://localhost:8000", "--url: must be the host:port"),
        ("--ip-adapter-image-embeds plus=a.png", "--ip-adapter-image-embeds: a.png is not a .npy file"),
        ("--ip-adapter-image-embeds none.npy", "--ip-adapter-image-embeds: cannot read none.npy: No such file"),
        ("--num-frames 8 --fps 0", "--fps: must be a number above 0, at most 1000; got 0"),
        ("--fps nan", "--fps: must be a number above 0"),
        (
            f"--ip-adapter-image {'x' * 5000}",
            "--ip-adapter-image: expected one entry for each adapter (plus, face), or NAME=FILE",
        ),
        ("--image \udcff.png", "--image: no such file: \\udcff.png"),
        ("-p \udcff", "--prompt: must be valid Unicode; character 0 ('\\udcff') is a lone surrogate (item 2 of 2)"),
        (f"--param height={'[' * 100_000}", "--height: must be an integer, got '[[["),
        ("--timeout 0", "--timeout: must be a number of seconds above 0"),
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
        "--original-size 64",
    ],
)
def test_invalid_command_line_exits_with_2(generate: Any, triton: FakeTriton, options: str) -> None:
    assert generate(*options.split()).exit_code == 2
    assert not triton.calls


@pytest.mark.parametrize(
    ("message", "shown"),
    [
        ("height: [64, 512] allowed", "--height: [64, 512] allowed"),
        ("mask_image: needs an image", "--mask-image: needs an image"),
        (
            "strength: less than one step; increase strength or num_inference_steps",
            "--strength: less than one step; increase strength or --num-inference-steps",
        ),
        (
            "controlnet: 'mask_image' is not one of a/mask_image",
            "--controlnet: 'mask_image' is not one of a/mask_image",
        ),
        ("encode_image: no", "encode_image: no"),
        ("the server is stopping", "the server is stopping"),
    ],
)
def test_server_errors_print_one_line_in_words_of_the_command(
    generate: Any, triton: FakeTriton, message: str, shown: str
) -> None:
    triton.answer = refuse(grpc.StatusCode.INVALID_ARGUMENT, message)
    outcome = generate()
    assert outcome.exit_code == 1
    assert f"error: {shown}\n" in outcome.stderr


def test_unreachable_server(run: Any) -> None:
    outcome = run("models", "--url", "127.0.0.1:1")
    assert outcome.exit_code == 1
    assert "error: 127.0.0.1:1: " in outcome.stderr


def test_latents_are_saved(generate: Any, triton: FakeTriton, folder: Path) -> None:
    triton.answer = lambda call: iter([{"latents": np.ones((2, 4, 1, 2), np.float32)}])
    assert generate("--output-type", "latent").stdout == "out.npy\n"
    assert np.load(folder / "out.npy").shape == (2, 4, 1, 2)
    assert triton.calls[0].texts("output_type") == ["latent"]


def test_metadata_can_be_switched_off(generate: Any, folder: Path) -> None:
    generate("--seed", "0", "-o", "with.png")
    generate("--seed", "0", "-o", "without.png", "--no-metadata")
    assert opened(folder / "with.png").text["parameters"].startswith("a cat\nSeed: 0, ")
    assert not opened(folder / "without.png").text


def test_encode_writes_what_generate_takes(run: Any, url: str, triton: FakeTriton, folder: Path) -> None:
    embeds = np.arange(2 * 1 * EMBED_SIZE, dtype=np.float32).reshape(2, 1, EMBED_SIZE)
    triton.answer = lambda call: iter([{"image_embeds_plus": embeds}])
    outcome = run("encode", "--model", "two", "--adapter", "plus", "a.png", "-o", "statue.npy", url=url)
    assert (outcome.exit_code, outcome.stdout) == (0, "statue.npy\n"), outcome.output
    assert triton.calls[0].texts("encode_image") == ["plus"]
    triton.answer = picture_answer
    arguments = ("generate", "--model", "two", "--prompt", "a", "--ip-adapter-image-embeds")
    assert run(*arguments, "plus=statue.npy", "--ip-adapter-image-embeds", "plus=statue.npy", url=url).exit_code == 0
    sent = triton.calls[1].inputs["ip_adapter_image_embeds_plus"]
    assert np.array_equal(sent, np.concatenate([embeds, embeds], axis=1))


def test_encode_needs_names_only_where_there_is_a_choice(run: Any, url: str, triton: FakeTriton, folder: Path) -> None:
    outcome = run("encode", "--model", "two", "a.png", url=url)
    assert outcome.exit_code == 2
    assert "--adapter: name one of the adapters of two: plus, face" in outcome.stderr
    triton.answer = lambda call: iter([{"image_embeds_plain": np.zeros((2, 2, EMBED_SIZE), np.float32)}])
    assert run("encode", "--model", "one", "a.png", "b.png", url=url).stdout == "embeds.npy\n"
    assert len(triton.calls[0].inputs["ip_adapter_image"]) == 2
    assert "embeddings must be saved as .npy" in run("encode", "a.png", "-o", "a.png", url=url).stderr
    assert "images: no such file: none.png" in run("encode", "--model", "one", "none.png", url=url).stderr


def test_connection_options(run: Any, url: str, triton: FakeTriton) -> None:
    for command in (("models",), ("generate", "--prompt", "a", "--model", "one")):
        assert run(*command, "--url", url, "--token", "secret").exit_code == 0
    assert triton.calls[0].metadata["authorization"] == "Bearer secret"
    outcome = run("models", "--url", url, "--root-certificates", "none.pem")
    assert "--root-certificates: cannot read 'none.pem'" in outcome.stderr


@pytest.mark.parametrize(
    ("typed", "completed"),
    [
        ("imprompt gen", "generate"),
        ("imprompt generate --guidance-s", "--guidance-scale"),
        ("imprompt generate --scheduler Euler", "EulerDiscreteScheduler"),
        ("imprompt encode --ad", "--adapter"),
    ],
)
@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_shell_completion(shell: str, typed: str, completed: str) -> None:
    words = {"COMP_WORDS": typed, "COMP_CWORD": str(typed.count(" ")), "_TYPER_COMPLETE_ARGS": typed}
    environment = {"_IMPROMPT_COMPLETE": f"complete_{shell}", "_TYPER_COMPLETE_FISH_ACTION": "get-args", **words}
    outcome = CliRunner(env=environment).invoke(cli.app, prog_name="imprompt")
    assert completed in re.split(r"[\s\"\\:]+", outcome.stdout)


def test_models_as_a_table_and_as_json(run: Any, url: str) -> None:
    table = run("models", url=url).stdout
    assert "plus (plain, 4 tokens), face (plain, 4 tokens)" in table
    assert "height 64 to 512, rows 16" in table
    described = json.loads(run("models", "--json", url=url).stdout)
    assert list(described) == ["none", "one", "two"]
    assert described["two"]["ip_adapters"][1]["name"] == "face"


def test_version(run: Any) -> None:
    assert run("--version").stdout == f"{__version__}\n"
