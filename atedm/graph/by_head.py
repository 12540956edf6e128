"""The by-head attention graph: holds the map of a few heads at a time. All queries vote, or a subsample of them.

Shapes: the map is (B, heads, M, N), see :mod:`atedm.graph.protocol`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from atedm.graph.dense import DenseGraph
from atedm.graph.streamed import StreamedGraph, take_rows
from atedm.graph.triton import TritonGraph, streamed_graph
from atedm.tokens import at_least_float32

# Every fifth query votes. An odd stride reaches all columns of a grid of even width; 4 would take the same few columns
# in every row.
SUBSAMPLING_STRIDE = 5

# Memory of the maps that are held together. On a CPU as many heads as fit into its caches, at least one; on a GPU a
# small part of its memory. A head whose map is larger than MAPS_BYTES is streamed; SDXL's largest at 1024 px is 64 MiB.
CACHE_BYTES = 8 * 2**20
MAPS_BYTES = 256 * 2**20


@dataclass(frozen=True, eq=False)
class ByHeadGraph:
    """An attention graph in which the queries 0, stride, 2 * stride, ... vote. With stride 1 all do, and it is exact.

    ``query`` (B, heads, M, d) and ``key`` (B, heads, N, d) are those of the whole map, ``log_sum_exp`` (B, heads, M)
    is that of its rows, if known. ``voters`` is the graph of the voting queries. The parts of this graph have one
    (:meth:`parts`); otherwise it is built for each answer. All answers but A^T s are exact and streamed.

    The estimate stride * sum_{i votes} A_ij s_i of (A^T s)_j is unbiased: its mean over the ``stride`` possible first
    queries is exact. Here the first is always 0. Power iteration reads only the scores of the voters. So it finds the
    scores that voters give each other, and ranks all keys by their last vote. That iteration is biased.
    """

    query: Tensor
    key: Tensor
    scale: float
    stride: int
    log_sum_exp: Tensor | None = None
    voters: DenseGraph | StreamedGraph | TritonGraph | None = None

    @classmethod
    def from_qk(
        cls, q: Tensor, k: Tensor, scale: float, stride: int = SUBSAMPLING_STRIDE, log_sum_exp: Tensor | None = None
    ) -> ByHeadGraph:
        """The graph softmax(scale * q k^T) of queries (B, heads, M, d) and keys (B, heads, N, d).

        ``log_sum_exp`` (B, heads, M) of each row, as fused attention returns it, if known. Raises ``ValueError`` for a
        stride below 1.
        """
        if stride < 1:
            raise ValueError(f"subsampling stride is {stride}, expected 1 or more")
        return cls(q, k, scale, stride, log_sum_exp)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(B, heads, M, N)."""
        batch, heads, queries, _ = self.query.shape
        return batch, heads, queries, self.key.shape[2]

    def parts(self) -> Iterator[ByHeadGraph]:
        """A few heads at a time, with the map of their voters in memory; or all heads, streamed, if one is too large.

        See :meth:`~atedm.graph.protocol.AttentionGraph.parts`. All parts reuse the same memory, because on a CPU
        allocating it takes longer than filling it. No gradient passes through them.
        """
        if self.voters is not None:
            yield self
            return
        batch, heads, _, keys = self.shape
        query = at_least_float32(self._voting(self.query.detach())) * self.scale
        voters = query.shape[2]
        of_head = voters * keys * query.element_size()
        if torch.compiler.is_compiling() or of_head > MAPS_BYTES:
            yield replace(self, voters=self._streamed_voters())
            return
        together = min(max(1, (CACHE_BYTES if query.device.type == "cpu" else MAPS_BYTES) // of_head), batch * heads)
        each = [x.detach().flatten(0, 1).unsqueeze(1) for x in (query, self.query, self.key)]
        sums = memory = None
        if self.log_sum_exp is not None:
            sums = self._voting(self.log_sum_exp).flatten(0, 1)[:, None, :, None]
            memory = query.new_empty(together, 1, voters, keys)
        for start in range(0, batch * heads, together):
            heads_now = slice(start, start + together)
            voting, q, k = (x[heads_now] for x in each)
            if sums is None or memory is None:
                dense = DenseGraph.from_qk(voting, k, 1.0)
            else:
                dense = _filled(memory[: len(q)], voting, at_least_float32(k), sums[heads_now])
            yield replace(self, query=q, key=k, log_sum_exp=None, voters=dense)

    def uniform(self) -> Tensor:
        """Equal scores for all queries, see :meth:`~atedm.graph.protocol.AttentionGraph.uniform`."""
        return torch.full_like(at_least_float32(self.query[..., 0]), 1 / self.shape[2])

    def rmatvec(self, s_q: Tensor) -> Tensor:
        """A^T s, or its estimate, see :meth:`~atedm.graph.protocol.AttentionGraph.rmatvec`."""
        voters = self.voters or self._streamed_voters()
        return self.stride * voters.rmatvec(self._voting(s_q))

    def matvec(self, s_k: Tensor) -> Tensor:
        """A s, see :meth:`~atedm.graph.protocol.AttentionGraph.matvec`."""
        return self._exact().matvec(s_k)

    def entropy(self) -> Tensor:
        """Entropy of each row in nats, see :meth:`~atedm.graph.protocol.AttentionGraph.entropy`."""
        return self._exact().entropy()

    def argmax_query(self, among: Tensor, targets: Tensor) -> Tensor:
        """The query that attends most to each target, see :meth:`~atedm.graph.protocol.AttentionGraph.argmax_query`."""
        sums = None if self.log_sum_exp is None else self.log_sum_exp.take_along_dim(among.unsqueeze(1), dim=2)
        rows = streamed_graph(take_rows(self.query, among), self.key, self.scale, sums)  # only these rows
        return rows.argmax_query(torch.arange(among.shape[1], device=among.device).expand_as(among), targets)

    def _voting(self, x: Tensor) -> Tensor:
        """The rows of ``x`` (B, heads, M, ...) that vote."""
        return x[:, :, :: self.stride]

    def _streamed_voters(self) -> StreamedGraph | TritonGraph:
        sums = None if self.log_sum_exp is None else self._voting(self.log_sum_exp)
        return streamed_graph(self._voting(self.query), self.key, self.scale, sums)

    def _exact(self) -> StreamedGraph:
        # Built for each answer: only cross-attention needs it, and its keys are few.
        return StreamedGraph.from_qk(self.query, self.key, self.scale, self.log_sum_exp)


def _filled(memory: Tensor, query: Tensor, key: Tensor, log_sum_exp: Tensor) -> DenseGraph:
    """The graph exp(query key^T - log_sum_exp), written to ``memory`` (b, 1, m, N) a few rows at a time, in cache.

    The sums of its rows are one up to rounding, which does not matter to A^T s.
    """
    rows = max(1, CACHE_BYTES // (memory[:, :, 0].numel() * memory.element_size()))
    for piece, q, sums in zip(*(torch.split(x, rows, dim=2) for x in (memory, query, log_sum_exp)), strict=True):
        torch.matmul(q, key.mT, out=piece).sub_(sums).exp_()
    return DenseGraph(memory)
