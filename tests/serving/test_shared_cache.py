"""The shared cache of embeddings, with a real Redis, and with stores that are slow, down, or wrong."""

from __future__ import annotations

import asyncio
import shutil
import socket
import subprocess
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bundles import ExportedBundle
from imprompt import Client
from imprompt_serving.launcher import Server
from imprompt_serving.pipeline import shared_cache
from imprompt_serving.pipeline.models import Tensors
from imprompt_serving.pipeline.shared_cache import MAX_FAILURES, TIMEOUT_S, VARIABLE, SharedCache, open_store
from served import read_metrics
from tiny import images

pytest.importorskip("redis", reason="needs the extra `cache`")
needs_redis = pytest.mark.skipif(not shutil.which("redis-server"), reason="needs redis-server (apt-get install redis)")


class Encoder:
    """Models with one encoder, whose answer depends on its input."""

    def __init__(self) -> None:
        self.calls = 0

    async def call(self, model: str, tensors: Mapping[str, np.ndarray]) -> Tensors:
        self.calls += 1
        return {"embeds": tensors["pixels"] * 2, "count": np.array([[self.calls]], np.int64)}

    def stream(self, model: str, tensors: Mapping[str, np.ndarray]) -> AsyncIterator[Tensors]:
        raise NotImplementedError


class Member:
    """A server's view of the cache: its own encoder, and what the cache counts."""

    def __init__(self, store: Any, folder: Path) -> None:
        self.encoder, self.outcomes = Encoder(), Counter[str]()
        self.cache = SharedCache(self.encoder, store, {"m": folder}, lambda outcome: self.outcomes.update([outcome]))

    async def call(self, value: float, *, model: str = "m", size: int = 4) -> Tensors:
        answer = await self.cache.call(model, {"pixels": np.full((1, size), value, np.float32)})
        assert answer["embeds"].tolist() == [[2 * value] * size]
        return answer

    async def start(self) -> None:
        """Make the calls that show the form of an answer, and wait for the hash of the files."""
        await self.call(-1.0)
        while self.cache._encoders["m"].digest() is None:
            await asyncio.sleep(0.001)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "1").mkdir()
    (tmp_path / "1/model.onnx").write_bytes(b"weights")
    return tmp_path / "1"


@pytest.fixture(scope="module")
def redis_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with closing(socket.socket()) as bound:
        bound.bind(("127.0.0.1", 0))
        port = bound.getsockname()[1]
    options = ("--port", str(port), "--bind", "127.0.0.1", "--save", "", "--dir", str(tmp_path_factory.mktemp("redis")))
    process = subprocess.Popen(["redis-server", *options], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert any("Ready to accept connections" in line for line in process.stdout)
    yield f"redis://127.0.0.1:{port}"
    process.terminate()
    process.wait(10)


def run(coroutine: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(coroutine, 30))


async def written(member: Member) -> None:
    await asyncio.gather(*member.cache._writes)


@needs_redis
def test_members_share_answers(redis_url: str, folder: Path) -> None:
    async def scenario() -> None:
        first, second = Member(open_store(redis_url), folder), Member(open_store(redis_url), folder)
        for member in (first, second):
            await member.start()
        answers = [await first.call(value) for value in (1.0, 2.0)]
        await written(first)
        calls = second.encoder.calls
        shared = [await second.call(value) for value in (1.0, 2.0)]
        assert second.encoder.calls == calls
        assert second.outcomes["hit"] == 2
        assert first.outcomes["miss"] == 2
        for own, other in zip(answers, shared, strict=True):
            assert own.keys() == other.keys()
            assert all(np.array_equal(own[name], other[name]) for name in own)
            assert all(own[name].dtype == other[name].dtype for name in own)
        await second.call(3.0)
        assert second.outcomes["miss"] == 1
        await second.call(1.0, size=5)
        assert second.outcomes["hit"] == 2, "another shape"
        await second.call(1.0, model="other")
        assert second.outcomes.total() == 5, "only encoders are cached"

    run(scenario())


@needs_redis
def test_other_weights_have_other_keys(redis_url: str, folder: Path, tmp_path: Path) -> None:
    async def scenario() -> None:
        first = Member(open_store(redis_url), folder)
        await first.start()
        await first.call(11.0)
        await written(first)
        retrained = tmp_path / "2"
        retrained.mkdir()
        (retrained / "model.onnx").write_bytes(b"weighty")
        second = Member(open_store(redis_url), retrained)
        await second.start()
        await second.call(11.0)
        assert second.outcomes["hit"] == 0
        assert second.outcomes["miss"] == 1

    run(scenario())


class Dictionary:
    """A store in memory, which changes what it returns."""

    def __init__(self, change: Callable[[bytes], bytes] = lambda value: value) -> None:
        self.values: dict[bytes, bytes] = {}
        self._change = change

    async def get(self, name: bytes) -> bytes | None:
        return self._change(self.values[name]) if name in self.values else None

    async def set(self, name: bytes, value: bytes, *, ex: int) -> None:
        self.values[name] = value


@pytest.mark.parametrize(
    "change",
    [
        lambda value: b"",
        lambda value: b"\xff" + value,
        lambda value: value[:-1],
        lambda value: value.replace(b"<f4", b"<f8"),
        lambda value: value.replace(b"<f4", b"|O8"),
        lambda value: value.replace(np.float32(42.0).tobytes(), np.float32(np.nan).tobytes()),
        lambda value: value.replace(b"embeds", b"embeda"),
    ],
    ids=["empty", "garbage", "short", "type", "objects", "nan", "name"],
)
def test_wrong_values_are_computed_again(change: Callable[[bytes], bytes], folder: Path) -> None:
    async def scenario() -> None:
        member = Member(Dictionary(change), folder)
        await member.start()
        await member.call(21.0)
        await written(member)
        calls = member.encoder.calls
        await member.call(21.0)
        assert member.encoder.calls == calls + 1
        assert member.outcomes["error"] == 1

    run(scenario())


class Hanging:
    """A port that accepts connections, and never answers; or, closed, one that refuses them."""

    def __init__(self, *, closed: bool = False) -> None:
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"redis://127.0.0.1:{self._socket.getsockname()[1]}"
        if closed:
            self._socket.close()


@pytest.mark.parametrize("closed", [False, True], ids=["hanging", "down"])
def test_a_broken_store_costs_little_and_soon_nothing(
    closed: bool, folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(shared_cache, "PAUSE_S", 0.5)

    async def scenario() -> None:
        member = Member(open_store(Hanging(closed=closed).url), folder)
        await member.start()
        began = time.perf_counter()
        for value in range(200):
            await member.call(float(value))
        seconds = time.perf_counter() - began
        assert seconds < (MAX_FAILURES + 2) * TIMEOUT_S + 1.0
        assert member.outcomes["error"] <= MAX_FAILURES + 2
        assert member.outcomes["skipped"] > 150
        assert any("the shared cache fails" in record.message for record in caplog.records)
        errors = member.outcomes["error"]
        until = time.monotonic() + 10
        while member.outcomes["error"] == errors and time.monotonic() < until:
            await member.call(1000.0)
            await asyncio.sleep(0.02)
        assert member.outcomes["error"] > errors, "no further attempt"
        for task in member.cache._writes:
            task.cancel()

    run(scenario())


def test_the_url_is_checked() -> None:
    with pytest.raises(ValueError, match="scheme"):
        open_store("http://cache:6379")


@needs_redis
def test_servers_share_embeddings(
    bundle: Callable[[str], ExportedBundle], redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second server takes prompts and pictures of the first from the cache, and makes the same picture."""
    monkeypatch.setenv(VARIABLE, redis_url)
    pictures, photos = [], images.photos(3, seed=80)

    def outcomes(server: Server) -> dict[str, float]:
        name = 'imprompt_shared_cache_total{model="sd15",outcome='
        samples = read_metrics(server.metrics_address)
        return {key.split('"')[3]: value for key, value in samples.items() if key.startswith(name)}

    for number in range(2):
        server = Server(bundle("sd15").repository)
        with server, Client(server.grpc_address) as client:

            def generate(index: int, client: Client = client) -> np.ndarray:
                photo = {"plain": photos[index]}
                result = client.generate(
                    model="sd15", prompt=f"{index}", ip_adapter_image=photo, seed=1, num_inference_steps=2,
                    output_type="np",
                )  # fmt: skip
                return np.asarray(result.images[0])

            until = time.monotonic() + 30
            while not outcomes(server)["miss"] + outcomes(server)["hit"]:  # until the files are hashed
                assert time.monotonic() < until
                generate(2)
            before = outcomes(server)
            pictures.append(generate(number and 1))
            pictures.append(generate(1))
            time.sleep(0.3)  # a separate thread updates the metrics
            gained = {name: value - before[name] for name, value in outcomes(server).items()}
            assert gained["error"] == 0
            if number:
                assert gained["miss"] == 0, gained
                assert gained["hit"] == 6, gained
    assert np.array_equal(pictures[1], pictures[2])
    assert np.array_equal(pictures[2], pictures[3])
    assert not np.array_equal(pictures[0], pictures[1])
