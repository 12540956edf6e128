"""Likeness of values: rankings that need no attention, against loops, and what they must leave on the grid."""

from __future__ import annotations

import math

import pytest
import torch

from atedm import TokenSet, top_k
from atedm.cosine import ANCHORS, dissimilarity, nearest
from atedm.coverage import grid_order
from atedm.merging import Matching, Merging, match_tokens


def random_tokens(batch: int, height: int, width: int, scale: float = 1.0) -> TokenSet:
    generator = torch.Generator().manual_seed(height * width)
    x = scale * torch.randn(batch, 6, height, width, generator=generator, dtype=torch.float64)
    return TokenSet.from_feature_map(x)


def cosine(x: list[float], y: list[float]) -> float:
    return sum(a * b for a, b in zip(x, y, strict=True)) / (math.hypot(*x) * math.hypot(*y))


@pytest.mark.parametrize("scale", [1.0, 1e-2])
@pytest.mark.parametrize(("count", "found"), [(1, 1), (2, 2), (5, 5), (9, 5)])
def test_nearest_by_loops(scale: float, count: int, found: int) -> None:
    values, others = random_tokens(2, 3, 4, scale).values, random_tokens(2, 1, 5, scale).values
    best, index = nearest(values, others, count)
    assert best.shape == index.shape == (2, 12, found)
    worst = 0.0
    for row in range(2):
        for token in range(12):
            cosines = [cosine(values[row, token].tolist(), other) for other in others[row].tolist()]
            order = sorted(range(5), key=lambda place: -cosines[place])[:found]
            assert index[row, token].tolist() == order
            for place, similarity in zip(order, best[row, token].tolist(), strict=True):
                worst = max(worst, abs(similarity - cosines[place]))
    print(f"cosine similarity at scale {scale}: max error {worst:.1e}")
    assert worst < 1e-15


def test_nearest_takes_the_first_of_equals_and_zeros_are_like_nothing() -> None:
    others = torch.tensor([[[0.0, 1.0], [2.0, 0.0], [1.0, 0.0], [0.0, 0.0]]])
    best, index = nearest(torch.tensor([[[3.0, 0.0], [0.0, 0.0], [-1.0, -1.0]]]), others)
    assert best.tolist() == [[[1.0], [0.0], [0.0]]]
    assert index.tolist() == [[[1], [0], [3]]]
    assert nearest(torch.tensor([[[3.0, 0.0]]]), others, 3)[1].tolist() == [[[1, 2, 0]]]


def test_nearest_computes_in_float32_at_least() -> None:
    values = random_tokens(1, 4, 4).values
    half = nearest(values.half(), values.half())
    assert half[0].dtype == torch.float32
    assert half[1].tolist() == [[[place] for place in range(16)]]


def test_dissimilarity_by_loops() -> None:
    tokens = random_tokens(2, 4, 6)
    scores = dissimilarity(tokens)
    order = grid_order(tokens)
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
