"""Atomic writing: files and folders that appear complete or not at all."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic_path(target: str | Path) -> Iterator[Path]:
    """A context with a path to write to. The file there becomes ``target`` if the block ends without an error.

    The temporary file lies beside ``target``, because renaming is atomic only within one file system. It has the same
    suffix, because Pillow chooses the format by it. If the block raises, or at Ctrl-C, it is removed and ``target`` is
    unchanged.

    Raises:
        IsADirectoryError: if ``target`` is a folder.
        OSError: if the folder of ``target`` does not exist or cannot be written to, or the disk is full. It names
            ``target``, whatever the block wrote to.
    """
    target = Path(target)
    if target.is_dir():
        raise IsADirectoryError(f"{target} is a folder, expected a file to write to")
    temporary = target.with_name(f".partial-{secrets.token_hex(8)}{target.suffix}")
    try:
        # Made here and not by the writer: a folder that cannot be written to is found before any work is done, and the
        # file gets the permissions of an ordinary new file.
        temporary.touch(exist_ok=False)
        yield temporary
        _flush_to_disk(temporary)
        temporary.replace(target)
    except OSError as error:
        _name(error, temporary, target)
        raise
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(target: str | Path) -> Iterator[Path]:
    """A context with a new folder to fill. It becomes ``target`` if the block ends without an error, else it is gone.

    Raises:
        FileExistsError: if ``target`` is there already and not an empty folder.
        OSError: if the parent folder of ``target`` does not exist or cannot be written to, or the disk is full.
            It names ``target``, whatever the block wrote to.
    """
    target = Path(target).absolute()
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise FileExistsError(f"{target} is already there, expected the name of a new folder")
    temporary = target.with_name(f".partial-{secrets.token_hex(8)}")
    try:
        temporary.mkdir()
        yield temporary
        for file in temporary.rglob("*"):
            if file.is_file():
                _flush_to_disk(file)
        temporary.replace(target)
    except OSError as error:
        _name(error, temporary, target)
        raise
    finally:
        if temporary.exists():
            shutil.rmtree(temporary)


def _name(error: OSError, temporary: Path, target: Path) -> None:
    """Puts ``target`` into an error that names the temporary file, or no file, as for a full disk."""
    named = error.filename
    if error.errno is not None and (named is None or Path(os.fsdecode(named)).is_relative_to(temporary)):
        error.filename = str(target)


def _flush_to_disk(path: Path) -> None:
    """Waits until the bytes are on disk. Some file systems report a full disk only now."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())
