"""Rankings that cover the grid: what stays is spread out, and no window is left empty."""

from __future__ import annotations

import math

import pytest
import torch

from atedm import LazyGraph, TokenSet, gwpr, scores, top_k
from atedm.coverage import SHIFTS, WINDOW, cover, grid_order
from atedm.graph.inputs import AttentionInputs


def random_tokens(batch: int, height: int, width: int) -> TokenSet:
    generator = torch.Generator().manual_seed(height * width)
    x = torch.randn(batch, 6, height, width, generator=generator, dtype=torch.float64)
    return TokenSet.from_feature_map(x)


def test_grid_order_is_the_dither_matrix_of_bayer() -> None:
    order = -grid_order(random_tokens(1, 4, 4))
    # The matrix for 4 x 4 as it is printed everywhere, with its anti-diagonal the second place.
    assert order.view(4, 4).tolist() == [[0, 8, 2, 10], [12, 4, 14, 6], [3, 11, 1, 9], [15, 7, 13, 5]]


@pytest.mark.parametrize("shift", range(len(SHIFTS)))
@pytest.mark.parametrize("grid", [(8, 8), (32, 32), (5, 7), (1, 9), (48, 16)])
def test_grid_order_covers_the_grid_however_many_stay(grid: tuple[int, int], shift: int) -> None:
    """No two are equal, and at each count the largest hole is not much larger than on a regular grid of that count."""
    tokens = random_tokens(1, *grid)
    scores = grid_order(tokens, shift)
    assert sorted((-scores[0]).tolist()) == sorted(set((-scores[0]).tolist()))
    assert shift > 0 or scores.max() == 0
    for count in (tokens.count // 4, tokens.count // 3, tokens.count // 2):
        kept = [divmod(place, grid[1]) for place in top_k(scores, max(1, count))[0].tolist()]
        everywhere = [(y, x) for y in range(grid[0]) for x in range(grid[1])]
        hole = max(min(max(abs(y - a), abs(x - b)) for a, b in kept) for y, x in everywhere)
        pitch = math.sqrt(tokens.count / max(1, count)) if min(grid) > 1 else tokens.count / max(1, count)
        print(f"{max(1, count)} of {grid}: farthest position {hole} from a kept one, regular grid of pitch {pitch:.1f}")
        assert hole <= 2 * pitch


def test_a_grid_that_moves_is_everywhere_in_turn() -> None:
    tokens = random_tokens(1, 8, 6)
    stays = [set(top_k(grid_order(tokens, shift), 12)[0].tolist()) for shift in range(len(SHIFTS))]
    assert set.union(*stays) == set(range(48))
    for kept, (down, right) in zip(stays, SHIFTS, strict=True):
        assert {((place // 6 + down) % 2, (place % 6 + right) % 2) for place in kept} == {(0, 0)}


def test_grid_order_knows_where_the_tokens_of_a_sparse_set_are() -> None:
    tokens = random_tokens(1, 4, 4)
    kept = torch.tensor([[1, 4, 5, 10, 15]])
    assert torch.equal(grid_order(tokens.keep(kept)), grid_order(tokens).gather(1, kept))


def covered_by_loops(values: list[float], positions: list[int], width: int) -> list[int]:
    """Token numbers, best first."""
    best = dict[tuple[int, int], int]()
    for token, position in enumerate(positions):
        window = position // width // WINDOW, position % width // WINDOW
        if window not in best or values[token] > values[best[window]]:
            best[window] = token
    return sorted(range(len(values)), key=lambda token: (token not in best.values(), -values[token], token))


@pytest.mark.parametrize("grid", [(8, 8), (5, 7), (1, 9), (6, 4)])
@pytest.mark.parametrize("kinds", [3, 1000], ids=["ties", "few ties"])
def test_cover_by_loops(grid: tuple[int, int], kinds: int) -> None:
    tokens = random_tokens(3, *grid)
    values = torch.randint(kinds, (3, tokens.count), generator=torch.Generator().manual_seed(kinds)).double()
    covered = cover(values, tokens)
    for row in range(3):
        best_first = covered[row].argsort(descending=True).tolist()
        assert best_first == covered_by_loops(values[row].tolist(), list(range(tokens.count)), grid[1])
    sparse = torch.tensor([0, 2, 3, 6, 8]).expand(3, -1)
    some, theirs = tokens.keep(sparse), values.gather(1, sparse)
    for row in range(3):
        best_first = cover(theirs, some)[row].argsort(descending=True).tolist()
        assert best_first == covered_by_loops(theirs[row].tolist(), sparse[row].tolist(), grid[1])


def test_covered_ranking_leaves_no_window_empty_and_else_follows_the_votes() -> None:
    tokens, generator = random_tokens(2, 6, 8), torch.Generator().manual_seed(0)
    q, k = (3 * torch.randn(2, 2, 48, 5, generator=generator, dtype=torch.float64) for _ in range(2))
    attention = LazyGraph(AttentionInputs(q, k, 0.4))
    kept = top_k(scores("covered", tokens, attention, attention), 18)
    votes = gwpr(attention.graph)
    for row in range(2):
        windows = [(place // 8 // WINDOW, place % 8 // WINDOW) for place in kept[row].tolist()]
        assert len(set(windows)) == 12
        winners = {
            max((p for p in range(48) if (p // 16, p % 8 // 2) == w), key=votes[row].__getitem__) for w in windows
        }
        rest = sorted(set(range(48)) - winners, key=lambda place: -votes[row, place].item())
        assert set(kept[row].tolist()) == winners | set(rest[:6])
