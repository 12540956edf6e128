"""The attention map as a weighted directed graph: query i votes for key j with weight A[i, j].

Shapes: the map is (B, heads, M, N) for M queries and N keys, each row sums to one. In self-attention queries and keys
are the same tokens and M = N.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

from torch import Tensor


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

    def rmatvec(self, s_q: Tensor) -> Tensor:
        """What the votes of queries with scores ``s_q`` (B, heads, M) add up to at each key: A^T s, (B, heads, N)."""

    def matvec(self, s_k: Tensor) -> Tensor:
        """What each query gets from keys with scores ``s_k`` (B, heads, N): A s, (B, heads, M)."""

    def entropy(self) -> Tensor:
        """How spread each row is, in nats (0 ln 0 = 0): (B, heads, M)."""

    def argmax_query(self, among: Tensor, targets: Tensor) -> Tensor:
        """Which query attends most to each target key.

        ``among`` (B, m) are indices of queries, ``targets`` (B, p) indices of keys. Returns (B, p): for each target b
        the place *in* ``among`` of the query i with the largest A[i, b], averaged over heads; the first on ties.
        """
