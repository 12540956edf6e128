"""The tests of tools/ are in the ring ``slow``: they run benchmarks, trainings and evaluations from end to end."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest

# Left out where the extra "scale" is not installed, as in tests/minisdxl/scale.
collect_ignore = [] if find_spec("ray") else ["test_evaluate_workers.py"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks the tests of this folder. The hook sees those of all folders."""
    for item in items:
        if Path(__file__).parent in item.path.parents and item.get_closest_marker("scale") is None:
            item.add_marker(pytest.mark.slow)
