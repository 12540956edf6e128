"""The attention graph: the attention map A as a weighted directed graph, query i votes for key j with weight A[i, j].

Shapes: A is (B, heads, M, N) for M queries and N keys, and each row sums to one. In self-attention M = N.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

from torch import Tensor


class AttentionGraph(Protocol):
    """The products and searches on an attention map that ranking and recovery need."""

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(B, heads, M, N)."""

    def parts(self) -> Iterator[AttentionGraph]:
        """The graph itself, or parts of it, (b, 1, M, N) each, in the order of (B, heads), to be ranked one by one.

        A part may reuse the memory of the part before it.
        """

    def uniform(self) -> Tensor:
        """Equal scores (B, heads, M) that sum to one over the queries: where G-WPR starts."""

    def rmatvec(self, s_q: Tensor) -> Tensor:
        """A^T s (B, heads, N): the votes that each key gets from queries with scores ``s_q`` (B, heads, M)."""

    def matvec(self, s_k: Tensor) -> Tensor:
        """A s (B, heads, M): what each query gets from keys with scores ``s_k`` (B, heads, N)."""

    def entropy(self) -> Tensor:
        """Entropy of each row in nats, with 0 ln 0 = 0: (B, heads, M)."""

    def argmax_query(self, among: Tensor, targets: Tensor) -> Tensor:
        """The query that attends most to each target key.

        ``among`` (B, m) are indices of queries, ``targets`` (B, p) indices of keys. Returns (B, p) indices *into*
        ``among``: for target b the query i with the largest A[i, b], averaged over heads, the first on ties.
        """
