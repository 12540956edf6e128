"""What an attention layer hands over, and the graph that is built from it on request."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from atedm.graph.by_head import ByHeadGraph
from atedm.graph.dense import DenseGraph
from atedm.graph.protocol import AttentionGraph
from atedm.graph.triton import streamed_graph

GRAPHS = ("by-head", "streamed", "subsampled", "dense")  # names of the kinds of graph


class AttentionInputs(NamedTuple):
    """What an attention layer hands over, so that no map is built where nobody asks for one.

    ``query`` is (B, heads, M, d), ``key`` is (B, heads, N, d); the map is softmax(scale * query key^T).
    ``log_sum_exp`` (B, heads, M) is that of each row of scale * query key^T, if the attention layer knows it: it spares
    graphs that are not held from computing all rows for it.
    """

    query: Tensor
    key: Tensor
    scale: float
    log_sum_exp: Tensor | None = None

    def graph(self, kind: str = "by-head") -> AttentionGraph:
        """Build the attention graph of the ``kind``, one of ``GRAPHS``. Raises ``ValueError`` for any other.

        ``dense`` holds the whole map in memory, ``by-head`` a few heads at a time while they are ranked, ``streamed``
        recomputes the map in pieces for each answer: the same answers. In ``subsampled`` every fifth query votes.
        """
        match kind:
            case "dense":
                return DenseGraph.from_qk(self.query, self.key, self.scale)
            case "by-head":
                return ByHeadGraph.from_qk(self.query, self.key, self.scale, stride=1, log_sum_exp=self.log_sum_exp)
            case "streamed":
                return streamed_graph(self.query, self.key, self.scale, self.log_sum_exp)
            case "subsampled":
                return ByHeadGraph.from_qk(self.query, self.key, self.scale, log_sum_exp=self.log_sum_exp)
        raise ValueError(f"attention graph is {kind!r}, expected one of {', '.join(GRAPHS)}")


class LazyGraph:
    """A graph that is built on first use and then shared by ranking and recovery."""

    def __init__(self, inputs: AttentionInputs, kind: str = "by-head") -> None:
        self.inputs = inputs
        self.kind = kind
        self._built: AttentionGraph | None = None  # no cached_property: its lock stops torch.compile

    @property
    def graph(self) -> AttentionGraph:
        """The graph of ``inputs``, see :meth:`AttentionInputs.graph`."""
        if self._built is None:
            self._built = self.inputs.graph(self.kind)
        return self._built
