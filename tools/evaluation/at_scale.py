"""``tools.evaluate --workers``: rows, pictures and features by the workers of a cluster, and metrics of their parts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import reduce
from pathlib import Path

from tqdm import tqdm

from minisdxl.scale.cluster import Lost, Placement, answers
from tools.evaluation.rows import DENSE, Folder
from tools.evaluation.set_metrics import REFERENCES
from tools.evaluation.statistics import Statistics, distance
from tools.evaluation.worker import Batch, EvaluationWorker, Part, References, Sums, Task

PART = 500  # pictures whose statistics are one unit
FILES = 50  # reference pictures that are one unit
REFERENCE, OTHER = "reference", "other"  # groups of reference pictures; the seeds of drawn ones


def missing_batches(
    folder: Folder, presets: Sequence[str], captions: int, batch: int, with_features: bool
) -> list[Batch]:
    """The batches of these presets that lack rows or features. Only captions that have a dense row, but for dense."""
    found = []
    for start in range(0, captions, batch):
        numbers = range(start, min(start + batch, captions))
        for preset in presets:
            ready = preset == DENSE or all(folder.has(DENSE, number) for number in numbers)
            missing = tuple(number for number in numbers if not folder.has(preset, number))
            bare = tuple(n for n in numbers if n in missing or not folder.has_features(preset, n))
            featureless = bare if with_features else ()
            if ready and (missing or featureless):
                found.append(Batch(preset, numbers, missing, featureless))
    return found


def make_rows(placement: Placement, task: Task, presets: Sequence[str]) -> None:
    """Makes all missing rows: first those of dense, with which the others are compared, then the others.

    Raises ``ChildProcessError`` if some could not be made; the same command tries them again.
    """
    options, total = task.options, len({DENSE, *presets}) * len(task.captions)
    with_features = task.captions.drawn or options.inception is not None or options.clip is not None
    failures: list[str] = []
    for kinds in ([DENSE], [preset for preset in presets if preset != DENSE]):
        folder = Folder(options.out, task.settings)
        batches = missing_batches(folder, kinds, len(task.captions), options.batch, with_features)
        there = sum(folder.has(kind, n) for kind in {DENSE, *presets} for n in range(len(task.captions)))
        with tqdm(total=total, initial=there, unit="picture", desc=" ".join(kinds[:3]) or "all") as bar:
            for answer in answers(placement, EvaluationWorker, task, batches):
                if isinstance(answer, int):
                    bar.update(answer)
                else:
                    failures.append(answer.reason if isinstance(answer, Lost) else answer)
                    bar.set_postfix_str(f"{len(failures)} batches failed")
    Folder(options.out, task.settings).merge_files()
    if failures:
        raise ChildProcessError(
            f"{len(failures)} of the batches failed, the first: {failures[0]:.200}; the same command tries them again"
        )


class MergedMetrics:
    """Metrics of all pictures of each preset together, from statistics of parts, each the work of one worker."""

    def __init__(
        self, placement: Placement, task: Task, files: Sequence[Path], presets: Sequence[str], numbers: Sequence[int]
    ) -> None:
        """``files`` are the reference pictures of FID. Raises ``ChildProcessError`` if a worker dies too often."""
        units: list[Part | References] = [
            References(REFERENCE, tuple(files[at : at + FILES])) for at in range(0, len(files), FILES)
        ]
        if task.captions.drawn and len(numbers) > 1:
            units += [References(REFERENCE, drawn=REFERENCES), References(OTHER, drawn=len(numbers))]
        for preset in dict.fromkeys([DENSE, *presets]):
            units += [Part(preset, tuple(numbers[at : at + PART])) for at in range(0, len(numbers), PART)]
        self.drawn, self.numbers, self.sums = task.captions.drawn, numbers, list[Sums]()
        for answer in answers(placement, EvaluationWorker, task, units):
            if isinstance(answer, Lost):
                raise ChildProcessError(f"a part of the metrics failed: {answer.reason}; the same command goes on")
            self.sums.append(answer)

    def own_distance(self) -> float:
        """Distance of as many other drawn pictures, as a perfect model would have."""
        return self._distance(OTHER)

    def of(self, preset: str) -> Mapping[str, float]:
        """The metrics of a preset; none for fewer than 2 pictures, which have no spread."""
        if len(self.numbers) < 2:
            return {}
        found = {}
        if any(each.group == REFERENCE for each in self.sums):
            found["Fréchet distance" if self.drawn else "FID"] = self._distance(preset)
        cosines = [each.cosines for each in self.sums if each.group == preset and each.cosines is not None]
        if cosines:
            found["CLIP"] = max(0.0, math.fsum(cosines) / len(self.numbers))
        return found

    def _distance(self, group: str) -> float:
        return distance(self._merged(group), self._merged(REFERENCE))

    def _merged(self, group: str) -> Statistics:
        parts = [each.statistics for each in self.sums if each.group == group and each.statistics is not None]
        return reduce(Statistics.merge, parts)
