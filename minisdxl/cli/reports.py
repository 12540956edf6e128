"""The report of a run, for programs: JSON that is written whole or not at all."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from minisdxl.checkpoint.atomic import atomic_path


def versions() -> dict[str, str | None]:
    """Of Python and of the packages that make the numbers; ``None`` for a source tree that was never installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in ("minisdxl", "torch", "tokenizers", "pillow"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


def hardware(device: torch.device) -> str:
    """What ``device`` is: the name of a GPU, or of the processor and how many of its threads compute."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{processor()}, {torch.get_num_threads()} threads"


def processor() -> str:
    """The name that the processor gives itself, where the system tells; its kind elsewhere."""
    told = Path("/proc/cpuinfo")
    lines = told.read_text().splitlines() if told.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def write_report(target: str, report: Mapping[str, Any]) -> None:
    """To a file, or to stdout where ``target`` is ``-``. Raises ``OSError``."""
    text = json.dumps(report, indent=1)
    if target == "-":
        print(text, flush=True)
        return
    with atomic_path(Path(target)) as path:
        path.write_text(text + "\n")
