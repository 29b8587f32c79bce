"""Read requests from a JSON Lines file: one object per line, with the keyword arguments of `Client.generate`."""

from __future__ import annotations

import difflib
import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from imprompt._errors import short_repr
from imprompt._image_prompts import PICTURES as PER_ADAPTER_PICTURES
from imprompt._parameters import NAMES, PICTURES
from imprompt._picture_files import is_path

_ID = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]{0,99}")
_PICTURES = (*PER_ADAPTER_PICTURES, *PICTURES)
"""Parameters with pictures, which a job gives as paths relative to its file."""
_KEYS = ("id", "model", "prompt", *(name for name in NAMES if name not in ("output_type", "output_format")))
_MAX_PROBLEMS = 5


class JobError(ValueError):
    """The file has lines that are not requests; the message names them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchJob:
    """One request of the file."""

    id: str
    arguments: Mapping[str, Any]
    """Keyword arguments of `generate`."""
    digest: str
    """A hash of the line and of the default model, to notice when a job has changed."""


class Chunk(NamedTuple):
    """Consecutive lines of the file."""

    start: int
    """Offset of the first line in bytes."""
    line: int
    """Number of the first line, from 1."""
    lines: int


@dataclass(frozen=True, kw_only=True, slots=True)
class JobFile:
    """A file of requests, which is read line by line, so its size does not matter.

    Args:
        path: UTF-8, one JSON object per line; empty lines are skipped.
        model: the bundle for jobs that do not name one.
    """

    path: Path
    model: str | None = None

    def check(self) -> int:
        """Check every line and return the number of jobs.

        Raises:
            JobError: a line is not a request, or two jobs have the same id.
            OSError: the file cannot be read.
        """
        seen: dict[bytes, int] = {}
        problems: list[str] = []
        for line, text in self._lines():
            try:
                job = self._job(line, text)
                first = seen.setdefault(hashlib.blake2b(job.id.encode(), digest_size=8).digest(), line)
                if first != line:
                    raise JobError(f"id {job.id!r} is also that of line {first}")
            except JobError as error:
                problems.append(f"{self.path.name}, line {line}: {error}")
                if len(problems) == _MAX_PROBLEMS:
                    break
        if problems:
            raise JobError("\n".join(problems))
        return len(seen)

    def jobs(self) -> Iterator[BatchJob]:
        """Read the jobs of a file that has been checked."""
        for line, text in self._lines():
            yield self._job(line, text)

    def chunks(self, lines: int) -> Iterator[Chunk]:
        """Split the file into chunks of `lines` lines."""
        start = first = line = 0
        with self.path.open("rb") as file:
            for text in file:
                if line % lines == 0 and line:
                    yield Chunk(first, line - lines + 1, lines)
                    first = start
                start += len(text)
                line += 1
        if line:
            count = (line - 1) % lines + 1
            yield Chunk(first, line - count + 1, count)

    def jobs_of(self, chunk: Chunk) -> Iterator[BatchJob]:
        """Read the jobs of one chunk."""
        with self.path.open("rb") as file:
            file.seek(chunk.start)
            for line in range(chunk.line, chunk.line + chunk.lines):
                text = file.readline()
                if text.strip():
                    yield self._job(line, text)

    def _lines(self) -> Iterator[tuple[int, bytes]]:
        with self.path.open("rb") as file:
            for line, text in enumerate(file, 1):
                if text.strip():
                    yield line, text

    def _job(self, line: int, text: bytes) -> BatchJob:
        given = _parse(text)
        unknown = given.keys() - set(_KEYS)
        if unknown:
            name = min(unknown)
            close = difflib.get_close_matches(name, _KEYS, n=1)
            raise JobError(f"unknown key {short_repr(name)}" + (f"; did you mean {close[0]}?" if close else ""))
        id = given.pop("id", f"{line:06d}")
        if not isinstance(id, str) or not _ID.fullmatch(id):
            raise JobError(f"id must be up to 100 letters, digits, '_' and '-'; got {short_repr(id)}")
        model = given.pop("model", self.model)
        if not isinstance(model, str):
            raise JobError("names no model, and --model gives none")
        arguments = {name: self._located(value) if name in _PICTURES else value for name, value in given.items()}
        digest = hashlib.blake2b(model.encode() + b"\n" + text.strip(), digest_size=16).hexdigest()
        return BatchJob(id=id, arguments={"model": model, **arguments}, digest=digest)

    def _located(self, pictures: Any) -> Any:
        """Resolve paths against the folder of the file."""
        if isinstance(pictures, str) and is_path(pictures):
            return str(self.path.parent / pictures)
        if isinstance(pictures, list):
            return [self._located(each) for each in pictures]
        if isinstance(pictures, dict):
            return {name: self._located(each) for name, each in pictures.items()}
        return pictures


def _parse(text: bytes) -> dict[str, Any]:
    try:
        given = json.loads(text)
    except RecursionError:
        raise JobError("the JSON is nested too deeply") from None
    except ValueError as error:
        raise JobError(f"invalid JSON: {error}") from None
    if not isinstance(given, dict):
        raise JobError(f"must be a JSON object, got {short_repr(given)}")
    return given
