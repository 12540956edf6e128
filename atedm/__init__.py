"""Token pruning and merging as ordinary layers, for any model whose transformer blocks attend over a grid.

AT-EDM, ToMe, ToDo, SiTo and ToMA.
"""

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
from atedm.merging import Merging, match_tokens
from atedm.plan import DENSE, BlockPlan, LayerPlan, Site, TokenPlan
from atedm.presets import PRESETS, parse_preset
from atedm.pruning import Pruning, prune
from atedm.ranking import RANKINGS, kept_count, scores, top_k
from atedm.recovery import RECOVERIES, Restore, recover, similarity_copy
from atedm.reduction import Merge, Reduction
from atedm.schedule import Schedule
from atedm.sito import SiTo
from atedm.todo import ToDo
from atedm.tokens import TokenSet
from atedm.toma import ToMA

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
    "Reduction",
    "Restore",
    "Schedule",
    "SiTo",
    "Site",
    "StreamedGraph",
    "ToDo",
    "ToMA",
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
