"""The pruning layer as a whole: what is kept, the way back, and what must hold whatever the attention."""

from __future__ import annotations

import math

import pytest
import torch

from atedm import AttentionInputs, HeldGraph, TokenSet, prune


def random_layer(batch: int, height: int, width: int, seed: int = 0) -> tuple[TokenSet, AttentionInputs]:
    generator = torch.Generator().manual_seed(seed)
    count = height * width
    x = torch.randn(batch, 8, height, width, generator=generator, dtype=torch.float64)
    q, k = (torch.randn(batch, 2, count, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    return TokenSet.from_feature_map(x), AttentionInputs(q, k, scale=0.5)


def scores_by_loops(heads: list[list[list[float]]], iterations: int) -> list[float]:
    """Power iteration on each head's map, then the root mean square over heads."""
    count = len(heads[0])
    squares = [0.0] * count
    for a in heads:
        s = [1 / count] * count
        for _ in range(iterations):
            s = [sum(a[i][j] * s[i] for i in range(count)) for j in range(count)]
        squares = [total + score**2 for total, score in zip(squares, s, strict=True)]
    return [math.sqrt(total / len(heads)) for total in squares]


@pytest.mark.parametrize("ratio", [0.25, 0.63, 0.9])
def test_by_loops(ratio: float) -> None:
    tokens, inputs = random_layer(2, 4, 5)
    graph = inputs.graph()
    kept, restore = prune(tokens, graph, ratio)
    restored = restore(kept).to_feature_map()
    for row in range(2):
        a = graph.map[row]
        scores = scores_by_loops(a.tolist(), iterations=100)
        best = sorted(range(20), key=lambda position: (-scores[position], position))
        expected = sorted(best[: round(20 * (1 - ratio))])
        assert kept.positions is not None
        assert kept.positions[row].tolist() == expected
        for b in range(20):
            received = [a[:, i, b].sum().item() for i in expected]
            source = b if b in expected else expected[received.index(max(received))]
            assert torch.equal(restored[row, :, b // 5, b % 5], tokens.values[row, source])


def test_ratio_zero_touches_nothing() -> None:
    tokens, inputs = random_layer(2, 4, 5)
    kept, restore = prune(tokens, inputs.graph(), 0.0)
    assert kept is tokens
    assert torch.equal(restore(kept).to_feature_map(), tokens.to_feature_map())
    assert restore(kept).is_dense


def test_pruning_again_and_back() -> None:
    tokens, inputs = random_layer(2, 4, 5)
    once, outer = prune(tokens, inputs.graph(), 0.5)
    _, fewer = random_layer(2, 2, 5, seed=1)
    twice, inner = prune(once, fewer.graph(), 0.5)
    assert (once.count, twice.count) == (10, 5)
    assert once.positions is not None
    assert twice.positions is not None
    for row in range(2):
        assert set(twice.positions[row].tolist()) < set(once.positions[row].tolist())
    restored = outer(inner(twice))
    assert restored.is_dense
    for row in range(2):
        held = twice.positions[row]
        assert torch.equal(restored.values[row, held], tokens.values[row, held])


def test_permuting_tokens_permutes_what_is_kept() -> None:
    tokens, inputs = random_layer(1, 4, 5)
    graph = inputs.graph()
    order = torch.randperm(20, generator=torch.Generator().manual_seed(2))
    permuted_graph = HeldGraph(graph.map[:, :, order][..., order])
    kept, restore = prune(tokens, graph, 0.6)
    permuted, permuted_restore = prune(tokens.with_values(tokens.values[:, order]), permuted_graph, 0.6)
    assert kept.positions is not None
    assert permuted.positions is not None
    assert sorted(order[permuted.positions[0]].tolist()) == kept.positions[0].tolist()
    assert torch.equal(permuted_restore(permuted).values, restore(kept).values[:, order])


def test_batch_rows_do_not_see_their_neighbours() -> None:
    ours, our_inputs = random_layer(1, 4, 5)
    others = [random_layer(1, 4, 5, seed=seed) for seed in (3, 4)]
    results = []
    for theirs, their_inputs in others:
        tokens = TokenSet(torch.cat([theirs.values, ours.values]), ours.grid)
        graph = HeldGraph(torch.cat([their_inputs.graph().map, our_inputs.graph().map]))
        kept, restore = prune(tokens, graph, 0.63)
        assert kept.positions is not None
        results.append((kept.positions[1], restore.source[1], restore(kept).values[1]))
    for first, second in zip(*results, strict=True):
        assert torch.equal(first, second)
    alone, _ = prune(ours, our_inputs.graph(), 0.63)
    assert alone.positions is not None
    assert torch.equal(alone.positions[0], results[0][0])


def test_half_precision_tokens() -> None:
    tokens, inputs = random_layer(2, 4, 5)
    half = tokens.with_values(tokens.values.half())
    kept, restore = prune(half, AttentionInputs(inputs.query.half(), inputs.key.half(), 0.5).graph(), 0.5)
    assert restore(kept).values.dtype == torch.float16


def test_bad_input_is_refused() -> None:
    tokens, inputs = random_layer(2, 4, 5)
    with pytest.raises(ValueError, match=r"\(2, 2, 12, 12\).*expected M = N = 20 tokens in a batch of 2"):
        prune(tokens, random_layer(2, 3, 4)[1].graph(), 0.5)
    with pytest.raises(ValueError, match="batch of 2"):
        prune(tokens, random_layer(1, 4, 5)[1].graph(), 0.5)
    with pytest.raises(ValueError, match=r"rho is 1\.0, expected 0 <= rho < 1"):
        prune(tokens, inputs.graph(), 1.0)
