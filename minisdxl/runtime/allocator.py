"""Memory between denoising steps: what one step frees stays with the process for the next one."""

from __future__ import annotations

import ctypes
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's malloc.h


@contextmanager
def freed_memory_kept() -> Iterator[None]:
    """Meanwhile, memory that is freed stays with the process; then all that is free goes back to the system.

    Each step asks anew for the same large tensors. glibc has the system map them, which fills every page with zeros
    when it is first touched, and unmaps them when they are freed: up to a seventh of a pruned step of SDXL. Where
    libc is another one, or somebody has tuned it by its ``MALLOC_`` variables, nothing changes.
    """
    tuned = any(name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in os.environ)
    if platform.libc_ver()[0] != "glibc" or tuned:
        yield
        return
    libc = ctypes.CDLL(None)
    libc.mallopt(M_MMAP_MAX, 0)
    libc.mallopt(M_TRIM_THRESHOLD, -1)
    try:
        yield
    finally:
        libc.mallopt(M_MMAP_MAX, 65536)  # glibc's own
        libc.mallopt(M_TRIM_THRESHOLD, 2**26)  # what glibc comes to by itself where tensors are large
        libc.malloc_trim(0)
