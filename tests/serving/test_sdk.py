"""The SDK and the command line against a running Triton."""

from __future__ import annotations

import asyncio
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc
from PIL import Image
from typer.testing import CliRunner

from imprompt import (
    AsyncClient,
    Cancelled,
    Client,
    ConnectionFailed,
    DeadlineExceeded,
    InvalidRequest,
    Progress,
    Result,
)
from imprompt._model import Input
from imprompt.cli import app
from imprompt_bench import cli as bench
from imprompt_bench import target
from imprompt_bench.results import Run
from parity import assert_different, assert_same
from served import Served
from tiny import images

SMALL: dict[str, Any] = {"model": "sd15", "prompt": "a photo of a cat", "num_inference_steps": 4, "seed": 0}
LONG: dict[str, Any] = {**SMALL, "num_inference_steps": 900, "scheduler": "DDIMScheduler"}


def pictures(result: Result) -> np.ndarray:
    return np.stack([np.asarray(image) for image in result.images])


def test_describe(sd15: Served) -> None:
    described = sd15.client.describe("sd15")
    assert [adapter["name"] for adapter in described["ip_adapters"]] == ["plain", "plus", "full_face"]
    assert "DDIMScheduler" in described["schedulers"]
    assert described["limits"]["height"] == [32, 256]
    assert sd15.client.models() == ["sd15"]


def test_stream_yields_progress_and_then_the_result(sd15: Served) -> None:
    *progress, result = sd15.client.stream(**SMALL)
    assert all(isinstance(event, Progress) for event in progress)
    assert [(event.step, event.steps) for event in progress] == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert_same(result, pictures(sd15.client.generate(**SMALL)))


def test_async_client(sd15: Served) -> None:
    async def run() -> tuple[list[Result], list[Any]]:
        async with AsyncClient(sd15.server.grpc_address) as client:
            results = await asyncio.gather(*(client.generate(**{**SMALL, "seed": seed}) for seed in range(3)))
            return results, [event async for event in client.stream(**SMALL)]

    results, events = asyncio.run(run())
    for seed, result in enumerate(results):
        assert_same(result, pictures(sd15.client.generate(**{**SMALL, "seed": seed})))
    assert_same(events[-1], pictures(results[0]))


def test_raw_client_gets_the_outputs_that_it_requests(sd15: Served) -> None:
    prompt = tritonclient.grpc.InferInput("prompt", [1], "BYTES")
    prompt.set_data_from_numpy(np.array([b"a cat"], dtype=object))
    steps = tritonclient.grpc.InferInput("num_inference_steps", [1], "INT32")
    steps.set_data_from_numpy(np.array([2], np.int32))
    wanted = [tritonclient.grpc.InferRequestedOutput(name) for name in ("seeds", "timings")]
    with tritonclient.grpc.InferenceServerClient(sd15.server.grpc_address) as client:
        answers = [client.infer("sd15", [prompt, steps], outputs=outputs) for outputs in (wanted, None)]
    names = [{output.name for output in answer.get_response().outputs} for answer in answers]
    assert names[0] == {"seeds", "timings"}
    assert {"seeds", "timings", "images"} <= names[1]


def test_timeout(sd15: Served) -> None:
    start = time.monotonic()
    with pytest.raises(DeadlineExceeded):
        sd15.client.generate(**LONG, timeout=0.5)
    assert time.monotonic() - start < 5
    assert idle(sd15)


def test_closing_a_stream_stops_its_work(sd15: Served) -> None:
    stream = sd15.client.stream(**LONG)
    next(stream)
    stream.close()
    assert idle(sd15)


def test_canceling_an_async_task_stops_its_work(sd15: Served) -> None:
    async def run() -> None:
        async with AsyncClient(sd15.server.grpc_address) as client:
            task = asyncio.create_task(client.generate(**LONG))
            await asyncio.sleep(0.5)
            task.cancel()
            with pytest.raises((asyncio.CancelledError, Cancelled)):
                await task

    asyncio.run(run())
    assert idle(sd15)


def idle(sd15: Served) -> bool:
    """Return whether a short request is served at once, so no long job is left in the denoiser."""
    for _ in range(100):
        start = time.monotonic()
        sd15.client.generate(**{**SMALL, "num_inference_steps": 2})
        if time.monotonic() - start < 2:
            return True
    return False


def test_generate_from_the_shell(sd15: Served, tmp_path: Path) -> None:
    reference, output = tmp_path / "statue.png", tmp_path / "out.png"
    images.photo(1).save(reference)
    arguments = ["generate", "--url", sd15.server.grpc_address, "--model", "sd15", "--prompt", "a photo of a cat"]
    arguments += ["--ip-adapter-image", f"plain={reference}", "--ip-adapter-scale", "0.6", "--seed", "0"]
    arguments += ["--num-inference-steps", "4", "-o", str(output)]
    outcome = CliRunner().invoke(app, arguments)
    assert outcome.exit_code == 0, outcome.output
    expected = sd15.client.generate(**SMALL, ip_adapter_image={"plain": str(reference)}, ip_adapter_scale=0.6)
    np.testing.assert_array_equal(np.asarray(Image.open(output)), pictures(expected)[0])
    bad = CliRunner().invoke(app, [*arguments, "--height", "100"])
    assert bad.exit_code == 1
    assert "height" in bad.output


def test_embeddings_from_the_shell(sd15: Served, tmp_path: Path) -> None:
    reference, embeds, output = (str(tmp_path / name) for name in ("statue.png", "statue.npy", "out.png"))
    images.photo(1).save(reference)
    server = ["--url", sd15.server.grpc_address, "--model", "sd15"]
    outcome = CliRunner().invoke(app, ["encode", *server, "--adapter", "plus", reference, "-o", embeds])
    assert (outcome.exit_code, outcome.stdout) == (0, f"{embeds}\n"), outcome.output
    arguments = ["--prompt", "a photo of a cat", "--seed", "0", "--steps", "4", "-o", output]
    outcome = CliRunner().invoke(app, ["generate", *server, *arguments, "--ip-adapter-image-embeds", f"plus={embeds}"])
    assert outcome.exit_code == 0, outcome.output
    saved = Image.open(output)
    assert_same(sd15.client.generate(**SMALL, ip_adapter_image={"plus": reference}), np.asarray(saved)[None])
    assert "Steps: 4, Seed: 0, Size: 64x64, Model: sd15" in saved.text["parameters"]  # type: ignore[attr-defined]


@pytest.mark.parametrize("kind", ["BMP", "GIF", "AVIF"])
def test_picture_formats_mean_the_same(sd15: Served, tmp_path: Path, kind: str) -> None:
    photo = images.photo(1, size=(64, 64)).quantize(64).convert("RGB")
    photo.save(file := tmp_path / f"statue.{kind.lower()}", **({"quality": 100} if kind == "AVIF" else {}))
    given = {name: sd15.client.generate(**SMALL, ip_adapter_image={"plain": value}) for name, value in (
        ("file", str(file)), ("pixels", Image.open(file).convert("RGB")), ("other", images.photo(2)),
    )}  # fmt: skip
    assert_same(given["file"], pictures(given["pixels"]))
    assert_different(given["file"], given["other"])


def test_refusals_in_streams_keep_their_status_and_log_nothing(sd15: Served, capfd: pytest.CaptureFixture[str]) -> None:
    capfd.readouterr()
    for _ in range(20):
        with pytest.raises(InvalidRequest, match="num_inference_steps: ") as caught:
            list(sd15.client.stream(**{**SMALL, "num_inference_steps": 0}))
        assert caught.value.parameter == "num_inference_steps"
        assert caught.value.request_id
    time.sleep(0.5)
    assert "HandleCancellation" not in capfd.readouterr().err


def test_timeout_ends_a_stream(sd15: Served) -> None:
    with pytest.raises(DeadlineExceeded, match=r"timeout: .*0\.5 s"):
        list(sd15.client.stream(**LONG, timeout=0.5))
    assert idle(sd15)


def test_errors_that_triton_finds_in_a_stream_are_invalid_requests(sd15: Served) -> None:
    client = Client(sd15.server.grpc_address)
    served = client._model("sd15", client._budget(), stream=True)
    wrong = {**served.inputs, "foo": Input(name="foo", dtype="INT32", dims=(1,))}
    client._models["sd15", True] = replace(served, inputs=wrong)
    with client, pytest.raises(InvalidRequest, match="unexpected inference input 'foo'") as caught:
        list(client.stream(**SMALL, foo=1))
    assert caught.value.parameter == "foo"


def test_large_seeds_are_reported_unchanged(sd15: Served) -> None:
    result = sd15.client.generate(**{**SMALL, "seed": 2**64 - 1})
    assert result.seeds == [2**64 - 1]
    assert_same(result, pictures(sd15.client.generate(**{**SMALL, "seed": -1})))


def test_proxy_from_the_environment_is_ignored(sd15: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "https_proxy", "grpc_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("no_proxy", "NO_PROXY", "no_grpc_proxy"):
        monkeypatch.delenv(name, raising=False)
    with Client(sd15.server.grpc_address) as client:
        assert client.models() == ["sd15"]


def test_metrics_port_is_refused_as_the_address(sd15: Served) -> None:
    with (
        Client(sd15.server.metrics_address) as client,
        pytest.raises(ConnectionFailed, match="the address must be the host:port of the server's gRPC endpoint"),
    ):
        client.models()


def test_bench_runs_without_metrics(
    sd15: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(target, "METRICS_PORT", 1)
    output = tmp_path / "run.json"
    extent = "--scenario closed --callers 1 --size 64 --steps 2 --requests 2".split()
    address = ["--url", sd15.server.grpc_address, "--model", "sd15"]
    assert bench.main([*address, *extent, "-o", str(output)]) == 0
    assert "no metrics of sd15 on port 1" in capsys.readouterr().err
    (point,) = Run.load(output).measurements
    assert (len(point.samples), point.server) == (2, None)
    assert bench.main([*address, *extent, "--metrics", "127.0.0.1:1", "-o", str(tmp_path / "none.json")]) == 1
    assert "no metrics at 127.0.0.1:1" in capsys.readouterr().err


def test_models_from_the_shell(sd15: Served) -> None:
    outcome = CliRunner().invoke(app, ["models", "--url", sd15.server.grpc_address, "--json"])
    assert outcome.exit_code == 0, outcome.output
    assert json.loads(outcome.output)["sd15"]["family"] == "sd15"


def test_export_writes_its_report_to_the_repository(sd15: Served) -> None:
    report = json.loads((sd15.bundle.repository / "sd15/export.json").read_text())
    rows = report["engines"]
    assert {"unet", "vae_decoder", "text_encoder", "image_encoder_plain"} <= {row["engine"] for row in rows}
    assert all(row["difference"] <= row["allowed"] for row in rows)
    unet = [row["sizes"] for row in rows if row["engine"] == "unet"]
    for axis in ("batch", "h", "tokens_plain", "scale"):
        assert len({sizes[axis] for sizes in unet}) >= 2, axis
