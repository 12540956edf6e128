"""Token merging against tomesd with its randomness off, bit for bit, and against loops over plain Python numbers."""

from __future__ import annotations

import math

import pytest
import torch
from tomesd.merge import bipartite_soft_matching_random2d
from torch import Tensor

from atedm import Merging, TokenSet, match_tokens

GRIDS = [(2, 2), (8, 8), (6, 10), (5, 7), (9, 4), (2, 3), (16, 15)]


def random_tokens(height: int, width: int, batch: int = 2, seed: int = 0, spread: float = 1.0) -> TokenSet:
    generator = torch.Generator().manual_seed(seed)
    x = spread * torch.randn(batch, 6, height, width, generator=generator, dtype=torch.float64)
    return TokenSet.from_feature_map(x)


def random_values(tokens: TokenSet, channels: int, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(tokens.values.shape[0], tokens.count, channels, generator=generator, dtype=torch.float64).to(
        dtype
    )


def sorted_rows(x: Tensor) -> Tensor:
    """Tokens (B, m, C) in the order of their first channel."""
    return torch.take_along_dim(x, x[..., :1].argsort(dim=1), dim=1)


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("ratio", [0.25, 0.4, 0.5, 0.75])
@pytest.mark.parametrize("spread", [1.0, 1e-3])
def test_bit_for_bit_as_tomesd(grid: tuple[int, int], ratio: float, spread: float) -> None:
    tokens = random_tokens(*grid, spread=spread)
    height, width = grid
    merge, unmerge = bipartite_soft_matching_random2d(
        tokens.values, width, height, 2, 2, int(tokens.count * ratio), no_rand=True
    )
    ours = match_tokens(tokens, Merging(ratio))
    for values in (tokens.values, random_values(tokens, 3), random_values(tokens, 5, torch.float32)):
        merged, theirs = ours.merge(values), merge(values)
        assert merged.shape == theirs.shape
        assert torch.equal(sorted_rows(merged), sorted_rows(theirs))
        assert torch.equal(ours.unmerge(merged), unmerge(theirs))
    print(f"grid {grid}, r {ratio}: {tokens.count} -> {merged.shape[1]} tokens, equal to tomesd")


@pytest.mark.parametrize("stride", [(2, 4), (3, 2), (1, 2)])
def test_other_cells_as_tomesd(stride: tuple[int, int]) -> None:
    tokens = random_tokens(7, 9)
    merge, unmerge = bipartite_soft_matching_random2d(
        tokens.values, 9, 7, stride[1], stride[0], int(63 * 0.45), no_rand=True
    )
    ours = match_tokens(tokens, Merging(0.45, stride=stride))
    values = random_values(tokens, 3)
    assert torch.equal(ours.unmerge(ours.merge(values)), unmerge(merge(values)))


@pytest.mark.parametrize("grid", [(4, 6), (5, 7)])
@pytest.mark.parametrize("ratio", [0.3, 0.5])
def test_by_loops(grid: tuple[int, int], ratio: float) -> None:
    """Greedy matching as the paper tells it: rank the edges of sources to their nearest destinations, take the best."""
    tokens = random_tokens(*grid)
    height, width = grid
    values = random_values(tokens, 3)
    matching = match_tokens(tokens, Merging(ratio))
    restored = matching.unmerge(matching.merge(values))
    worst = 0.0
    for row in range(2):
        x = tokens.values[row].tolist()
        unit = [[c / math.sqrt(sum(d * d for d in token)) for c in token] for token in x]
        corners = [i * width + j for i in range(0, height - 1, 2) for j in range(0, width - 1, 2)]
        edges = []
        for source in range(tokens.count):
            if source not in corners:
                alike = {d: sum(p * q for p, q in zip(unit[source], unit[d], strict=True)) for d in corners}
                nearest = max(corners, key=lambda d: alike[d])
                edges.append((alike[nearest], source, nearest))
        groups = {token: [token] for token in range(tokens.count)}
        for _, source, nearest in sorted(edges, reverse=True)[: int(tokens.count * ratio)]:
            groups[nearest].append(source)
            groups[source] = groups[nearest]
        for token, group in groups.items():
            for channel in range(3):
                mean = sum(values[row, member, channel].item() for member in group) / len(group)
                worst = max(worst, abs(restored[row, token, channel].item() - mean))
    print(f"merging by loops, grid {grid}: max error {worst:.1e}")
    assert worst < 1e-15


def test_merging_keeps_the_weighted_sum() -> None:
    """Means, weighted by how many tokens each stands for, add up to the sum of all."""
    tokens = random_tokens(6, 8)
    matching = match_tokens(tokens, Merging(0.5))
    sizes = matching.unmerge(matching.merge(torch.ones(2, 48, 1, dtype=torch.float64)))
    assert torch.equal(sizes, torch.ones_like(sizes))
    restored = matching.unmerge(matching.merge(tokens.values))
    error = (restored.sum(1) - tokens.values.sum(1)).abs().max().item()
    print(f"sum of values after merging: off by {error:.1e}")
    assert error < 1e-13
    again = matching.unmerge(matching.merge(restored))
    assert (again - restored).abs().max() < 1e-15  # merging what is merged changes nothing


def test_equal_similarity_takes_the_first_token() -> None:
    tokens = TokenSet(torch.ones(1, 16, 3), (4, 4))
    values = torch.arange(16.0).view(1, 16, 1)
    matching = match_tokens(tokens, Merging(0.25))
    restored = matching.unmerge(matching.merge(values)).flatten()
    mean = torch.tensor(0.0 + 1 + 3 + 4 + 5) / 5  # destinations are 0, 2, 8 and 10
    assert restored.tolist() == [mean, mean, 2, mean, mean, mean, *range(6, 16)]


def test_zero_tokens_have_a_similarity() -> None:
    values = random_tokens(4, 4).values.clone()
    values[:, 5] = 0
    matching = match_tokens(TokenSet(values, (4, 4)), Merging(0.5))
    assert matching.merge(values).isfinite().all()


def test_batch_rows_do_not_see_their_neighbours() -> None:
    row = random_tokens(6, 6, batch=1)
    results = []
    for seed in (2, 3):
        tokens = TokenSet(torch.cat([random_tokens(6, 6, batch=1, seed=seed).values, row.values]), (6, 6))
        matching = match_tokens(tokens, Merging(0.5))
        results.append(matching.unmerge(matching.merge(tokens.values))[1])
    assert torch.equal(*results)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_compared_in_float32(dtype: torch.dtype) -> None:
    half = random_tokens(8, 8).values.to(dtype)
    matching = match_tokens(TokenSet(half, (8, 8)), Merging(0.5))
    in_float32 = match_tokens(TokenSet(half.float(), (8, 8)), Merging(0.5))
    assert matching.merge(half).dtype == dtype
    identity = torch.arange(64.0).view(1, 64, 1).expand(2, -1, -1)
    assert torch.equal(matching.merge(identity), in_float32.merge(identity))


def test_ratio_zero_touches_nothing() -> None:
    tokens = random_tokens(4, 4)
    for merge in Merging(0.0).match(tokens):
        assert merge.merge(tokens.values) is tokens.values
        assert merge.unmerge(tokens.values) is tokens.values
    sparse = tokens.keep(torch.tensor([[0, 3], [2, 5]]))
    assert Merging(0.0).match(sparse)[0].merge(sparse.values) is sparse.values


@pytest.mark.parametrize(
    "where", [(True, True, True), (True, False, False), (False, True, True), (False, False, False)]
)
def test_around_some_sub_layers_only(where: tuple[bool, bool, bool]) -> None:
    tokens = random_tokens(5, 7)
    merging = Merging(0.5, *where)
    counts = tuple(merge.merge(tokens.values).shape[1] for merge in merging.match(tokens))
    assert counts == tuple(18 if merged else 35 for merged in where)
    assert merging.counts((5, 7)) == (counts[0], *counts)


@pytest.mark.parametrize(
    ("grid", "ratio", "fewer"), [((64, 64), 0.5, 2048), ((64, 64), 0.4, 2458), ((5, 7), 0.75, 9), ((1, 5), 0.1, 5)]
)
def test_counts(grid: tuple[int, int], ratio: float, fewer: int) -> None:
    assert Merging(ratio).counts(grid) == (fewer, fewer, fewer, fewer)


def test_without_contents() -> None:
    tokens = TokenSet(torch.empty(2, 35, 8, device="meta"), (5, 7))
    matching = match_tokens(tokens, Merging(0.5))
    assert matching.merge(tokens.values).shape == (2, 18, 8)
    assert matching.unmerge(matching.merge(tokens.values)).shape == (2, 35, 8)


def test_bad_input_is_refused() -> None:
    for ratio in (-0.1, 0.76, math.nan):
        with pytest.raises(ValueError, match=rf"merging ratio r is {ratio}, expected 0 to 0\.75 with stride \(2, 2\)"):
            Merging(ratio)
    with pytest.raises(ValueError, match=r"merging stride is \(2, 0\), expected 1 or more each"):
        Merging(0.5, stride=(2, 0))
    with pytest.raises(ValueError, match=r"cannot match 2 of 16 tokens of grid \(4, 4\), expected all"):
        match_tokens(random_tokens(4, 4).keep(torch.tensor([[0, 3], [2, 5]])), Merging(0.5))
    with pytest.raises(ValueError, match=r"grid \(1, 8\) is smaller than a merging cell \(2, 2\)"):
        match_tokens(random_tokens(1, 8), Merging(0.5))
