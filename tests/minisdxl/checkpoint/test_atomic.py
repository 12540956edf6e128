"""Files and folders that appear whole or not at all."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from minisdxl.checkpoint.atomic import atomic_folder, atomic_path


def test_the_file_appears_at_the_end_and_only_then(tmp_path: Path) -> None:
    target = tmp_path / "picture.png"
    with atomic_path(target) as temporary:
        temporary.write_bytes(b"whole")
        assert temporary.parent == tmp_path
        assert temporary.suffix == ".png"
        assert not target.exists()
    assert target.read_bytes() == b"whole"
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize("before", [None, b"before"], ids=["new", "existing"])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, OSError], ids=lambda error: error.__name__)
def test_a_failure_leaves_everything_as_it_was(
    tmp_path: Path, before: bytes | None, error: type[BaseException]
) -> None:
    target = tmp_path / "picture.png"
    if before is not None:
        target.write_bytes(before)
    with pytest.raises(error), atomic_path(target) as temporary:
        temporary.write_bytes(b"ha")
        raise error
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == ({"picture.png": before} if before else {})


def test_an_existing_file_is_replaced(tmp_path: Path) -> None:
    target = tmp_path / "picture.png"
    target.write_bytes(b"before")
    with atomic_path(str(target)) as temporary:
        temporary.write_bytes(b"after")
    assert target.read_bytes() == b"after"


def test_an_error_names_what_was_asked_for(tmp_path: Path) -> None:
    """Not the temporary file, of which nobody has heard, and not nothing."""
    for open_target, target in ((atomic_path, tmp_path / "a.png"), (atomic_folder, tmp_path / "folder")):
        with pytest.raises(OSError, match=rf"No space left on device: '{target}'"), open_target(target):
            raise OSError(errno.ENOSPC, "No space left on device")
        with pytest.raises(OSError, match=rf": '{target}'"), open_target(target) as temporary:
            (temporary / "nowhere" / "file").touch()
        with pytest.raises(FileNotFoundError, match="'nowhere'"), open_target(target):
            Path("nowhere").read_bytes()
        with pytest.raises(OSError, match=r"^of another kind$"), open_target(target):
            raise OSError("of another kind")
    target = tmp_path / "nowhere" / "a.png"
    with pytest.raises(FileNotFoundError, match=rf"No such file or directory: '{target}'"), atomic_path(target):
        pytest.fail("the block was entered")
    assert not list(tmp_path.iterdir())


def test_permissions_are_those_of_an_ordinary_new_file(tmp_path: Path) -> None:
    (tmp_path / "ordinary").touch()
    with atomic_path(tmp_path / "atomic") as temporary:
        temporary.write_bytes(b"")
    assert os.stat(tmp_path / "atomic").st_mode == os.stat(tmp_path / "ordinary").st_mode


def test_two_writers_of_one_file_do_not_meet(tmp_path: Path) -> None:
    target = tmp_path / "picture.png"
    with atomic_path(target) as first, atomic_path(target) as second:
        first.write_bytes(b"first")
        second.write_bytes(b"second")
        assert first != second
    assert target.read_bytes() == b"first"  # the inner block ends first, so the outer one replaces its file
    assert list(tmp_path.iterdir()) == [target]


def test_a_bad_target_is_refused_before_any_work(tmp_path: Path) -> None:
    with pytest.raises(IsADirectoryError, match="is a folder"), atomic_path(tmp_path):
        pytest.fail("the block was entered")
    with pytest.raises(FileNotFoundError), atomic_path(tmp_path / "nowhere" / "picture.png"):
        pytest.fail("the block was entered")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("exists", [False, True], ids=["new", "empty"])
def test_the_folder_appears_at_the_end_and_only_then(tmp_path: Path, exists: bool) -> None:
    target = tmp_path / "folder"
    if exists:
        target.mkdir()
    with atomic_folder(str(target)) as temporary:
        (temporary / "deeper").mkdir()
        (temporary / "deeper" / "file").write_bytes(b"whole")
        assert temporary.parent == tmp_path
        assert not (target / "deeper").exists()
    assert (target / "deeper" / "file").read_bytes() == b"whole"
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, OSError], ids=lambda error: error.__name__)
def test_a_failure_leaves_no_folder(tmp_path: Path, error: type[BaseException]) -> None:
    with pytest.raises(error), atomic_folder(tmp_path / "folder") as temporary:
        (temporary / "file").write_bytes(b"ha")
        raise error
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_there_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "file").write_bytes(b"before")
    for target in (tmp_path / "folder", tmp_path / "folder" / "file"):
        with pytest.raises(FileExistsError, match="is already there"), atomic_folder(target):
            pytest.fail("the block was entered")
    with pytest.raises(FileNotFoundError), atomic_folder(tmp_path / "nowhere" / "folder"):
        pytest.fail("the block was entered")
    assert (tmp_path / "folder" / "file").read_bytes() == b"before"
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "folder"]
