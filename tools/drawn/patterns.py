"""The patterns of the drawn world: textures of two tones on an object or a background.

Coordinates are shares of the picture's side, x to the right, y down.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

Field = NDArray[np.float32]

KINDS = ("plain", "stripes", "waves", "checks", "blobs")
TURN = {
    "stripes": math.pi,
    "waves": math.pi,
    "checks": math.pi / 2,
    "blobs": math.pi / 3,
}  # leaves it the same
PERIODS = (1 / 16, 1 / 11)  # shortest and longest; a latent of 64 x 64 has 4 to 6 cells a period
BEND = 0.3  # how far waves swing to each side, in periods; one swing takes two periods
CONTRAST = 1.2  # an edge between two tones is about 1 / (2 pi CONTRAST) periods wide
BLOB = 0.4  # where the sum of three cosines turns into a blob; blobs cover about a third


@dataclass(frozen=True)
class Pattern:
    """A texture: kind, direction (radians), period, and shift along two axes (in periods).

    Raises ``ValueError`` for an unknown kind.
    """

    kind: str = "plain"
    angle: float = 0.0
    period: float = 1 / 12
    shift: tuple[float, float] = (0.0, 0.0)

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"pattern is {self.kind!r}, expected one of {', '.join(KINDS)}")

    def share(self, x: Field, y: Field) -> Field:
        """Share of the first tone, in [0, 1], at points that broadcast to one shape; the rest is the second tone."""
        if self.kind == "plain":
            return np.ones(np.broadcast_shapes(x.shape, y.shape), dtype=np.float32)
        return np.asarray(np.clip(0.5 + CONTRAST * self._height(x, y), 0, 1), dtype=np.float32)

    def turned(self) -> Pattern:
        """The pattern in the direction furthest from its own. Raises ``KeyError`` for a plain one."""
        return replace(self, angle=self.angle + TURN[self.kind] / 2)

    def angle_to(self, other: Pattern) -> float:
        """Smallest turn (radians) from this direction to that of another pattern of the same kind."""
        if self.kind == "plain":
            return 0.0
        turn = TURN[self.kind]
        return abs((other.angle - self.angle + turn / 2) % turn - turn / 2)

    def _height(self, x: Field, y: Field) -> Field:
        """Positive in the first tone, negative in the second, 0 on the edge between them."""
        a, b = self.shift
        if self.kind == "stripes":
            return _cosine(self._along(0, x, y) + a)
        if self.kind == "waves":
            swing = _cosine(self._along(math.pi / 2, x, y) / 2 + (b - 0.25))
            return _cosine(self._along(0, x, y) + a + BEND * swing)
        if self.kind == "checks":
            return _cosine(self._along(0, x, y) + a) + _cosine(self._along(math.pi / 2, x, y) + b)
        third = 2 * math.pi / 3  # three waves, each a third of a turn from the next, meet in a lattice of round spots
        first, second, last = (_cosine(self._along(turn * third, x, y) + s) for turn, s in enumerate((a, b, -a - b)))
        return np.asarray(BLOB - first - second - last, dtype=np.float32)

    def _along(self, turn: float, x: Field, y: Field) -> Field:
        """Periods along the pattern's direction turned by ``turn`` radians."""
        angle = self.angle + turn
        along = (math.cos(angle) / self.period) * x + (math.sin(angle) / self.period) * y
        return np.asarray(along, dtype=np.float32)


FLAT = Pattern()


def random_pattern(rng: random.Random, without: str | None = None) -> Pattern:
    """Any pattern, of any kind but ``without``."""
    kind = rng.choice([each for each in KINDS if each != without])
    return Pattern(kind, rng.uniform(0, math.pi), rng.uniform(*PERIODS), (rng.random(), rng.random()))


def _cosine(turns: NDArray[np.floating[Any]]) -> Field:
    return np.asarray(np.cos(2 * math.pi * turns), dtype=np.float32)
