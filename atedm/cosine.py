"""Cosine similarity of token values: the ranking ``dissimilarity``, and the nearest kept token of a pruned one.

No attention map is needed. Attention measures something else; ``python -m tools.single_step`` shows the difference.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from atedm.coverage import grid_order
from atedm.graph.streamed import PIECE_BYTES
from atedm.tokens import TokenSet, at_least_float32, take_tokens

ANCHORS = 4  # the others are compared with every 4th token


def nearest(values: Tensor, others: Tensor, count: int = 1) -> tuple[Tensor, Tensor]:
    """The ``count`` largest cosine similarities of each of ``values`` (B, n, C) to ``others`` (B, m, C).

    Returns similarities and indices into ``others``, both (B, n, min(count, m)), largest first; among equal ones the
    lowest index wins. A zero vector has similarity 0 to all. Computed in float32 at least, in pieces of the (n, m)
    similarities, to save memory.
    """
    directions, theirs = (F.normalize(at_least_float32(each), dim=-1, eps=1e-12) for each in (values, others))
    rows = max(1, PIECE_BYTES // (theirs[..., 0].numel() * theirs.element_size()))
    pieces = [_largest(piece @ theirs.mT, count) for piece in torch.split(directions, rows, dim=1)]
    best, index = (torch.cat(each, dim=1) for each in zip(*pieces, strict=True))
    return best, index


def _largest(weights: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """``topk`` along the last axis, with the lowest index first among equal values. Overwrites ``weights``."""
    found = []
    for _ in range(min(count, weights.shape[-1])):
        best, index = weights.max(dim=-1, keepdim=True)
        found.append((best, index))
        if count > 1:
            weights.scatter_(-1, index, -torch.inf)
    bests, indices = (torch.cat(each, dim=-1) for each in zip(*found, strict=True))
    return bests, indices


def dissimilarity(tokens: TokenSet) -> Tensor:
    """Scores (B, n) that are low for tokens similar to others, so that redundant tokens are pruned first.

    One token in ``ANCHORS`` is an anchor, on a regular grid (:func:`grid_order`). Anchors score highest. Any other
    token scores minus its largest cosine similarity to an anchor. The idea is ToMe's (Bolya and Hoffman 2023): on a
    grid of even sides the anchors are its destinations. There similar tokens are merged, here they are pruned.
    """
    order = grid_order(tokens)
    anchors = order.topk(max(1, tokens.count // ANCHORS), dim=-1).indices
    best, _ = nearest(tokens.values, take_tokens(tokens.values, anchors))
    places = 4 ** (max(tokens.grid) - 1).bit_length()
    first = 2 + order.gather(1, anchors) / (2 * places)  # from 1.5 to 2, above all others, in grid order
    return (-best[..., 0]).scatter(1, anchors, first.to(best.dtype))
