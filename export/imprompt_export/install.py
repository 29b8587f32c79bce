"""Put the models of a bundle into a repository that other bundles, exports and servers share."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from imprompt_export.errors import BundleError

OWNER = "1/owner"
"""File in the folder of a model: the bundle that it belongs to."""


def check_free(repository: Path, bundle: str, models: Iterable[str]) -> None:
    """Refuse to replace what is not of `bundle`.

    Raises:
        BundleError: one of `models` is there, and of another bundle, or of none.
    """
    for name in sorted(models):
        folder = repository / name
        owner = _owner(folder)
        if os.path.lexists(folder) and owner != bundle:
            whose = f"bundle {owner}" if owner else "no bundle"
            raise BundleError(
                f"name: bundle {bundle} has a model {name}, but that in {repository} belongs to {whose}: take another "
                "name, another repository, or remove it"
            )


@contextlib.contextmanager
def work_folder(repository: Path, bundle: str) -> Iterator[Path]:
    """A temporary folder on the file system of `repository`, which is made: models move from one to the other at once.

    Beside the repository, where a server that starts does not see it; within it where its parent is of another file
    system, as with a volume, or cannot be written.

    Raises:
        BundleError: `repository` is no folder, or cannot be written.
    """
    try:
        missing = not repository.exists()
        repository.mkdir(parents=True, exist_ok=True)
        work = _made_beside(repository.resolve(), bundle)
    except OSError as error:
        a_file = repository.is_file()
        reason = "it is a file; a folder is wanted" if a_file else error.strerror
        raise BundleError(f"cannot write models to {repository}: {reason}") from None
    try:
        yield work
    finally:
        shutil.rmtree(work, ignore_errors=True)
        if missing:
            with contextlib.suppress(OSError):
                repository.rmdir()  # when nothing came of it


def _made_beside(repository: Path, bundle: str) -> Path:
    """An empty folder from which others can be moved into `repository`."""
    for parent in (repository.parent, repository):
        try:
            work = Path(tempfile.mkdtemp(prefix=f".{bundle}-", dir=parent))
        except OSError:
            if parent == repository:
                raise
            continue
        probe, there = work / "probe", repository / f"{work.name}-probe"
        probe.mkdir()
        try:
            probe.rename(there)
        except OSError:
            shutil.rmtree(work)
            if parent == repository:
                raise
            continue
        there.rmdir()
        return work
    raise AssertionError("the loop returns or raises")


def install(models: Path, repository: Path, bundle: str) -> None:
    """Put all of `models` in the place of those of `bundle`; when that fails, everything is as it was.

    Raises:
        BundleError: another bundle has taken a name meanwhile.
    """
    new = sorted(models.iterdir())
    aside = models.parent / "replaced"
    aside.mkdir()
    moved: list[tuple[Path, Path]] = []
    with _locked(repository):
        check_free(repository, bundle, (model.name for model in new))
        old = [folder for folder in repository.iterdir() if _owner(folder) == bundle]
        moves = [(folder, aside / folder.name) for folder in old]
        moves += [(model, repository / model.name) for model in new]
        try:
            for source, target in moves:
                source.rename(target)
                moved.append((source, target))
        except BaseException:
            for source, target in reversed(moved):
                target.rename(source)
            raise


@contextlib.contextmanager
def _locked(repository: Path) -> Iterator[None]:
    """Two exports change a repository one after the other."""
    descriptor = os.open(repository, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # file systems without locks
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _owner(folder: Path) -> str | None:
    try:
        return (folder / OWNER).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return None
