"""An attention graph in which every s-th query votes: a cheap estimate of the votes of all.

Shapes: the map is (B, heads, M, N), see :mod:`atedm.graph`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from atedm.fused import streamed_graph
from atedm.held import HeldGraph
from atedm.streamed import StreamedGraph, take_rows

# One query in five votes. An odd stride walks across the columns of a grid of even width, where 4 would ask the same
# few columns in every row.
SKETCH_STRIDE = 5


@dataclass(frozen=True, eq=False)
class SketchedGraph:
    """Votes from the queries 0, stride, 2 * stride, ... alone; all other answers are exact, and streamed.

    ``query`` (B, heads, M, d) and ``key`` (B, heads, N, d) are those of the whole map, ``voters`` is the graph of the
    queries that vote: it holds M / stride x N numbers.

    The sketch stride * sum_{i votes} A_ij s_i is an unbiased estimate of one vote (A^T s)_j: its mean over the
    ``stride`` places at which counting could start is exactly that. From 0 it is one draw, the same every time. Power
    iteration on it only ever reads the scores of the queries that vote, so that it finds the scores that these give
    each other, and ranks all keys by a last vote of theirs; that, as any iteration of an estimate, is biased.
    """

    query: Tensor
    key: Tensor
    scale: float
    voters: HeldGraph
    stride: int
    log_sum_exp: Tensor | None = None

    @classmethod
    def from_qk(
        cls, q: Tensor, k: Tensor, scale: float, stride: int = SKETCH_STRIDE, log_sum_exp: Tensor | None = None
    ) -> SketchedGraph:
        """A sketch of the graph softmax(scale * q k^T) of queries (B, heads, M, d) and keys (B, heads, N, d).

        ``log_sum_exp`` (B, heads, M) is what fused attention knows of each row, if it is at hand.
        Raises ``ValueError`` for a stride below 1.
        """
        if stride < 1:
            raise ValueError(f"sketch stride is {stride}, expected 1 or more")
        voting = None if log_sum_exp is None else log_sum_exp[:, :, ::stride]
        voters = HeldGraph.from_qk(q[:, :, ::stride], k, scale, voting)
        return cls(q, k, scale, voters, stride, log_sum_exp)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(B, heads, M, N)."""
        batch, heads, queries, _ = self.query.shape
        return batch, heads, queries, self.key.shape[2]

    def uniform(self) -> Tensor:
        """Equal scores for all queries, see :meth:`~atedm.graph.AttentionGraph.uniform`."""
        return self.voters.map.new_full(self.shape[:3], 1 / self.shape[2])

    def votes(self, s_q: Tensor) -> Tensor:
        """The sketch of A^T s, see :meth:`~atedm.graph.AttentionGraph.votes`."""
        return self.stride * self.voters.votes(s_q[:, :, :: self.stride])

    def gather(self, s_k: Tensor) -> Tensor:
        """A s, see :meth:`~atedm.graph.AttentionGraph.gather`."""
        return self._exact().gather(s_k)

    def entropy(self) -> Tensor:
        """Entropy of each row in nats, see :meth:`~atedm.graph.AttentionGraph.entropy`."""
        return self._exact().entropy()

    def strongest_query(self, among: Tensor, targets: Tensor) -> Tensor:
        """Which query attends most to each target, see :meth:`~atedm.graph.AttentionGraph.strongest_query`."""
        sums = None if self.log_sum_exp is None else self.log_sum_exp.take_along_dim(among.unsqueeze(1), dim=2)
        rows = streamed_graph(take_rows(self.query, among), self.key, self.scale, sums)  # no others are needed
        return rows.strongest_query(torch.arange(among.shape[1], device=among.device).expand_as(among), targets)

    def _exact(self) -> StreamedGraph:
        # Anew each time: cross-attention asks, whose keys are few; self-attention, which does not, would pay for it.
        return StreamedGraph.from_qk(self.query, self.key, self.scale, self.log_sum_exp)
