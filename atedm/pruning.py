"""The pruning layer: rank the tokens, keep the best, hand on the way back (AT-EDM paper, section 3.1, steps 2 to 4)."""

from __future__ import annotations

from atedm.graph import AttentionGraph
from atedm.ranking import gwpr, kept_count, top_k
from atedm.recovery import Restore, identity, similarity_copy
from atedm.tokens import TokenSet


def prune(tokens: TokenSet, graph: AttentionGraph, ratio: float) -> tuple[TokenSet, Restore]:
    """Remove the share ``ratio`` (rho) of ``tokens`` that G-WPR rates lowest on their self-attention ``graph``.

    Returns the kept tokens and the inverse, which is returned, not remembered. Where nothing is to be removed, the
    tokens are the ones given, untouched. Raises ``ValueError`` for a graph of other tokens or a ratio outside [0, 1).
    """
    batch, _, queries, keys = graph.shape
    if (batch, queries, keys) != (tokens.values.shape[0], tokens.count, tokens.count):
        raise ValueError(
            f"attention graph is {graph.shape} (B, heads, M, N), expected M = N = {tokens.count} tokens "
            f"in a batch of {tokens.values.shape[0]}"
        )
    count = kept_count(tokens.count, ratio)
    if count == tokens.count:
        return tokens, identity(tokens)
    kept = top_k(gwpr(graph), count)
    return tokens.keep(kept), similarity_copy(tokens, graph, kept)
