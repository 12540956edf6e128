"""The Triton kernels against float64: on a GPU where there is one, else by Triton's interpreter (tests/conftest.py).

The interpreter computes nothing in bfloat16; float16 stands for both half precisions there, with the same float32 sums.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from atedm import DenseGraph, gwpr
from atedm.graph.triton import TritonGraph, usable

pytest.importorskip("triton", reason="Triton has no build for this system")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PRECISIONS = [torch.float32, torch.float16] + ([torch.bfloat16] if DEVICE == "cuda" else [])
SHAPES = [(1, 2, 70, 70, 64), (2, 3, 130, 77, 40), (1, 1, 5, 9, 8), (2, 2, 128, 64, 64)]


def inputs(shape: tuple[int, ...], dtype: torch.dtype, deviation: float = 1.0) -> tuple[Tensor, Tensor, float, Tensor]:
    """Queries, keys, the scale, and the map in float64."""
    batch, heads, queries, keys, channels = shape
    torch.manual_seed(0)
    q = (deviation * torch.randn(batch, heads, queries, channels)).to(DEVICE, dtype)
    k = (deviation * torch.randn(batch, heads, keys, channels)).to(DEVICE, dtype)
    scale = channels**-0.5
    return q, k, scale, ((q.double() * scale) @ k.double().mT).softmax(dim=-1)


@pytest.mark.parametrize("deviation", [1e-2, 1.0, 4.0])
@pytest.mark.parametrize("dtype", PRECISIONS)
@pytest.mark.parametrize("shape", SHAPES)
def test_votes(shape: tuple[int, ...], dtype: torch.dtype, deviation: float) -> None:
    q, k, scale, attention = inputs(shape, dtype, deviation)
    scores = torch.rand(shape[:3], dtype=torch.float64)
    scores[:, :, ::3] = 0  # who has no score has no vote
    scores = (scores / scores.sum(dim=-1, keepdim=True)).to(DEVICE)
    votes = TritonGraph.from_qk(q, k, scale).rmatvec(scores.float())
    wanted = DenseGraph(attention).rmatvec(scores)
    error = ((votes - wanted).abs() / wanted.max()).max().item()
    print(f"max error {error:.2e} of the largest vote")
    assert error <= 1e-5  # logits reach 60, where float32 has steps of 4e-6


@pytest.mark.parametrize("dtype", PRECISIONS)
@pytest.mark.parametrize("shape", SHAPES)
def test_strongest_query(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    q, k, scale, attention = inputs(shape, dtype)
    batch, _, queries, keys, _ = shape
    among = torch.stack([torch.randperm(queries)[: queries // 2 + 1].sort().values for _ in range(batch)])
    targets = torch.stack([torch.randperm(keys)[: keys // 2 + 1].sort().values for _ in range(batch)])
    found = TritonGraph.from_qk(q, k, scale).argmax_query(among, targets)
    weights = (
        attention.mean(dim=1).take_along_dim(among.unsqueeze(2), dim=1).take_along_dim(targets.unsqueeze(1), dim=2)
    )
    assert torch.equal(found, weights.argmax(dim=1))


def test_of_equal_queries_the_first_is_strongest() -> None:
    q = torch.ones(1, 2, 150, 16, device=DEVICE)
    # Whole numbers: their products are equal in every row, in whatever order a processor's library sums them.
    k = torch.randint(-4, 5, (1, 2, 150, 16), generator=torch.Generator().manual_seed(0)).float().to(DEVICE)
    every = torch.arange(150, device=DEVICE).unsqueeze(0)
    assert not TritonGraph.from_qk(q, k, 0.25).argmax_query(every, every).any()


def test_known_log_sum_exp_is_used() -> None:
    q, k, scale, _ = inputs((1, 2, 20, 20, 16), torch.float32)
    exact = ((q * scale) @ k.mT).logsumexp(dim=-1)
    scores = torch.full((1, 2, 20), 1 / 20, device=DEVICE)
    plain = TritonGraph.from_qk(q, k, scale, exact).rmatvec(scores)
    halved = TritonGraph.from_qk(q, k, scale, exact + math.log(2)).rmatvec(scores)
    assert torch.allclose(halved, plain / 2, rtol=1e-5)


@pytest.mark.parametrize("cross", [False, True])
def test_ranking_by_kernels(cross: bool) -> None:
    q, k, scale, attention = inputs((2, 2, 90, 30 if cross else 90, 32), torch.float32)
    graph = TritonGraph.from_qk(q, k, scale)
    error = (gwpr(graph, cross=cross) - gwpr(attention, cross=cross)).abs().max().item()
    print(f"max error {error:.2e} of scores that sum to about 1")
    assert error <= 1e-6


def test_kernels_are_for_a_gpu() -> None:
    assert not usable(torch.ones(1, 1, 1, 8))
