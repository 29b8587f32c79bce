"""Installing into a shared repository never touches other bundles, and installs all models or none."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Sequence
from pathlib import Path

import pytest

from imprompt_export import BundleError, install

OLD, NEW = "old", "new"


def make_models(folder: Path, bundle: str, names: Sequence[str], content: str = OLD) -> Path:
    for name in names:
        (folder / name / "1").mkdir(parents=True)
        (folder / name / "1/owner").write_text(f"{bundle}\n")
        (folder / name / "config.pbtxt").write_text(content)
    return folder


def state(repository: Path) -> dict[str, str]:
    return {folder.name: (folder / "config.pbtxt").read_text() for folder in sorted(repository.iterdir())}


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    folder = make_models(tmp_path / "repository", "sd15", ["sd15", "sd15_stream", "sd15_face_encoder"])
    return make_models(folder, "other", ["other"])


def test_all_models_of_the_bundle_are_replaced(repository: Path, tmp_path: Path) -> None:
    models = make_models(tmp_path / "work/models", "sd15", ["sd15", "sd15_stream", "sd15_denoiser"], NEW)
    install.install(models, repository, "sd15")
    assert state(repository) == {"other": OLD, "sd15": NEW, "sd15_denoiser": NEW, "sd15_stream": NEW}


@pytest.mark.parametrize("fails_at", range(6))
def test_failure_in_the_middle_restores_everything(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails_at: int
) -> None:
    models = make_models(tmp_path / "work/models", "sd15", ["sd15", "sd15_denoiser", "sd15_stream"], NEW)
    before, rename, calls = state(repository), Path.rename, []

    def failing(self: Path, target: Path) -> Path:
        calls.append(self)
        if len(calls) == fails_at + 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(OSError, match="No space"):
        install.install(models, repository, "sd15")
    monkeypatch.undo()
    assert state(repository) == before
    assert len(state(models)) == 3


@pytest.mark.parametrize(
    ("bundle", "models", "there", "owner"),
    [
        ("sd15", ["sd15", "sd15_stream"], "sd15_stream", "sd15_stream"),
        ("sd15_stream", ["sd15_stream", "sd15_stream_stream"], "sd15_stream", "sd15"),
        ("sd15", ["sd15", "sd15_denoiser"], "sd15_denoiser", "sd15_denoiser"),
        ("x_vae_decoder", ["x_vae_decoder"], "x_vae_decoder", "x"),
    ],
)
def test_models_of_other_bundles_are_never_replaced(
    tmp_path: Path, bundle: str, models: list[str], there: str, owner: str
) -> None:
    repository = make_models(tmp_path / "repository", owner, [there])
    new = make_models(tmp_path / "work/models", bundle, models, NEW)
    message = f"bundle {bundle} has a model {there}, but that in .* belongs to bundle {owner}"
    with pytest.raises(BundleError, match=message):
        install.check_free(repository, bundle, models)
    with pytest.raises(BundleError, match=message):  # the other bundle may have been installed during this export
        install.install(new, repository, bundle)
    assert state(repository) == {there: OLD}


@pytest.mark.parametrize("kind", ["folder", "file", "dangling link"])
def test_entries_without_an_owner_are_never_replaced(tmp_path: Path, kind: str) -> None:
    repository = tmp_path / "repository"
    repository.mkdir()
    mine = repository / "sd15_vae_encoder"
    if kind == "folder":
        (mine / "1").mkdir(parents=True)
    elif kind == "file":
        mine.write_text("mine")
    else:
        mine.symlink_to(tmp_path / "nowhere")
    with pytest.raises(BundleError, match=r"sd15_vae_encoder, but that in .* belongs to no bundle"):
        install.check_free(repository, "sd15", ["sd15", "sd15_vae_encoder"])
    assert os.path.lexists(mine)


def test_concurrent_exports_into_one_repository(tmp_path: Path) -> None:
    """If several bundles claim a name, one wins and has all of its models; the others are refused."""
    repository = tmp_path / "repository"
    repository.mkdir()
    bundles = ["sd15", "sd15_stream", "sd15_stream_stream", "sd15_stream_stream_stream"]
    start, refused = threading.Barrier(len(bundles)), []

    def run(name: str) -> None:
        models = make_models(tmp_path / name / "models", name, [name, f"{name}_stream"], name)
        start.wait()
        try:
            install.install(models, repository, name)
        except BundleError:
            refused.append(name)

    threads = [threading.Thread(target=run, args=(name,)) for name in bundles]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    installed = set(bundles) - set(refused)
    assert installed
    assert state(repository) == {model: name for name in installed for model in (name, f"{name}_stream")}


def test_repository_is_locked_while_models_move(repository: Path, tmp_path: Path) -> None:
    models = make_models(tmp_path / "work/models", "sd15", ["sd15"], NEW)
    thread = threading.Thread(target=install.install, args=(models, repository, "sd15"))
    with install._locked(repository):
        thread.start()
        thread.join(0.3)
        assert thread.is_alive()
        assert state(repository)["sd15"] == OLD
    thread.join(10)
    assert state(repository)["sd15"] == NEW


def test_work_folder_is_next_to_the_repository(repository: Path) -> None:
    with install.work_folder(repository, "sd15") as work:
        assert work.parent == repository.parent
    assert not work.exists()
    assert repository.is_dir()


@pytest.mark.parametrize("code", [errno.EXDEV, errno.EACCES, errno.EROFS])
def test_work_folder_is_inside_a_mounted_repository(
    repository: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    """A folder next to a mounted repository cannot be renamed into it."""
    rename = Path.rename

    def across(self: Path, target: Path) -> Path:
        if repository not in self.parents:
            raise OSError(code, os.strerror(code))
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", across)
    before = sorted(repository.parent.iterdir())
    with install.work_folder(repository, "sd15") as work:
        assert work.parent == repository
        make_models(work / "models", "sd15", ["sd15"], NEW)
        install.install(work / "models", repository, "sd15")
    assert sorted(repository.parent.iterdir()) == before
    assert state(repository) == {"other": OLD, "sd15": NEW}


def test_new_repository_is_removed_after_a_failure(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="does not fit"), install.work_folder(tmp_path / "new", "sd15"):
        raise BundleError("does not fit")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("path", ["file", "file/below", "/proc/imprompt"])
def test_unwritable_repository_is_refused(tmp_path: Path, path: str) -> None:
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(BundleError, match=f"cannot write models to .*{path}"),
        install.work_folder(tmp_path / path, "b"),
    ):
        raise AssertionError
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]
