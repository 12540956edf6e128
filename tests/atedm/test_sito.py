"""SiTo against loops over plain Python numbers, and its noise."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from atedm import SiTo, TokenSet
from tests.atedm.reductions import sito_by_loops
from tests.atedm.test_merging import random_tokens, random_values

GRIDS = [(8, 8), (5, 7), (9, 4), (1, 6), (2, 3), (7, 1), (16, 15)]


def draw(count: int, seed: int) -> list[float]:
    drawn: list[float] = torch.randn(count, generator=torch.Generator().manual_seed(seed)).tolist()
    return drawn


def passed(how: SiTo, tokens: TokenSet, values: Tensor) -> Tensor:
    """The values after merging and unmerging around self-attention."""
    around = how.match(tokens)[0]
    return around.unmerge(around.merge(values))


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("how", [SiTo(0.5), SiTo(0.3, alpha=2.0, seed=5), SiTo(0.2, beta=0.0), SiTo(0.25, alpha=0.0)])
def test_by_loops(grid: tuple[int, int], how: SiTo) -> None:
    tokens = random_tokens(*grid)
    values = random_values(tokens, 3)
    merge = how.match(tokens)[0]
    merged = merge.merge(values)
    assert how.counts(grid) == (merged.shape[1], merged.shape[1], tokens.count, tokens.count)
    assert merge.context(merged) is merged
    noise, worst = draw(tokens.count, how.seed), 0.0
    for row in range(2):
        loops = sito_by_loops(list(tokens.values[row]), grid, how.ratio, noise, how.alpha, how.beta)
        theirs = loops.merge(list(values[row]))
        worst = max(worst, (merged[row] - torch.stack(theirs)).abs().max().item())
        worst = max(worst, (merge.unmerge(merged)[row] - torch.stack(loops.unmerge(theirs))).abs().max().item())
    print(f"{how} by loops, grid {grid}: {merged.shape[1]} of {tokens.count} tokens, max error {worst:.1e}")
    assert worst == 0


def test_only_self_attention_is_without_tokens() -> None:
    tokens = random_tokens(5, 7)
    around_self, *others = SiTo(0.5).match(tokens)
    assert around_self.merge(tokens.values).shape[1] == 35 - 17
    assert all(merge.merge(tokens.values) is tokens.values for merge in others)


@pytest.mark.parametrize("grid", [(8, 8), (5, 7), (3, 3)])
def test_at_most_all_but_the_bases_are_pruned(grid: tuple[int, int]) -> None:
    windows = -(-grid[0] // 2) * -(-grid[1] // 2)
    assert SiTo(0.75).counts(grid)[0] == windows
    tokens = random_tokens(*grid)
    assert SiTo(0.75).match(tokens)[0].merge(tokens.values).shape[1] == windows


def test_a_seed_is_one_choice_in_any_batch_and_state() -> None:
    """The noise comes from the seed alone: not from torch's own generator, which it leaves as it is."""
    tokens, how = random_tokens(6, 7, batch=3), SiTo(0.5, alpha=10.0, seed=3)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    together = passed(how, tokens, tokens.values)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    for row in range(3):
        alone = TokenSet(tokens.values[row : row + 1], tokens.grid)
        assert torch.equal(passed(how, alone, alone.values), together[row : row + 1])
    assert not torch.equal(passed(replace(how, seed=4), tokens, tokens.values), together)


def test_blocks_and_steps_have_seeds_of_their_own() -> None:
    """A step's comes again after four, so that few plans differ."""
    how = SiTo(0.5, seed=2**32 - 5)
    seeds = {(step, block): how.at(step, block).seed for step in range(4) for block in range(11)}
    assert len(set(seeds.values())) == 44
    assert all(0 <= seed < 2**32 for seed in seeds.values())
    assert how.at(6, 3) == how.at(2, 3) == replace(how, seed=seeds[2, 3])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_compared_in_float32(dtype: torch.dtype) -> None:
    half = random_tokens(8, 8).values.to(dtype)
    merge = SiTo(0.5).match(TokenSet(half, (8, 8)))[0]
    assert merge.merge(half).dtype == dtype
    identity = torch.arange(64.0).view(1, 64, 1).expand(2, -1, -1)
    assert torch.equal(merge.merge(identity), SiTo(0.5).match(TokenSet(half.float(), (8, 8)))[0].merge(identity))


def test_zero_tokens_have_a_similarity() -> None:
    values = random_tokens(4, 4).values.clone()
    values[:, 5] = 0
    assert passed(SiTo(0.5), TokenSet(values, (4, 4)), values).isfinite().all()


def test_ratio_zero_touches_nothing() -> None:
    tokens = random_tokens(4, 4)
    assert all(merge.merge(tokens.values) is tokens.values for merge in SiTo(0.0).match(tokens))


def test_without_contents() -> None:
    tokens = TokenSet(torch.empty(2, 35, 8, device="meta"), (5, 7))
    assert passed(SiTo(0.5), tokens, tokens.values).shape == (2, 35, 8)


def test_bad_input_is_refused() -> None:
    for ratio in (-0.1, 0.76, float("nan")):
        with pytest.raises(ValueError, match=rf"SiTo's ratio r is {ratio}, expected 0 to 0\.75"):
            SiTo(ratio)
    with pytest.raises(ValueError, match="alpha is inf, expected a finite number of 0 or more"):
        SiTo(0.5, alpha=float("inf"))
    with pytest.raises(ValueError, match=r"beta is -1\.0, expected a finite number of 0 or more"):
        SiTo(0.5, beta=-1.0)
    for seed in (-1, 2**32):
        with pytest.raises(ValueError, match=f"seed is {seed}, expected 0 to 4294967295"):
            SiTo(0.5, seed=seed)
    with pytest.raises(ValueError, match=r"cannot match 2 of 16 tokens of grid \(4, 4\), expected all"):
        SiTo(0.5).match(random_tokens(4, 4).keep(torch.tensor([[0, 3], [2, 5]])))
