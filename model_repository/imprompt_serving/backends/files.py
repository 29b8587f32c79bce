"""Files that several processes read and write: caches, and what is kept for the next start."""

from __future__ import annotations

import uuid
from pathlib import Path


def write_whole(file: Path, content: bytes) -> None:
    """Write beside `file` and rename: a reader sees all of it or the one before, also when the writer is killed."""
    draft = file.with_name(f".{file.name}.{uuid.uuid4().hex}")
    try:
        draft.write_bytes(content)
        draft.replace(file)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise
