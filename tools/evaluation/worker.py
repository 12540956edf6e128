"""The worker of an evaluation: makes pictures and their rows, and the features that metrics of all of them need."""

from __future__ import annotations

import argparse
import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from minisdxl.cli.options import DTYPES
from minisdxl.loading import load
from minisdxl.scale.store import Store
from tools.evaluation.metrics import vae_features
from tools.evaluation.official_metrics import ClipScore, Fid, read_pixels
from tools.evaluation.pictures import Captions, Evaluation
from tools.evaluation.rows import SETTINGS, Folder, preset_folder
from tools.evaluation.set_metrics import Drawn
from tools.evaluation.statistics import Statistics

FRECHET, CLIP = "frechet", "clip"  # names of features: those of a Fréchet distance, and the cosine of the CLIP score


@dataclass(frozen=True)
class Task:
    """What all workers of an evaluation are told."""

    options: argparse.Namespace  # settled, with a device that is there
    captions: Captions
    settings: Mapping[str, Any]  # of the folder
    steps: int
    cfg: float
    size: tuple[int, int]
    threads: int | None  # on a CPU
    place: Path  # the folder in which the command was given


class Batch(NamedTuple):
    """Makes the rows ``missing`` of a batch of one preset, and then features where they are ``featureless``."""

    preset: str
    numbers: range
    missing: tuple[int, ...]
    featureless: tuple[int, ...]


class Part(NamedTuple):
    """Statistics of the features of some pictures of a preset, and the sum of their cosines."""

    preset: str
    numbers: tuple[int, ...]


class References(NamedTuple):
    """Statistics of reference pictures of a ``group``: of files, or of so many drawn ones, whose seed is the group."""

    group: str
    files: tuple[Path, ...] = ()
    drawn: int = 0


class Sums(NamedTuple):
    """What a :class:`Part` or :class:`References` adds to the metrics of a ``group``: a preset, or a seed or files."""

    group: str
    statistics: Statistics | None
    cosines: float | None


class EvaluationWorker:
    """Makes units of a :class:`Task`; loads each model once, when it is first needed.

    Raises ``ValueError`` on a machine that does not see the folder.
    """

    def __init__(self, task: Task) -> None:
        self.task = task
        if task.threads is not None:
            torch.set_num_threads(task.threads)
        if task.place.is_dir():
            os.chdir(task.place)
        if SETTINGS not in Store(task.options.out).names():
            raise ValueError(f"{platform.node()} does not see the folder {task.options.out}, expected a shared one")
        self.folder = Folder(task.options.out, task.settings)

    def make(self, unit: Batch | Part | References) -> int | str | Sums:
        """The number of rows that were made, or what went wrong in a batch, or sums for the metrics."""
        if isinstance(unit, Part):
            return self._sums(unit)
        if isinstance(unit, References):
            files = map(read_pixels, unit.files)
            features = self._fid.features(files) if unit.files else self._drawn.features(unit.group, unit.drawn)
            return Sums(unit.group, Statistics.of(features), None)
        try:
            rows = self._evaluation.make(unit.preset, unit.numbers, unit.missing) if unit.missing else []
        except ArithmeticError as error:
            return f"{unit.preset} of captions {unit.numbers[0]} to {unit.numbers[-1]}: {error}"
        for number in unit.featureless:
            self.folder.save_features(unit.preset, number, self._features(unit.preset, number))
        if rows:
            self.folder.add(f"rows-{preset_folder(unit.preset)}-{unit.numbers[0]:05}.csv", rows)
        return len(rows)

    @cached_property
    def _evaluation(self) -> Evaluation:
        task, options = self.task, self.task.options
        dtype = DTYPES[options.dtype]
        sdxl = load(options.weights, device=options.device, dtype=dtype, tokenizer=options.tokenizer)
        settings = (task.steps, task.cfg, task.size, options.batch, options.sampling)
        return Evaluation(sdxl, task.captions, self.folder, *settings)

    @property
    def _device(self) -> torch.device:
        return torch.device(self.task.options.device)

    @cached_property
    def _drawn(self) -> Drawn:
        return Drawn(self._evaluation.sdxl.vae, self.task.size[0])

    @cached_property
    def _fid(self) -> Fid:
        return Fid(self.task.options.inception, [], self._device)

    @cached_property
    def _clip(self) -> ClipScore:
        return ClipScore(self.task.options.clip, self._device)

    def _features(self, preset: str, number: int) -> dict[str, NDArray[Any]]:
        picture, found = self.folder.picture(preset, number), dict[str, NDArray[Any]]()
        if self.task.captions.drawn:
            found[FRECHET] = vae_features(self._drawn.vae, [picture])[0].numpy()
        elif self.task.options.inception is not None:
            found[FRECHET] = self._fid.features([picture])[0].numpy()
        if self.task.options.clip is not None:
            found[CLIP] = np.array(self._clip.cosine(picture, self.task.captions.texts[number]))
        return found

    def _sums(self, part: Part) -> Sums:
        features = [self.folder.features(part.preset, number) for number in part.numbers]
        frechet = [torch.from_numpy(each[FRECHET]) for each in features if FRECHET in each]
        cosines = [float(each[CLIP]) for each in features if CLIP in each]
        return Sums(
            part.preset, Statistics.of(torch.stack(frechet)) if frechet else None, sum(cosines) if cosines else None
        )
