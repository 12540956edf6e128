"""The folder of a run on several file systems: files are whole or not there."""

from __future__ import annotations

import errno
import pickle
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest
from fsspec.implementations.dirfs import DirFileSystem
from fsspec.implementations.local import LocalFileSystem
from fsspec.implementations.memory import MemoryFileSystem

from minisdxl.scale.store import Store


class Server(DirFileSystem):  # type: ignore[misc]
    """Stands for file systems whose files grow while they are written, and that can rename."""

    protocol = "server"

    def __init__(self) -> None:
        super().__init__(path="/", fs=LocalFileSystem())


@pytest.fixture(params=["local", "memory", "server"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Store]:
    fsspec.register_implementation("server", Server, clobber=True)
    urls = {"local": str(tmp_path / "run"), "memory": "memory://bucket/run", "server": f"server://{tmp_path}/run"}
    yield Store(urls[request.param])
    MemoryFileSystem.store.clear()


def test_files_are_read_as_they_were_written(store: Store) -> None:
    assert store.names() == set()
    files = {"a.png": b"one", "rows/a.png.json": b"{}", "b.png": bytes(10**6)}
    for name, data in files.items():
        store.write(name, data)
    assert store.names() == files.keys()
    assert {name: store.read(name) for name in files} == files
    assert store.each(files, len) == [3, 2, 10**6]
    store.write("a.png", b"another")
    store.remove(["b.png"])
    store.remove_folder("rows")
    assert store.names() == {"a.png"}
    assert store.read("a.png") == b"another"
    with pytest.raises(FileNotFoundError):
        store.read("b.png")


def test_half_written_files_do_not_count_and_can_be_removed(store: Store) -> None:
    store.write("whole.png", b"whole")
    store.system.pipe_file(f"{store.root}/.partial-0123", b"ha")
    assert store.names() == {"whole.png"}
    store.remove_partial()
    assert [path.rpartition("/")[2] for path in store.system.find(store.root)] == ["whole.png"]


def test_a_full_disk_leaves_the_file_as_it_was(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    store.write("a.png", b"before")

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    monkeypatch.setattr(type(store.system), "pipe_file", full)
    with pytest.raises(OSError, match="No space left on device"):
        store.write("a.png", b"after")
    assert store.names() == {"a.png"}
    assert store.read("a.png") == b"before"


def test_a_store_can_be_sent_to_another_process(store: Store) -> None:
    store.write("a.png", b"one")
    assert pickle.loads(pickle.dumps(store)).read("a.png") == b"one"


def test_unknown_protocols_are_named() -> None:
    with pytest.raises(ValueError, match="nosuch"):
        Store("nosuch://bucket/run")
