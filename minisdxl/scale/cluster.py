"""Ray as the engine of a run: it places the workers, restarts those that die, and tries their work again.

Only this module imports Ray.
"""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from typing import Any, NamedTuple

import ray
from ray.exceptions import RayError, RayTaskError
from ray.util import ActorPool

RETRIES = 2  # of a unit whose worker died in making it
ROUNDS = 2  # in which a unit is given to Ray
LOST_IN_A_ROW = 3  # units, after which a run stops: it is not the prompts that kill the workers
OBJECT_STORE = 100 * 2**20  # bytes of Ray's own instance: what goes through it is small
ANSWER_SECONDS = 5.0  # within which an address has to answer
PATIENCE_SECONDS = 15.0  # without a result, after which the machines are counted again


class Lost(NamedTuple):
    """A unit whose worker died each time that Ray tried it."""

    unit: Any
    reason: str


@dataclass(frozen=True)
class Placement:
    """Where workers run: how many, on which kind of device, and with how many threads each on a CPU."""

    workers: int
    device: str  # "cuda" or "cpu"
    threads: int | None  # None on a GPU

    @property
    def resources(self) -> dict[str, int]:
        """What Ray keeps free for each worker."""
        return {"num_gpus": 1, "num_cpus": 0} if self.threads is None else {"num_gpus": 0, "num_cpus": self.threads}


class Actor:
    """The process of a worker, which makes the worker when the first unit comes: Ray counts how often that is tried."""

    worker: Any = None

    def make(self, worker: type, boxed_task: list[ray.ObjectRef], number: int, unit: object) -> tuple[int, Any]:
        """The number, and what the worker makes of the unit. The task is fetched once, so it comes as a reference."""
        if self.worker is None:
            self.worker = worker(ray.get(boxed_task[0]))
        return number, self.worker.make(unit)


@contextmanager
def connected(address: str | None) -> Iterator[None]:
    """A context with Ray: an instance of its own that ends with it, or the cluster at ``address``.

    In the context nothing is written to stdout, where Ray would tell of each worker that it starts again.
    Raises ``ConnectionError`` for an address where no cluster answers, and if Ray does not start.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # sends nothing about the run anywhere
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if address is None:
        try:
            ray.init("local", include_dashboard=False, object_store_memory=OBJECT_STORE, **quiet)
        except Exception as error:  # Ray raises this type itself where a machine is too busy
            ray.shutdown()
            raise ConnectionError(f"Ray did not start ({_one_line(error)}); the same command tries again") from error
    else:
        try:
            _knock(address)
            ray.init(address, **quiet)
        except (OSError, RuntimeError, ValueError, RayError) as error:  # RuntimeError: another version of Ray
            raise ConnectionError(
                f"--ray-address is {address}, where no cluster answers ({_one_line(error)}); expected auto, HOST:PORT "
                "or ray://HOST:PORT of one that runs"
            ) from error
    try:
        with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
            yield
    finally:
        ray.shutdown()


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


def _knock(address: str) -> None:
    """Raises ``OSError`` or ``ValueError`` unless somebody listens there: Ray would try for minutes."""
    host, _, port = address.rpartition("//")[2].rpartition(":")
    if address != "auto":
        socket.create_connection((host, int(port)), ANSWER_SECONDS).close()


def place(workers: int, device: str, threads: int | None) -> Placement:
    """The placement of so many workers on the machines that Ray has.

    ``device`` is "auto", "cuda" or "cpu": auto takes GPUs where there are any. ``threads`` of each worker on a CPU:
    ``None`` divides the cores. Raises ``ValueError`` for more workers than there is room for.
    """
    machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    gpus = sum(int(machine.get("GPU", 0)) for machine in machines)
    cores = [int(machine.get("CPU", 0)) for machine in machines]
    if device not in ("auto", "cuda", "cpu"):
        raise ValueError(f"--device is {device} with --workers, expected auto, cuda or cpu")
    if device == "cuda" or (device == "auto" and gpus):
        if workers > gpus:
            raise ValueError(f"--workers is {workers}, expected at most {gpus}: one for each GPU")
        return Placement(workers, "cuda", None)
    room = sum(count // (threads or 1) for count in cores)
    if workers > room:
        each = "one for each core" if threads is None else f"--threads is {threads} of {sum(cores)} cores"
        raise ValueError(f"--workers is {workers}, expected at most {room}: {each}")
    return Placement(workers, "cpu", threads or divided(cores, workers))


def divided(cores: Sequence[int], workers: int) -> int:
    """The most threads that each of ``workers`` can have on machines with so many cores."""
    return max(n for n in range(1, max(cores) + 1) if sum(count // n for count in cores) >= workers)


def answers(placement: Placement, worker: type, task: object, units: Sequence[object]) -> Iterator[Any]:
    """What ``worker(task).make(unit)`` returns for all units, in the order in which they are finished.

    Each worker is an actor, which Ray starts again, on any machine with room, when it dies. Ray then tries its unit
    again, up to ``RETRIES`` times. When a machine leaves, all of that may happen before Ray notices, so at the end
    units that were lost are given to it once more; then the answer is :class:`Lost`. Closing the iterator leaves the
    actors to :func:`connected`.

    Raises:
        ChildProcessError: if ``LOST_IN_A_ROW`` units are lost one after the other, or no machine is left for a worker.
        Exception: what ``worker`` and ``make`` raised.
    """
    left = dict(enumerate(units))
    reason, lost = "", 0
    for _ in range(ROUNDS):
        for answer in _round(placement, worker, task, left):
            if isinstance(answer, RayError):
                reason, lost = _one_line(answer), lost + 1
                if lost >= LOST_IN_A_ROW:
                    raise ChildProcessError(
                        f"{lost} units in a row each ended their worker {RETRIES + 1} times, as one does that needs "
                        "more memory than there is; the same command goes on, with fewer --workers if it was that"
                    )
            else:
                number, made = answer
                lost = 0
                del left[number]
                yield made
    for unit in left.values():
        yield Lost(unit, f"its worker died {RETRIES + 1} times: {reason}")


def _round(placement: Placement, worker: type, task: object, units: Mapping[int, object]) -> Iterator[Any]:
    """The number of each unit with what was made of it; where its worker died too often, the error."""
    restarting = {"max_restarts": -1, "max_task_retries": RETRIES}
    actor = ray.remote(Actor).options(**placement.resources, **restarting)
    boxed = [ray.put(task)]
    pool = ActorPool([actor.remote() for _ in range(min(placement.workers, len(units)))])
    for each in units.items():
        pool.submit(lambda free, each: free.make.remote(worker, boxed, *each), each)
    while pool.has_next():
        try:
            yield pool.get_next_unordered(timeout=PATIENCE_SECONDS)
        except TimeoutError:
            _check_room(placement)
        except RayTaskError as error:
            raise error.cause from None
        except RayError as error:
            yield error
        # Room for workers that wait for a machine, because theirs has left.
        while (idle := pool.pop_idle()) is not None:
            ray.kill(idle)


def _check_room(placement: Placement) -> None:
    """Raises ``ChildProcessError`` if no machine that is left could hold a worker."""
    kind, count = ("GPU", 1) if placement.threads is None else ("CPU", placement.threads)
    if not any(node["Resources"].get(kind, 0) >= count for node in ray.nodes() if node["Alive"]):
        raise ChildProcessError("no machine with room for a worker is left in the cluster; the same command goes on")
