"""ToDo against loops, and against torch's nearest-neighbour interpolation, which their code uses."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange

from atedm import ToDo, TokenSet
from tests.atedm.reductions import todo_by_loops
from tests.atedm.test_merging import random_tokens

GRIDS = [(8, 8), (64, 64), (5, 7), (9, 4), (1, 6), (2, 3), (1, 1), (75, 101)]


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("factor", [2, 3, 4])
def test_keys_are_those_of_a_downsampled_picture(grid: tuple[int, int], factor: int) -> None:
    how, tokens = ToDo(1 - 1 / factor**2), random_tokens(*grid)
    around_self, *others = how.match(tokens)
    ours = around_self.context(tokens.values)
    size = [max(1, side // factor) for side in grid]
    theirs = F.interpolate(tokens.to_feature_map(), size=size, mode="nearest")
    assert torch.equal(ours, rearrange(theirs, "b c h w -> b (h w) c"))
    assert how.counts(grid) == (tokens.count, ours.shape[1], tokens.count, tokens.count)
    for merge in (around_self, *others):
        assert merge.merge(tokens.values) is tokens.values
        assert merge.unmerge(tokens.values) is tokens.values
    assert all(merge.context(tokens.values) is tokens.values for merge in others)
    print(f"grid {grid}, factor {factor}: keys of {ours.shape[1]} of {tokens.count} tokens, equal to interpolation")


@pytest.mark.parametrize("grid", [(8, 8), (5, 7), (9, 4), (1, 6)])
def test_by_loops(grid: tuple[int, int]) -> None:
    tokens = random_tokens(*grid)
    ours = ToDo(0.75).match(tokens)[0].context(tokens.values)
    theirs = torch.stack([torch.stack(todo_by_loops(list(row), grid, 2).context(list(row))) for row in tokens.values])
    error = (ours - theirs).abs().max().item()
    print(f"ToDo by loops, grid {grid}: max error {error:.1e}")
    assert error == 0


@pytest.mark.parametrize("side", [63, 64, 96, 160])
def test_a_ratio_of_six_digits_is_every_third_row(side: int) -> None:
    assert ToDo(0.888889).coarse((side, side)) == (side // 3, side // 3)


def test_ratio_zero_touches_nothing() -> None:
    tokens = random_tokens(4, 4)
    assert all(merge.context(tokens.values) is tokens.values for merge in ToDo(0.0).match(tokens))
    assert ToDo(0.0).counts((4, 4)) == (16, 16, 16, 16)


def test_without_contents() -> None:
    tokens = TokenSet(torch.empty(2, 35, 8, device="meta"), (5, 7))
    assert ToDo(0.75).match(tokens)[0].context(tokens.values).shape == (2, 2 * 3, 8)


def test_bad_input_is_refused() -> None:
    for ratio in (-0.1, 1.0, float("nan")):
        with pytest.raises(ValueError, match=rf"ToDo's ratio r is {ratio}, expected 0 to 0\.999"):
            ToDo(ratio)
    with pytest.raises(ValueError, match=r"cannot match 2 of 16 tokens of grid \(4, 4\), expected all"):
        ToDo(0.75).match(random_tokens(4, 4).keep(torch.tensor([[0, 3], [2, 5]])))
