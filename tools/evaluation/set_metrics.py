"""Metrics of all pictures of a preset together: Fréchet distances and CLIP score."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from minisdxl.vae import VAE
from tools.drawn.painting import draw
from tools.drawn.world import random_scene
from tools.evaluation.metrics import Picture, frechet_distance, vae_features
from tools.evaluation.official_metrics import ClipScore, Fid
from tools.evaluation.pictures import Evaluation

REFERENCES = 1000  # number of drawn pictures in the reference set of the Fréchet distance


class Drawn:
    """The reference set of the Fréchet distance: VAE features of drawn pictures of one size."""

    def __init__(self, vae: VAE, side: int) -> None:
        self.vae, self.side = vae, side

    def distance(self, pictures: Iterable[Picture]) -> float:
        """Distance of two or more pictures to ``REFERENCES`` drawn ones of captions that training never saw."""
        return frechet_distance(vae_features(self.vae, pictures), self._references)

    def own_distance(self, count: int) -> float:
        """Distance of ``count`` other drawn pictures, as a perfect model would have."""
        return frechet_distance(self.features("other", count), self._references)

    def features(self, seed: str, count: int) -> torch.Tensor:
        """Features (n, D) of ``count`` drawn pictures: the references have the seed "reference"."""
        return vae_features(self.vae, self._draw(seed, count))

    @cached_property
    def _references(self) -> torch.Tensor:
        return self.features("reference", REFERENCES)

    def _draw(self, seed: str, count: int) -> Iterator[Picture]:
        rng = random.Random(seed)
        return (draw(random_scene(rng, "test"), self.side) for _ in range(count))


@dataclass(frozen=True)
class SetMetrics:
    """Metrics of all pictures of a preset together, for :func:`tools.evaluation.summaries.summarize`.

    Drawn captions have the Fréchet distance to drawn pictures. Others have FID and CLIP score, if their weights were
    given.
    """

    evaluation: Evaluation
    drawn: Drawn
    fid: Fid | None = None
    clip: ClipScore | None = None

    def of(self, numbers: Sequence[int]) -> Callable[[str], Mapping[str, float]]:
        """The metrics of a preset for these captions; none for fewer than 2 pictures, which have no spread."""
        return lambda preset: self._measure(preset, numbers) if len(numbers) > 1 else {}

    def _measure(self, preset: str, numbers: Sequence[int]) -> dict[str, float]:
        folder, captions = self.evaluation.folder, self.evaluation.captions

        def pictures() -> Iterator[Picture]:
            return (folder.picture(preset, number) for number in numbers)

        if captions.drawn:
            return {"Fréchet distance": self.drawn.distance(pictures())}
        found = {} if self.fid is None else {"FID": self.fid(pictures())}
        texts = [captions.texts[number] for number in numbers]
        return found if self.clip is None else {**found, "CLIP": self.clip(pictures(), texts)}
