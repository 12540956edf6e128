"""Similarity-based copy against loops over plain Python numbers, and restores that nest."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from atedm import HeldGraph, TokenSet, similarity_copy
from atedm.recovery import identity


def random_graph(batch: int, tokens: int, seed: int = 0) -> HeldGraph:
    generator = torch.Generator().manual_seed(seed)
    return HeldGraph.from_map((2 * torch.randn(batch, 3, tokens, tokens, generator=generator).double()).softmax(-1))


def random_tokens(batch: int, height: int, width: int) -> TokenSet:
    return TokenSet.from_feature_map(torch.randn(batch, 4, height, width, generator=torch.Generator().manual_seed(1)))


def source_by_loops(a: Tensor, kept: list[int]) -> list[int]:
    """For each token the place of its source among the kept ones; ``a`` is (heads, N, N)."""
    heads, count, _ = a.shape
    source = []
    for b in range(count):
        if b in kept:
            source.append(kept.index(b))
            continue
        received = [sum(a[h, i, b].item() for h in range(heads)) / heads for i in kept]
        source.append(max(range(len(kept)), key=lambda place: (received[place], -place)))
    return source


def test_source_map_and_values_by_loops() -> None:
    tokens, graph = random_tokens(2, 3, 4), random_graph(2, 12)
    kept = torch.tensor([[0, 3, 4, 9, 11], [1, 2, 6, 7, 10]])
    restore = similarity_copy(tokens, graph, kept)
    later = tokens.keep(kept).with_values(torch.randn(2, 5, 6))
    restored = restore(later)
    assert restored.is_dense
    assert restored.positions is None
    for row in range(2):
        source = source_by_loops(graph.map[row], kept[row].tolist())
        assert restore.source[row].tolist() == source
        for b, place in enumerate(source):
            assert torch.equal(restored.values[row, b], later.values[row, place])


def test_kept_tokens_come_back_as_they_are() -> None:
    tokens, graph = random_tokens(2, 3, 4), random_graph(2, 12)
    kept = torch.tensor([[0, 3, 4, 9, 11], [1, 2, 6, 7, 10]])
    restored = similarity_copy(tokens, graph, kept)(tokens.keep(kept))
    for row in range(2):
        assert torch.equal(restored.values[row, kept[row]], tokens.values[row, kept[row]])


def test_equal_attention_takes_the_first_kept_token() -> None:
    graph = HeldGraph.from_map(torch.full((1, 2, 6, 6), 1 / 6))
    tokens = random_tokens(1, 2, 3)
    restore = similarity_copy(tokens, graph, torch.tensor([[2, 4, 5]]))
    assert restore.source.tolist() == [[0, 0, 0, 0, 1, 2]]


def test_unpruned_set_is_restored_bit_for_bit() -> None:
    tokens, graph = random_tokens(2, 3, 4), random_graph(2, 12)
    everything = torch.arange(12).expand(2, -1)
    assert torch.equal(identity(tokens)(tokens).values, tokens.values)
    restore = similarity_copy(tokens, graph, everything)
    assert torch.equal(restore.source, everything)
    assert torch.equal(restore(tokens.keep(everything)).to_feature_map(), tokens.to_feature_map())


def test_restores_nest() -> None:
    tokens = random_tokens(1, 3, 4)
    kept = torch.tensor([[1, 2, 4, 7, 8, 11]])
    once = tokens.keep(kept)
    outer = similarity_copy(tokens, random_graph(1, 12), kept)
    again = torch.tensor([[0, 3, 5]])
    twice = once.keep(again)
    inner = similarity_copy(once, random_graph(1, 6, seed=2), again)

    middle = inner(twice)
    assert middle.positions is once.positions
    restored = outer(middle)
    assert restored.is_dense
    for b in range(12):
        source = inner.source[0, outer.source[0, b]]
        assert torch.equal(restored.values[0, b], twice.values[0, source])


def test_other_tokens_are_refused() -> None:
    tokens, graph = random_tokens(2, 3, 4), random_graph(2, 12)
    kept = torch.tensor([[0, 3, 4], [1, 2, 6]])
    restore = similarity_copy(tokens, graph, kept)
    with pytest.raises(ValueError, match=r"cannot restore \(2, 12\).*pruning kept \(2, 3\)"):
        restore(tokens)
    with pytest.raises(ValueError, match=r"cannot restore \(1, 3\)"):
        restore(random_tokens(1, 3, 4).keep(kept[:1]))
    with pytest.raises(ValueError, match=r"grid \(4, 3\).*grid \(3, 4\)"):
        restore(random_tokens(2, 4, 3).keep(kept))
