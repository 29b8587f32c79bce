"""Install the models of a bundle into a repository that other bundles, exports, and servers share."""

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
"""File in a model's folder that names the bundle it belongs to."""


def check_free(repository: Path, bundle: str, models: Iterable[str]) -> None:
    """Check that installing `models` would only replace models of `bundle`.

    Raises:
        BundleError: one of `models` exists and belongs to another bundle or to none.
    """
    for name in sorted(models):
        folder = repository / name
        owner = _owner(folder)
        if os.path.lexists(folder) and owner != bundle:
            whose = f"bundle {owner}" if owner else "no bundle"
            raise BundleError(
                f"name: bundle {bundle} has a model {name}, but that in {repository} belongs to {whose}: use another "
                "name or repository, or remove it"
            )


@contextlib.contextmanager
def work_folder(repository: Path, bundle: str) -> Iterator[Path]:
    """Create `repository` and a temporary folder on the same file system, so that models can be moved by renaming.

    The folder is next to the repository, where a starting server does not see it. If the parent is on another file
    system (the repository is a mounted volume) or read-only, the folder is inside the repository.

    Raises:
        BundleError: `repository` is not a folder or is read-only.
    """
    try:
        missing = not repository.exists()
        repository.mkdir(parents=True, exist_ok=True)
        work = _made_beside(repository.resolve(), bundle)
    except OSError as error:
        a_file = repository.is_file()
        reason = "it is a file, not a folder" if a_file else error.strerror
        raise BundleError(f"cannot write models to {repository}: {reason}") from None
    try:
        yield work
    finally:
        shutil.rmtree(work, ignore_errors=True)
        if missing:
            with contextlib.suppress(OSError):
                repository.rmdir()  # only succeeds if nothing was installed


def _made_beside(repository: Path, bundle: str) -> Path:
    """Create an empty folder from which others can be renamed into `repository`."""
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
    """Replace the models of `bundle` by all of `models`; if that fails, restore the old ones.

    Raises:
        BundleError: another bundle has taken one of the names in the meantime.
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
    """Lock `repository`, so that only one export changes it at a time."""
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
