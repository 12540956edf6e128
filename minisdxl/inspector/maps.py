"""Attention of one transformer layer, reduced to what a page can hold.

Shapes: N tokens of the grid (H, W), heads h, T text tokens. Where tokens are merged, attention sees M < N of them; each
token then has the attention of its group, and a group is shown at the position of the token that stayed. Where only
keys and values are fewer (ToDo), no token attends to the others, and there is no G-WPR: it needs a square map.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from atedm.graph import AttentionGraph, AttentionInputs, DenseGraph
from atedm.gwpr import rank
from minisdxl.inspector.groups import Groups

TOP = 12  # of a token's row and column, so many largest weights are kept
ITERATIONS = 12  # of G-WPR that are kept at most
WORD_SIDE = 32  # cells per side of a map of a word at most; larger grids are averaged


@dataclass(frozen=True)
class Top:
    """The largest weights of each token: ``positions`` (N, k) of the tokens they are of, ``weights`` (N, k)."""

    positions: Tensor
    weights: Tensor


@dataclass(frozen=True)
class AttentionMaps:
    """Attention of the first layer of a block, averaged over heads.

    ``rows`` is what a token attends to, ``columns`` who attends to it. ``words`` (words, H', W') is the attention to
    each word, which is that to all its tokens together. ``scores`` (t, N) are those of G-WPR after so many
    ``iterations``, the last of them converged or at the limit; t is 0 if the map is not square.
    """

    rows: Top
    columns: Top
    words: Tensor
    iterations: list[int]
    scores: Tensor


def attention_maps(
    grid: tuple[int, int],
    self_attention: AttentionInputs,
    cross_attention: AttentionInputs,
    words: Sequence[Sequence[int]],
    groups: Groups | None,
    ranked_by_text: bool,
    sharpness: float = 1.0,
) -> AttentionMaps:
    """The maps of the last row of the batch. ``words`` are the text tokens of each word.

    With ``ranked_by_text``, G-WPR runs on cross-attention, as the ranking ``ca-wpr`` does, else on self-attention of
    this ``sharpness`` (:class:`~atedm.pruning.Pruning`). The maps are those of attention as it is.
    """
    ours, text = last_row(self_attention), last_row(cross_attention)
    count = grid[0] * grid[1]
    everywhere = torch.arange(count, device=ours.query.device)
    places = everywhere if groups is None else groups.places

    def spread(x: Tensor) -> Tensor:
        """From groups (M, ...) to tokens (N, ...), where attention saw groups; 0 for tokens that are in none."""
        if groups is None or x.shape[0] == count:
            return x
        if groups.members is None:
            return x.new_zeros(count, *x.shape[1:]).index_copy(0, places, x)
        return x[groups.members]

    attention = mean_map(ours)
    asking, read = (everywhere if size == count else places for size in attention.shape)
    rows, columns = (x.topk(min(TOP, x.shape[1]), dim=1) for x in (attention, attention.mT))
    if len(asking) == len(read):
        iterations, scores = iterated(text if ranked_by_text else ours.sharpened(sharpness), cross=ranked_by_text)
        scores = spread(scores.mT).mT
    else:
        iterations, scores = [], attention.new_zeros(0, count)
    return AttentionMaps(
        Top(spread(read[rows.indices]).cpu(), spread(rows.values).cpu()),
        Top(spread(asking[columns.indices]).cpu(), spread(columns.values).cpu()),
        word_maps(spread(mean_map(text)), grid, words).cpu(),
        iterations,
        scores.cpu(),
    )


def last_row(inputs: AttentionInputs) -> AttentionInputs:
    """The last picture of a batch."""
    sums = None if inputs.log_sum_exp is None else inputs.log_sum_exp[-1:]
    return AttentionInputs(inputs.query[-1:], inputs.key[-1:], inputs.scale, sums)


def mean_map(inputs: AttentionInputs) -> Tensor:
    """The attention map (M, N) of one picture, averaged over heads, which are held one at a time."""
    heads = inputs.query.shape[1]
    maps = (
        DenseGraph.from_qk(inputs.query[:, h, None], inputs.key[:, h, None], inputs.scale).map for h in range(heads)
    )
    total = sum(each[0, 0] for each in maps)
    assert isinstance(total, Tensor)
    return total / heads


def iterated(inputs: AttentionInputs, cross: bool) -> tuple[list[int], Tensor]:
    """Numbers of iterations of G-WPR, up to ``ITERATIONS`` of them, and the scores (t, M) after each (Algorithm 1).

    For one picture.
    """
    graph = WatchedGraph(inputs.graph("dense" if cross else "by-head"))
    ranking = rank(graph, cross=cross)
    heads = ranking.heads[0]  # (heads, M)
    last = int(ranking.iterations.max())
    numbers = sorted({round(1 + (last - 1) * i / (ITERATIONS - 1)) for i in range(ITERATIONS)})
    sizes = [asked[0].shape[:2].numel() for asked in graph.asked]
    scores = []
    for number in numbers:  # what the next iteration would start from; a head that has stopped keeps its scores
        parts = [
            asked[number].flatten(0, 1) if number < len(asked) else end
            for asked, end in zip(graph.asked, torch.split(heads, sizes), strict=True)
        ]
        scores.append(torch.cat(parts).square().mean(dim=0).sqrt())
    return numbers, torch.stack(scores)


class WatchedGraph:
    """An attention graph that notes the scores s_Q of each question A^T s, which power iteration asks once a turn.

    ``asked`` has them for each part of the graph that is ranked by itself, (b, heads, M) each.
    """

    def __init__(self, graph: AttentionGraph, asked: list[list[Tensor]] | None = None) -> None:
        self.graph = graph
        self.asked: list[list[Tensor]] = [] if asked is None else asked

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """As :attr:`AttentionGraph.shape`."""
        return self.graph.shape

    def parts(self) -> Iterator[AttentionGraph]:
        """As :meth:`AttentionGraph.parts`."""
        return (WatchedGraph(part, self.asked) for part in self.graph.parts())

    def uniform(self) -> Tensor:
        """As :meth:`AttentionGraph.uniform`; power iteration starts here."""
        self.asked.append([])
        return self.graph.uniform()

    def rmatvec(self, s_q: Tensor) -> Tensor:
        """As :meth:`AttentionGraph.rmatvec`."""
        self.asked[-1].append(s_q)
        return self.graph.rmatvec(s_q)

    def matvec(self, s_k: Tensor) -> Tensor:
        """As :meth:`AttentionGraph.matvec`."""
        return self.graph.matvec(s_k)

    def entropy(self) -> Tensor:
        """As :meth:`AttentionGraph.entropy`."""
        return self.graph.entropy()

    def argmax_query(self, among: Tensor, targets: Tensor) -> Tensor:
        """As :meth:`AttentionGraph.argmax_query`."""
        return self.graph.argmax_query(among, targets)


def word_maps(attention: Tensor, grid: tuple[int, int], words: Sequence[Sequence[int]]) -> Tensor:
    """The map (words, H', W') of each word, from the attention (N, T) to text tokens."""
    if not words:
        return attention.new_zeros(0, *grid)
    maps = torch.stack([attention[:, list(tokens)].sum(dim=1).view(grid) for tokens in words])
    cell = -(-max(grid) // WORD_SIDE)
    return F.avg_pool2d(maps, cell, ceil_mode=True) if cell > 1 else maps
