"""The hardware and the library versions as text, and sizes in GiB."""

from __future__ import annotations

import os
import platform
from importlib.metadata import version

from minisdxl.cli.reports import processor


def machine() -> str:
    """Processor, cores, memory and library versions, as text."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "diffusers"))
    return (
        f"{processor()}, {len(os.sched_getaffinity(0))} cores, {gib(memory)} GiB; "
        f"Python {platform.python_version()}, {versions}"
    )


def gib(size: float) -> str:
    """Bytes as GiB, with two decimals."""
    return f"{size / 2**30:.2f}"
