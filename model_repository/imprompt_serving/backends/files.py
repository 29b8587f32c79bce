"""Write files that several processes share, such as caches."""

from __future__ import annotations

import uuid
from pathlib import Path


def write_atomically(file: Path, content: bytes) -> None:
    """Write a temporary file and rename it to `file`, so that readers see the old or the new content, never a part.

    That also holds if the writer is killed.
    """
    draft = file.with_name(f".{file.name}.{uuid.uuid4().hex}")
    try:
        draft.write_bytes(content)
        draft.replace(file)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise
