"""Token pruning as ordinary layers (AT-EDM, ToMe), for any model whose transformer blocks attend over a grid."""

from atedm.graph import (
    GRAPHS,
    AttentionGraph,
    AttentionInputs,
    ByHeadGraph,
    DenseGraph,
    LazyGraph,
    StreamedGraph,
)
from atedm.gwpr import Ranking, gwpr, rank
from atedm.merging import Merge, Merging, match_tokens
from atedm.plan import DENSE, BlockPlan, LayerPlan, Site, TokenPlan
from atedm.presets import PRESETS, parse_preset
from atedm.pruning import Pruning, prune
from atedm.ranking import RANKINGS, kept_count, scores, top_k
from atedm.recovery import RECOVERIES, Restore, recover, similarity_copy
from atedm.schedule import Schedule
from atedm.tokens import TokenSet

__all__ = [
    "DENSE",
    "GRAPHS",
    "PRESETS",
    "RANKINGS",
    "RECOVERIES",
    "AttentionGraph",
    "AttentionInputs",
    "BlockPlan",
    "ByHeadGraph",
    "DenseGraph",
    "LayerPlan",
    "LazyGraph",
    "Merge",
    "Merging",
    "Pruning",
    "Ranking",
    "Restore",
    "Schedule",
    "Site",
    "StreamedGraph",
    "TokenPlan",
    "TokenSet",
    "gwpr",
    "kept_count",
    "match_tokens",
    "parse_preset",
    "prune",
    "rank",
    "recover",
    "scores",
    "similarity_copy",
    "top_k",
]
