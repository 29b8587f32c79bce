"""The output folder of a batch: pictures, and next to them a record of each finished job."""

from __future__ import annotations

import fcntl
import json
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from imprompt._batch.jobs import BatchJob
from imprompt._errors import ImpromptError, InvalidRequest
from imprompt._result import Result

RESULTS = "results.jsonl"
_RECORDS = ".records"


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchFolder:
    """Results of a batch.

    The pictures of a job are moved into place before its record, each by a rename. So a job with a record has all of
    its pictures, whenever a run was killed; a job without one is run again and replaces what is there.

    Args:
        path: created if it does not exist. For a cluster, on storage that all nodes share.
        picture_suffix: file type of pictures, such as `.png`.
        clip_suffix: file type of clips.
    """

    path: Path
    picture_suffix: str
    clip_suffix: str

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Create the folder, keep other runs out of it, and remove what a killed run left unfinished.

        Raises:
            OSError: the folder cannot be written to, or another run is writing to it.
        """
        self._records.mkdir(parents=True, exist_ok=True)
        with (self._records / "lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise OSError(f"{self.path}: another batch is writing to this folder") from None
            for left in self._records.glob("*.tmp"):
                shutil.rmtree(left, ignore_errors=True)
            yield

    def is_done(self, job: BatchJob) -> bool:
        """Whether the job has been run with success, and has not changed since."""
        record = self._read(job)
        return record is not None and "error" not in record and record["digest"] == job.digest

    def save(self, job: BatchJob, result: Result) -> dict[str, Any]:
        """Save the pictures or clips of a job and its record, which is returned."""
        before = self._read(job)
        suffix = self.picture_suffix if result.frames is None else self.clip_suffix
        with self._scratch() as scratch:
            saved = result.save(Path(scratch) / f"file{suffix}")
            # Ids have no dots, so names of different jobs differ.
            numbers = [""] if len(saved) == 1 else [f".{index}" for index in range(len(saved))]
            files = [f"{job.id}{number}{suffix}" for number in numbers]
            for file, name in zip(saved, files, strict=True):
                file.replace(self.path / name)
            record = {
                "id": job.id,
                "files": files,
                "model": result.model,
                "seeds": result.seeds,
                "timings": result.timings,
                "warnings": result.warnings,
                "nsfw_content_detected": result.nsfw_content_detected,
            }
            self._record(job, record, Path(scratch))
        for name in set(before.get("files", ()) if before else ()) - set(files):  # the job has changed
            (self.path / name).unlink(missing_ok=True)
        return record

    def fail(self, job: BatchJob, error: ImpromptError | OSError) -> dict[str, Any]:
        """Record why a job failed. The next run tries it again."""
        details = {"type": type(error).__name__, "message": str(error)}
        if isinstance(error, InvalidRequest) and error.parameter:
            details["parameter"] = error.parameter
        record = {"id": job.id, "error": details}
        with self._scratch() as scratch:
            self._record(job, record, Path(scratch))
        return record

    def write_results(self, jobs: Iterable[BatchJob]) -> Path:
        """Write the records of all finished jobs to one file, in the order of the jobs, and return its path."""
        with self._scratch() as scratch:
            file = Path(scratch) / RESULTS
            with file.open("w", encoding="utf-8") as out:
                for record in self._finished(jobs):
                    out.write(json.dumps(record) + "\n")
            return file.replace(self.path / RESULTS)

    def _finished(self, jobs: Iterable[BatchJob]) -> Iterator[dict[str, Any]]:
        for job in jobs:
            record = self._read(job)
            if record is not None and record.pop("digest") == job.digest:
                yield record

    def _record(self, job: BatchJob, record: dict[str, Any], scratch: Path) -> None:
        file = scratch / "record"
        file.write_text(json.dumps(record | {"digest": job.digest}), encoding="utf-8")
        file.replace(self._records / f"{job.id}.json")

    def _read(self, job: BatchJob) -> dict[str, Any] | None:
        try:
            record: dict[str, Any] = json.loads((self._records / f"{job.id}.json").read_bytes())
            return record
        except FileNotFoundError:
            return None

    def _scratch(self) -> tempfile.TemporaryDirectory[str]:
        """Create a folder on the same file system, which a rename cannot leave."""
        return tempfile.TemporaryDirectory(dir=self._records, suffix=".tmp")

    @property
    def _records(self) -> Path:
        return self.path / _RECORDS
