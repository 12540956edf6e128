"""The streamed attention graph on a GPU, by the Triton kernels of :mod:`atedm.graph.kernels`.

Shapes: the map is (B, heads, M, N), see :mod:`atedm.graph.protocol`; d channels per head.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec

import torch
from torch import Tensor

from atedm.graph.streamed import StreamedGraph, take_rows


def usable(query: Tensor) -> bool:
    """Whether the kernels can run for ``query``: on a GPU, with Triton installed and without gradients."""
    return query.is_cuda and find_spec("triton") is not None and not torch.is_grad_enabled()


def streamed_graph(q: Tensor, k: Tensor, scale: float, log_sum_exp: Tensor | None) -> StreamedGraph | TritonGraph:
    """The streamed graph softmax(scale * q k^T): by Triton where it is usable, in plain PyTorch elsewhere."""
    kind = TritonGraph if usable(q) else StreamedGraph
    return kind.from_qk(q, k, scale, log_sum_exp)


@dataclass(frozen=True, eq=False)
class TritonGraph:
    """The answers of :class:`~atedm.graph.streamed.StreamedGraph` up to rounding, by one kernel each.

    ``query`` (B, heads, M, d) and ``key`` (B, heads, N, d) are those of the attention layer, in its precision.
    ``log_sum_exp`` (B, heads, M) is that of each row of scale * query key^T.
    """

    query: Tensor
    key: Tensor
    scale: float
    log_sum_exp: Tensor

    @classmethod
    def from_qk(cls, q: Tensor, k: Tensor, scale: float, log_sum_exp: Tensor | None = None) -> TritonGraph:
        """The graph of queries (B, heads, M, d) and keys (B, heads, N, d).

        ``log_sum_exp`` (B, heads, M) of each row, as fused attention returns it; computed here if not given.
        """
        known = StreamedGraph.from_qk(q, k, scale).log_sum_exp if log_sum_exp is None else log_sum_exp
        return cls(q, k, scale, known)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(B, heads, M, N)."""
        batch, heads, queries, _ = self.query.shape
        return batch, heads, queries, self.key.shape[2]

    def parts(self) -> Iterator[TritonGraph]:
        """The graph itself, see :meth:`~atedm.graph.protocol.AttentionGraph.parts`."""
        yield self

    def uniform(self) -> Tensor:
        """Equal scores for all queries, see :meth:`~atedm.graph.protocol.AttentionGraph.uniform`."""
        return torch.full_like(self.log_sum_exp, 1 / self.shape[2], dtype=torch.float32)

    def rmatvec(self, s_q: Tensor) -> Tensor:
        """A^T s for scores s >= 0, see :meth:`~atedm.graph.protocol.AttentionGraph.rmatvec`."""
        from atedm.graph import kernels  # needs Triton, which may not be installed

        return kernels.rmatvec(self.query, self.key, self.scale, self.log_sum_exp, s_q)

    def matvec(self, s_k: Tensor) -> Tensor:
        """A s, see :meth:`~atedm.graph.protocol.AttentionGraph.matvec`."""
        return self._in_pieces().matvec(s_k)

    def entropy(self) -> Tensor:
        """Entropy of each row in nats, see :meth:`~atedm.graph.protocol.AttentionGraph.entropy`."""
        return self._in_pieces().entropy()

    def argmax_query(self, among: Tensor, targets: Tensor) -> Tensor:
        """The query that attends most to each target, see :meth:`~atedm.graph.protocol.AttentionGraph.argmax_query`."""
        from atedm.graph import kernels

        sums = self.log_sum_exp.take_along_dim(among.unsqueeze(1), dim=2)
        return kernels.argmax_query(take_rows(self.query, among), take_rows(self.key, targets), self.scale, sums)

    def _in_pieces(self) -> StreamedGraph:
        # Only cross-attention needs these answers, and its keys are few.
        return StreamedGraph.from_qk(self.query, self.key, self.scale, self.log_sum_exp)
