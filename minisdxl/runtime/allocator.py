"""Memory allocation on a CPU: keeps freed memory mapped between denoising steps (glibc)."""

from __future__ import annotations

import ctypes
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's malloc.h


@contextmanager
def freed_memory_kept() -> Iterator[None]:
    """A context in which freed memory stays with the process. At its end free memory goes back to the system.

    Each step allocates the same large tensors again. glibc maps such memory at every allocation, and the system fills
    each page with zeros when it is first touched: up to a seventh of the time of a pruned step of SDXL. Does nothing
    with another libc, or if a ``MALLOC_`` variable or ``GLIBC_TUNABLES`` is set.
    """
    libc = _untuned_glibc()
    if libc is None:
        yield
        return
    libc.mallopt(M_MMAP_MAX, 0)
    libc.mallopt(M_TRIM_THRESHOLD, -1)
    try:
        yield
    finally:
        libc.mallopt(M_MMAP_MAX, 65536)  # glibc's default
        libc.mallopt(M_TRIM_THRESHOLD, 2**26)  # the value that glibc reaches by itself for large tensors
        libc.malloc_trim(0)


def give_back_freed_memory() -> None:
    """Gives the freed memory that glibc has kept back to the system: for a process that may wait for its next work.

    Does nothing where :func:`freed_memory_kept` does nothing.
    """
    libc = _untuned_glibc()
    if libc is not None:
        libc.malloc_trim(0)


def _untuned_glibc() -> ctypes.CDLL | None:
    tuned = any(name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in os.environ)
    return None if platform.libc_ver()[0] != "glibc" or tuned else ctypes.CDLL(None)
