"""The pruning layer: rank the tokens, keep the best, hand on the way back (AT-EDM paper, section 3.1, steps 2 to 4)."""

from __future__ import annotations

from dataclasses import dataclass

from atedm.graph import GRAPHS, AttentionInputs, LazyGraph
from atedm.ranking import RANKINGS, check_ratio, kept_count, scores, top_k
from atedm.recovery import RECOVERIES, Restore, identity, recover
from atedm.tokens import TokenSet


@dataclass(frozen=True)
class Pruning:
    """How a pruning layer prunes: what share, by which ranking, and what pruned positions become afterwards.

    ``ratio`` is rho, the share of tokens removed. ``ranking`` is one of ``RANKINGS``, ``graph`` one of ``GRAPHS``,
    ``recovery`` one of ``RECOVERIES``. ``iterations`` is how often G-WPR iterates, exactly; ``None`` is until it
    settles. ``seed`` is for the rankings ``random`` and ``moving-grid``: the same seed keeps the same
    positions.
    Raises ``ValueError`` for an unknown name and for numbers out of range.
    """

    ratio: float
    ranking: str = "gwpr"
    graph: str = "by-head"
    recovery: str = "similarity"
    iterations: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        check_ratio(self.ratio)
        choices = (("ranking", self.ranking, RANKINGS), ("graph", self.graph, GRAPHS))
        for what, name, names in (*choices, ("recovery", self.recovery, RECOVERIES)):
            if name not in names:
                raise ValueError(f"{what} is {name!r}, expected one of {', '.join(names)}")
        if self.iterations is not None and self.iterations < 1:
            raise ValueError(f"iterations is {self.iterations}, expected 1 or more, or None: until the scores settle")


def prune(
    tokens: TokenSet, self_attention: AttentionInputs, cross_attention: AttentionInputs, how: Pruning
) -> tuple[TokenSet, Restore]:
    """Remove the share ``how.ratio`` (rho) of ``tokens`` that ``how.ranking`` rates lowest.

    ``self_attention`` is that of these tokens among each other, ``cross_attention`` theirs to the text; of the two,
    only the graphs that ``how`` reads are built. Returns the kept tokens and the inverse, which is returned, not
    remembered. Where nothing is to be removed, the tokens are the ones given, untouched.

    Raises ``ValueError`` for attention of other tokens.
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
    self_graph = LazyGraph(self_attention, how.graph)
    cross_graph = LazyGraph(
        cross_attention, "dense" if how.graph == "by-head" else how.graph
    )  # keys are words, and few
    kept = top_k(scores(how.ranking, tokens, self_graph, cross_graph, how.iterations, how.seed), count)
    return tokens.keep(kept), recover(how.recovery, tokens, kept, self_graph)
