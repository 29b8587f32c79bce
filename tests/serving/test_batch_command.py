"""`imprompt batch` against a running Triton: killed and continued, and on a Ray cluster that loses a node."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from served import Served

JOBS = 96
WAIT_S = 120.0


@pytest.fixture
def jobs(tmp_path: Path, sd15: Served) -> Path:
    file = tmp_path / "jobs.jsonl"
    lines = (
        {
            "id": f"cat{index:03d}",
            "prompt": f"cat {index}",
            "num_inference_steps": 2,
            "seed": index,
        }
        for index in range(JOBS)
    )
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


def start(jobs: Path, sd15: Served, *options: str) -> subprocess.Popen[str]:
    command = [str(Path(sys.executable).with_name("imprompt")), "batch", str(jobs), "-o", str(jobs.parent / "out")]
    options = ("--model", "sd15", "--url", sd15.server.grpc_address, *options)
    return subprocess.Popen([*command, *options], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finished(jobs: Path) -> int:
    return len(list((jobs.parent / "out/.records").glob("cat*.json")))


def wait_for(condition: Callable[[], bool], run: subprocess.Popen[str]) -> None:
    until = time.monotonic() + WAIT_S
    while not condition():
        assert run.poll() is None, run.communicate()
        assert time.monotonic() < until
        time.sleep(0.01)


def assert_whole(jobs: Path, sd15: Served) -> None:
    """Every job has one result and its files, and nothing else is in the folder."""
    out = jobs.parent / "out"
    results = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    assert [each["id"] for each in results] == [f"cat{index:03d}" for index in range(JOBS)]
    assert [each["seeds"] for each in results] == [[index] for index in range(JOBS)]
    files = {each["files"][0] for each in results}
    assert {file.name for file in out.iterdir()} == files | {".records", "results.jsonl"}
    assert {file.name for file in (out / ".records").iterdir() if file.suffix != ".json"} == {"lock"}
    expected = sd15.generate(prompt="cat 7", num_inference_steps=2, seed=7).images[0]
    assert np.array_equal(np.asarray(Image.open(out / "cat007.png")), np.asarray(expected))


def test_a_batch_that_was_killed_continues(jobs: Path, sd15: Served) -> None:
    killed = start(jobs, sd15)
    wait_for(lambda: finished(jobs) >= 5, killed)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    before = finished(jobs)
    assert before < JOBS
    run = start(jobs, sd15)
    stdout, stderr = run.communicate(timeout=WAIT_S)
    assert run.returncode == 0, stderr
    assert f"{JOBS - before} done, 0 failed, {before} were done already" in stdout
    assert_whole(jobs, sd15)


@pytest.fixture
def cluster() -> Iterator[Any]:
    """Start a Ray cluster on loopback, whose first node has room for one worker."""
    pytest.importorskip("ray", reason="needs the extra `ray`")
    from ray.cluster_utils import Cluster

    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "node_ip_address": "127.0.0.2"})
    try:
        yield made
    finally:
        made.shutdown()


def test_a_ray_cluster_that_loses_a_node_finishes_the_batch(jobs: Path, sd15: Served, cluster: Any) -> None:
    lost = cluster.add_node(num_cpus=1, node_ip_address="127.0.0.3")
    run = start(jobs, sd15, "--ray", "--ray-address", cluster.address, "--workers", "2", "--in-flight", "2")
    wait_for(lambda: finished(jobs) >= 5, run)
    cluster.remove_node(lost, allow_graceful=False)
    assert finished(jobs) < JOBS
    cluster.add_node(num_cpus=1, node_ip_address="127.0.0.4")
    stdout, stderr = run.communicate(timeout=WAIT_S)
    assert run.returncode == 0, stderr[-3000:]
    assert "0 failed" in stdout
    assert_whole(jobs, sd15)
