"""What a run keeps from step to step: tensors of the U-Net, earlier evaluations, the last difference of guidance."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import takewhile

from torch import Tensor

from minisdxl.steps.forecast import Point
from minisdxl.steps.plan import StepPlan


@dataclass
class Kept:
    """Made by a run for the pictures of a batch that share their plans, and gone with it."""

    tensors: dict[str, Tensor] = field(default_factory=dict)  # by minisdxl/steps/evaluate.py, of `halves` branches
    halves: dict[str, tuple[str, ...]] = field(default_factory=dict)  # the branches that each of them has
    trail: list[Point] = field(default_factory=list)  # all calls of the denoiser
    difference: Tensor | None = None  # of the conditional and the unconditional noise, (B, C, H, W)
    plans: list[StepPlan] = field(default_factory=list)  # of all steps so far, as they were carried out

    def put(self, tensors: dict[str, Tensor], branches: tuple[str, ...], averaged: frozenset[str]) -> None:
        """Keeps what a call with these branches of guidance gave. ``averaged`` kinds have the mean of both."""
        for name, tensor in tensors.items():
            self.tensors[name] = tensor
            self.halves[name] = () if name.partition(" ")[0] in averaged else branches

    def take(self, branches: tuple[str, ...]) -> dict[str, Tensor]:
        """All tensors, of these branches of guidance alone."""
        found = {}
        for name, tensor in self.tensors.items():
            had = self.halves[name]
            if had in ((), branches):
                found[name] = tensor
            elif len(had) == 2 and len(branches) == 1:
                found[name] = tensor.chunk(2)[had.index(branches[0])]
        return found

    @property
    def past(self) -> list[Point]:
        """All evaluations."""
        return [point for point in self.trail if point.evaluated]

    def since(self) -> list[Point]:
        """The forecasts since the last evaluation."""
        return list(takewhile(lambda point: not point.evaluated, reversed(self.trail)))[::-1]
