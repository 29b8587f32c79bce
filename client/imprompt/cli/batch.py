"""`imprompt batch`: generate pictures for a file of requests."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from imprompt import AsyncClient
from imprompt._batch.folder import BatchFolder
from imprompt._batch.jobs import JobError, JobFile
from imprompt._batch.runner import Tally, run_jobs
from imprompt._output_files import check_extension
from imprompt.cli import console
from imprompt.cli.options import CONNECTION, with_options


@with_options(CONNECTION)
def batch(
    context: typer.Context,
    jobs: Annotated[
        Path, typer.Argument(help="JSON Lines: one object per line, with the parameters of a request and an `id`.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for pictures and results.jsonl.")],
    model: Annotated[str | None, typer.Option(help="Bundle for jobs that do not name one.")] = None,
    in_flight: Annotated[int, typer.Option(min=1, max=1000, help="Requests that a server works on at a time.")] = 8,
    picture_format: Annotated[str, typer.Option(help="File type of pictures: png, jpg or webp.")] = "png",
    clip_format: Annotated[str, typer.Option(help="File type of clips: gif, webp or mp4.")] = "gif",
    patience: Annotated[float, typer.Option(help="Seconds to wait for a server that is away or full.")] = 300.0,
    ray: Annotated[bool, typer.Option("--ray", help="Run as a Ray Data job, on a cluster or on this machine.")] = False,
    ray_address: Annotated[str | None, typer.Option(help="Address of the Ray cluster (default: RAY_ADDRESS).")] = None,
    repository: Annotated[
        Path | None, typer.Option(help="With --ray: start servers of this model repository, instead of using --url.")
    ] = None,
    workers: Annotated[int, typer.Option(min=1, help="With --ray: number of servers, or of clients of --url.")] = 1,
    gpus_per_worker: Annotated[float, typer.Option(min=0, help="With --ray: GPUs that Ray gives each worker.")] = 0,
    **connection: Any,
) -> None:
    """Generate pictures for every line of a file, and record what became of each in results.jsonl.

    Run the same command again to continue after an interruption, or to try the jobs that failed again.
    """
    if not ray and (repository or ray_address or workers != 1 or gpus_per_worker):
        console.fail("--repository, --ray-address, --workers and --gpus-per-worker need --ray", status=2)
    file = JobFile(path=jobs, model=model)
    folder = BatchFolder(path=output, picture_suffix=f".{picture_format}", clip_suffix=f".{clip_format}")
    try:
        check_extension(Path(f"picture.{picture_format}"))
        check_extension(Path(f"clip.{clip_format}"), clip=True)
        count = file.check()
    except (JobError, ValueError, OSError) as error:
        console.fail(str(error), status=2)
    with console.reported_errors(context), folder.locked(), _progress(count) as progress:
        task = progress.add_task("jobs", total=count)
        if ray:
            from imprompt._batch.on_ray import Workers, run_on_ray

            tally = run_on_ray(
                file,
                folder,
                Workers(
                    count=workers,
                    gpus=gpus_per_worker,
                    repository=repository,
                    connection=connection,
                    in_flight=in_flight,
                    patience_s=patience,
                ),
                address=ray_address,
                advance=lambda jobs: progress.advance(task, jobs),
            )
        else:
            tally = asyncio.run(_run(file, folder, connection, in_flight, patience, lambda: progress.advance(task)))
        results = folder.write_results(file.jobs())
    console.out.print(
        f"{tally.done} done, {tally.failed} failed, {tally.skipped} were done already; {results}", soft_wrap=True
    )
    if tally.failed:
        raise typer.Exit(1)


async def _run(
    file: JobFile,
    folder: BatchFolder,
    connection: dict[str, Any],
    in_flight: int,
    patience: float,
    advance: Callable[[], None],
) -> Tally:
    async with AsyncClient(**connection) as client:
        return await run_jobs(client, file.jobs(), folder, in_flight=in_flight, patience_s=patience, advance=advance)


def _progress(count: int) -> Progress:
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("left:"), TimeRemainingColumn())
    return Progress(*columns, console=console.err, transient=True)
