"""Copies and changes of kept tokens against loops over plain Python numbers, and all recoveries nested."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from atedm import RECOVERIES, AttentionInputs, DenseGraph, LazyGraph, Restore, TokenSet, recover, similarity_copy
from atedm.recovery import identity


def random_graph(batch: int, tokens: int, seed: int = 0) -> DenseGraph:
    generator = torch.Generator().manual_seed(seed)
    return DenseGraph.from_map((2 * torch.randn(batch, 3, tokens, tokens, generator=generator).double()).softmax(-1))


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
    graph = DenseGraph.from_map(torch.full((1, 2, 6, 6), 1 / 6))
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


def lazy(batch: int, tokens: int, seed: int = 0) -> LazyGraph:
    generator = torch.Generator().manual_seed(seed)
    q, k = (torch.randn(batch, 3, tokens, 4, generator=generator) for _ in range(2))
    return LazyGraph(AttentionInputs(q, k, 0.5))


@pytest.mark.parametrize("recovery", RECOVERIES)
def test_every_recovery_nests_on_sparse_sets(recovery: str) -> None:
    """By hand: two prunings in a row, the values changed after each, and both undone."""
    tokens = random_tokens(1, 3, 4)
    kept = torch.tensor([[1, 2, 4, 7, 8, 11]])
    outer = recover(recovery, tokens, kept, lazy(1, 12))
    once = tokens.keep(kept)
    once = once.with_values(2 * once.values)
    again = torch.tensor([[0, 3, 5]])  # grid positions 1, 7 and 11
    inner = recover(recovery, once, again, lazy(1, 6, seed=2))
    twice = once.keep(again)
    twice = twice.with_values(twice.values + 1)
    middle = inner(twice)
    restored = outer(middle)
    assert middle.positions is once.positions
    assert restored.is_dense
    for position in (1, 7, 11):
        assert torch.equal(restored.values[0, position], 2 * tokens.values[0, position] + 1)
    if recovery == "zeros":
        assert restored.values[0, [0, 2, 3, 4, 5, 6, 8, 9, 10]].abs().max() == 0
    if recovery == "direct":
        assert torch.equal(restored.values[0, [2, 4, 8]], 2 * tokens.values[0, [2, 4, 8]])
        assert torch.equal(restored.values[0, [0, 3, 5]], tokens.values[0, [0, 3, 5]])
    if recovery == "bicubic":
        grid = torch.zeros(1, 12, 4).index_copy(1, torch.tensor([1, 7, 11]), twice.values)
        dense = TokenSet(grid, (3, 4))
        expected = recover(recovery, dense, torch.tensor([[1, 7, 11]]), lazy(1, 12))(
            dense.keep(torch.tensor([[1, 7, 11]]))
        )
        assert torch.equal(middle.values, expected.values[:, kept[0]])  # not held at all counts as zero


@pytest.mark.parametrize("recovery", RECOVERIES)
def test_a_linear_layer_may_run_before_a_copy_only(recovery: str) -> None:
    tokens = random_tokens(2, 3, 4)
    tokens = tokens.with_values(tokens.values.double())
    kept = torch.tensor([[0, 3, 4, 9, 11], [1, 2, 6, 7, 10]])
    restore: Restore = recover(recovery, tokens, kept, lazy(2, 12))
    torch.manual_seed(5)
    layer = torch.nn.Linear(4, 4, dtype=torch.float64)
    few = tokens.keep(kept)
    after, before = layer(restore(few).values), restore(few.with_values(layer(few.values))).values
    error = (after - before).abs().max().item()
    print(f"{recovery}: layer before or after differs by {error:.1e}")
    assert (error < 1e-14) == (recovery in ("similarity", "nearest"))


@pytest.mark.parametrize("recovery", RECOVERIES)
def test_recovering_an_unpruned_set_is_the_identity(recovery: str) -> None:
    tokens = random_tokens(2, 3, 4)
    everything = torch.arange(12).expand(2, -1)
    restored = recover(recovery, tokens, everything, lazy(2, 12))(tokens.keep(everything))
    assert torch.equal(restored.to_feature_map(), tokens.to_feature_map())


@pytest.mark.parametrize("recovery", ["nearest", "similarity-change", "nearest-change", "nearest-two-change"])
def test_nearest_and_change_by_loops(recovery: str) -> None:
    tokens = random_tokens(2, 3, 4)
    tokens = tokens.with_values(tokens.values.double())
    kept = torch.tensor([[0, 3, 4, 9, 11], [1, 2, 6, 7, 10]])
    attention = lazy(2, 12)
    restore = recover(recovery, tokens, kept, attention)
    generator = torch.Generator().manual_seed(6)
    later = tokens.keep(kept).with_values(torch.randn(2, 5, 4, generator=generator, dtype=torch.float64))
    restored = restore(later)
    assert restored.is_dense
    graph = attention.inputs.graph("dense")
    assert isinstance(graph, DenseGraph)
    worst = 0.0
    for row in range(2):
        held, before, after = kept[row].tolist(), tokens.values[row].tolist(), later.values[row].tolist()
        alike = [[source] for source in source_by_loops(graph.map[row], held)]
        for b in range(12):
            if recovery.startswith("nearest") and b not in held:
                cosines = [cosine(before[b], before[i]) for i in held]
                alike[b] = sorted(range(5), key=lambda i: -cosines[i])[: 2 if "two" in recovery else 1]
            if recovery == "nearest" or b in held:
                expected = after[alike[b][0]]
            else:
                changes = [[new - was for new, was in zip(after[i], before[held[i]], strict=True)] for i in alike[b]]
                expected = [own + sum(each) / len(each) for own, *each in zip(before[b], *changes, strict=True)]
            worst = max(worst, *(abs(x - y) for x, y in zip(restored.values[row, b].tolist(), expected, strict=True)))
    print(f"{recovery}: max error {worst:.1e}")
    assert worst < 1e-14


def cosine(x: list[float], y: list[float]) -> float:
    return sum(a * b for a, b in zip(x, y, strict=True)) / (math.hypot(*x) * math.hypot(*y))


@pytest.mark.parametrize("recovery", ["similarity-change", "nearest-change", "nearest-two-change"])
def test_a_change_that_all_tokens_share_is_recovered_exactly(recovery: str) -> None:
    tokens = random_tokens(2, 3, 4)
    tokens = tokens.with_values(tokens.values.double())
    kept = torch.tensor([[0, 3, 4, 9, 11], [1, 2, 6, 7, 10]])
    few, shift = tokens.keep(kept), torch.arange(4.0, dtype=torch.float64)
    restored = recover(recovery, tokens, kept, lazy(2, 12))(few.with_values(few.values + shift))
    error = (restored.values - (tokens.values + shift)).abs().max().item()
    print(f"{recovery}: a shared change comes back with an error of {error:.1e}")
    assert error < 1e-14


@pytest.mark.parametrize("recovery", ["zeros", "bicubic", "direct", "nearest", "nearest-change", "nearest-two-change"])
def test_these_refuse_other_tokens_and_need_no_graph(recovery: str) -> None:
    tokens = random_tokens(2, 3, 4)
    kept = torch.tensor([[0, 3, 4], [1, 2, 6]])
    q = torch.empty(0)
    restore = recover(recovery, tokens, kept, LazyGraph(AttentionInputs(q, q, 1.0), "not to be built"))
    with pytest.raises(ValueError, match=r"cannot restore \(2, 12\).*pruning kept \(2, 3\)"):
        restore(tokens)


def test_unknown_recovery() -> None:
    with pytest.raises(ValueError, match="recovery is 'mean', expected one of similarity, zeros, bicubic, direct"):
        recover("mean", random_tokens(1, 2, 3), torch.tensor([[0]]), lazy(1, 6))
