"""`imprompt batch`: job files, the output folder, and the fake server."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from fake_triton import Call, FakeTriton, opened, picture, refuse

from imprompt import AsyncClient
from imprompt._batch.folder import BatchFolder
from imprompt._batch.jobs import BatchJob, JobError, JobFile
from imprompt._batch.runner import ServerAway, run_jobs


def write(folder: Path, *jobs: object) -> Path:
    file = folder / "jobs.jsonl"
    file.write_text("".join((job if isinstance(job, str) else json.dumps(job)) + "\n" for job in jobs))
    return file


def results(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "out/results.jsonl").read_text().splitlines()]


@pytest.fixture
def batch(run: Any, url: str, folder: Path) -> Any:
    return lambda *options: run("batch", "jobs.jsonl", "-o", "out", "--model", "two", *options, url=url)


def test_pictures_and_results_in_the_order_of_the_jobs(batch: Any, folder: Path, triton: FakeTriton) -> None:
    write(folder, {"id": "cat", "prompt": "a cat", "num_inference_steps": 3}, "", {"prompt": ["a dog", "a fish"]})
    triton.answer = lambda call: iter([picture(len(call.texts("prompt")))])
    outcome = batch("--in-flight", "1")
    assert outcome.exit_code == 0, outcome.output
    assert [(each["id"], each["files"]) for each in results(folder)] == [
        ("cat", ["cat.png"]),
        ("000003", ["000003.0.png", "000003.1.png"]),
    ]
    assert all(opened(folder / "out" / name).size == (16, 8) for each in results(folder) for name in each["files"])
    assert "2 done, 0 failed, 0 were done already" in outcome.stdout


def test_pictures_of_a_job_lie_relative_to_its_file(folder: Path) -> None:
    link = "data:image/png;base64,AA=="
    job = {"prompt": "x", "image": "a.png", "ip_adapter_image": {"plus": ["b/c.png", "/d.png", link]}, "model": "two"}
    (read,) = JobFile(path=write(folder, job)).jobs()
    assert read.arguments["image"] == str(folder / "a.png")
    assert read.arguments["ip_adapter_image"] == {"plus": [str(folder / "b/c.png"), "/d.png", link]}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 1: invalid JSON"),
        ("[" * 100_000, "line 1: the JSON is nested too deeply"),
        ("[1]", "line 1: must be a JSON object, got [1]"),
        ('{"promt": "x"}', "line 1: unknown key 'promt'; did you mean prompt?"),
        ('{"id": "../x", "prompt": "x"}', "line 1: id must be up to 100 letters"),
        ('{"id": 3, "prompt": "x"}', "line 1: id must be up to 100 letters"),
    ],
)
def test_a_line_that_is_no_request_stops_the_batch_before_anything_is_sent(
    line: str, message: str, batch: Any, folder: Path, triton: FakeTriton
) -> None:
    write(folder, line, {"prompt": "a cat"})
    outcome = batch()
    assert outcome.exit_code == 2
    assert message in " ".join(outcome.stderr.split())
    assert not triton.calls
    assert not (folder / "out").exists()


def test_ids_are_unique(folder: Path) -> None:
    file = write(folder, {"id": "a", "prompt": "x"}, {"id": "b", "prompt": "x"}, {"id": "a", "prompt": "y"})
    with pytest.raises(JobError, match=r"line 3: id 'a' is also that of line 1"):
        JobFile(path=file, model="two").check()


def test_a_second_run_continues(batch: Any, folder: Path, triton: FakeTriton) -> None:
    jobs = [{"id": f"job{index}", "prompt": f"prompt {index}"} for index in range(4)]
    write(folder, *jobs)
    triton.answer = refuse_prompt("prompt 2")
    first = batch()
    assert first.exit_code == 1
    assert "3 done, 1 failed" in first.stdout
    assert results(folder)[2]["error"] == {
        "type": "InvalidRequest",
        "message": "height: must be 8 to 64",
        "parameter": "height",
    }
    triton.calls.clear()
    triton.answer = lambda call: iter([picture()])
    write(folder, *jobs[:3], {"id": "job3", "prompt": "another prompt"})
    second = batch()
    assert "2 done, 0 failed, 2 were done already" in second.stdout
    assert sorted(call.texts("prompt")[0] for call in triton.calls) == ["another prompt", "prompt 2"]
    assert [each["id"] for each in results(folder)] == ["job0", "job1", "job2", "job3"]
    assert all("error" not in each for each in results(folder))


def test_files_of_a_job_that_has_changed_are_removed(batch: Any, folder: Path, triton: FakeTriton) -> None:
    triton.answer = lambda call: iter([picture(len(call.texts("prompt")))])
    write(folder, {"id": "a", "prompt": ["x", "y"]})
    batch()
    write(folder, {"id": "a", "prompt": "x"})
    batch()
    assert sorted(file.name for file in (folder / "out").iterdir()) == [".records", "a.png", "results.jsonl"]


def test_a_folder_takes_one_batch_at_a_time(batch: Any, folder: Path) -> None:
    write(folder, {"prompt": "x"})
    with BatchFolder(path=folder / "out", picture_suffix=".png", clip_suffix=".gif").locked():
        outcome = batch()
    assert outcome.exit_code == 1
    assert "another batch is writing to this folder" in " ".join(outcome.stderr.split())


def test_jobs_are_read_as_they_are_needed(url: str, folder: Path) -> None:
    read = ahead = 0
    saved: list[str] = []

    def jobs() -> Iterator[BatchJob]:
        nonlocal read, ahead
        for index in range(20):
            read += 1
            ahead = max(ahead, read - len(saved))
            yield BatchJob(id=f"{index}", arguments={"model": "two", "prompt": "x"}, digest="")

    async def run() -> None:
        out = BatchFolder(path=folder / "out", picture_suffix=".png", clip_suffix=".gif")
        with out.locked():
            async with AsyncClient(url) as client:
                await run_jobs(client, jobs(), out, in_flight=3, patience_s=60, advance=lambda: saved.append(""))

    asyncio.run(run())
    assert len(saved) == 20
    assert ahead == 3


def test_a_server_that_is_away_is_waited_for_but_not_for_ever(folder: Path, triton: FakeTriton, url: str) -> None:
    triton.answer = refuse(grpc.StatusCode.UNAVAILABLE, "the server is full")
    job = BatchJob(id="a", arguments={"model": "two", "prompt": "x"}, digest="")
    out = BatchFolder(path=folder / "out", picture_suffix=".png", clip_suffix=".gif")

    async def run() -> None:
        async with AsyncClient(url, max_retries=0) as client:
            await run_jobs(client, iter([job]), out, in_flight=2, patience_s=0)

    with out.locked(), pytest.raises(ServerAway, match="the server is full"):
        asyncio.run(run())
    assert not out.is_done(job)


def test_chunks_cover_the_file(folder: Path) -> None:
    file = JobFile(
        path=write(folder, *({"prompt": "é" * index} for index in range(7)), "", {"prompt": "last"}), model="two"
    )
    for lines in (1, 2, 3, 100):
        chunks = list(file.chunks(lines))
        assert [job.id for chunk in chunks for job in file.jobs_of(chunk)] == [job.id for job in file.jobs()]
        assert all(chunk.lines <= lines for chunk in chunks)


def refuse_prompt(prompt: str) -> Any:
    def answer(call: Call) -> Any:
        if call.texts("prompt") == [prompt]:
            return refuse(grpc.StatusCode.INVALID_ARGUMENT, "height: must be 8 to 64")(call)
        return iter([picture()])

    return answer
