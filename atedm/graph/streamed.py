"""The streamed attention graph: keeps queries and keys, and recomputes the map in pieces for each answer.

The M x N map is never in memory. The weight of query i for key j is exp(scale q_i k_j - L_i), with L_i the row's
log-sum-exp. Shapes: the map is (B, heads, M, N), see :mod:`atedm.graph.protocol`; d channels per head.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from atedm.tokens import at_least_float32

# Memory of a piece of the map and one temporary of its size. SDXL's largest map (4096 tokens, 10 heads) is 640 MiB in
# float32. Smaller pieces save little compared to queries and keys, and each piece costs a few kernel launches.
PIECE_BYTES = 24 * 2**20


@dataclass(frozen=True, eq=False)
class StreamedGraph:
    """The answers of :class:`~atedm.graph.dense.DenseGraph` from pieces of the map of at most ``piece_bytes``.

    ``query`` (B, heads, M, d), already scaled, and ``key`` (B, heads, N, d) are in float32 or float64. ``log_sum_exp``
    (B, heads, M) is L, in natural logarithm. The smallest piece is one row or column of each head.
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

        ``log_sum_exp`` (B, heads, M) of each row, as fused attention returns it; computed here if not given. Raises
        ``ValueError`` if it has another shape.
        """
        # Contiguous, because attention layers split heads by a view, which every piece would copy.
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
        """The graph itself, see :meth:`~atedm.graph.protocol.AttentionGraph.parts`."""
        yield self

    def uniform(self) -> Tensor:
        """Equal scores for all queries, see :meth:`~atedm.graph.protocol.AttentionGraph.uniform`."""
        return torch.full_like(self.log_sum_exp, 1 / self.shape[2])

    def rmatvec(self, s_q: Tensor) -> Tensor:
        """A^T s for scores s >= 0, see :meth:`~atedm.graph.protocol.AttentionGraph.rmatvec`.

        (A^T s)_j = sum_i exp(scale q_i k_j - L_i + log s_i): attention with queries and keys swapped, and a bias.
        Weights and scores are at most one, so the sum is safe without subtracting a maximum.
        """
        bias = (s_q.log() - self.log_sum_exp).unsqueeze(2)  # -inf where s = 0, and exp(-inf) = 0
        pieces = self._pieces(along=3, across=2)
        return torch.cat([(self.key[:, :, j] @ self.query.mT).add_(bias).exp_().sum(dim=-1) for j in pieces], dim=-1)

    def matvec(self, s_k: Tensor) -> Tensor:
        """A s, see :meth:`~atedm.graph.protocol.AttentionGraph.matvec`."""
        column, pieces = s_k.unsqueeze(-1), self._pieces(along=2, across=3)
        return torch.cat([self._logits(rows).softmax(dim=-1) @ column for rows in pieces], dim=2).squeeze(-1)

    def entropy(self) -> Tensor:
        """Entropy of each row in nats, see :meth:`~atedm.graph.protocol.AttentionGraph.entropy`."""
        pieces = self._pieces(along=2, across=3)
        weights = (self._logits(rows).softmax(dim=-1) for rows in pieces)  # exp(logit - L) errs near one-hot rows
        return torch.cat([torch.special.entr(piece).sum(dim=-1) for piece in weights], dim=-1)

    def argmax_query(self, among: Tensor, targets: Tensor) -> Tensor:
        """The query that attends most to each target, see :meth:`~atedm.graph.protocol.AttentionGraph.argmax_query`.

        Only this part of the map is computed. Where two weights differ by rounding alone, the result may differ from
        that of a :class:`~atedm.graph.dense.DenseGraph`.
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
            strongest.append(weights.argmax(dim=1))  # the first of equal maxima, as torch documents
        return torch.cat(strongest, dim=-1)

    def _logits(self, rows: slice) -> Tensor:
        return self.query[:, :, rows] @ self.key.mT

    def _pieces(self, along: int, across: int, heads: int | None = None) -> Iterator[slice]:
        """Slices of the map's axis ``along``, so that two pieces, complete along ``across``, fit into ``piece_bytes``.

        Pieces are of all heads, or of ``heads`` at a time.
        """
        numbers = self.shape[0] * (heads or self.shape[1]) * self.shape[across]
        step = max(1, self.piece_bytes // (2 * self.query.element_size() * numbers))
        for start in range(0, max(1, self.shape[along]), step):  # an empty axis is one empty piece
            yield slice(start, start + step)


def take_rows(x: Tensor, indices: Tensor) -> Tensor:
    """Gathers (B, heads, m, d) from queries or keys ``x`` (B, heads, M, d) at ``indices`` (B, m)."""
    return x.gather(2, indices[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))
