"""The attention map as a weighted directed graph: query i votes for key j with weight A[i, j].

Shapes: the map is (B, heads, M, N) for M queries and N keys, each row sums to one. In self-attention queries and keys
are the same tokens and M = N.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor


class AttentionGraph(Protocol):
    """What ranking and recovery ask of an attention map, however it is kept."""

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(B, heads, M, N)."""

    def uniform(self) -> Tensor:
        """Equal scores for all queries, (B, heads, M), each head's sum is one: where ranking starts."""

    def votes(self, s_q: Tensor) -> Tensor:
        """What the votes of queries with scores ``s_q`` (B, heads, M) add up to at each key: A^T s, (B, heads, N)."""

    def gather(self, s_k: Tensor) -> Tensor:
        """What each query gets from keys with scores ``s_k`` (B, heads, N): A s, (B, heads, M)."""

    def entropy(self) -> Tensor:
        """How spread each row is, in nats (0 ln 0 = 0): (B, heads, M)."""

    def strongest_query(self, among: Tensor, targets: Tensor) -> Tensor:
        """Which query attends most to each target key.

        ``among`` (B, m) are indices of queries, ``targets`` (B, p) indices of keys. Returns (B, p): for each target b
        the place *in* ``among`` of the query i with the largest A[i, b], averaged over heads; the first on ties.
        """


@dataclass(frozen=True, eq=False)
class HeldGraph:
    """An attention graph that holds its whole map in memory, in float32 or float64."""

    map: Tensor

    @classmethod
    def from_map(cls, attention: Tensor) -> HeldGraph:
        """The graph of a given map (B, heads, M, N); half precision becomes float32.

        Raises ``ValueError`` unless the map has that shape, is free of NaN, has no negative weights, and its rows sum
        to one: to within 1e-3, or four units of rounding where the map's own precision is coarser than that.
        """
        shape = tuple(attention.shape)
        if len(shape) != 4 or 0 in shape:
            raise ValueError(f"attention map has shape {shape}, expected (B, heads, M, N) without empty axes")
        if not attention.is_floating_point():
            raise ValueError(f"attention map is {attention.dtype}, expected floating point numbers")
        held = _at_least_float32(attention)
        if held.isnan().any():
            raise ValueError("attention map contains NaN, expected rows of weights that sum to one")
        if held.min() < 0:
            raise ValueError(f"attention map has a negative weight {held.min().item():.3g}, expected 0 or more")
        tolerance = max(1e-3, 4 * torch.finfo(attention.dtype).eps)
        off = (held.sum(dim=-1) - 1).abs().max().item()
        if not off <= tolerance:
            raise ValueError(
                f"attention map is not row-stochastic: a row's sum is off one by {off:.3g}, "
                f"expected at most {tolerance:.3g}"
            )
        return cls(held)

    @classmethod
    def from_qk(cls, q: Tensor, k: Tensor, scale: float) -> HeldGraph:
        """The graph softmax(scale * q k^T) of queries (B, heads, M, d) and keys (B, heads, N, d).

        Logits and softmax are computed in float32 at least, as fused attention does inside.
        """
        logits = (_at_least_float32(q) * scale) @ _at_least_float32(k).mT
        return cls(logits.softmax(dim=-1))

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(B, heads, M, N)."""
        batch, heads, queries, keys = self.map.shape
        return batch, heads, queries, keys

    def uniform(self) -> Tensor:
        """Equal scores for all queries, see :meth:`AttentionGraph.uniform`."""
        batch, heads, queries, _ = self.shape
        return self.map.new_full((batch, heads, queries), 1 / queries)

    def votes(self, s_q: Tensor) -> Tensor:
        """A^T s, see :meth:`AttentionGraph.votes`."""
        return (s_q.unsqueeze(-2) @ self.map).squeeze(-2)  # einsum would copy the map to transpose it

    def gather(self, s_k: Tensor) -> Tensor:
        """A s, see :meth:`AttentionGraph.gather`."""
        return (self.map @ s_k.unsqueeze(-1)).squeeze(-1)

    def entropy(self) -> Tensor:
        """Entropy of each row in nats, see :meth:`AttentionGraph.entropy`."""
        terms: Tensor = torch.special.entr(self.map)  # -x ln x, and 0 at x = 0
        return terms.sum(dim=-1)

    def strongest_query(self, among: Tensor, targets: Tensor) -> Tensor:
        """Which query attends most to each target, see :meth:`AttentionGraph.strongest_query`."""
        rows = torch.take_along_dim(self.map.mean(dim=1), among.unsqueeze(2), dim=1)
        weights = torch.take_along_dim(rows, targets.unsqueeze(1), dim=2)  # (B, m, p)
        return weights.argmax(dim=1)  # torch documents: the first of equal maxima


class AttentionInputs(NamedTuple):
    """What an attention layer hands over, so that no map is built where nobody asks for one.

    ``query`` is (B, heads, M, d), ``key`` is (B, heads, N, d); the map is softmax(scale * query key^T).
    """

    query: Tensor
    key: Tensor
    scale: float

    def graph(self) -> HeldGraph:
        """Build the attention graph."""
        return HeldGraph.from_qk(self.query, self.key, self.scale)


def _at_least_float32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
