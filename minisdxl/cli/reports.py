"""The JSON report of a run, with versions and hardware, written complete or not at all."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from minisdxl.checkpoint.atomic import atomic_path


def versions(*more: str) -> dict[str, str | None]:
    """Versions of Python and the packages that compute, and ``more``; ``None`` for one that is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in ("minisdxl", "torch", "tokenizers", "pillow", *more):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


def hardware(device: torch.device) -> str:
    """The device as text: the name of a GPU, or the processor and the number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{processor()}, {torch.get_num_threads()} threads"


def processor() -> str:
    """The name of the processor if the system tells it, else its architecture."""
    told = Path("/proc/cpuinfo")
    lines = told.read_text().splitlines() if told.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def sha256(files: Iterable[Path]) -> str:
    """The sha256 of files, one after the other. Raises ``OSError``."""
    digest = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            hashlib.file_digest(file, lambda: digest)
    return digest.hexdigest()


def write_report(target: str, report: Mapping[str, Any]) -> None:
    """Writes the report to a file, or to stdout if ``target`` is ``-``. Raises ``OSError``."""
    text = json.dumps(report, indent=1)
    if target == "-":
        print(text, flush=True)
        return
    with atomic_path(Path(target)) as path:
        path.write_text(text + "\n")


def check_writable(targets: Sequence[Path]) -> None:
    """Checks before sampling that all files can be written. Raises ``OSError``."""
    for folder in {target.parent for target in targets}:
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_path(folder / ".writable") as path:
            path.touch()
        (folder / ".writable").unlink()
    for target in targets:
        if target.is_dir():
            raise IsADirectoryError(f"{target} is a folder, expected a file to write to")
