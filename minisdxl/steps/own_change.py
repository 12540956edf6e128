"""Recovery by a token's own history: a pruned token adds the change that the block made to it when it last stayed.

Rankings that let every token stay now and then, such as the moving grid, give each position a history. A block's change
of a token varies slowly from step to step, so the token's own last change, or the line through its last two, replaces
the change of its most similar neighbour now. A position that has not stayed yet takes its neighbour's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from atedm.recovery import Restore
from atedm.tokens import TokenSet, take_tokens

HISTORY = ("change", "earlier", "stayed", "stayed earlier", "clock")


@dataclass(frozen=True, eq=False)
class OwnChange:
    """The restore of one pruning. ``kept`` and ``new`` hold the history of all positions, under ``name``.

    ``before`` is the token set (B, n) before pruning, ``indices`` (B, k) are those of the tokens that stayed, and
    ``neighbours`` restores the others by their neighbours' change.
    """

    before: TokenSet
    indices: Tensor
    neighbours: Restore
    linear: bool
    name: str
    kept: Mapping[str, Tensor]
    new: dict[str, Tensor]

    def __call__(self, tokens: TokenSet) -> TokenSet:
        """See :class:`~atedm.recovery.Restore`."""
        restored, before = self.neighbours(tokens), self.before.values
        change, earlier, stayed, stayed_earlier, clock = self._history()
        clock = clock + 1
        found = change
        if self.linear:  # the line through the last two visits of each position
            slope = (change - earlier) / (stayed - stayed_earlier).clamp(min=1).unsqueeze(-1)
            twice = (stayed_earlier > 0).unsqueeze(-1)
            found = torch.where(twice, change + slope * (clock - stayed).unsqueeze(-1), change)
        values = torch.where((stayed > 0).unsqueeze(-1), before + found, restored.values)
        place = self.indices.unsqueeze(-1).expand(-1, -1, values.shape[-1])
        values = values.scatter(1, place, tokens.values)
        fresh = tokens.values - take_tokens(before, self.indices)
        now = clock.expand(-1, self.indices.shape[1])
        history = (
            change.scatter(1, place, fresh),
            earlier.scatter(1, place, take_tokens(change, self.indices)),
            stayed.scatter(1, self.indices, now),
            stayed_earlier.scatter(1, self.indices, stayed.gather(1, self.indices)),
            clock,
        )
        self.new.update({f"{key} {self.name}": value for key, value in zip(HISTORY, history, strict=True)})
        return restored.with_values(values)

    def has_history(self) -> Tensor:
        """Which positions (B, n) have stayed before, so that their own change is taken."""
        return self._history()[2] > 0

    def _history(self) -> list[Tensor]:
        """Last change (B, n, C) and the one before it, when each was (B, n), counted from 1, and the time (B, 1)."""
        if f"change {self.name}" in self.kept:
            return [self.kept[f"{key} {self.name}"] for key in HISTORY]
        values = self.before.values
        never = torch.zeros(values.shape[:2], device=values.device)
        return [torch.zeros_like(values), torch.zeros_like(values), never, never, never[:, :1]]
