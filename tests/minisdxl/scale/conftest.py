"""Tests that need Ray are left out where the extra "scale" is not installed."""

from __future__ import annotations

from importlib.util import find_spec

NEED_RAY = ["test_cluster.py", "test_faults.py", "test_pictures.py"]
collect_ignore = [] if find_spec("ray") else NEED_RAY
