"""Files that several processes share are replaced atomically."""

from __future__ import annotations

import threading
from pathlib import Path
from types import SimpleNamespace

import pytest

from imprompt_serving.backends.files import write_atomically
from imprompt_serving.backends.tensorrt import EngineInfo
from imprompt_serving.gpu.tensorrt import TensorRTEngine

SIZE = 1 << 20


def test_a_reader_never_sees_a_partial_file(tmp_path: Path) -> None:
    file, stop = tmp_path / "engine.kernels", threading.Event()
    contents = [bytes([letter]) * SIZE for letter in b"ab"]
    write_atomically(file, contents[0])

    def write() -> None:
        while not stop.is_set():
            for content in contents:
                write_atomically(file, content)

    writers = [threading.Thread(target=write) for _ in range(2)]
    for writer in writers:
        writer.start()
    seen = {file.read_bytes() for _ in range(200)}
    stop.set()
    for writer in writers:
        writer.join()
    assert seen <= set(contents)
    assert [path.name for path in tmp_path.iterdir()] == [file.name]


def test_a_writer_that_fails_leaves_the_file_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "engine.kernels"
    write_atomically(file, b"before")

    def full(self: Path, content: bytes) -> int:
        self.touch()
        raise OSError("No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space"):
        write_atomically(file, b"after")
    monkeypatch.undo()
    assert file.read_bytes() == b"before"
    assert [path.name for path in tmp_path.iterdir()] == [file.name]


def test_an_engine_description_is_replaced_atomically(tmp_path: Path) -> None:
    """A reader that has the file open keeps reading the old content."""
    info = EngineInfo(
        backend="tensorrt", version="1", target="SM89", model="m", architecture="a", settings="s", refit=False
    )
    info.save(tmp_path / "unet.plan")
    with (tmp_path / "unet.json").open("rb") as opened:
        EngineInfo(
            backend="tensorrt", version="2", target="SM89", model="m", architecture="a", settings="s", refit=False
        ).save(tmp_path / "unet.plan")
        assert b'"version": "1"' in opened.read()
    assert EngineInfo.load(tmp_path / "unet.plan").version == "2"


def test_kernels_are_saved_atomically(tmp_path: Path) -> None:
    """One server may save them while another reads them. The rest of an engine needs a GPU."""
    engine, contents = TensorRTEngine.__new__(TensorRTEngine), [b"old" * SIZE, b"new" * SIZE]
    engine._kernels_file = tmp_path / "unet.kernels"
    for content in contents:
        engine._kernels = SimpleNamespace(serialize=lambda content=content: memoryview(content))
        engine._save_kernels()
        if content is contents[0]:
            opened = engine._kernels_file.open("rb")
    with opened:
        assert opened.read() == contents[0]
    assert engine._kernels_file.read_bytes() == contents[1]
