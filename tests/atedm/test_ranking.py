"""G-WPR against Algorithm 1 in loops over plain Python numbers (float64), and what must hold whatever the map."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from atedm import (
    GRAPHS,
    RANKINGS,
    AttentionInputs,
    DenseGraph,
    LazyGraph,
    TokenSet,
    gwpr,
    kept_count,
    rank,
    scores,
    top_k,
)
from atedm.coverage import grid_order


def random_map(batch: int, heads: int, queries: int, keys: int, sharpness: float = 1.5, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(batch, heads, queries, keys, generator=generator, dtype=torch.float64)
    return (sharpness * logits).softmax(-1)


def algorithm_1(a: list[list[float]], cross: bool, eps: float, limit: int) -> tuple[list[float], int]:
    """The paper's listing for one head, line by line."""
    m, n = len(a), len(a[0])
    s_q = [1 / m] * m
    t = 0
    while True:
        s_k = [0.0] * n
        for i in range(m):
            for j in range(n):
                s_k[j] += a[i][j] * s_q[i]
        if cross:
            new = []
            for i in range(m):
                attended = sum(a[i][j] * s_k[j] for j in range(n))
                entropy = -sum(a[i][j] * math.log(a[i][j]) for j in range(n))
                new.append(attended / entropy)
        else:
            new = s_k
        total = sum(abs(s) for s in new)
        new = [s / total for s in new]
        change = sum(abs(x - y) for x, y in zip(new, s_q, strict=True))
        s_q, t = new, t + 1
        if change <= eps or t == limit:
            return s_q, t


@pytest.mark.parametrize(("cross", "keys"), [(False, 12), (True, 12), (True, 5), (True, 20)])
@pytest.mark.parametrize(("eps", "limit"), [(1e-9, 200), (1e-3, 200), (1e-9, 3)])
def test_by_loops(cross: bool, keys: int, eps: float, limit: int) -> None:
    batch, heads, queries = 2, 3, 12
    a = random_map(batch, heads, queries, keys)
    ranking = rank(a, cross=cross, eps=eps, max_iterations=limit)
    worst = 0.0
    for b in range(batch):
        squares = [0.0] * queries
        for h in range(heads):
            expected, iterations = algorithm_1(a[b, h].tolist(), cross, eps, limit)
            worst = max(worst, max(abs(x - y) for x, y in zip(ranking.heads[b, h].tolist(), expected, strict=True)))
            squares = [total + s * s for total, s in zip(squares, expected, strict=True)]
            assert ranking.iterations[b, h] == iterations
        means = [math.sqrt(total / heads) for total in squares]
        worst = max(worst, max(abs(x - y) for x, y in zip(ranking.scores[b].tolist(), means, strict=True)))
    print(f"cross={cross} {queries}x{keys} eps={eps:.0e}: max error {worst:.1e}, {ranking.iterations.max()} iterations")
    assert worst < 1e-14
    assert ranking.converged.all() == (limit > 3)
    assert torch.equal(gwpr(a, cross=cross, eps=eps, max_iterations=limit), ranking.scores)


@pytest.mark.parametrize("cross", [False, True])
@pytest.mark.parametrize("sharpness", [1e-2, 1.0, 5.0])
def test_scores_of_each_head_sum_to_one(cross: bool, sharpness: float) -> None:
    heads = rank(random_map(2, 3, 40, 40, sharpness), cross=cross).heads
    error = (heads.sum(-1) - 1).abs().max().item()
    print(f"cross={cross} sharpness={sharpness}: sum of scores off by {error:.1e}")
    assert error < 1e-14
    assert (heads >= 0).all()


def test_stationary_votes() -> None:
    """What Algorithm 1 converges to is the left eigenvector of eigenvalue 1, found here by a linear solve."""
    a = random_map(1, 1, 30, 30)
    ranking = rank(a, eps=1e-14, max_iterations=1000)
    system = torch.cat([a[0, 0].mT - torch.eye(30, dtype=a.dtype), torch.ones(1, 30, dtype=a.dtype)])
    target = torch.cat([torch.zeros(30, 1, dtype=a.dtype), torch.ones(1, 1, dtype=a.dtype)])
    expected = torch.linalg.lstsq(system, target).solution.squeeze(-1)
    error = (ranking.heads[0, 0] - expected).abs().max().item()
    print(f"stationary distribution: max error {error:.1e}")
    assert ranking.converged.all()
    assert error < 1e-13


def test_permuting_tokens_permutes_scores() -> None:
    a = random_map(2, 3, 25, 25)
    order = torch.randperm(25, generator=torch.Generator().manual_seed(5))
    permuted = gwpr(a[:, :, order][..., order])
    assert torch.allclose(permuted, gwpr(a)[:, order], rtol=0, atol=1e-15)

    a = random_map(2, 3, 25, 9)
    order_k = torch.randperm(9, generator=torch.Generator().manual_seed(6))
    permuted = gwpr(a[:, :, order][..., order_k], cross=True)
    assert torch.allclose(permuted, gwpr(a, cross=True)[:, order], rtol=0, atol=1e-15)


def test_doubly_stochastic_map_gives_uniform_scores() -> None:
    generator = torch.Generator().manual_seed(7)
    weights = torch.rand(6, generator=generator, dtype=torch.float64).softmax(-1)
    permutations = [torch.eye(16, dtype=torch.float64)[torch.randperm(16, generator=generator)] for _ in weights]
    mixture = sum((w * p for w, p in zip(weights, permutations, strict=True)), torch.zeros(16, 16, dtype=torch.float64))
    scores = gwpr(mixture.expand(2, 3, 16, 16))
    error = (scores - 1 / 16).abs().max().item()
    print(f"doubly stochastic: max error {error:.1e}")
    assert error < 1e-16


@pytest.mark.parametrize("cross", [False, True])
def test_batch_rows_do_not_see_their_neighbours(cross: bool) -> None:
    """Bitwise, although one neighbour makes the loop run on long after the row is done."""
    row = random_map(1, 3, 24, 24, sharpness=1.0)
    quick, slow = random_map(1, 3, 24, 24, sharpness=0.01, seed=1), random_map(1, 3, 24, 24, sharpness=6.0, seed=2)
    beside_quick = rank(torch.cat([quick, row]).float(), cross=cross)
    beside_slow = rank(torch.cat([slow, row]).float(), cross=cross)
    assert beside_slow.iterations[0].max() > beside_slow.iterations[1].max() > beside_quick.iterations[0].max()
    assert torch.equal(beside_quick.heads[1], beside_slow.heads[1])
    assert torch.equal(beside_quick.iterations[1], beside_slow.iterations[1])
    assert torch.equal(beside_quick.scores[1], beside_slow.scores[1])


def test_what_stopped_it_is_reported() -> None:
    swap = torch.tensor([[0.0, 1.0, 0.0], [1.0, 0.0, 0.0], [0.5, 0.0, 0.5]], dtype=torch.float64)  # never settles
    settled = torch.full((3, 3), 1 / 3, dtype=torch.float64)
    ranking = rank(torch.stack([swap, settled]).unsqueeze(0), max_iterations=30)
    assert ranking.converged.tolist() == [[False, True]]
    assert ranking.iterations.tolist() == [[30, 1]]
    exact = rank(torch.full((1, 1, 4, 4), 0.25, dtype=torch.float64), eps=0.0)
    assert exact.converged.all()
    assert exact.iterations.tolist() == [[1]]


def test_without_a_threshold_nothing_waits_for_the_device() -> None:
    """All iterations are done, and the answer is that of a threshold that is never met."""
    a = random_map(2, 3, 12, 12)
    fixed, threshold = rank(a, eps=0.0, max_iterations=4), rank(a, eps=1e-300, max_iterations=4)
    assert torch.equal(fixed.heads, threshold.heads)
    assert (fixed.iterations == 4).all()
    meta = DenseGraph(torch.empty(2, 3, 12, 12, device="meta"))
    for cross in (False, True):
        assert rank(meta, cross=cross, eps=0.0, max_iterations=4).scores.shape == (2, 12)
    with pytest.raises((RuntimeError, NotImplementedError)):  # here it would have to wait for what does not exist
        rank(meta, max_iterations=4)


def test_one_hot_rows_in_cross_attention() -> None:
    a = random_map(1, 2, 8, 5)
    a[0, :, 3] = torch.nn.functional.one_hot(torch.tensor(1), 5)
    ranking = rank(a.float(), cross=True)
    assert ranking.heads.isfinite().all()
    assert (ranking.heads.argmax(-1) == 3).all()  # entropy 0: the limit of equation (1) gives it all the weight


def test_bad_input_is_refused() -> None:
    with pytest.raises(ValueError, match="4 queries and 6 keys"):
        gwpr(random_map(1, 1, 4, 6))
    with pytest.raises(ValueError, match="4 queries and 6 keys"):
        gwpr(DenseGraph.from_map(random_map(1, 1, 4, 6)))
    with pytest.raises(ValueError, match="not row-stochastic"):
        gwpr(2 * random_map(1, 1, 4, 4))
    with pytest.raises(ValueError, match="NaN"):
        gwpr(torch.full((1, 1, 4, 4), torch.nan))
    with pytest.raises(ValueError, match=r"eps is -1\.0"):
        gwpr(random_map(1, 1, 4, 4), eps=-1.0)
    with pytest.raises(ValueError, match="max_iterations is 0"):
        gwpr(random_map(1, 1, 4, 4), max_iterations=0)


def test_nan_in_a_graph_never_counts_as_converged() -> None:
    graph = DenseGraph(torch.full((1, 1, 4, 4), torch.nan))
    assert not rank(graph, max_iterations=3).converged.any()


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
        heads = [algorithm_1(a[b, h].tolist(), cross, eps, limit)[0] for h in range(3)]
        for token in range(12):
            expected = math.sqrt(sum(head[token] ** 2 for head in heads) / 3)
            worst = max(worst, abs(given[b, token].item() - expected))
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
