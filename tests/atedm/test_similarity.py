"""Likeness of values: rankings that need no attention, against loops, and what they must leave on the grid."""

from __future__ import annotations

import math

import pytest
import torch

from atedm import TokenSet, top_k
from atedm.merging import Matching, Merging, match_tokens
from atedm.similarity import ANCHORS, dissimilarity, nearest, spread


def random_tokens(batch: int, height: int, width: int, scale: float = 1.0) -> TokenSet:
    generator = torch.Generator().manual_seed(height * width)
    x = scale * torch.randn(batch, 6, height, width, generator=generator, dtype=torch.float64)
    return TokenSet.from_feature_map(x)


def cosine(x: list[float], y: list[float]) -> float:
    return sum(a * b for a, b in zip(x, y, strict=True)) / (math.hypot(*x) * math.hypot(*y))


@pytest.mark.parametrize("scale", [1.0, 1e-2])
def test_nearest_by_loops(scale: float) -> None:
    values, others = random_tokens(2, 3, 4, scale).values, random_tokens(2, 1, 5, scale).values
    best, index = nearest(values, others)
    worst = 0.0
    for row in range(2):
        for token in range(12):
            cosines = [cosine(values[row, token].tolist(), other) for other in others[row].tolist()]
            assert index[row, token] == cosines.index(max(cosines))
            worst = max(worst, abs(best[row, token].item() - max(cosines)))
    print(f"cosine similarity at scale {scale}: max error {worst:.1e}")
    assert worst < 1e-15


def test_nearest_takes_the_first_of_equals_and_zeros_are_like_nothing() -> None:
    others = torch.tensor([[[0.0, 1.0], [2.0, 0.0], [1.0, 0.0], [0.0, 0.0]]])
    best, index = nearest(torch.tensor([[[3.0, 0.0], [0.0, 0.0], [-1.0, -1.0]]]), others)
    assert best.tolist() == [[1.0, 0.0, 0.0]]
    assert index.tolist() == [[1, 0, 3]]


def test_nearest_computes_in_float32_at_least() -> None:
    values = random_tokens(1, 4, 4).values
    half = nearest(values.half(), values.half())
    assert half[0].dtype == torch.float32
    assert half[1].tolist() == [list(range(16))]


def test_spread_is_the_dither_matrix_of_bayer() -> None:
    order = -spread(random_tokens(1, 4, 4))
    # The matrix for 4 x 4 as it is printed everywhere, with its anti-diagonal the second place.
    assert order.view(4, 4).tolist() == [[0, 8, 2, 10], [12, 4, 14, 6], [3, 11, 1, 9], [15, 7, 13, 5]]


@pytest.mark.parametrize("grid", [(8, 8), (32, 32), (5, 7), (1, 9), (48, 16)])
def test_spread_covers_the_grid_however_many_stay(grid: tuple[int, int]) -> None:
    """No two are equal, and at each count the largest hole is not much larger than on a regular grid of that count."""
    tokens = random_tokens(1, *grid)
    scores = spread(tokens)
    assert sorted((-scores[0]).tolist()) == sorted(set((-scores[0]).tolist()))
    assert scores.max() == 0
    for count in (tokens.count // 4, tokens.count // 3, tokens.count // 2):
        kept = [divmod(place, grid[1]) for place in top_k(scores, max(1, count))[0].tolist()]
        everywhere = [(y, x) for y in range(grid[0]) for x in range(grid[1])]
        hole = max(min(max(abs(y - a), abs(x - b)) for a, b in kept) for y, x in everywhere)
        pitch = math.sqrt(tokens.count / max(1, count)) if min(grid) > 1 else tokens.count / max(1, count)
        print(f"{max(1, count)} of {grid}: farthest position {hole} from a kept one, regular grid of pitch {pitch:.1f}")
        assert hole <= 2 * pitch


def test_spread_knows_where_the_tokens_of_a_sparse_set_are() -> None:
    tokens = random_tokens(1, 4, 4)
    kept = torch.tensor([[1, 4, 5, 10, 15]])
    assert torch.equal(spread(tokens.keep(kept)), spread(tokens).gather(1, kept))


def test_dissimilarity_by_loops() -> None:
    tokens = random_tokens(2, 4, 6)
    scores = dissimilarity(tokens)
    order = spread(tokens)
    worst = 0.0
    for row in range(2):
        anchors = sorted(range(24), key=lambda place: -order[row, place].item())[: 24 // ANCHORS]
        assert scores[row, anchors].sort(descending=True).values.tolist() == scores[row, anchors].tolist()
        assert scores[row, anchors].min() >= 1.5
        for place in set(range(24)) - set(anchors):
            values = tokens.values[row].tolist()
            expected = -max(cosine(values[place], values[anchor]) for anchor in anchors)
            worst = max(worst, abs(scores[row, place].item() - expected))
    print(f"dissimilarity: max error {worst:.1e}")
    assert worst < 1e-15


@pytest.mark.parametrize("grid", [(8, 8), (4, 6), (10, 14)])
def test_dissimilarity_keeps_what_merging_keeps(grid: tuple[int, int]) -> None:
    """On a grid of even sides the tokens that stay are those that ToMe does not merge into others."""
    tokens = random_tokens(2, *grid)
    matching = match_tokens(tokens, Merging(0.5))
    kept = top_k(dissimilarity(tokens), tokens.count - Merging(0.5).removed(tokens.count))
    assert isinstance(matching, Matching)
    assert torch.equal(matching.order[:, : kept.shape[1]].sort(dim=1).values, kept)


def test_dissimilarity_of_few_tokens() -> None:
    tokens = random_tokens(1, 1, 3)
    assert dissimilarity(tokens).argmax() == 0
    assert top_k(dissimilarity(tokens), 1).tolist() == [[0]]
