"""Token sets, ranking, pruning and recovery: AT-EDM as ordinary layers, for any model that attends over a grid."""

from atedm.graph import AttentionGraph, AttentionInputs, HeldGraph
from atedm.pruning import prune
from atedm.ranking import Ranking, gwpr, kept_count, rank, top_k
from atedm.recovery import Restore, similarity_copy
from atedm.schedule import DENSE, PRESETS, BlockPlan, Schedule, Site, TokenPlan, parse_preset
from atedm.tokens import TokenSet

__all__ = [
    "DENSE",
    "PRESETS",
    "AttentionGraph",
    "AttentionInputs",
    "BlockPlan",
    "HeldGraph",
    "Ranking",
    "Restore",
    "Schedule",
    "Site",
    "TokenPlan",
    "TokenSet",
    "gwpr",
    "kept_count",
    "parse_preset",
    "prune",
    "rank",
    "similarity_copy",
    "top_k",
]
