"""Rankings against Algorithm 1 in loops, the choice of the best scores, and which graphs are built for them."""

from __future__ import annotations

import math

import pytest
import torch

from atedm import (
    GRAPHS,
    RANKINGS,
    AttentionInputs,
    DenseGraph,
    LazyGraph,
    TokenSet,
    kept_count,
    scores,
    top_k,
)
from atedm.coverage import grid_order
from tests.atedm.reference import algorithm_1, root_mean_square


def test_top_k_by_sorting_pairs() -> None:
    scores = torch.randint(0, 6, (4, 40), generator=torch.Generator().manual_seed(8)) / 7  # many ties
    for k in range(1, 41):
        kept = top_k(scores, k)
        for b, row in enumerate(scores.tolist()):
            pairs = sorted((-score, position) for position, score in enumerate(row))
            assert kept[b].tolist() == sorted(position for _, position in pairs[:k])


def test_top_k_ties_go_to_the_lower_position() -> None:
    assert top_k(torch.ones(1, 4096), 5).tolist() == [[0, 1, 2, 3, 4]]
    assert top_k(torch.tensor([[0.1, 0.3, 0.2, 0.3, 0.2, 0.2]]), 4).tolist() == [[1, 2, 3, 4]]


@pytest.mark.parametrize("k", [0, 7, -1])
def test_top_k_out_of_range(k: int) -> None:
    with pytest.raises(ValueError, match=f"k is {k}, expected 1 to 6"):
        top_k(torch.ones(1, 6), k)


@pytest.mark.parametrize(
    ("n", "ratio", "kept"),
    [(4096, 0.63, 1516), (1024, 0.63, 379), (256, 0.63, 95), (10, 0.75, 2), (10, 0.25, 8), (10, 0.999, 1), (7, 0, 7)],
)
def test_kept_count(n: int, ratio: float, kept: int) -> None:
    assert kept_count(n, ratio) == kept


@pytest.mark.parametrize("ratio", [-0.1, 1.0, 1.5, math.nan, math.inf])
def test_ratio_out_of_range(ratio: float) -> None:
    with pytest.raises(ValueError, match=f"rho is {ratio}, expected 0 <= rho < 1"):
        kept_count(10, ratio)


def random_inputs(queries: int, keys: int, seed: int, device: str = "cpu") -> AttentionInputs:
    generator = torch.Generator().manual_seed(seed)
    q, k = (torch.randn(2, 3, n, 4, generator=generator, dtype=torch.float64).to(device) for n in (queries, keys))
    return AttentionInputs(q, k, 0.8)


TOKENS = TokenSet(torch.randn(2, 12, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64), grid=(3, 4))
GRAPHS_READ: dict[str, list[int]] = {
    **{"gwpr": [0], "ca-wpr": [1], "one-vote": [0], "lowest": [0], "covered": [0]},
    **{"random": [], "grid": [], "moving-grid": [], "dissimilarity": []},
}


def lazy_pair(device: str = "cpu") -> tuple[LazyGraph, LazyGraph]:
    return LazyGraph(random_inputs(12, 12, 0, device)), LazyGraph(random_inputs(12, 5, 1, device))


@pytest.mark.parametrize("iterations", [None, 1, 3])
@pytest.mark.parametrize(("name", "cross"), [("gwpr", False), ("ca-wpr", True), ("one-vote", False)])
def test_rankings_by_loops(name: str, cross: bool, iterations: int | None) -> None:
    pair = lazy_pair()
    given = scores(name, TOKENS, *pair, iterations=iterations)
    inputs = pair[cross].inputs
    a = (0.8 * inputs.query @ inputs.key.mT).softmax(-1)
    eps, limit = (1e-5, 50) if iterations is None else (-1.0, iterations)
    if name == "one-vote":
        limit = 1
    worst = 0.0
    for b in range(2):
        expected = root_mean_square([algorithm_1(a[b, h].tolist(), cross, eps, limit)[0] for h in range(3)])
        worst = max(worst, max(abs(x - y) for x, y in zip(given[b].tolist(), expected, strict=True)))
    print(f"{name}, {iterations} iterations: max error {worst:.1e}")
    assert worst < 1e-15


def test_one_vote_is_the_attention_received() -> None:
    pair = lazy_pair()
    graph = pair[0].inputs.graph("dense")
    assert isinstance(graph, DenseGraph)
    received = graph.map.mean(dim=2)  # over queries
    assert torch.allclose(scores("one-vote", TOKENS, *pair), received.square().mean(1).sqrt(), rtol=0, atol=1e-16)


def test_lowest_turns_gwpr_around() -> None:
    pair = lazy_pair()
    assert torch.equal(scores("lowest", TOKENS, *pair), -scores("gwpr", TOKENS, *pair))


def test_random_scores() -> None:
    drawn = scores("random", TOKENS, *lazy_pair(), seed=3)
    assert drawn.shape == (2, 12)
    assert torch.equal(drawn[0], drawn[1])
    assert torch.equal(scores("random", TOKENS, *lazy_pair(), seed=3), drawn)
    assert not torch.equal(scores("random", TOKENS, *lazy_pair(), seed=4), drawn)
    state = torch.get_rng_state()
    scores("random", TOKENS, *lazy_pair(), seed=5)
    assert torch.equal(torch.get_rng_state(), state)  # nobody else's numbers change


def test_a_grid_moves_with_the_seed() -> None:
    moved = [scores("moving-grid", TOKENS, *lazy_pair(), seed=seed) for seed in range(5)]
    assert all(torch.equal(moved[seed], grid_order(TOKENS, seed % 4)) for seed in range(5))


def test_random_scores_choose_each_position_as_often() -> None:
    pair = lazy_pair()
    kept = torch.cat([top_k(scores("random", TOKENS, *pair, seed=seed)[:1], 4).flatten() for seed in range(600)])
    often = kept.bincount(minlength=12) / 600
    print(f"random keep of 4 of 12: each position in {often.min():.3f} to {often.max():.3f} of draws, expected 0.333")
    assert (often - 1 / 3).abs().max() < 0.07  # 3.6 standard deviations


@pytest.mark.parametrize(("name", "read"), GRAPHS_READ.items())
def test_only_the_graph_that_is_read_is_built(name: str, read: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    pair = lazy_pair()
    built = []
    build = AttentionInputs.graph

    def spy(inputs: AttentionInputs, kind: str = "by-head") -> object:
        built.append([inputs is lazy.inputs for lazy in pair].index(True))
        return build(inputs, kind)

    monkeypatch.setattr(AttentionInputs, "graph", spy)
    scores(name, TOKENS, *pair)
    assert built == read


@pytest.mark.parametrize("name", RANKINGS)
@pytest.mark.parametrize("kind", GRAPHS)
def test_rankings_without_contents(name: str, kind: str) -> None:
    pair = [LazyGraph(lazy.inputs, kind) for lazy in lazy_pair("meta")]
    assert scores(name, TOKENS.with_values(TOKENS.values.to("meta")), pair[0], pair[1], iterations=3).shape == (2, 12)


def test_unknown_ranking() -> None:
    with pytest.raises(
        ValueError, match="ranking is 'pagerank', expected one of gwpr, ca-wpr, one-vote, lowest, random"
    ):
        scores("pagerank", TOKENS, *lazy_pair())
