"""Freed memory that is kept while sampling: counted by the system in a process of its own."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys

import pytest

ALLOCATING = """
import json, resource, torch
from minisdxl.runtime import allocator

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(3):
        torch.ones(2**24)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def resident():
    return int(open("/proc/self/statm").read().split()[1])

faults()
found = {"ordinary": faults()}
with allocator.freed_memory_kept():
    for _ in range(10):  # aligned requests leave gaps in glibc before 2.38: it settles
        faults()
    found |= {"kept": faults(), "pages_kept": resident()}
print(json.dumps(found | {"pages_after": resident()}))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="this is about glibc's allocator")
@pytest.mark.parametrize("tuned", [False, True], ids=["plain", "tuned by the user"])
def test_freed_memory_is_kept_and_goes_back(tuned: bool) -> None:
    """Counted by the system: pages that it had to find, for three tensors of 64 MiB one after the other."""
    mine = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    mine |= {"MALLOC_ARENA_MAX": "4"} if tuned else {}
    done = subprocess.run([sys.executable, "-c", ALLOCATING], env=mine, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    print(found)
    if tuned:
        assert found["kept"] > found["ordinary"] / 2
    else:
        assert found["kept"] < found["ordinary"] / 20
        assert found["pages_kept"] - found["pages_after"] > 0.9 * 2**26 / os.sysconf("SC_PAGE_SIZE")
