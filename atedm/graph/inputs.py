"""Queries and keys of an attention layer, and the attention graph that is built from them on first use."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from atedm.graph.by_head import ByHeadGraph
from atedm.graph.dense import DenseGraph
from atedm.graph.protocol import AttentionGraph
from atedm.graph.triton import streamed_graph

GRAPHS = ("by-head", "streamed", "subsampled", "dense")  # names of the kinds of graph


class AttentionInputs(NamedTuple):
    """Queries and keys of an attention layer. A map is built from them only where a ranking or recovery reads it.

    ``query`` is (B, heads, M, d), ``key`` is (B, heads, N, d); the map is softmax(scale * query key^T).
    ``log_sum_exp`` (B, heads, M) is that of each row of scale * query key^T, where the layer knows it. Graphs that do
    not hold the map need it, and compute it from all rows otherwise.
    """

    query: Tensor
    key: Tensor
    scale: float
    log_sum_exp: Tensor | None = None

    def sharpened(self, factor: float) -> AttentionInputs:
        """The inputs of the map softmax(factor * scale * query key^T)."""
        return self if factor == 1 else AttentionInputs(self.query, self.key, factor * self.scale)

    def graph(self, kind: str = "by-head") -> AttentionGraph:
        """The attention graph of the ``kind``, one of ``GRAPHS``. Raises ``ValueError`` for any other.

        ``dense`` holds the whole map in memory, ``by-head`` a few heads at a time, and ``streamed`` recomputes the map
        in pieces; their answers are the same. In ``subsampled`` only every fifth query votes.
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
    """An attention graph that is built on first use and shared by ranking and recovery."""

    def __init__(self, inputs: AttentionInputs, kind: str = "by-head") -> None:
        self.inputs = inputs
        self.kind = kind
        self._built: AttentionGraph | None = None  # not a cached_property, whose lock torch.compile cannot trace

    @property
    def graph(self) -> AttentionGraph:
        """The graph of ``inputs``, see :meth:`AttentionInputs.graph`."""
        if self._built is None:
            self._built = self.inputs.graph(self.kind)
        return self._built


def lazy_graphs(
    self_attention: AttentionInputs, cross_attention: AttentionInputs, kind: str, sharpness: float
) -> tuple[LazyGraph, LazyGraph]:
    """The graphs that ranking and recovery may read, of the ``kind`` (:meth:`AttentionInputs.graph`).

    Self-attention is sharpened. A cross-attention map to a few words is small, so heads in turn would save nothing.
    """
    cross_kind = "dense" if kind == "by-head" else kind
    return LazyGraph(self_attention.sharpened(sharpness), kind), LazyGraph(cross_attention, cross_kind)
