"""What ToMe, ToDo, SiTo and ToMA have in common: they compile to one graph, and say how many tokens they leave."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from atedm import Merging, Reduction, SiTo, ToDo, TokenSet, ToMA
from tests.atedm.test_merging import random_tokens

METHODS = [Merging(0.5), ToDo(0.75), SiTo(0.5, alpha=50.0), SiTo(0.5, alpha=50.0, seed=9), ToMA(0.7, tiles=4)]


def through(how: Reduction, values: Tensor, grid: tuple[int, int]) -> list[Tensor]:
    """Merged, read by self-attention, and unmerged, around each of the sub-layers."""
    merges = how.match(TokenSet(values, grid))
    merged = [merge.merge(values) for merge in merges]
    contexts = [merge.context(x) for merge, x in zip(merges, merged, strict=True)]
    return [*merged, *contexts, *(merge.unmerge(x) for merge, x in zip(merges, merged, strict=True))]


@pytest.mark.parametrize("how", METHODS, ids=str)
def test_one_graph_with_the_same_result(how: Reduction) -> None:
    """The noise of a seed is a constant of the graph: another seed, which is another plan, has its own."""
    torch.compiler.reset()
    compiled = torch.compile(lambda values: through(how, values, (4, 6)), backend="eager", fullgraph=True)
    for seed in (0, 1):
        values = random_tokens(4, 6, seed=seed).values
        ours, theirs = compiled(values), through(how, values, (4, 6))
        assert len(ours) == len(theirs) == 9
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    print(f"{how}: one graph, the same bits")


@pytest.mark.parametrize("how", METHODS, ids=str)
@pytest.mark.parametrize("grid", [(8, 8), (5, 7), (2, 3)])
def test_sizes_are_those_that_are_counted(how: Reduction, grid: tuple[int, int]) -> None:
    values = random_tokens(*grid).values
    sizes = [x.shape[1] for x in through(how, values, grid)]
    queries, keys, in_cross, in_feed = how.counts(grid)
    assert sizes[:4] == [queries, in_cross, in_feed, keys]
    assert sizes[6:] == [values.shape[1]] * 3
