"""Attention graphs: the attention map as a weighted directed graph, held in memory or recomputed in pieces."""

from atedm.graph.by_head import ByHeadGraph
from atedm.graph.dense import DenseGraph
from atedm.graph.inputs import GRAPHS, AttentionInputs, LazyGraph, lazy_graphs
from atedm.graph.protocol import AttentionGraph
from atedm.graph.streamed import StreamedGraph

__all__ = [
    "GRAPHS",
    "AttentionGraph",
    "AttentionInputs",
    "ByHeadGraph",
    "DenseGraph",
    "LazyGraph",
    "StreamedGraph",
    "lazy_graphs",
]
