"""ToDo, SiTo and ToMA in loops over plain Python numbers: what they do to the tokens of one picture, as matrices."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

Rows = Sequence[Sequence[float]]


@dataclass
class ByLoops:
    """Weights of tokens in merged tokens (m, n), of those in keys and values (k, m), and of those in tokens (n, m)."""

    into: Rows
    keys: Rows
    back: Rows

    def merge(self, x: list[Tensor]) -> list[Tensor]:
        return _weighted(self.into, x)

    def context(self, x: list[Tensor]) -> list[Tensor]:
        return _weighted(self.keys, x)

    def unmerge(self, x: list[Tensor]) -> list[Tensor]:
        return _weighted(self.back, x)


def _weighted(weights: Rows, x: list[Tensor]) -> list[Tensor]:
    return [
        torch.stack([weight * token for weight, token in zip(row, x, strict=True) if weight]).sum(0) for row in weights
    ]


def _picks(places: Sequence[int], count: int) -> Rows:
    return [[float(i == place) for i in range(count)] for place in places]


def cosines(x: list[Tensor]) -> Rows:
    unit = [[c / math.sqrt(sum(d * d for d in token.tolist())) for c in token.tolist()] for token in x]
    return [[sum(p * q for p, q in zip(a, b, strict=True)) for b in unit] for a in unit]


def todo_by_loops(x: list[Tensor], grid: tuple[int, int], factor: int) -> ByLoops:
    """Keys are the tokens that a picture of 1 / ``factor`` the height and width shows, each side rounded down."""
    width = grid[1]
    rows, columns = (
        [math.floor(i * side / max(1, side // factor)) for i in range(max(1, side // factor))] for side in grid
    )
    everything = _picks(range(len(x)), len(x))
    return ByLoops(everything, _picks([i * width + j for i in rows for j in columns], len(x)), everything)


def sito_by_loops(
    x: list[Tensor], grid: tuple[int, int], r: float, noise: Sequence[float], alpha: float, beta: float
) -> ByLoops:
    """The token with the best score of each 2 x 2 window is a base; the r n tokens most like a base are pruned."""
    alike, width = cosines(x), grid[1]
    scores = [beta * sum(alike[i]) + alpha * noise[i] for i in range(len(x))]
    best: dict[tuple[int, int], int] = {}
    for i in sorted(range(len(x)), key=lambda i: -scores[i]):
        best.setdefault((i // width // 2, i % width // 2), i)
    bases = set(best.values())
    others = sorted(set(range(len(x))) - bases, key=lambda i: -max(alike[i][base] for base in bases))
    pruned = others[: int(r * len(x))]
    kept = [i for i in range(len(x)) if i not in pruned]
    source = [i if i in kept else max(kept, key=lambda k: alike[i][k]) for i in range(len(x))]
    return ByLoops(
        _picks(kept, len(x)), _picks(range(len(kept)), len(kept)), _picks([kept.index(k) for k in source], len(kept))
    )


def toma_by_loops(x: list[Tensor], grid: tuple[int, int], r: float, per_side: int, scale: float) -> ByLoops:
    """In each tile the destinations that greedily maximize the sum of each token's similarity to the nearest.

    Of those that add as much up to 1e-5 the first: two tokens that are like each other add the same.
    """
    alike, (height, width) = cosines(x), grid
    into: list[list[float]] = []
    back: list[dict[int, float]] = [{} for _ in x]
    for rows in np.array_split(range(height), max(1, min(per_side, height // 2))):
        for columns in np.array_split(range(width), max(1, min(per_side, width // 2))):
            tile = [int(i) * width + int(j) for i in rows for j in columns]
            chosen: list[int] = []
            while len(chosen) < max(1, math.floor(len(tile) * (1 - r))):

                def covered(token: int, chosen: list[int] = chosen, tile: list[int] = tile) -> float:
                    return sum(max(alike[d][i] for d in [*chosen, token]) for i in tile)

                gains = {i: covered(i) for i in tile if i not in chosen}
                chosen.append(next(i for i in gains if gains[i] >= max(gains.values()) - 1e-5))
            shares = {}
            for i in tile:
                most = max(alike[d][i] for d in chosen)
                parts = {d: math.exp(scale * (alike[d][i] - most)) for d in chosen}
                shares[i] = {d: part / sum(parts.values()) for d, part in parts.items()}
            for d in chosen:
                for i in tile:
                    back[i][len(into)] = shares[i][d]
                whole = sum(shares[i][d] for i in tile)
                into.append([shares[i][d] / whole if i in tile else 0.0 for i in range(len(x))])
    return ByLoops(
        into, _picks(range(len(into)), len(into)), [[row.get(d, 0.0) for d in range(len(into))] for row in back]
    )
