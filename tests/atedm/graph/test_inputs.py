"""The attention graph against loops over plain Python numbers (float64), and against fused attention."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from atedm import GRAPHS, AttentionGraph, AttentionInputs, ByHeadGraph, DenseGraph, LazyGraph, StreamedGraph
from atedm.graph.by_head import SUBSAMPLING_STRIDE

BATCH, HEADS, QUERIES, KEYS = 2, 3, 5, 7


def random_map(dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(BATCH, HEADS, QUERIES, KEYS, generator=generator, dtype=torch.float64)
    return logits.softmax(-1).to(dtype)


def test_rmatvec_matvec_entropy_by_loops() -> None:
    a = random_map()
    a[0, 0, 2] = torch.nn.functional.one_hot(torch.tensor(4), KEYS)  # 0 ln 0 = 0
    generator = torch.Generator().manual_seed(1)
    s_q = torch.rand(BATCH, HEADS, QUERIES, generator=generator, dtype=torch.float64)
    s_k = torch.rand(BATCH, HEADS, KEYS, generator=generator, dtype=torch.float64)
    graph: AttentionGraph = DenseGraph.from_map(a)
    voted, gathered, entropy = graph.rmatvec(s_q), graph.matvec(s_k), graph.entropy()
    assert graph.shape == (BATCH, HEADS, QUERIES, KEYS)
    assert voted.shape == s_k.shape
    assert gathered.shape == entropy.shape == s_q.shape

    worst = 0.0
    for b in range(BATCH):
        for h in range(HEADS):
            rows = a[b, h].tolist()
            for j in range(KEYS):
                expected = sum(rows[i][j] * s_q[b, h, i].item() for i in range(QUERIES))
                worst = max(worst, abs(voted[b, h, j].item() - expected))
            for i in range(QUERIES):
                expected = sum(rows[i][j] * s_k[b, h, j].item() for j in range(KEYS))
                worst = max(worst, abs(gathered[b, h, i].item() - expected))
                expected = -sum(w * math.log(w) for w in rows[i] if w > 0)
                worst = max(worst, abs(entropy[b, h, i].item() - expected))
    print(f"rmatvec, matvec, entropy: max error {worst:.1e}")
    assert worst < 1e-14
    assert entropy[0, 0, 2] == 0


def test_uniform_scores_sum_to_one() -> None:
    s_q = DenseGraph.from_map(random_map()).uniform()
    assert s_q.shape == (BATCH, HEADS, QUERIES)
    assert torch.equal(s_q, torch.full_like(s_q, 1 / QUERIES))


def test_argmax_query_by_loops() -> None:
    a = random_map()
    among, targets = torch.tensor([[0, 2, 4], [1, 2, 3]]), torch.tensor([[6, 0, 1, 5], [3, 3, 2, 0]])
    strongest = DenseGraph.from_map(a).argmax_query(among, targets)
    for b in range(BATCH):
        for place, key in enumerate(targets[b].tolist()):
            received = [sum(a[b, h, i, key].item() for h in range(HEADS)) / HEADS for i in among[b].tolist()]
            assert strongest[b, place] == received.index(max(received))


def test_first_of_equal_queries_wins() -> None:
    attention = torch.full((1, 2, 6, 6), 1 / 6)
    attention[0, :, 3] = torch.tensor([0.5, 0.1, 0.1, 0.1, 0.1, 0.1])  # query 3 prefers key 0
    graph = DenseGraph.from_map(attention)
    strongest = graph.argmax_query(among=torch.tensor([[1, 3, 5]]), targets=torch.tensor([[0, 2, 4]]))
    assert strongest.tolist() == [[1, 0, 0]]


def test_no_targets() -> None:
    graph = DenseGraph.from_map(random_map())
    assert graph.argmax_query(torch.zeros(2, 1, dtype=torch.int64), torch.zeros(2, 0, dtype=torch.int64)).numel() == 0


@pytest.mark.parametrize("spread", [1.0, 1e-2])
def test_map_times_values_is_fused_attention(spread: float) -> None:
    generator = torch.Generator().manual_seed(2)
    shape = (BATCH, HEADS, 9, 4)
    q, k, v = (spread * torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(3))
    scale = 0.5
    graph = DenseGraph.from_qk(q, k, scale)
    fused = torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=scale)
    error = (graph.map @ v - fused).abs().max().item()
    print(f"map @ v against fused attention, spread {spread}: max error {error:.1e}")
    assert error < 1e-14 * spread


@pytest.mark.parametrize(
    ("given", "held"),
    [(torch.float64, torch.float64), (torch.float32, torch.float32), (torch.bfloat16, torch.float32)],
)
def test_softmax_in_float32_at_least(given: torch.dtype, held: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(3)
    q, k = (torch.randn(1, 2, 64, 32, generator=generator, dtype=torch.float64).to(given) for _ in range(2))
    graph = DenseGraph.from_qk(q, k, 32**-0.5)
    exact = (q.double() @ k.double().mT * 32**-0.5).softmax(-1)
    error = (graph.map - exact).abs().max().item()
    print(f"softmax of {given}: max error {error:.1e}")
    assert graph.map.dtype == held
    assert error < 4 * torch.finfo(held).eps


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_a_softmax_is_accepted_in_any_precision(dtype: torch.dtype) -> None:
    logits = torch.randn(1, 2, 300, 300, generator=torch.Generator().manual_seed(4))
    logits[0, 1] = 0  # 1/300 rounds the same way 300 times: bfloat16 rows are off by 2e-3
    graph = DenseGraph.from_map(logits.softmax(-1).to(dtype))
    assert graph.map.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


def test_bad_maps_are_refused() -> None:
    with pytest.raises(ValueError, match=r"shape \(3, 5, 7\), expected \(B, heads, M, N\)"):
        DenseGraph.from_map(random_map()[0])
    with pytest.raises(ValueError, match="without empty axes"):
        DenseGraph.from_map(torch.zeros(1, 2, 3, 0))
    with pytest.raises(ValueError, match=r"torch\.int64, expected floating point"):
        DenseGraph.from_map(torch.eye(4, dtype=torch.int64).expand(1, 1, 4, 4))
    with_nan = random_map()
    with_nan[1, 2, 0, 0] = torch.nan
    with pytest.raises(ValueError, match="contains NaN"):
        DenseGraph.from_map(with_nan)
    with_infinity = random_map()
    with_infinity[1, 2, 0, 0] = torch.inf
    with pytest.raises(ValueError, match="off one by inf"):
        DenseGraph.from_map(with_infinity)
    negative = random_map()
    negative[0, 0, 0, 0] -= 1
    negative[0, 0, 0, 1] += 1
    with pytest.raises(ValueError, match="negative weight"):
        DenseGraph.from_map(negative)
    with pytest.raises(ValueError, match=r"not row-stochastic.*off one by 0\.002"):
        DenseGraph.from_map(random_map() * 1.002)
    DenseGraph.from_map(random_map() * 1.0005)


def test_graphs_by_name() -> None:
    q, k = torch.randn(2, 3, 9, 4), torch.randn(2, 3, 7, 4)
    inputs = AttentionInputs(q, k, 0.5)
    graphs = [inputs.graph(kind) for kind in GRAPHS]
    assert [type(graph) for graph in graphs] == [ByHeadGraph, StreamedGraph, ByHeadGraph, DenseGraph]
    assert all(graph.shape == (2, 3, 9, 7) for graph in graphs)
    assert [graph.stride for graph in graphs if isinstance(graph, ByHeadGraph)] == [1, SUBSAMPLING_STRIDE]
    assert isinstance(inputs.graph(), ByHeadGraph)
    with pytest.raises(ValueError, match="graph is 'hold', expected one of by-head, streamed, subsampled, dense"):
        inputs.graph("hold")


def test_lazy_graph_is_built_once_and_only_if_read() -> None:
    q = torch.randn(1, 2, 5, 4)
    lazy = LazyGraph(AttentionInputs(q, q, 0.5), "streamed")
    assert isinstance(lazy.graph, StreamedGraph)
    assert lazy.graph is lazy.graph
    LazyGraph(AttentionInputs(q, q, 0.5), "no such kind")  # nothing is built, so that nothing can go wrong
