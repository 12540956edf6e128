"""Ray's part: where workers run, and what becomes of units whose workers die or whose machines leave."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.cluster_utils import Cluster

from minisdxl.scale.cluster import LOST_IN_A_ROW, RETRIES, ROUNDS, Lost, Placement, answers, connected, divided, place

pytestmark = pytest.mark.scale


class Counting:
    """A worker that says which unit it made, and where; a few units misbehave."""

    def __init__(self, task: Path) -> None:
        self.task = task

    def make(self, unit: int) -> tuple[int, str]:
        if unit >= 100:  # always ends its worker
            with (self.task / f"tried-{unit}").open("a") as file:
                file.write("x")
            os._exit(1)
        if unit == 13:
            raise OSError("No space left on device")
        time.sleep(0.05)
        return unit, ray.get_runtime_context().get_node_id()


@pytest.fixture
def two_nodes() -> Iterator[tuple[Cluster, Any]]:
    """A cluster of two machines with a core each, and the second of them."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    second = cluster.add_node(num_cpus=1)
    yield cluster, second
    cluster.shutdown()


def test_threads_are_divided() -> None:
    assert [divided([2], workers) for workers in (1, 2)] == [2, 1]
    assert divided([16, 16, 4], 3) == 8  # two on one of the large ones, or one on each of them and none on the small
    assert divided([16, 16, 4], 9) == 4
    assert divided([1, 1], 2) == 1


def test_units_are_made_tried_again_and_given_up(tmp_path: Path) -> None:
    with connected(None):
        with pytest.raises(ValueError, match=r"--workers is 1000, expected at most \d+: one for each core"):
            place(1000, "auto", None)
        with pytest.raises(ValueError, match=r"--workers is 2, expected at most 0: --threads is 1000 of"):
            place(2, "cpu", 1000)
        with pytest.raises(ValueError, match="--device is mps with --workers, expected auto, cuda or cpu"):
            place(1, "mps", None)
        placement = place(2, "cpu", 1)
        assert placement == Placement(2, "cpu", 1)

        units = [*range(5), 100, *range(5, 10)]
        made = list(answers(placement, Counting, tmp_path, units))
        assert sorted(each[0] for each in made if not isinstance(each, Lost)) == list(range(10))
        assert [each.unit for each in made if isinstance(each, Lost)] == [100]
        assert (tmp_path / "tried-100").read_text() == "x" * ROUNDS * (1 + RETRIES)

        with pytest.raises(OSError, match="No space left on device"):
            list(answers(placement, Counting, tmp_path, [1, 13, 2]))

        with pytest.raises(ChildProcessError, match=f"{LOST_IN_A_ROW} units in a row each ended their worker"):
            list(answers(placement, Counting, tmp_path, list(range(101, 120))))


def test_a_machine_that_leaves_loses_nothing(two_nodes: tuple[Cluster, Any], tmp_path: Path) -> None:
    cluster, second = two_nodes
    with connected(cluster.address):
        placement = place(2, "cpu", None)
        assert placement == Placement(2, "cpu", 1)
        units, made, nodes = list(range(20, 80)), list[int](), set[str]()
        for number, node in answers(placement, Counting, tmp_path, units):
            made.append(number)
            nodes.add(node)
            if len(nodes) == 2 and len(made) >= 10 and second is not None:
                cluster.remove_node(second, allow_graceful=False)
                second = None
    assert second is None
    assert sorted(made) == units  # the unit of the lost worker, too, on the machine that is left


def test_an_address_without_a_cluster_is_refused() -> None:
    for address, reason in {
        "127.0.0.1:1": "Connection refused",
        "ray://127.0.0.1:1": "Connection refused",
        "nonsense": "nonsense",
    }.items():
        line = f"--ray-address is {address}, where no cluster answers .*{reason}"
        with pytest.raises(ConnectionError, match=line), connected(address):
            pass
