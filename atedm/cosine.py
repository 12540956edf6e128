"""Cosine similarity of token values: the ranking ``dissimilarity``, and the nearest kept token of each pruned one.

This is not what attention measures; ``python -m tools.single_step`` shows the difference.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from atedm.coverage import grid_order
from atedm.graph.streamed import PIECE_BYTES
from atedm.tokens import TokenSet, at_least_float32, take_tokens

ANCHORS = 4  # one token in so many is what the others are compared with


def nearest(values: Tensor, others: Tensor, count: int = 1) -> tuple[Tensor, Tensor]:
    """The ``count`` largest cosine similarities of each of ``values`` (B, n, C) to ``others`` (B, m, C), and to which.

    Returns (B, n, count) both, the largest first, and fewer if m is. In float32 at least, and in pieces of the (n, m)
    similarities. A value of zeros has no direction: its similarity to all is zero. Of equals the first counts.
    """
    directions, theirs = (F.normalize(at_least_float32(each), dim=-1, eps=1e-12) for each in (values, others))
    rows = max(1, PIECE_BYTES // (theirs[..., 0].numel() * theirs.element_size()))
    pieces = [_largest(piece @ theirs.mT, count) for piece in torch.split(directions, rows, dim=1)]
    best, index = (torch.cat(each, dim=1) for each in zip(*pieces, strict=True))
    return best, index


def _largest(weights: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """As ``topk`` along the last axis, which does not say what it takes of equals. Changes ``weights``."""
    found = []
    for _ in range(min(count, weights.shape[-1])):
        best, index = weights.max(dim=-1, keepdim=True)
        found.append((best, index))
        if count > 1:
            weights.scatter_(-1, index, -torch.inf)
    bests, indices = (torch.cat(each, dim=-1) for each in zip(*found, strict=True))
    return bests, indices


def dissimilarity(tokens: TokenSet) -> Tensor:
    """Scores (B, n): how unlike the rest of the tokens each is, so that the redundant ones are pruned first.

    One token in ``ANCHORS``, those that :func:`grid_order` puts first, stand for all and score highest. Any other
    scores minus its largest cosine similarity to one of them. The idea is ToMe's (Bolya and Hoffman 2023), whose
    destinations these anchors are on a grid of even sides; there tokens are merged, here they are left out.
    """
    order = grid_order(tokens)
    anchors = order.topk(max(1, tokens.count // ANCHORS), dim=-1).indices
    best, _ = nearest(tokens.values, take_tokens(tokens.values, anchors))
    places = 4 ** (max(tokens.grid) - 1).bit_length()
    first = 2 + order.gather(1, anchors) / (2 * places)  # 1.5 to 2: above all others, in the order of the grid
    return (-best[..., 0]).scatter(1, anchors, first.to(best.dtype))
