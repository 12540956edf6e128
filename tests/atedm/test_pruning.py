"""The pruning layer as a whole: what is kept, the way back, and what must hold whatever the attention."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from atedm import GRAPHS, RANKINGS, RECOVERIES, AttentionInputs, Pruning, TokenSet, prune
from atedm.gwpr import EPSILON, MAX_ITERATIONS
from tests.atedm.reference import algorithm_1, root_mean_square

Layer = tuple[TokenSet, AttentionInputs, AttentionInputs]
# Each ranking and each recovery with each graph; which recovery goes with a ranking changes from pair to pair.
CHOICES = [
    (ranking, graph, list(RECOVERIES)[number % len(RECOVERIES)])
    for number, (ranking, graph) in enumerate(itertools.product(RANKINGS, GRAPHS))
] + [("gwpr", graph, recovery) for graph, recovery in itertools.product(GRAPHS, RECOVERIES)]


def random_layer(batch: int, height: int, width: int, seed: int = 0) -> Layer:
    """Tokens, their self-attention, and their cross-attention to 6 others."""
    generator = torch.Generator().manual_seed(seed)
    count = height * width

    def heads(tokens: int) -> torch.Tensor:
        return torch.randn(batch, 2, tokens, 4, generator=generator, dtype=torch.float64)

    x = torch.randn(batch, 8, height, width, generator=generator, dtype=torch.float64)
    q = heads(count)
    return TokenSet.from_feature_map(x), AttentionInputs(q, heads(count), 0.5), AttentionInputs(q, heads(6), 0.5)


def stack(one: Layer, other: Layer) -> Layer:
    """One batch of two layers' tokens."""
    self_attention, cross_attention = (
        AttentionInputs(torch.cat([x.query, y.query]), torch.cat([x.key, y.key]), x.scale)
        for x, y in ((one[1], other[1]), (one[2], other[2]))
    )
    return TokenSet(torch.cat([one[0].values, other[0].values]), one[0].grid), self_attention, cross_attention


@pytest.mark.parametrize("ratio", [0.25, 0.63, 0.9])
@pytest.mark.parametrize(("iterations", "sharpness"), [(None, 1.0), (3, 1.0), (None, 4.0)])
def test_by_loops(ratio: float, iterations: int | None, sharpness: float) -> None:
    tokens, self_attention, cross_attention = random_layer(2, 4, 5)
    how = Pruning(ratio, iterations=iterations, sharpness=sharpness)
    kept, restore = prune(tokens, self_attention, cross_attention, how)
    restored = restore(kept).to_feature_map()
    eps, limit = (EPSILON, MAX_ITERATIONS) if iterations is None else (-1.0, iterations)
    for row in range(2):
        a = (sharpness * 0.5 * self_attention.query[row] @ self_attention.key[row].mT).softmax(-1)
        scores = root_mean_square([algorithm_1(head, eps=eps, limit=limit)[0] for head in a.tolist()])
        best = sorted(range(20), key=lambda position: (-scores[position], position))
        expected = sorted(best[: round(20 * (1 - ratio))])
        assert kept.positions is not None
        assert kept.positions[row].tolist() == expected
        for b in range(20):
            received = [a[:, i, b].sum().item() for i in expected]
            source = b if b in expected else expected[received.index(max(received))]
            assert torch.equal(restored[row, :, b // 5, b % 5], tokens.values[row, source])


@pytest.mark.parametrize(("ranking", "graph", "recovery"), CHOICES)
def test_every_choice(ranking: str, graph: str, recovery: str) -> None:
    """Kept tokens come back as they are, also when pruned twice. Tensors without contents do as well."""
    how = Pruning(0.5, ranking, graph, recovery, iterations=3, seed=7)
    tokens, *attention = random_layer(2, 4, 5)
    once, outer = prune(tokens, attention[0], attention[1], how)
    _, fewer_self, fewer_cross = random_layer(2, 2, 5, seed=1)
    twice, inner = prune(once, fewer_self, fewer_cross, how)
    assert (once.count, twice.count) == (10, 5)
    restored = outer(inner(twice))
    assert restored.is_dense
    assert restored.positions is None
    assert once.positions is not None
    assert twice.positions is not None
    for row in range(2):
        held = twice.positions[row]
        assert set(held.tolist()) < set(once.positions[row].tolist())
        assert torch.equal(restored.values[row, held], tokens.values[row, held])

    on_meta = [AttentionInputs(x.query.to("meta"), x.key.to("meta"), x.scale) for x in attention]
    kept, restore = prune(tokens.with_values(tokens.values.to("meta")), on_meta[0], on_meta[1], how)
    assert kept.count == 10
    assert restore(kept).values.shape == (2, 20, 8)


@pytest.mark.parametrize("graph", GRAPHS)
def test_a_sharper_map_is_that_of_longer_queries(graph: str) -> None:
    """Known sums of the rows of the map as it is must not be taken for those of the sharper one."""
    tokens, self_attention, cross_attention = random_layer(2, 6, 5)
    q, k, scale, _ = self_attention
    sums = (scale * q @ k.mT).logsumexp(-1)
    kept, restore = prune(
        tokens, AttentionInputs(q, k, scale, sums), cross_attention, Pruning(0.6, "gwpr", graph, sharpness=4.0)
    )
    longer, other = prune(tokens, AttentionInputs(4 * q, k, scale), cross_attention, Pruning(0.6, "gwpr", graph))
    assert kept.positions is not None and longer.positions is not None
    assert torch.equal(kept.positions, longer.positions)
    assert torch.equal(restore(kept).values, other(longer).values)


def test_held_and_streamed_graphs_keep_the_same() -> None:
    layer = random_layer(2, 8, 8)
    for ranking, recovery in itertools.product(RANKINGS, RECOVERIES):
        held, streamed = (prune(*layer, Pruning(0.63, ranking, graph, recovery)) for graph in ("by-head", "streamed"))
        assert torch.equal(held[1](held[0]).values, streamed[1](streamed[0]).values)


def test_ratio_zero_touches_nothing() -> None:
    layer = random_layer(2, 4, 5)
    for recovery in RECOVERIES:
        kept, restore = prune(*layer, Pruning(0.0, recovery=recovery))
        assert kept is layer[0]
        assert torch.equal(restore(kept).to_feature_map(), layer[0].to_feature_map())
        assert restore(kept).is_dense


@pytest.mark.parametrize("ranking", ["gwpr", "ca-wpr", "one-vote", "lowest"])
@pytest.mark.parametrize("recovery", [recovery for recovery in RECOVERIES if recovery != "bicubic"])
def test_permuting_tokens_permutes_what_is_kept(ranking: str, recovery: str) -> None:
    """All rankings by attention, and all recoveries but interpolation on the grid, which know where a token is."""
    tokens, self_attention, cross_attention = random_layer(1, 4, 5)
    order = torch.randperm(20, generator=torch.Generator().manual_seed(2))
    q, k, scale, _ = self_attention
    how = Pruning(0.6, ranking, recovery=recovery)
    kept, restore = prune(tokens, self_attention, cross_attention, how)
    permuted, permuted_restore = prune(
        tokens.with_values(tokens.values[:, order]),
        AttentionInputs(q[:, :, order], k[:, :, order], scale),
        AttentionInputs(q[:, :, order], cross_attention.key, scale),
        how,
    )
    assert kept.positions is not None
    assert permuted.positions is not None
    assert sorted(order[permuted.positions[0]].tolist()) == kept.positions[0].tolist()
    assert torch.equal(permuted_restore(permuted).values, restore(kept).values[:, order])


@pytest.mark.parametrize(("ranking", "graph", "recovery"), CHOICES)
def test_batch_rows_do_not_see_their_neighbours(ranking: str, graph: str, recovery: str) -> None:
    ours, how = random_layer(1, 4, 5), Pruning(0.63, ranking, graph, recovery)
    results = []
    for seed in (3, 4):
        kept, restore = prune(*stack(random_layer(1, 4, 5, seed), ours), how)
        assert kept.positions is not None
        results.append((kept.positions[1], restore(kept).values[1]))
    alone, _ = prune(*ours, how)
    assert alone.positions is not None
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])
    assert torch.equal(results[0][0], alone.positions[0])


@pytest.mark.parametrize("recovery", RECOVERIES)
def test_half_precision_tokens(recovery: str) -> None:
    tokens, self_attention, cross_attention = random_layer(2, 4, 5)
    half = [AttentionInputs(x.query.half(), x.key.half(), x.scale) for x in (self_attention, cross_attention)]
    how = Pruning(0.5, recovery=recovery)
    kept, restore = prune(tokens.with_values(tokens.values.half()), half[0], half[1], how)
    assert restore(kept).values.dtype == torch.float16


def test_seed_chooses_the_random_positions() -> None:
    layer = random_layer(2, 8, 8)
    first, again, other = (prune(*layer, Pruning(0.5, "random", seed=seed))[0].positions for seed in (1, 1, 2))
    assert first is not None
    assert again is not None
    assert other is not None
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ratio": 1.0}, r"rho is 1\.0, expected 0 <= rho < 1"),
        ({"ranking": "wpr"}, "ranking is 'wpr', expected one of gwpr, ca-wpr, one-vote, lowest, random"),
        ({"graph": "stream"}, "graph is 'stream', expected one of by-head, streamed, subsampled, dense"),
        ({"recovery": "copy"}, "recovery is 'copy', expected one of similarity, zeros, bicubic, direct"),
        ({"sharpness": 0.0}, "sharpness is 0, expected more than 0"),
        ({"iterations": 0}, "iterations is 0, expected 1 or more, or None"),
    ],
)
def test_bad_settings_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Pruning(**{"ratio": 0.5, **changes})


def test_attention_of_other_tokens_is_refused() -> None:
    tokens, self_attention, cross_attention = random_layer(2, 4, 5)
    _, fewer_self, fewer_cross = random_layer(2, 3, 4)
    _, other_batch, _ = random_layer(1, 4, 5)
    how = Pruning(0.5)
    with pytest.raises(ValueError, match=r"self-attention .*\(2, 2, 12, 4\).*expected 20 queries and as many keys"):
        prune(tokens, fewer_self, cross_attention, how)
    with pytest.raises(ValueError, match=r"self-attention .*expected 20 queries and as many keys in a batch of 2"):
        prune(tokens, other_batch, cross_attention, how)
    with pytest.raises(ValueError, match=r"self-attention .*keys \(2, 2, 6, 4\)"):
        prune(tokens, cross_attention, cross_attention, how)
    with pytest.raises(ValueError, match=r"cross-attention .*\(2, 2, 12, 4\).*expected 20 queries in a batch of 2"):
        prune(tokens, self_attention, fewer_cross, how)


def test_compiles_without_a_break() -> None:
    """With a fixed number of iterations, all but the random ranking, whose generator torch.compile does not take."""
    tokens, self_attention, cross_attention = random_layer(2, 4, 5)
    how = Pruning(0.5, graph="streamed", iterations=3)

    def layer(values: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        kept, restore = prune(tokens.with_values(values), AttentionInputs(q, k, 0.5), cross_attention, how)
        return restore(kept).values

    arguments = (tokens.values, self_attention.query, self_attention.key)
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    assert torch.equal(compiled(*arguments), layer(*arguments))


@pytest.mark.parametrize("recovery", RECOVERIES)
@pytest.mark.parametrize("batch", [3, 4])
def test_a_few_heads_at_a_time_change_nothing(batch: int, recovery: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens, self_attention, cross_attention = random_layer(batch, 4, 5)
    how = Pruning(0.5, recovery=recovery)
    kept, restore = prune(tokens, self_attention, cross_attention, how)
    monkeypatch.setattr("atedm.graph.by_head.CACHE_BYTES", 3 * 20 * 20 * 8)
    kept_2, restore_2 = prune(tokens, self_attention, cross_attention, how)
    torch.testing.assert_close(kept_2.positions, kept.positions)
    twice = kept.with_values(3 * kept.values)
    error = (restore_2(twice).values - restore(twice).values).abs().max().item()
    print(f"largest difference between all heads and three at a time: {error}")
    assert error == 0
    again, undo = prune(kept_2, take(self_attention, kept_2), take(cross_attention, kept_2), how)  # of a sparse set
    torch.testing.assert_close(undo(again).positions, kept.positions)


def take(attention: AttentionInputs, kept: TokenSet) -> AttentionInputs:
    """The attention of the kept tokens, among each other where it was among all."""

    def of(heads: torch.Tensor) -> torch.Tensor:
        assert kept.positions is not None
        return heads.gather(2, kept.positions[:, None, :, None].expand(-1, heads.shape[1], -1, heads.shape[3]))

    own = attention.key.shape[2] == kept.size
    return AttentionInputs(of(attention.query), of(attention.key) if own else attention.key, attention.scale)
