"""G-WPR against Algorithm 1 in loops over plain Python numbers (float64), and what must hold whatever the map."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from atedm import DenseGraph, gwpr, rank
from tests.atedm.reference import algorithm_1, root_mean_square


def random_map(batch: int, heads: int, queries: int, keys: int, sharpness: float = 1.5, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(batch, heads, queries, keys, generator=generator, dtype=torch.float64)
    return (sharpness * logits).softmax(-1)


@pytest.mark.parametrize(("cross", "keys"), [(False, 12), (True, 12), (True, 5), (True, 20)])
@pytest.mark.parametrize(("eps", "limit"), [(1e-9, 200), (1e-3, 200), (1e-9, 3)])
def test_by_loops(cross: bool, keys: int, eps: float, limit: int) -> None:
    batch, heads, queries = 2, 3, 12
    a = random_map(batch, heads, queries, keys)
    ranking = rank(a, cross=cross, eps=eps, max_iterations=limit)
    worst = 0.0
    for b in range(batch):
        expected = []
        for h in range(heads):
            scores, iterations = algorithm_1(a[b, h].tolist(), cross, eps, limit)
            worst = max(worst, max(abs(x - y) for x, y in zip(ranking.heads[b, h].tolist(), scores, strict=True)))
            assert ranking.iterations[b, h] == iterations
            expected.append(scores)
        means = root_mean_square(expected)
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
