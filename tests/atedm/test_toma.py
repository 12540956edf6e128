"""ToMA against loops over plain Python numbers, and facility location against its guarantee."""

from __future__ import annotations

import itertools

import pytest
import torch

from atedm import TokenSet, ToMA
from atedm.toma import facility_location
from tests.atedm.reductions import toma_by_loops
from tests.atedm.test_merging import random_tokens, random_values, sorted_rows

GRIDS = [(8, 8), (5, 7), (9, 4), (1, 6), (2, 3), (1, 1), (7, 8)]


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize(
    "how", [ToMA(0.5), ToMA(0.5, tiles=9, scale=10.0), ToMA(0.7, tiles=4, scale=1.0), ToMA(0.2, tiles=1, scale=0.0)]
)
def test_by_loops(grid: tuple[int, int], how: ToMA) -> None:
    tokens = random_tokens(*grid)
    values = random_values(tokens, 3)
    merges = how.match(tokens)
    merged = merges[0].merge(values)
    restored = merges[0].unmerge(merged)
    assert merges[0] is merges[1] is merges[2] or grid == (1, 1)
    assert how.counts(grid) == (merged.shape[1],) * 4
    assert merges[0].context(merged) is merged
    worst = 0.0
    for row in range(2):
        loops = toma_by_loops(list(tokens.values[row]), grid, how.ratio, round(how.tiles**0.5), how.scale)
        theirs = loops.merge(list(values[row]))
        error = sorted_rows(merged[row : row + 1]) - sorted_rows(torch.stack(theirs).unsqueeze(0))
        worst = max(worst, error.abs().max().item())
        worst = max(worst, (restored[row] - torch.stack(loops.unmerge(theirs))).abs().max().item())
    print(f"{how} by loops, grid {grid}: {merged.shape[1]} of {tokens.count} tokens, max error {worst:.1e}")
    assert worst < 1e-12


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_greedy_choice_is_near_the_best_one(count: int) -> None:
    """The sum of similarities is monotone and submodular, so greedy choice reaches 1 - 1/e of the best of all sets."""
    x = torch.nn.functional.normalize(random_tokens(3, 4, batch=5).values.abs(), dim=-1)  # cosines of 0 or more
    similarity = x @ x.mT
    chosen = facility_location(similarity, count)
    for row, picked in zip(similarity, chosen.tolist(), strict=True):
        covered = {
            places: row[list(places)].amax(0).sum().item() for places in itertools.combinations(range(12), count)
        }
        share = covered[tuple(sorted(picked))] / max(covered.values())
        print(f"{count} destinations: {share:.3f} of the best choice")
        assert share >= 1 - 1 / 2.718281828
        assert count > 1 or share == 1


def test_equal_tokens_are_all_different_destinations() -> None:
    assert facility_location(torch.ones(1, 6, 6), 4).tolist() == [[0, 1, 2, 3]]


def test_a_large_scale_gives_each_token_to_its_nearest_destination() -> None:
    """Then a merged token is the mean of its group, and a token of its own keeps its value."""
    tokens = random_tokens(4, 4)
    merge = ToMA(0.5, tiles=1, scale=1e9).match(tokens)[0]
    once = merge.unmerge(merge.merge(tokens.values))
    error = (merge.unmerge(merge.merge(once)) - once).abs().max().item()
    print(f"merging what is merged changes {error:.1e}")
    assert error < 1e-14
    assert (once - tokens.values).abs().amax(-1).eq(0).any()


def test_tiles_do_not_see_each_other() -> None:
    values = random_tokens(8, 8, batch=1).values
    changed = values.clone()
    changed.view(1, 8, 8, -1)[:, 4:, 4:] += 1
    results = []
    for each in (values, changed):
        merge = ToMA(0.5, tiles=4, scale=5.0).match(TokenSet(each, (8, 8)))[0]
        results.append(merge.unmerge(merge.merge(each)).view(1, 8, 8, -1))
    same = (results[0] == results[1]).all(-1)
    assert same[:, :4].all()
    assert same[:, :, :4].all()
    assert not same[:, 4:, 4:].any()


def test_batch_rows_do_not_see_their_neighbours() -> None:
    row, results = random_tokens(6, 7, batch=1), []
    for seed in (2, 3):
        tokens = TokenSet(torch.cat([random_tokens(6, 7, batch=1, seed=seed).values, row.values]), (6, 7))
        merge = ToMA(0.5).match(tokens)[1]
        results.append(merge.unmerge(merge.merge(tokens.values))[1])
    assert torch.equal(*results)


@pytest.mark.parametrize(
    ("grid", "sizes"),
    [
        ((64, 64), {(8, 8)}),
        ((32, 32), {(4, 4)}),
        ((8, 8), {(2, 2)}),
        ((9, 12), {(3, 2), (2, 2)}),
        ((75, 101), {(10, 13), (10, 12), (9, 13), (9, 12)}),
        ((1, 3), {(1, 3)}),
    ],
)
def test_tiles_of_other_grids(grid: tuple[int, int], sizes: set[tuple[int, int]]) -> None:
    regions = ToMA(0.5).regions(grid)
    assert {(region.rows.size, region.columns.size) for region in regions} == sizes
    assert sum(region.tiles * region.tokens for region in regions) == grid[0] * grid[1]
    assert sum(region.tiles for region in regions) == max(1, min(8, grid[0] // 2)) * max(1, min(8, grid[1] // 2))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_compared_in_float32(dtype: torch.dtype) -> None:
    half = random_tokens(8, 8).values.to(dtype)
    merge = ToMA(0.5).match(TokenSet(half, (8, 8)))[0]
    assert merge.unmerge(merge.merge(half)).dtype == dtype
    identity = torch.arange(64.0).view(1, 64, 1).expand(2, -1, -1)
    assert torch.equal(merge.merge(identity), ToMA(0.5).match(TokenSet(half.float(), (8, 8)))[0].merge(identity))


def test_zero_tokens_have_a_similarity() -> None:
    values = torch.zeros(1, 16, 3)
    merge = ToMA(0.5, tiles=1).match(TokenSet(values, (4, 4)))[0]
    assert merge.unmerge(merge.merge(values)).isfinite().all()


def test_ratio_zero_touches_nothing() -> None:
    tokens = random_tokens(4, 4)
    assert all(merge.merge(tokens.values) is tokens.values for merge in ToMA(0.0).match(tokens))


def test_without_contents() -> None:
    tokens = TokenSet(torch.empty(2, 35, 8, device="meta"), (5, 7))
    merge = ToMA(0.5, tiles=4).match(tokens)[0]
    merged = merge.merge(tokens.values)
    assert merged.shape == (2, ToMA(0.5, tiles=4).counts((5, 7))[0], 8)
    assert merge.unmerge(merged).shape == (2, 35, 8)


def test_bad_input_is_refused() -> None:
    for ratio in (-0.1, 1.0, float("nan")):
        with pytest.raises(ValueError, match=rf"ToMA's ratio r is {ratio}, expected 0 to 0\.999"):
            ToMA(ratio)
    for tiles in (0, -4, 60):
        with pytest.raises(ValueError, match=f"tiles is {tiles}, expected a square number, such as 64"):
            ToMA(0.5, tiles=tiles)
    with pytest.raises(ValueError, match="scale is nan, expected a finite number of 0 or more"):
        ToMA(0.5, scale=float("nan"))
    with pytest.raises(ValueError, match=r"cannot match 2 of 16 tokens of grid \(4, 4\), expected all"):
        ToMA(0.5).match(random_tokens(4, 4).keep(torch.tensor([[0, 3], [2, 5]])))
