"""The worker of a run: loads the model once, makes pictures, and writes them into the folder."""

from __future__ import annotations

import argparse
import os
import platform
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from minisdxl.checkpoint.modules import open_source
from minisdxl.cli.jobs import Job
from minisdxl.cli.models import load_model, parts_of
from minisdxl.cli.options import DTYPES
from minisdxl.cli.picture_files import picture_bytes
from minisdxl.cli.reports import hardware, sha256
from minisdxl.cli.runs import Run
from minisdxl.loading import weights_path
from minisdxl.runtime.allocator import give_back_freed_memory
from minisdxl.scale.folder import MANIFEST, write_whole
from minisdxl.scale.store import Store


class Unit(NamedTuple):
    """What a worker makes at a time: a batch, of which only the files in ``wanted`` are written."""

    jobs: tuple[Job, ...]
    wanted: frozenset[str]


class Answer(NamedTuple):
    """The files of a unit, and what went wrong if they were not made."""

    names: frozenset[str]
    error: str | None = None


@dataclass(frozen=True)
class Task:
    """What all workers of a run are told."""

    options: argparse.Namespace  # settled, with a device that is there
    run: Callable[..., Run]  # with all that a run needs but its model and settings
    settings: Mapping[str, Any]  # of all pictures
    store: Store
    manifest: bytes  # of the folder
    threads: int | None  # on a CPU
    place: Path  # the folder in which the command was given
    host: str  # where it was given


class PictureWorker:
    """Makes the pictures of a :class:`Task`, one unit after the other.

    Raises ``ValueError`` if this machine differs from the one where the command was given, and as
    :func:`minisdxl.cli.models.load_model`.
    """

    def __init__(self, task: Task) -> None:
        self.task = task
        if task.threads is not None:
            torch.set_num_threads(task.threads)
        if task.place.is_dir():
            os.chdir(task.place)
        self._check_machine()
        sdxl = load_model(task.options)
        self.run = task.run(sdxl=sdxl.compile() if task.options.compile else sdxl, settings=task.settings)
        self.machine = {"machine": hardware(sdxl.device), "host": platform.node()}

    def make(self, unit: Unit) -> Answer:
        """Makes a unit. An error that its prompts may have caused is part of the answer; others are raised.

        Raises ``OSError`` where the folder cannot be written.
        """
        try:
            drawn = list(self.run.draw(unit.jobs))
        except Exception as error:
            return Answer(unit.wanted, f"{type(error).__name__}: {error}")
        for job, image, picture in drawn:
            if picture["path"] in unit.wanted:
                data = picture_bytes(image, self.run.metadata(job, picture))
                write_whole(self.task.store, {**picture, **self.machine}, data)
        give_back_freed_memory()
        return Answer(unit.wanted)

    def _check_machine(self) -> None:
        """Raises ``ValueError`` where pictures would differ, or would be written to another place."""
        task, here = self.task, platform.node()
        try:
            seen = task.store.read(MANIFEST)
        except FileNotFoundError:
            seen = b""
        if seen != task.manifest:
            raise ValueError(
                f"{here} does not see the folder {task.store.url} of {task.host}, expected one that all "
                "machines share, such as s3://BUCKET/FOLDER"
            )
        expected = task.settings
        if torch.__version__ != expected["torch"]:
            raise ValueError(f"{here} has torch {torch.__version__}, expected {expected['torch']} as on {task.host}")
        if here != task.host and self._weights_sha256() != expected["sha256"]:
            raise ValueError(f"--weights is {task.options.weights}, another file on {here} than on {task.host}")

    def _weights_sha256(self) -> str:
        options = self.task.options
        path, dtype = weights_path(options.weights), DTYPES[options.dtype]
        return sha256(open_source(path, dtype, **parts_of(options)).files)
