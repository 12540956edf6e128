"""The attention map as a weighted directed graph: query i votes for key j with weight A[i, j].

Shapes: the map is (B, heads, M, N) for M queries and N keys, each row sums to one. In self-attention queries and keys
are the same tokens and M = N.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, Protocol

from torch import Tensor

from atedm.fused import streamed_graph
from atedm.headwise import HeadwiseGraph
from atedm.held import HeldGraph

GRAPHS = ("held", "streamed", "sketched", "whole")  # the names of the ways to keep a graph


class AttentionGraph(Protocol):
    """What ranking and recovery ask of an attention map, however it is kept."""

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(B, heads, M, N)."""

    def parts(self) -> Iterator[AttentionGraph]:
        """The graph, or parts of it that are (b, 1, M, N) each, in the order of (B, heads), to be ranked one by one.

        A part may be built when its turn comes, and its memory used again for the next one.
        """

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

    def graph(self, kind: str = "held") -> AttentionGraph:
        """Build the attention graph of the ``kind``, one of ``GRAPHS``. Raises ``ValueError`` for any other.

        ``whole`` has the whole map in memory, ``held`` those of some heads while they are ranked, ``streamed`` none: it
        computes them anew for each answer. All three give the same answers. ``sketched`` lets some of the queries vote.
        """
        match kind:
            case "whole":
                return HeldGraph.from_qk(self.query, self.key, self.scale)
            case "held":
                return HeadwiseGraph.from_qk(self.query, self.key, self.scale, stride=1, log_sum_exp=self.log_sum_exp)
            case "streamed":
                return streamed_graph(self.query, self.key, self.scale, self.log_sum_exp)
            case "sketched":
                return HeadwiseGraph.from_qk(self.query, self.key, self.scale, log_sum_exp=self.log_sum_exp)
        raise ValueError(f"attention graph is {kind!r}, expected one of {', '.join(GRAPHS)}")


class LazyGraph:
    """A graph that is built when it is first read, and kept from then on: several readers share it, or nobody pays."""

    def __init__(self, inputs: AttentionInputs, kind: str = "held") -> None:
        self.inputs = inputs
        self.kind = kind
        self._built: AttentionGraph | None = None  # no cached_property: its lock stops torch.compile

    @property
    def graph(self) -> AttentionGraph:
        """The graph of ``inputs``, see :meth:`AttentionInputs.graph`."""
        if self._built is None:
            self._built = self.inputs.graph(self.kind)
        return self._built
