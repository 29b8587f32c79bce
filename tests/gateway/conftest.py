"""A gateway process in front of the embedded bundle."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page

import chromium
from imprompt_serving.launcher import Server
from served import Served


@contextmanager
def running(*options: str) -> Iterator[str]:
    """Run `imprompt gateway` on a free port, and yield its address; it must end with status 0."""
    command = [str(Path(sys.executable).with_name("imprompt")), "gateway", "--port", "0", *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        ready, _, address = process.stdout.readline().strip().partition(" ")
        assert ready == "ready"
        yield address
    finally:
        process.terminate()
        status = process.wait(60)
    assert status == 0


@pytest.fixture(scope="session")
def gateway(world: Server) -> Iterator[str]:
    """Serve `world` and `world_lcm` over HTTP: `http://127.0.0.1:PORT`."""
    with running("--url", world.grpc_address) as address:
        yield address


@pytest.fixture(scope="session")
def guarded(world: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Serve them to callers who send the key `first` or `second`."""
    keys = tmp_path_factory.mktemp("keys") / "keys.txt"
    keys.write_text("# team a\nfirst\n\n# team b\nsecond\n")
    with running("--url", world.grpc_address, "--api-key-file", str(keys)) as address:
        yield address


@pytest.fixture(scope="module")
def lora_gateway(served: Callable[[str], Served]) -> Iterator[str]:
    """Serve a bundle whose requests choose LoRAs."""
    with running("--url", served("inductor").server.grpc_address) as address:
        yield address


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Run Chromium. Until the end of its module, Playwright keeps an event loop running, which bars `asyncio.run`."""
    with chromium.launched() as browser:
        yield browser


@pytest.fixture
def page(browser: Browser, gateway: str) -> Iterator[Page]:
    """Open the playground with a prompt, few steps, and a fixed seed."""
    with (
        browser.new_context(permissions=["clipboard-read", "clipboard-write"]) as context,
        chromium.opened(context, gateway) as page,
    ):
        chromium.wait_for_models(page)
        page.fill("#prompt", "a fish")
        page.fill("#steps", "4")
        page.fill("#seed", "4")
        yield page
