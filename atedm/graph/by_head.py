"""The attention graph that holds some heads at a time, and lets all queries vote, or every s-th: a sketch of the votes.

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

# One query in five votes. An odd stride walks across the columns of a grid of even width, where 4 would ask the same
# few columns in every row.
SUBSAMPLING_STRIDE = 5

# Maps held together while they are ranked: as many as fit into the caches of a CPU, or into a small part of a GPU's
# memory, and one alone if it has at most as much as that: SDXL's largest at 1024 px takes 64 MiB.
CACHE_BYTES = 8 * 2**20
MAPS_BYTES = 256 * 2**20


@dataclass(frozen=True, eq=False)
class ByHeadGraph:
    """Votes from the queries 0, stride, 2 * stride, ... alone; with a stride of 1 from all, which is exact.

    ``query`` (B, heads, M, d) and ``key`` (B, heads, N, d) are those of the whole map, ``log_sum_exp`` (B, heads, M)
    is that of its rows if known. ``voters`` is the graph of the queries that vote: a part of this graph has it
    (:meth:`parts`). Without, it is built for each answer. All answers but votes are streamed.

    The sketch stride * sum_{i votes} A_ij s_i is an unbiased estimate of one vote (A^T s)_j: its mean over the
    ``stride`` places at which counting could start is exactly that. From 0 it is one draw, the same every time. Power
    iteration on it only ever reads the scores of the queries that vote, so that it finds the scores that these give
    each other, and ranks all keys by a last vote of theirs; that, as any iteration of an estimate, is biased.
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
        """A sketch of the graph softmax(scale * q k^T) of queries (B, heads, M, d) and keys (B, heads, N, d).

        ``log_sum_exp`` (B, heads, M) is what fused attention knows of each row, if it is at hand.
        Raises ``ValueError`` for a stride below 1.
        """
        if stride < 1:
            raise ValueError(f"sketch stride is {stride}, expected 1 or more")
        return cls(q, k, scale, stride, log_sum_exp)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(B, heads, M, N)."""
        batch, heads, queries, _ = self.query.shape
        return batch, heads, queries, self.key.shape[2]

    def parts(self) -> Iterator[ByHeadGraph]:
        """Some heads at a time, with their voters in memory; all and streamed, where one head's would take too much.

        See :meth:`~atedm.graph.protocol.AttentionGraph.parts`. All parts share their memory: on a CPU it takes longer
        to get than to fill. No gradient goes through them.
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
        """The sketch of A^T s, see :meth:`~atedm.graph.protocol.AttentionGraph.rmatvec`."""
        voters = self.voters or self._streamed_voters()
        return self.stride * voters.rmatvec(self._voting(s_q))

    def matvec(self, s_k: Tensor) -> Tensor:
        """A s, see :meth:`~atedm.graph.protocol.AttentionGraph.matvec`."""
        return self._exact().matvec(s_k)

    def entropy(self) -> Tensor:
        """Entropy of each row in nats, see :meth:`~atedm.graph.protocol.AttentionGraph.entropy`."""
        return self._exact().entropy()

    def argmax_query(self, among: Tensor, targets: Tensor) -> Tensor:
        """Which query attends most to each target, see :meth:`~atedm.graph.protocol.AttentionGraph.argmax_query`."""
        sums = None if self.log_sum_exp is None else self.log_sum_exp.take_along_dim(among.unsqueeze(1), dim=2)
        rows = streamed_graph(take_rows(self.query, among), self.key, self.scale, sums)  # no others are needed
        return rows.argmax_query(torch.arange(among.shape[1], device=among.device).expand_as(among), targets)

    def _voting(self, x: Tensor) -> Tensor:
        """The rows of ``x`` (B, heads, M, ...) that vote."""
        return x[:, :, :: self.stride]

    def _streamed_voters(self) -> StreamedGraph | TritonGraph:
        sums = None if self.log_sum_exp is None else self._voting(self.log_sum_exp)
        return streamed_graph(self._voting(self.query), self.key, self.scale, sums)

    def _exact(self) -> StreamedGraph:
        # Anew each time: cross-attention asks, whose keys are few; self-attention, which does not, would pay for it.
        return StreamedGraph.from_qk(self.query, self.key, self.scale, self.log_sum_exp)


def _filled(memory: Tensor, query: Tensor, key: Tensor, log_sum_exp: Tensor) -> DenseGraph:
    """The graph exp(query key^T - log_sum_exp) in ``memory`` (b, 1, m, N), made a few rows at a time, in cache.

    Its weights are off by rounding, the sums of its rows too, which no vote notices.
    """
    rows = max(1, CACHE_BYTES // (memory[:, :, 0].numel() * memory.element_size()))
    for piece, q, sums in zip(*(torch.split(x, rows, dim=2) for x in (memory, query, log_sum_exp)), strict=True):
        torch.matmul(q, key.mT, out=piece).sub_(sums).exp_()
    return DenseGraph(memory)
