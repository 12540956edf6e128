"""Files and folders that appear whole or not at all."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic_path(target: str | Path) -> Iterator[Path]:
    """Gives a path to write to; what was written there becomes ``target`` when the block ends well.

    The temporary file lies beside ``target``, because renaming is atomic within one file system only, and keeps its
    suffix, because Pillow picks the format by it. It is removed if the block raises, Ctrl-C included: ``target`` is
    then as it was before, or absent.

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
    """Gives a new folder to fill, which becomes ``target`` when the block ends well; else nothing is left of it.

    Raises:
        FileExistsError: if ``target`` is there already and not an empty folder.
        OSError: if the folder that ``target`` is to be in does not exist or cannot be written to, or the disk is full.
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
    """Makes a system's error name ``target`` where it names what was temporary, or nothing, as for a full disk."""
    named = error.filename
    if error.errno is not None and (named is None or Path(os.fsdecode(named)).is_relative_to(temporary)):
        error.filename = str(target)


def _flush_to_disk(path: Path) -> None:
    """Waits until the bytes are on disk: some file systems say only now that there is no room for them."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())
