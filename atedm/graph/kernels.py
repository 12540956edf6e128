"""Triton kernels that reduce an attention map without storing it: A^T s, and the strongest query of each key.

A kernel computes tiles of the map in registers, in float32, from queries, keys and the rows' log-sum-exp, and reduces
them at once. So memory grows with the number of tokens, not with its square. Triton comes with torch for CUDA. With
``TRITON_INTERPRET=1`` in the environment the kernels run on a CPU, slowly, for tests.

Shapes: queries are (B, heads, M, d), keys (B, heads, N, d); d is padded to a power of two of at least 16.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# Rows and columns of a tile. NOTE: not tuned on a GPU; `python -m tools.bench` measures.
TILE = 64


@triton.jit
def _votes_kernel(
    query, key, bias, out, queries, keys, channels, scale, TILE_M: tl.constexpr, TILE_N: tl.constexpr, D: tl.constexpr
):  # fmt: skip
    """One tile of keys of one head, summed over all queries."""
    head = tl.program_id(1).to(tl.int64)
    n = tl.program_id(0) * TILE_N + tl.arange(0, TILE_N)
    d = tl.arange(0, D)
    k = tl.load(
        key + (head * keys + n[:, None]) * channels + d[None, :], (n[:, None] < keys) & (d[None, :] < channels), 0.0
    )
    total = tl.zeros([TILE_N], tl.float32)
    for start in range(0, queries, TILE_M):
        m = start + tl.arange(0, TILE_M)
        q = tl.load(
            query + (head * queries + m[:, None]) * channels + d[None, :],
            (m[:, None] < queries) & (d[None, :] < channels),
            0.0,
        )
        b = tl.load(bias + head * queries + m, m < queries, float("-inf"))  # exp(-inf) = 0 beyond the last row
        logits = tl.dot(k, tl.trans(q), input_precision="ieee") * scale
        total += tl.sum(tl.exp(logits + b[None, :]), axis=1)
    tl.store(out + head * keys + n, total, n < keys)


def rmatvec(query: Tensor, key: Tensor, scale: float, log_sum_exp: Tensor, s_q: Tensor) -> Tensor:
    """A^T s (B, heads, N) in float32, for scores ``s_q`` >= 0 and the rows' ``log_sum_exp``, both (B, heads, M)."""
    batch, heads, queries, channels = query.shape
    keys = key.shape[2]
    bias = (s_q.log() - log_sum_exp).float().contiguous()
    out = torch.empty(batch, heads, keys, dtype=torch.float32, device=query.device)
    grid = (-(-keys // TILE), batch * heads)
    _votes_kernel[grid](
        query.contiguous(), key.contiguous(), bias, out, queries, keys, channels, scale,
        TILE_M=TILE, TILE_N=TILE, D=_padded(channels),
    )  # fmt: skip
    return out


@triton.jit
def _strongest_kernel(
    query, key, log_sum_exp, out, heads, queries, keys, channels, scale,
    TILE_M: tl.constexpr, TILE_N: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """One tile of keys of one batch row: the maximum over all queries of the weight, summed over heads."""
    row = tl.program_id(1).to(tl.int64)
    n = tl.program_id(0) * TILE_N + tl.arange(0, TILE_N)
    d = tl.arange(0, D)
    best = tl.full([TILE_N], -1.0, tl.float32)
    place = tl.zeros([TILE_N], tl.int64)
    for start in range(0, queries, TILE_M):
        m = start + tl.arange(0, TILE_M)
        weight = tl.zeros([TILE_M, TILE_N], tl.float32)
        for h in range(0, heads):
            head = row * heads + h
            q = tl.load(
                query + (head * queries + m[:, None]) * channels + d[None, :],
                (m[:, None] < queries) & (d[None, :] < channels),
                0.0,
            )
            k = tl.load(
                key + (head * keys + n[:, None]) * channels + d[None, :],
                (n[:, None] < keys) & (d[None, :] < channels),
                0.0,
            )
            sums = tl.load(log_sum_exp + head * queries + m, m < queries, float("inf"))
            weight += tl.exp(tl.dot(q, tl.trans(k), input_precision="ieee") * scale - sums[:, None])
        weight = tl.where(m[:, None] < queries, weight, -1.0)
        largest, first = tl.max(weight, axis=0, return_indices=True, return_indices_tie_break_left=True)
        better = largest > best  # of equal ones the first stays
        place = tl.where(better, start + first, place)
        best = tl.where(better, largest, best)
    tl.store(out + row * keys + n, place, n < keys)


def argmax_query(query: Tensor, key: Tensor, scale: float, log_sum_exp: Tensor) -> Tensor:
    """For each key the index of the query with the largest weight, summed over heads, first on ties: (B, N) int64.

    ``query`` and ``log_sum_exp`` (B, heads, M) are of the tokens to choose among, ``key`` of the targets.
    """
    batch, heads, queries, channels = query.shape
    keys = key.shape[2]
    out = torch.empty(batch, keys, dtype=torch.int64, device=query.device)
    grid = (-(-keys // TILE), batch)
    _strongest_kernel[grid](
        query.contiguous(), key.contiguous(), log_sum_exp.float().contiguous(), out,
        heads, queries, keys, channels, scale, TILE_M=TILE, TILE_N=TILE, D=_padded(channels),
    )  # fmt: skip
    return out


def _padded(channels: int) -> int:
    """``channels`` rounded up to a power of two of at least 16, the least that tensor cores take."""
    return max(16, 1 << (channels - 1).bit_length())
