"""curl, the snippets of the gateway's page, and a gateway under load."""

from __future__ import annotations

import io
import json
import re
import subprocess
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
from PIL import Image

from imprompt_demo.world import picture
from imprompt_serving.launcher import Server
from served import read_metrics

ROOT = Path(__file__).parents[2]
PAGE, README = ROOT / "docs/gateway.md", ROOT / "README.md"
BLOCK = re.compile(r"^```(python|sh)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def curl(*arguments: str) -> bytes:
    command = ["curl", "--silent", "--show-error", "--max-time", "300", *arguments]
    return subprocess.run(command, check=True, capture_output=True).stdout


def generate(gateway: str, body: dict[str, Any], *arguments: str) -> bytes:
    """Send a request for pictures of `world`."""
    given = json.dumps({"model": "world", "prompt": "a star", "num_inference_steps": 4} | body)
    json_type = ("-H", "Content-Type: application/json")
    return curl(f"{gateway}/v1/images/generations", *json_type, "-d", given, *arguments)


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Create the files that the page names, in a new working directory."""
    monkeypatch.chdir(tmp_path)
    picture(64).image().save("garden.png")
    picture(62).image().save("statue.png")
    hole = Image.new("RGBA", (64, 64), "black")
    hole.putalpha(picture(64).mask_image().point(lambda value: 255 - value))
    hole.save("hole.png")


@pytest.mark.usefixtures("files")
def test_snippets_of_the_page_run(gateway: str) -> None:
    text = PAGE.read_text(encoding="utf-8")
    names: dict[str, Any] = {}
    ran = {"python": 0, "sh": 0}
    for language, snippet in BLOCK.findall(text):
        if language == "sh" and not snippet.startswith("curl"):
            continue  # these install and start what the fixture has started
        snippet = snippet.replace("http://localhost:8080", gateway).replace("sd15", "world")
        snippet = re.sub(r'"num_inference_steps": 20', '"num_inference_steps": 4', snippet)
        ran[language] += 1
        if language == "python":
            exec(compile(snippet, str(PAGE), "exec"), names)
        else:
            subprocess.run(["sh", "-euc", snippet], check=True, timeout=300)
    assert ran == {"python": 4, "sh": 3}
    sizes = [Image.open(name).size for name in ("flower-0.png", "flower-1.png", "flower.png", "cat.png", "flower.gif")]
    assert sizes == [(64, 64)] * 5
    assert getattr(Image.open("flower.gif"), "n_frames", 1) == 8
    assert Image.open(io.BytesIO(names["flower"])).size == (64, 64)


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp"])
def test_accept_answers_with_the_file(gateway: str, tmp_path: Path, kind: str) -> None:
    headers = tmp_path / "headers"
    data = generate(gateway, {"seed": 7}, "-H", f"Accept: image/{kind}", "-D", str(headers))
    assert Image.open(io.BytesIO(data)).format == kind.upper()
    lines = dict(line.split(": ", 1) for line in headers.read_text().lower().splitlines() if ": " in line)
    assert lines["content-type"] == f"image/{kind}"
    assert lines["imprompt-seeds"] == "[7]"
    assert json.loads(lines["imprompt-timings"])["total"] > 0


def test_same_seed_gives_the_same_file(gateway: str) -> None:
    first = json.loads(generate(gateway, {}))
    again = json.loads(generate(gateway, {"seed": first["seeds"][0]}))
    other = json.loads(generate(gateway, {}))
    assert first["data"] == again["data"] != other["data"]


@pytest.mark.usefixtures("files")
def test_form_of_curl(gateway: str) -> None:
    fields = ("model=world", "prompt=a heart", "image=@garden.png", "mask=@hole.png", "n=2", "num_inference_steps=4")
    nested = ("ip_adapter_image[plain][]=@statue.png", "ip_adapter_scale[plain]=0.5", "seed[]=1", "seed[]=2")
    form = [argument for field in (*fields, *nested) for argument in ("-F", field)]
    answer = json.loads(curl(f"{gateway}/v1/images/edits", *form))
    assert (len(answer["data"]), answer["seeds"]) == (2, [1, 2])


def test_events_of_a_stream_arrive_one_by_one(gateway: str) -> None:
    body = {"stream": True, "num_inference_steps": 6, "seed": 5}
    text = generate(gateway, body, "--no-buffer").decode()
    names = re.findall(r"^event: (.*)$", text, re.MULTILINE)
    assert names == ["image_generation.progress"] * 6 + ["image_generation.completed"]
    assert all(json.loads(data) for data in re.findall(r"^data: (.*)$", text, re.MULTILINE))


def test_server_behind_the_gateway_is_ready(gateway: str) -> None:
    assert json.loads(curl(f"{gateway}/readyz")) == {"ready": True}


def until(holds: Callable[[], bool], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def world_metric(server: Server, name: str) -> float:
    """Sum a metric over the models."""
    return sum(value for key, value in read_metrics(server.metrics_address).items() if key.startswith(name))


def callers_that_left(gateway: str) -> float:
    """Count the requests whose callers left before the answer."""
    metrics = read_metrics(gateway.removeprefix("http://"))
    return metrics.get('imprompt_gateway_requests_total{route="/v1/images/generations",status="499"}', 0.0)


def test_one_of_eight_callers_leaves(gateway: str, world: Server) -> None:
    """The others get their pictures, and the work for the one that left ends."""
    cancelled = 'imprompt_jobs_ended_total{model="world_denoiser",outcome="cancelled"'
    before, left = world_metric(world, cancelled), callers_that_left(gateway)
    client: Any = openai.OpenAI(base_url=f"{gateway}/v1", api_key="none", max_retries=0)
    with ThreadPoolExecutor(7) as callers:
        body = json.dumps({"model": "world", "prompt": "a star", "num_inference_steps": 1000})
        arguments = ["-H", "Content-Type: application/json", "-d", body]
        leaving = subprocess.Popen(["curl", "--silent", f"{gateway}/v1/images/generations", *arguments])
        until(lambda: world_metric(world, 'imprompt_jobs{model="world_denoiser",state="running"') >= 1)

        def ask(seed: int) -> Any:
            steps = {"num_inference_steps": 8, "seed": seed}
            return client.images.generate(model="world", prompt="a flower", extra_body=steps)

        answers = [callers.submit(ask, seed) for seed in range(7)]
        leaving.kill()
        leaving.wait()
        pictures = [answer.result().data[0].b64_json for answer in answers]
    assert len({*pictures}) == 7
    until(lambda: world_metric(world, cancelled) == before + 1)
    until(lambda: world_metric(world, "imprompt_requests_in_flight") == 0)
    until(lambda: callers_that_left(gateway) == left + 1)


def test_caller_that_leaves_a_stream_cancels_it(gateway: str, world: Server) -> None:
    client: Any = openai.OpenAI(base_url=f"{gateway}/v1", api_key="none", max_retries=0)
    body = {"num_inference_steps": 1000}
    events = client.images.generate(model="world", prompt="a star", stream=True, extra_body=body)
    assert next(iter(events)).type == "image_generation.progress"
    events.close()
    until(lambda: world_metric(world, "imprompt_requests_in_flight") == 0)


def test_full_queue_is_refused_with_the_time_to_wait(gateway: str, world: Server) -> None:
    """Requests of 128 rows each: one runs, one waits, and there is no room for more."""
    client: Any = openai.OpenAI(base_url=f"{gateway}/v1", api_key="none", max_retries=0)
    body = {"num_inference_steps": 50}
    refused = threading.Event()
    errors: list[openai.APIStatusError] = []

    def ask() -> None:
        try:
            events = client.images.generate(model="world", prompt="a", n=64, stream=True, extra_body=body)
            next(iter(events))
            refused.wait(120)
            events.close()
        except openai.APIStatusError as error:
            errors.append(error)
            refused.set()

    callers = [threading.Thread(target=ask) for _ in range(4)]
    for caller in callers:
        caller.start()
    assert refused.wait(120)
    error = errors[0]
    assert isinstance(error, openai.RateLimitError)
    assert error.code == "queue_full"
    assert int(error.response.headers["retry-after"]) >= 1
    for caller in callers:
        caller.join(120)
    until(lambda: world_metric(world, "imprompt_requests_in_flight") == 0)


@pytest.mark.usefixtures("files")
def test_snippets_of_the_readme_make_the_same_picture(gateway: str) -> None:
    """The README sends the same request with curl and with the `openai` package."""
    pictures = {}
    for language, snippet in BLOCK.findall(README.read_text(encoding="utf-8")):
        if "http://localhost:8080" not in snippet:
            continue
        snippet = snippet.replace("http://localhost:8080", gateway).replace("sd15", "world")
        if language == "python":
            exec(compile(snippet, str(README), "exec"), {})
        else:
            subprocess.run(["sh", "-euc", snippet], check=True, timeout=300)
        pictures[language] = np.asarray(Image.open("garden.png").convert("RGB"), np.int16)
    assert np.abs(pictures["python"] - pictures["sh"]).max() <= 2
