"""The dense attention graph: holds the whole map in memory. The simplest graph, and the fastest for small maps.

Shapes: the map is (B, heads, M, N), see :mod:`atedm.graph.protocol`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from atedm.tokens import at_least_float32


@dataclass(frozen=True, eq=False)
class DenseGraph:
    """An attention graph with its whole ``map`` (B, heads, M, N) in memory, in float32 or float64."""

    map: Tensor

    @classmethod
    def from_map(cls, attention: Tensor) -> DenseGraph:
        """The graph of a map (B, heads, M, N). Half precision is converted to float32.

        Raises ``ValueError`` for another shape, NaN, negative weights, and rows that do not sum to one within 1e-3, or
        within four units of rounding of the map's dtype if that is more.
        """
        shape = tuple(attention.shape)
        if len(shape) != 4 or 0 in shape:
            raise ValueError(f"attention map has shape {shape}, expected (B, heads, M, N) without empty axes")
        if not attention.is_floating_point():
            raise ValueError(f"attention map is {attention.dtype}, expected floating point numbers")
        held = at_least_float32(attention)
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
    def from_qk(cls, q: Tensor, k: Tensor, scale: float) -> DenseGraph:
        """The graph softmax(scale * q k^T) of queries (B, heads, M, d) and keys (B, heads, N, d).

        Logits and softmax are computed in float32 at least, as in fused attention.
        """
        logits = (at_least_float32(q) * scale) @ at_least_float32(k).mT
        return cls(logits.softmax(dim=-1))

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(B, heads, M, N)."""
        batch, heads, queries, keys = self.map.shape
        return batch, heads, queries, keys

    def parts(self) -> Iterator[DenseGraph]:
        """The graph itself, see :meth:`~atedm.graph.protocol.AttentionGraph.parts`."""
        yield self

    def uniform(self) -> Tensor:
        """Equal scores for all queries, see :meth:`~atedm.graph.protocol.AttentionGraph.uniform`."""
        batch, heads, queries, _ = self.shape
        return self.map.new_full((batch, heads, queries), 1 / queries)

    def rmatvec(self, s_q: Tensor) -> Tensor:
        """A^T s, see :meth:`~atedm.graph.protocol.AttentionGraph.rmatvec`."""
        return (s_q.unsqueeze(-2) @ self.map).squeeze(-2)  # einsum would copy the map to transpose it

    def matvec(self, s_k: Tensor) -> Tensor:
        """A s, see :meth:`~atedm.graph.protocol.AttentionGraph.matvec`."""
        return (self.map @ s_k.unsqueeze(-1)).squeeze(-1)

    def entropy(self) -> Tensor:
        """Entropy of each row in nats, see :meth:`~atedm.graph.protocol.AttentionGraph.entropy`."""
        return torch.special.entr(self.map).sum(dim=-1)  # -x ln x, and 0 at x = 0

    def argmax_query(self, among: Tensor, targets: Tensor) -> Tensor:
        """The query that attends most to each target, see :meth:`~atedm.graph.protocol.AttentionGraph.argmax_query`."""
        rows = self.map.mean(dim=1).gather(1, among.unsqueeze(2).expand(-1, -1, self.map.shape[-1]))
        weights = rows.gather(2, targets.unsqueeze(1).expand(-1, among.shape[1], -1))  # (B, m, p)
        return weights.argmax(dim=1)  # the first of equal maxima, as torch documents
