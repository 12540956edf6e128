"""Attention graphs that hold no M x N numbers: they keep queries and keys, and compute the map anew for each answer.

Shapes: the map is (B, heads, M, N), see :mod:`atedm.graph.protocol`; d is the number of channels of a head. The weight
of query i for key j is exp(q_i k_j * scale - L_i), where L_i is the row's log-sum-exp.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from atedm.tokens import at_least_float32

# What a piece of the map and one temporary of its size may take together. SDXL's largest map (4096 tokens, 10 heads)
# is 640 MiB in float32. Smaller pieces save little beside the queries and keys, and each costs a few kernel launches.
PIECE_BYTES = 24 * 2**20


@dataclass(frozen=True, eq=False)
class StreamedGraph:
    """The answers of :class:`~atedm.graph.dense.DenseGraph` without its map, from pieces of at most ``piece_bytes``.

    ``query`` (B, heads, M, d) is scaled already, ``key`` is (B, heads, N, d), both in float32 or float64;
    ``log_sum_exp`` (B, heads, M) is L, in natural logarithm. A piece is one row or column of each head at the least.
    """

    query: Tensor
    key: Tensor
    log_sum_exp: Tensor
    piece_bytes: int

    @classmethod
    def from_qk(
        cls, q: Tensor, k: Tensor, scale: float, log_sum_exp: Tensor | None = None, piece_bytes: int = PIECE_BYTES
    ) -> StreamedGraph:
        """The graph softmax(scale * q k^T) of queries (B, heads, M, d) and keys (B, heads, N, d).

        ``log_sum_exp`` (B, heads, M) is what fused attention knows of each row; without it, it is computed here.
        Raises ``ValueError`` if it has another shape.
        """
        # Attention layers split heads by a view. Contiguous, because every piece would copy it otherwise.
        query, key = (at_least_float32(q) * scale).contiguous(), at_least_float32(k).contiguous()
        graph = cls(query, key, query.new_zeros(query.shape[:3]), piece_bytes)
        if log_sum_exp is None:
            pieces = graph._pieces(along=2, across=3)
            log_sum_exp = torch.cat([graph._logits(rows).logsumexp(dim=-1) for rows in pieces], dim=-1)
        if log_sum_exp.shape != query.shape[:3]:
            raise ValueError(f"log_sum_exp is {tuple(log_sum_exp.shape)}, expected {tuple(query.shape[:3])}: one a row")
        return replace(graph, log_sum_exp=log_sum_exp.to(query.dtype))

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(B, heads, M, N)."""
        batch, heads, queries, _ = self.query.shape
        return batch, heads, queries, self.key.shape[2]

    def parts(self) -> Iterator[StreamedGraph]:
        """Itself, all heads at once, see :meth:`~atedm.graph.protocol.AttentionGraph.parts`."""
        yield self

    def uniform(self) -> Tensor:
        """Equal scores for all queries, see :meth:`~atedm.graph.protocol.AttentionGraph.uniform`."""
        return torch.full_like(self.log_sum_exp, 1 / self.shape[2])

    def rmatvec(self, s_q: Tensor) -> Tensor:
        """A^T s for scores s >= 0, see :meth:`~atedm.graph.protocol.AttentionGraph.rmatvec`.

        (A^T s)_j = exp(logsumexp_i(q_i k_j * scale - L_i + log s_i)): attention with queries and keys swapped and a
        bias. Weights and scores are at most one, so that the sum needs no maximum taken out to be safe.
        """
        bias = (s_q.log() - self.log_sum_exp).unsqueeze(2)  # -inf where s = 0, which exp takes back to 0
        pieces = self._pieces(along=3, across=2)
        return torch.cat([(self.key[:, :, j] @ self.query.mT).add_(bias).exp_().sum(dim=-1) for j in pieces], dim=-1)

    def matvec(self, s_k: Tensor) -> Tensor:
        """A s, see :meth:`~atedm.graph.protocol.AttentionGraph.matvec`."""
        column, pieces = s_k.unsqueeze(-1), self._pieces(along=2, across=3)
        return torch.cat([self._logits(rows).softmax(dim=-1) @ column for rows in pieces], dim=2).squeeze(-1)

    def entropy(self) -> Tensor:
        """Entropy of each row in nats, see :meth:`~atedm.graph.protocol.AttentionGraph.entropy`."""
        pieces = self._pieces(along=2, across=3)
        weights = (self._logits(rows).softmax(dim=-1) for rows in pieces)  # exp(logit - L) is off near one-hot rows
        return torch.cat([torch.special.entr(piece).sum(dim=-1) for piece in weights], dim=-1)

    def argmax_query(self, among: Tensor, targets: Tensor) -> Tensor:
        """Which query attends most to each target, see :meth:`~atedm.graph.protocol.AttentionGraph.argmax_query`.

        No other part of the map than these queries and keys is computed. Where two are equal but for rounding, the
        winner can be another than in a :class:`~atedm.graph.dense.DenseGraph`.
        """
        part = replace(
            self,
            query=take_rows(self.query, among),
            key=take_rows(self.key, targets),
            log_sum_exp=torch.take_along_dim(self.log_sum_exp, among.unsqueeze(1), dim=2),
        )
        heads = [x.unbind(1) for x in (part.query, part.key, part.log_sum_exp.unsqueeze(-1))]
        strongest = []
        for columns in part._pieces(along=3, across=2, heads=1):
            weights = part.query.new_zeros(among.shape[0], among.shape[1], part.key[0, 0, columns].shape[0])
            for query, key, bias in zip(*heads, strict=True):
                weights += (query @ key[:, columns].mT).sub_(bias).exp_()
            strongest.append(weights.argmax(dim=1))  # torch documents: the first of equal maxima
        return torch.cat(strongest, dim=-1)

    def _logits(self, rows: slice) -> Tensor:
        return self.query[:, :, rows] @ self.key.mT

    def _pieces(self, along: int, across: int, heads: int | None = None) -> Iterator[slice]:
        """Cut axis ``along`` of the map so that two pieces fit into ``piece_bytes``; they are whole ``across``.

        Of all heads, or of so many ``heads``.
        """
        numbers = self.shape[0] * (heads or self.shape[1]) * self.shape[across]
        step = max(1, self.piece_bytes // (2 * self.query.element_size() * numbers))
        for start in range(0, max(1, self.shape[along]), step):  # an empty axis is one empty piece
            yield slice(start, start + step)


def take_rows(x: Tensor, indices: Tensor) -> Tensor:
    """Queries or keys (B, heads, m, d) at ``indices`` (B, m) of ``x`` (B, heads, M, d)."""
    return x.gather(2, indices[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))
