"""The folder of a run on any file system that fsspec knows: a local path, ``s3://``, ``gs://``, ``memory://``.

Files appear whole or not at all, whenever a process is killed.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import fsspec
from fsspec.implementations.local import LocalFileSystem

from minisdxl.checkpoint.atomic import atomic_path

# Protocols of file systems whose files appear when all of their bytes are there.
APPEAR_WHOLE = {"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "adl", "memory"}
PARTIAL = ".partial-"  # files that are being written begin so, in atomic_path as well
READERS = 16  # files read at a time

T = TypeVar("T")


class Store:
    """The files in the folder ``url``, by their names in it; ``url`` is a path or what fsspec reads.

    All methods raise ``OSError`` as the file system does, and the constructor ``ValueError`` and ``ImportError`` for a
    protocol that is unknown, or needs a package that is not installed.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        local = "://" not in url
        self.system, root = (LocalFileSystem(), str(Path(url).absolute())) if local else fsspec.core.url_to_fs(url)
        self.root = root.rstrip("/")

    def read(self, name: str) -> bytes:
        """The bytes of a file. Raises ``FileNotFoundError`` if there is none."""
        return bytes(self.system.cat_file(self._path(name)))

    def each(self, names: Iterable[str], use: Callable[[bytes], T]) -> list[T]:
        """What ``use`` makes of the bytes of each file, in order; some files are read at a time."""
        with ThreadPoolExecutor(READERS) as readers:
            return list(readers.map(lambda name: use(self.read(name)), names))

    def write(self, name: str, data: bytes) -> None:
        """Writes a file, which appears whole."""
        path = self._path(name)
        protocols = {self.system.protocol} if isinstance(self.system.protocol, str) else set(self.system.protocol)
        if isinstance(self.system, LocalFileSystem):
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            with atomic_path(path) as temporary:
                temporary.write_bytes(data)
        elif protocols & APPEAR_WHOLE:
            self.system.pipe_file(path, data)
        else:  # renaming is atomic on the others: file servers
            folder = path.rpartition("/")[0]
            self.system.makedirs(folder, exist_ok=True)
            temporary_path = f"{folder}/{PARTIAL}{secrets.token_hex(8)}"
            self.system.pipe_file(temporary_path, data)
            self.system.mv(temporary_path, path)

    def names(self) -> set[str]:
        """The names of all files, those in folders with a slash, without what a killed process left half-written."""
        self.system.invalidate_cache()
        return {name for name in self._all() if not name.rpartition("/")[2].startswith(PARTIAL)}

    def remove(self, names: Iterable[str]) -> None:
        """Removes files."""
        for name in names:
            self.system.rm_file(self._path(name))

    def remove_folder(self, name: str) -> None:
        """Removes a folder with all files in it."""
        self.system.rm(self._path(name), recursive=True)

    def remove_partial(self) -> None:
        """Removes what killed processes left half-written. Nobody may be writing."""
        self.remove({name for name in self._all() if name.rpartition("/")[2].startswith(PARTIAL)})

    def _all(self) -> set[str]:
        if not self.system.exists(self.root):
            return set()
        return {path.removeprefix(f"{self.root}/") for path in self.system.find(self.root)}

    def _path(self, name: str) -> str:
        return f"{self.root}/{name}"
