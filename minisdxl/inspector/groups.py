"""What a layer sees where it reduces its tokens around self-attention: M of a picture's N tokens, or M groups."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from atedm.merging import Matching
from atedm.reduction import Merge
from atedm.sito import Without
from atedm.todo import KeysAt
from atedm.toma import Assignment


@dataclass(frozen=True)
class Groups:
    """The M groups of a picture's N tokens: ``places`` (M,) are the positions at which they are shown.

    ``members`` (N,) says which of the M each token takes its result from; ``None`` where every token has its own, and
    only keys and values are those of M tokens (ToDo).
    """

    places: Tensor
    members: Tensor | None

    def sources(self) -> Tensor | None:
        """The position (N, 1) that each token takes its result from, or ``None`` if each has its own."""
        return None if self.members is None else self.places[self.members].unsqueeze(-1)


def groups_of(merge: Merge) -> Groups | None:
    """The groups of the last picture of a batch, or ``None`` if nothing is merged."""
    if isinstance(merge, Matching):
        order = merge.order[-1]
        return Groups(order[: len(order) - merge.target.shape[1]], merge.source[-1])
    if isinstance(merge, Without):
        return Groups(merge.kept[-1], merge.source[-1])
    if isinstance(merge, Assignment):
        return _assigned(merge)
    return Groups(merge.positions, None) if isinstance(merge, KeysAt) else None


def _assigned(merge: Assignment) -> Groups:
    """ToMA's: a token belongs to the destination that has the largest share of it."""
    height, width = merge.grid
    positions = torch.arange(height * width, device=merge.shares[0].device)
    places, members, before = [], torch.empty_like(positions), 0
    for region, shares, chosen in zip(merge.regions, merge.shares, merge.chosen, strict=True):
        tiles = region.split(positions.view(1, -1, 1), merge.grid)[0, :, :, 0]  # (T, s)
        places.append(tiles.gather(1, chosen[-1]).flatten())
        first = before + chosen.shape[-1] * torch.arange(len(tiles), device=tiles.device)
        members[tiles] = first.unsqueeze(-1) + shares[-1].argmax(dim=-2)
        before += chosen[-1].numel()
    return Groups(torch.cat(places), members)
