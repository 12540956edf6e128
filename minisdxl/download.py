"""The command ``python -m minisdxl.download``: downloads published weights from the Hugging Face hub and checks them.

``weights/downloads.json`` lists the known files with their sizes in bytes and their sha256. A file is written as
``NAME.partial`` and renamed when both are right. If a download ends early (a broken connection, a full disk, Ctrl-C),
the same command continues where it stopped. ``hf_hub_download`` is not used because it deletes partial files.
Addresses, login and connections come from the hub library, so ``HF_ENDPOINT``, ``HF_TOKEN`` and ``HF_HUB_OFFLINE``
apply.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import constants, get_hf_file_metadata, get_session, hf_hub_url
from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]  # httpx's in release 1, httpx2's in 2
from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]  # documented, not marked as exported
from tqdm import tqdm

from minisdxl.bundled import WEIGHTS
from minisdxl.cli.options import Parser

TABLE = WEIGHTS / "downloads.json"
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # full disk, full quota, file too large for FAT32
CHUNK = 1 << 20  # bytes hashed at a time
ADDRESS = r"https?://([\w.-]+|\[[\da-fA-F:]+\])(:\d+)?(/\S*)?"


class DownloadError(Exception):
    """A download failed. The message is one line: why it failed, and which part of the file is kept."""


@dataclass(frozen=True)
class HubFile:
    """A file on the hub."""

    repo: str
    file: str
    save_as: str  # path in the folder of downloads
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Download:
    """The files of one name of the table, with a description and their license."""

    about: str
    license: str
    files: tuple[HubFile, ...]


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command; exit code 0 on success, 2 with one line if a download fails, 130 after Ctrl-C."""
    parser = _parser()
    options = parser.parse_args(arguments)
    with parser.one_line("the partial file is kept, the same command continues from there", DownloadError):
        table = read_table()
        if options.names == ["list"]:
            for name, entry in table.items():
                size = sum(file.bytes for file in entry.files)
                print(f"{name:<18} {size / 1e6:7,.1f} MB  {entry.about} ({entry.license})")
            return
        if options.retries < 0:
            raise ValueError(f"--retries is {options.retries}, expected 0 or more")
        unknown = [name for name in options.names if name not in table]
        if unknown:
            raise ValueError(f"{unknown[0]!r} is not known, expected list or some of {', '.join(table)}")
        if not re.fullmatch(ADDRESS, constants.ENDPOINT):
            raise ValueError(f"HF_ENDPOINT is {constants.ENDPOINT!r}, expected an address like https://huggingface.co")
        wanted = [file for name in dict.fromkeys(options.names) for file in table[name].files]
        missing = [file for file in wanted if not is_present(file, options.to)]
        check_room(missing, options.to)
        for file in missing:
            fetch(file, options.to, options.retries)


def _parser() -> Parser:
    parser = Parser(prog="python -m minisdxl.download", description="Downloads published weights and checks them.")
    add = parser.add_argument
    add("names", nargs="+", metavar="NAME", help="what to download, such as sdxl-base; 'list' prints all names")
    add("--to", type=Path, default=Path("."), metavar="DIR", help="folder for the files (default: the current one)")
    add("--retries", type=int, default=5, help="failed tries in a row before giving up (default: %(default)s)")
    return parser


def read_table() -> dict[str, Download]:
    """All known downloads by name."""
    raw: dict[str, dict[str, Any]] = json.loads(TABLE.read_text(encoding="utf-8"))
    return {
        name: Download(entry["about"], entry["license"], tuple(HubFile(**file) for file in entry["files"]))
        for name, entry in raw.items()
    }


def is_present(file: HubFile, folder: Path) -> bool:
    """Whether ``folder`` has the file. Raises :class:`DownloadError` if something else is there under its name."""
    target = folder / file.save_as
    if not target.exists():
        return False
    problem = _misfit(file, target)
    if problem:
        raise DownloadError(f"{target} is there and is not the published file: it has {problem}; move it away")
    print(f"{target}: already there, {file.bytes:,} bytes, sha256 as published")
    return True


def check_room(files: Sequence[HubFile], folder: Path) -> None:
    """Makes ``folder`` and raises :class:`DownloadError` if its disk has no room for what is missing of the files."""
    if folder.exists() and not folder.is_dir():
        raise DownloadError(f"--to is {folder}, which is a file, expected a folder")
    folder.mkdir(parents=True, exist_ok=True)
    needed = sum(file.bytes - _size(_partial(file, folder)) for file in files)
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise DownloadError(f"the disk of {folder} has {free:,} bytes free, the download needs {needed:,} more")


def fetch(file: HubFile, folder: Path, retries: int = 5) -> Path:
    """Downloads one file, or the rest of it if a partial file is there.

    Args:
        file: what to download.
        folder: where to put it.
        retries: how many connections in a row may break without a new byte, after the first one.

    Returns:
        The path of the file, which has the published bytes and sha256.

    Raises:
        DownloadError: if the download fails. The partial file is kept, unless its content is wrong.
    """
    target, partial = folder / file.save_as, _partial(file, folder)
    partial.parent.mkdir(parents=True, exist_ok=True)
    failures = 0
    with tqdm(total=file.bytes, desc=target.name, unit="B", unit_scale=True, disable=None) as bar:
        while (before := _size(partial)) < file.bytes:
            time.sleep(failures)
            reason = "the connection ended early"
            try:
                _receive(file, partial, bar)
            except HTTPError as error:
                reason = _transient(error, file)
            except OSError as error:
                if error.errno not in NO_ROOM:
                    raise
                raise DownloadError(f"no room for {target}: {error.strerror}; {_kept(file, partial)}") from error
            failures = 0 if _size(partial) > before else failures + 1
            if failures > retries:
                raise DownloadError(f"{file.repo}/{file.file}: {reason}; {_kept(file, partial)}")
    problem = _misfit(file, partial)
    if problem:
        partial.unlink()  # its content is wrong, so continuing from it cannot succeed
        raise DownloadError(f"{file.repo}/{file.file} arrived with {problem}; it was thrown away")
    with partial.open("rb+") as written:
        os.fsync(written.fileno())
    partial.replace(target)
    print(f"{target}: {file.bytes:,} bytes, sha256 as published")
    return target


def _receive(file: HubFile, partial: Path, bar: tqdm[Any]) -> None:
    """Downloads over one connection and appends to ``partial``."""
    url = hf_hub_url(file.repo, file.file)
    metadata = get_hf_file_metadata(url)
    # The hub's tag of a large file is its sha256; that of a small file is not.
    tag = metadata.etag if re.fullmatch("[0-9a-f]{64}", metadata.etag or "") else None
    if metadata.size not in (None, file.bytes) or tag not in (None, file.sha256):
        raise DownloadError(
            f"{url} is another file: it has {metadata.size} bytes and the tag {metadata.etag}, "
            f"expected {file.bytes} and sha256 {file.sha256}"
        )
    start = _size(partial)
    headers = {**build_hf_headers(), "Accept-Encoding": "identity", "Range": f"bytes={start}-"}
    with get_session().stream("GET", url, headers=headers, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT) as response:
        response.raise_for_status()
        partial.touch()
        with partial.open("rb+", buffering=0) as out:
            # A server without range requests answers 200 and sends the whole file.
            bar.n = out.seek(start if response.status_code == 206 else 0)
            out.truncate()
            for chunk in response.iter_bytes():
                rest = memoryview(chunk)
                while rest:  # a nearly full disk may take only a part
                    rest = rest[out.write(rest) :]
                bar.update(len(chunk))
                if out.tell() > file.bytes:
                    return


def _transient(error: Any, file: HubFile) -> str:
    """Describes an error that a new try may fix. Raises :class:`DownloadError` for an answer that will stay."""
    response = getattr(error, "response", None)
    if response is None:
        return f"the connection broke ({type(error).__name__}: {error})"
    status = response.status_code
    if status >= 500 or status in (408, 429):
        return f"the hub answers {status}"
    advice = "accept its license on the hub and log in with `hf auth login`" if status in (401, 403) else "is it gone?"
    raise DownloadError(f"the hub answers {status} to {file.repo}/{file.file}: {advice}") from error


def _kept(file: HubFile, partial: Path) -> str:
    size = _size(partial)
    return f"{size:,} of {file.bytes:,} bytes are kept in {partial}: the same command continues from there"


def _misfit(file: HubFile, path: Path) -> str:
    """How ``path`` differs from the published file; an empty string if it does not."""
    if _size(path) != file.bytes:
        return f"{_size(path):,} bytes, expected {file.bytes:,}"
    digest = hashlib.sha256()
    bar = tqdm(total=file.bytes, desc=f"checking {path.name}", unit="B", unit_scale=True, disable=None, leave=False)
    with path.open("rb") as content, bar:
        while chunk := content.read(CHUNK):
            digest.update(chunk)
            bar.update(len(chunk))
    found = digest.hexdigest()
    return "" if found == file.sha256 else f"sha256 {found}, expected {file.sha256}"


def _partial(file: HubFile, folder: Path) -> Path:
    return folder / f"{file.save_as}.partial"


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


if __name__ == "__main__":
    main()
