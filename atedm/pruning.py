"""The pruning layer: ranks the tokens, keeps the best, and returns the inverse (AT-EDM paper, section 3.1)."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf

from atedm.graph import GRAPHS, AttentionInputs, lazy_graphs
from atedm.ranking import RANKINGS, check_ratio, kept_count, scores, top_k
from atedm.recovery import RECOVERIES, Restore, identity, recover
from atedm.tokens import TokenSet

WITH_HISTORY = ("own-change", "own-change-linear")  # recoveries that look back on earlier steps: minisdxl/steps


@dataclass(frozen=True)
class Pruning:
    """How to prune. Raises ``ValueError`` for an unknown name and for numbers out of range."""

    ratio: float  # rho: the share of tokens that are removed
    ranking: str = "gwpr"  # one of RANKINGS: which tokens stay
    graph: str = "by-head"  # one of GRAPHS: how the attention map is kept or recomputed
    recovery: str = "similarity"  # one of RECOVERIES, or WITH_HISTORY: what pruned positions become afterwards
    sharpness: float = 1.0  # factor of the self-attention logits of which the map is made
    iterations: int | None = None  # exactly so many of G-WPR; None: until it converges
    seed: int = 0  # for the rankings "random" and "moving-grid"; the same seed keeps the same positions

    def __post_init__(self) -> None:
        check_ratio(self.ratio)
        choices = (("ranking", self.ranking, RANKINGS), ("graph", self.graph, GRAPHS))
        for what, name, names in (*choices, ("recovery", self.recovery, RECOVERIES + WITH_HISTORY)):
            if name not in names:
                raise ValueError(f"{what} is {name!r}, expected one of {', '.join(names)}")
        if not 0 < self.sharpness < inf:
            raise ValueError(f"sharpness is {self.sharpness:g}, expected more than 0: 1 is attention as it is")
        if self.iterations is not None and self.iterations < 1:
            raise ValueError(f"iterations is {self.iterations}, expected 1 or more, or None: until the scores settle")


def prune(
    tokens: TokenSet, self_attention: AttentionInputs, cross_attention: AttentionInputs, how: Pruning
) -> tuple[TokenSet, Restore]:
    """Removes the share ``how.ratio`` (rho) of ``tokens`` that ``how.ranking`` scores lowest.

    ``self_attention`` is that of these tokens, ``cross_attention`` theirs to the text. Only the graphs that ``how``
    reads are built. Returns the kept tokens and the restore that recovers the others. Where rho rounds to no token,
    the tokens are returned unchanged. Raises ``ValueError`` for attention of other tokens.
    """
    batch, held = tokens.values.shape[0], tokens.count
    for name, (query, key, *_) in (("self", self_attention), ("cross", cross_attention)):
        keys = held if name == "self" else key.shape[2]
        if (query.shape[0], query.shape[2], key.shape[0], key.shape[2]) != (batch, held, batch, keys):
            raise ValueError(
                f"{name}-attention has queries {tuple(query.shape)} and keys {tuple(key.shape)} (B, heads, tokens, d), "
                f"expected {held} {'queries and as many keys' if name == 'self' else 'queries'} in a batch of {batch}"
            )
    count = kept_count(held, how.ratio)
    if count == held:
        return tokens, identity(tokens)
    self_graph, cross_graph = lazy_graphs(self_attention, cross_attention, how.graph, how.sharpness)
    kept = top_k(scores(how.ranking, tokens, self_graph, cross_graph, how.iterations, how.seed), count)
    return tokens.keep(kept), recover(how.recovery, tokens, kept, self_graph)
