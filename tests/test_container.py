"""What the container runs, outside of a container: its entry point and its health check."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from imprompt_serving.launcher.health import Health, health_server

DEPLOY = Path(__file__).parents[1] / "deploy"


def run(script: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(DEPLOY / script), *arguments], capture_output=True, text=True, timeout=60, env=os.environ | environment
    )


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (
            ["serve", "/repository", "--restart", "never"],
            [
                "serve",
                "--host",
                "0.0.0.0",
                "--allow-remote",
                "--health-port",
                "8003",
                "/repository",
                "--restart",
                "never",
            ],
        ),
        (["export", "a b.toml", "-o", "/repository"], ["export", "a b.toml", "-o", "/repository"]),
        ([], []),
    ],
)
def test_entry_point_serves_on_all_addresses_with_a_health_port(
    tmp_path: Path, arguments: list[str], expected: list[str]
) -> None:
    command = tmp_path / "imprompt"
    command.write_text("#!/bin/sh\nprintf '%s\\n' \"$@\"\n")
    command.chmod(0o755)
    done = run("entrypoint", *arguments, PATH=f"{tmp_path}:{os.environ['PATH']}")
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[:-1] == (expected or [""])


def test_options_of_the_entry_point_exist() -> None:
    done = subprocess.run(
        [Path(sys.executable).with_name("imprompt"), "serve", "--help"],
        capture_output=True,
        text=True,
        timeout=60,
        env=os.environ | {"COLUMNS": "200"},
    )
    assert all(option in done.stdout for option in ("--host", "--allow-remote", "--health-port", "--restart"))


@pytest.mark.parametrize(("state", "status"), [("serving", 0), ("restarting", 1)])
def test_health_check_follows_readiness(state: Any, status: int) -> None:
    with health_server(Health(max_canary_age=30.0, state=state), "127.0.0.1", 0) as address:
        done = run("healthcheck", IMPROMPT_HEALTH_PORT=address.rpartition(":")[2], http_proxy="http://127.0.0.1:9")
    assert done.returncode == status
    assert state in done.stdout + done.stderr


def test_health_check_fails_without_a_server() -> None:
    with health_server(Health(max_canary_age=30.0), "127.0.0.1", 0) as address:
        port = address.rpartition(":")[2]
    done = run("healthcheck", IMPROMPT_HEALTH_PORT=port)
    assert done.returncode == 1
    assert f"no answer on port {port}" in done.stderr
