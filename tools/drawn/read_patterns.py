"""Reads the pattern of an object: draws candidate patterns and finds the most similar one.

A pattern is a sum of a few plane waves. Its kind fixes their directions and lengths. For each angle and period of a
bank, least squares gives the phases of these waves in the cells of an object. A pattern with these phases is drawn and
correlated with the cells. Phases of two objects are not compared, because a model need not get them right.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

from tools.drawn.patterns import FLAT, KINDS, PERIODS, Pattern
from tools.drawn.regions import GRID, Floats, Mask

WINDOW = 0.14  # radius around an object's center, about a small object; a larger window needs a finer bank
FLAT_BELOW = 0.25  # smallest spread of a pattern: standard deviation over half the distance of the two tones
ANGLES = 30  # angles of the bank, over half a turn
LENGTHS = 6  # periods of the bank, from the shortest to the longest
TRIED = 6  # candidates of each kind that are drawn

# Plane waves of each kind: periods along the pattern's direction and across it.
_THIRD = [(math.cos(turn * 2 * math.pi / 3), math.sin(turn * 2 * math.pi / 3)) for turn in range(3)]
WAVES: dict[str, list[tuple[float, float]]] = {
    "stripes": [(1, 0)],
    "waves": [(1, 0), (1, 0.5), (1, -0.5)],
    "checks": [(1, 0), (0, 1)],
    "blobs": _THIRD,
}


@dataclass(frozen=True)
class Likeness:
    """The best pattern of a kind, and its correlation with an object's tones."""

    pattern: Pattern
    correlation: float


def read_pattern(tones: Floats, inside: Mask, spread: float) -> dict[str, Likeness]:
    """The best pattern of every kind for an object, or only "plain" if its tones hardly differ.

    ``tones`` (GRID, GRID) is the object's brightness, ``spread`` the difference of a pattern's two tones in the same
    unit. ``inside`` are the cells that lie wholly in the object.
    """
    rows, columns = np.nonzero(inside)
    near = np.hypot(rows - rows.mean(), columns - columns.mean()) <= WINDOW * GRID
    x, y = (columns[near] + 0.5) / GRID, (rows[near] + 0.5) / GRID
    values = tones[rows[near], columns[near]]
    values = values - values.mean()
    if 2 * values.std() / spread < FLAT_BELOW:
        return {"plain": Likeness(FLAT, 1.0)}
    return {kind: _best_of_kind(kind, values, x, y) for kind in KINDS if kind != "plain"}


@cache
def _bank() -> tuple[Floats, Floats]:
    """Angles and periods of all candidates."""
    angles, periods = np.meshgrid(np.arange(ANGLES) * math.pi / ANGLES, np.geomspace(*PERIODS, LENGTHS))
    return angles.ravel(), periods.ravel()


def _best_of_kind(kind: str, values: Floats, x: Floats, y: Floats) -> Likeness:
    angles, periods = _bank()
    along = (np.cos(angles)[:, None] * x + np.sin(angles)[:, None] * y) / periods[:, None]  # (candidates, cells)
    across = (np.cos(angles)[:, None] * y - np.sin(angles)[:, None] * x) / periods[:, None]
    turns = [2 * math.pi * (u * along + v * across) for u, v in WAVES[kind]]
    basis = np.stack([np.ones_like(along), *map(np.cos, turns), *map(np.sin, turns)], axis=-1)
    gram = basis.swapaxes(1, 2) @ basis + 1e-3 * len(values) * np.eye(basis.shape[-1])
    moments = values @ basis
    weights = np.linalg.solve(gram, moments[..., None])[..., 0]
    explained = (weights * moments).sum(axis=-1)
    count = len(turns)
    phases = np.arctan2(-weights[:, 1 + count :], weights[:, 1 : 1 + count]) / (2 * math.pi)  # cos(turn + phase)
    best = Likeness(Pattern(kind), -1.0)
    for index in np.argsort(-explained)[:TRIED]:
        for shift in _shifts(kind, phases[index]):
            pattern = Pattern(kind, float(angles[index]), float(periods[index]), shift)
            best = max(best, Likeness(pattern, _correlation(pattern, values, x, y)), key=lambda each: each.correlation)
    return best


def _shifts(kind: str, phases: NDArray[np.float64]) -> list[tuple[float, float]]:
    """Shifts of a pattern whose plane waves have these phases, in turns."""
    if kind == "stripes":
        return [(phases[0], 0.0)]
    if kind == "checks":
        return [(phases[0], phases[1])]
    if kind == "blobs":  # minus a sum of three cosines whose shifts add up to 0
        shifts = phases + 0.5
        error = (shifts.sum() + 0.5) % 1 - 0.5
        return [(shifts[0] - error / 3, shifts[1] - error / 3)]
    # cos(u + a + B sin(w + b)) has side waves cos(u + a + w + b) and -cos(u + a - w - b): phases a + b, a - b + 1/2.
    a = (phases[1] + phases[2] - 0.5) / 2
    b = (phases[1] - phases[2] + 0.5) / 2
    return [(a, b), (a + 0.5, b + 0.5)]


def _correlation(pattern: Pattern, values: Floats, x: Floats, y: Floats) -> float:
    drawn = pattern.share(x.astype(np.float32), y.astype(np.float32)).astype(np.float64)
    drawn -= drawn.mean()
    return float(drawn @ values / (np.linalg.norm(drawn) * np.linalg.norm(values) + 1e-9))
