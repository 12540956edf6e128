"""The by-head graph: exact with all queries voting, and an unbiased estimate of A^T s with a subsample of them."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from atedm import ByHeadGraph, DenseGraph, StreamedGraph, rank


def random_qk(queries: int, keys: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    q, k = (torch.randn(2, 3, n, 4, generator=generator, dtype=torch.float64) for n in (queries, keys))
    return q, k


def random_scores(count: int) -> Tensor:
    return torch.rand(2, 3, count, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.mark.parametrize("stride", [1, 3, 5, 30])
def test_votes_by_loops(stride: int) -> None:
    q, k = random_qk(23, 11)
    a = DenseGraph.from_qk(q, k, 0.5).map
    s = random_scores(23)
    votes = ByHeadGraph.from_qk(q, k, 0.5, stride).rmatvec(s)
    worst = 0.0
    for b in range(2):
        for h in range(3):
            for j in range(11):
                expected = stride * sum(a[b, h, i, j].item() * s[b, h, i].item() for i in range(0, 23, stride))
                worst = max(worst, abs(votes[b, h, j].item() - expected))
    print(f"subsampled votes, stride {stride}: max error {worst:.1e}")
    assert worst < 1e-13


@pytest.mark.parametrize(("queries", "stride"), [(24, 4), (23, 5), (7, 9)])
def test_the_mean_over_all_starts_is_exact(queries: int, stride: int) -> None:
    """Also where the stride does not divide the number of queries. Dropping queries moves the start."""
    q, k = random_qk(queries, 11)
    s = random_scores(queries)
    exact = DenseGraph.from_qk(q, k, 0.5).rmatvec(s)
    mean = torch.zeros_like(exact)
    for start in range(min(stride, queries)):
        mean += ByHeadGraph.from_qk(q[:, :, start:], k, 0.5, stride).rmatvec(s[:, :, start:]) / stride
    error = (mean - exact).abs().max().item()
    print(f"mean of estimates, {queries} queries, stride {stride}: max error {error:.1e}")
    assert error < 1e-13


def test_iteration_is_that_of_the_voters_among_each_other() -> None:
    """Loops over the voters' part of the map, then one vote of theirs for all."""
    q, k = random_qk(20, 20)
    a = DenseGraph.from_qk(q, k, 0.5).map[1, 2].tolist()
    ranking = rank(ByHeadGraph.from_qk(q, k, 0.5, 3), eps=1e-15, max_iterations=200)
    voters = range(0, 20, 3)
    s = dict.fromkeys(voters, 1.0)
    for _ in range(200):
        new = {j: sum(a[i][j] * s[i] for i in voters) for j in voters}
        s = {j: vote / sum(new.values()) for j, vote in new.items()}
    votes = [sum(a[i][j] * s[i] for i in voters) for j in range(20)]
    error = max(abs(ranking.heads[1, 2, j].item() - vote / sum(votes)) for j, vote in enumerate(votes))
    print(f"power iteration of the voters: max error {error:.1e}")
    assert error < 1e-14


@pytest.mark.parametrize("keys", [40, 9])
def test_everything_but_votes_is_exact(keys: int) -> None:
    q, k = random_qk(40, keys)
    held, subsampled = DenseGraph.from_qk(q, k, 0.5), ByHeadGraph.from_qk(q, k, 0.5, 4)
    s_k = random_scores(keys)
    assert subsampled.shape == held.shape
    assert torch.equal(subsampled.uniform(), held.uniform())
    assert (subsampled.matvec(s_k) - held.matvec(s_k)).abs().max() < 1e-14
    assert (subsampled.entropy() - held.entropy()).abs().max() < 1e-13
    among = torch.tensor([[0, 3, 4, 30], [1, 2, 17, 39]])
    targets = torch.arange(1, keys, 2).expand(2, -1)
    assert torch.equal(subsampled.argmax_query(among, targets), held.argmax_query(among, targets))


@pytest.mark.parametrize("stride", [1, 8])
@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("heads", [0.3, 1, 4, 6])  # less than one is filled a few rows at a time
def test_heads_are_held_a_few_at_a_time(
    stride: int, known: bool, heads: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever their number, and whether or not there is memory for one: the scores of the whole map's voters."""
    q, k = random_qk(40, 40)
    whole = DenseGraph.from_qk(q, k, 0.5)
    sums = (0.5 * q @ k.mT).logsumexp(dim=-1) if known else None
    graph = ByHeadGraph.from_qk(q, k, 0.5, stride, sums)
    of_head = -(-40 // stride) * 40 * 8
    monkeypatch.setattr("atedm.graph.by_head.CACHE_BYTES", int(heads * of_head))
    sizes = [part.voters.map.shape for part in graph.parts() if isinstance(part.voters, DenseGraph)]
    assert sizes == [(size, 1, -(-40 // stride), 40) for size in {0.3: [1] * 6, 1: [1] * 6, 4: [4, 2], 6: [6]}[heads]]
    by_parts = rank(graph)
    monkeypatch.setattr("atedm.graph.by_head.MAPS_BYTES", of_head - 1)
    (part,) = graph.parts()
    assert type(part.voters) is StreamedGraph and part.shape == graph.shape
    streamed = rank(graph)
    assert torch.equal(by_parts.iterations, streamed.iterations) and by_parts.iterations.shape == (2, 3)
    error = (by_parts.heads - streamed.heads).abs().max().item()
    if stride == 1:
        error = max(error, (by_parts.heads - rank(whole).heads).abs().max().item())
        assert torch.equal(by_parts.converged, rank(whole).converged)
    print(f"stride {stride}, {heads} heads at a time: max error {error:.1e}")
    assert error < 1e-14


@pytest.mark.parametrize("memory", [0, 2**20])
def test_sums_of_rows_are_computed_once(memory: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """However often a head votes, held or streamed, and also where attention does not tell them."""
    q, k = random_qk(40, 40)
    calls = 0
    logsumexp = Tensor.logsumexp

    def counted(x: Tensor, dim: int) -> Tensor:
        nonlocal calls
        calls += 1
        return logsumexp(x, dim)

    monkeypatch.setattr(Tensor, "logsumexp", counted)
    monkeypatch.setattr("atedm.graph.by_head.MAPS_BYTES", memory)
    iterations = rank(ByHeadGraph.from_qk(q, k, 0.5, 1)).iterations.max().item()
    print(f"{iterations} votes, sums of rows computed {calls} times")
    assert iterations > 2 and calls == (memory == 0)  # in memory, softmax does it


def test_no_gradient_goes_through_parts() -> None:
    """Ranking inside training: scores say which tokens stay, and nothing is learned from that."""
    q, k = (x.requires_grad_() for x in random_qk(12, 12))
    assert not rank(ByHeadGraph.from_qk(q, k, 0.5, 1)).heads.requires_grad


def test_stride_below_one() -> None:
    with pytest.raises(ValueError, match="subsampling stride is 0, expected 1 or more"):
        ByHeadGraph.from_qk(*random_qk(4, 4), 0.5, stride=0)


def test_known_sums_of_rows_are_not_computed_again() -> None:
    """Fused attention knows the log-sum-exp of each row: the same answers, and shifted ones for shifted sums."""
    q, k = random_qk(23, 23)
    known = (0.5 * q @ k.mT).logsumexp(dim=-1)
    computed, given = ByHeadGraph.from_qk(q, k, 0.5, 4), ByHeadGraph.from_qk(q, k, 0.5, 4, known)
    s, among = random_scores(23), torch.tensor([[0, 3, 4, 22], [1, 2, 17, 20]])
    targets = torch.arange(1, 23, 2).expand(2, -1)
    error = (given.rmatvec(s) - computed.rmatvec(s)).abs().max()
    print(f"votes with known sums: max error {error:.1e}")
    assert error < 1e-14
    assert (given.matvec(s) - computed.matvec(s)).abs().max() < 1e-14
    assert torch.equal(given.argmax_query(among, targets), computed.argmax_query(among, targets))
    halved = ByHeadGraph.from_qk(q, k, 0.5, 4, known + math.log(2))
    assert (halved.rmatvec(s) - computed.rmatvec(s) / 2).abs().max() < 1e-14
    known[:, :, 3] -= 100  # the strongest of all, if it is believed
    believed = ByHeadGraph.from_qk(q, k, 0.5, 4, known).argmax_query(among[:1].expand(2, -1), targets)
    assert bool((believed == 1).all())
