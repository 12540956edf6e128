"""Measurements that each run in a fresh process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def measure(kind: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """One measurement of ``tools.benchmark.worker`` in a fresh process. Raises ``RuntimeError`` if it fails."""
    with Path(arguments["weights"]).open("rb") as file:
        while file.read(2**24):  # into the system's cache, so that the disk is not measured
            pass
    command = [sys.executable, "-m", "tools.benchmark.worker", kind, json.dumps(arguments)]
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=Path(__file__).parents[2], env=environment, capture_output=True, text=True)
    if done.returncode:
        why = "killed, as systems do when memory runs out" if done.returncode == -9 else f"exit code {done.returncode}"
        last = done.stderr.strip().splitlines()[-1:]
        raise RuntimeError(f"measuring {kind} {arguments['dtype']} failed: {' '.join([why, *last])}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result
