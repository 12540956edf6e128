"""Groups of tokens, against what the merges do with numbered tokens."""

from __future__ import annotations

import pytest
import torch

from atedm import TokenSet, match_tokens
from atedm.merging import Merging
from atedm.reduction import Merge
from atedm.sito import SiTo
from atedm.todo import ToDo
from atedm.toma import ToMA
from minisdxl.inspector.groups import groups_of

GRID = (7, 9)  # for ToMA: tiles of four sizes
COUNT = GRID[0] * GRID[1]


def tokens() -> TokenSet:
    return TokenSet(torch.randn(2, COUNT, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64), GRID)


def numbered(count: int) -> torch.Tensor:
    return torch.arange(count, dtype=torch.float64).view(1, -1, 1).expand(2, -1, -1)


def test_sito_takes_results_of_the_tokens_that_stay() -> None:
    merge = SiTo(0.5).match(tokens())[0]
    groups = groups_of(merge)
    assert groups is not None and groups.members is not None
    assert torch.equal(groups.places, merge.merge(numbered(COUNT))[-1, :, 0].long())
    assert torch.equal(groups.members, merge.unmerge(numbered(len(groups.places)))[-1, :, 0].long())
    sources = groups.sources()
    assert sources is not None and torch.equal(sources[groups.places, 0], groups.places)


def test_toma_shows_the_destination_with_the_largest_share() -> None:
    merge = ToMA(0.6, tiles=9).match(tokens())[0]
    groups = groups_of(merge)
    assert groups is not None and groups.members is not None
    count = len(groups.places)
    assert count == ToMA(0.6, tiles=9).counts(GRID)[0] == len(set(groups.places.tolist()))
    shares = merge.unmerge(torch.eye(count, dtype=torch.float64).expand(2, -1, -1))[-1]  # (N, M)
    assert torch.equal(groups.members, shares.argmax(dim=-1))
    assert torch.equal(groups.members[groups.places], torch.arange(count))  # a destination is most like itself


def test_todo_reads_fewer_and_keeps_all() -> None:
    merge = ToDo(0.75).match(tokens())[0]
    groups = groups_of(merge)
    assert groups is not None and groups.members is None and groups.sources() is None
    assert torch.equal(groups.places, merge.context(numbered(COUNT))[-1, :, 0].long())


def test_tome_groups_are_those_of_its_matching() -> None:
    merge = match_tokens(tokens(), Merging(0.5))
    groups = groups_of(merge)
    assert groups is not None and groups.members is not None
    assert torch.equal(groups.members, merge.unmerge(numbered(len(groups.places)))[-1, :, 0].long())
    means = merge.merge(numbered(COUNT))[-1, :, 0]  # of the numbers of each group's tokens
    for group, place in enumerate(groups.places.tolist()):
        of = (groups.members == group).nonzero().flatten()
        assert place in of.tolist() and of.double().mean().item() == pytest.approx(means[group].item(), abs=1e-9)


def test_nothing_merged_is_no_group() -> None:
    assert groups_of(Merge()) is None
