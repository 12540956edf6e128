"""The recoveries that put kept tokens among values of another kind: zeros, interpolated, old, or old and changed ones.

Source: the AT-EDM paper, section 4.4, "Similarity-based Copy", and figure 9. :func:`add_change` is not in the paper.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from atedm.tokens import TokenSet, at_least_float32, take_tokens


@dataclass(frozen=True, eq=False)
class Fill:
    """The restore that puts the kept tokens back among values of another kind.

    ``kept`` (B, k) are the indices that the tokens had in the set before, whose positions and grid the others are.
    ``background`` gives values (B, n, C) for all n tokens of the set before, from those of the kept ones (B, k, C).
    """

    kept: Tensor
    grid: tuple[int, int]
    positions: Tensor | None
    background: Callable[[Tensor], Tensor]

    def __call__(self, tokens: TokenSet) -> TokenSet:
        """The background with the kept tokens over it, see :class:`~atedm.recovery.Restore`."""
        check_kept(tokens, (self.kept.shape[0], self.kept.shape[1]), self.grid)
        return TokenSet(put_tokens(tokens.values, self.kept, self.background(tokens.values)), self.grid, self.positions)


def zero_padding(tokens: TokenSet, kept: Tensor) -> Fill:
    """Pruned tokens become zero. Arguments as in :func:`~atedm.recovery.recover`."""
    count = tokens.count

    def zeros(values: Tensor) -> Tensor:
        return values.new_zeros(values.shape[0], count, values.shape[2])

    return Fill(kept, tokens.grid, tokens.positions, zeros)


def direct_copy(tokens: TokenSet, kept: Tensor) -> Fill:
    """Pruned tokens take the value that they had when pruned. Arguments as in :func:`~atedm.recovery.recover`.

    NOTE: where pruning is repeated, the paper's "values before the first pruning layer" would be older ones.
    """
    before = tokens.values
    return Fill(kept, tokens.grid, tokens.positions, lambda _: before)


def add_change(tokens: TokenSet, kept: Tensor, sources: Tensor) -> Fill:
    """Pruned tokens keep the value that they had when pruned, and take on what has changed in kept tokens since.

    ``sources`` (B, n, m) names m kept tokens for each, as :class:`~atedm.recovery.Copy` names one; of their changes the
    mean counts. A residual stream is a sum of changes: this stands in for the ones that a pruned token missed, and does
    not touch what it was already.
    """
    before, kept_before = tokens.values, take_tokens(tokens.values, kept)

    def changed(now: Tensor) -> Tensor:
        changes = (now - kept_before) / sources.shape[-1]
        return sum((take_tokens(changes, source) for source in sources.unbind(-1)), start=before)

    return Fill(kept, tokens.grid, tokens.positions, changed)


def bicubic_interpolation(tokens: TokenSet, kept: Tensor) -> Fill:
    """Pruned tokens are interpolated from the kept ones around. Arguments as in :func:`~atedm.recovery.recover`.

    NOTE: the paper does not say how; it reports values near zero amid other pruned tokens. Here the grid, zero where
    no token is, is resampled to half its sides (rounded up) and back, bicubic both times, without antialiasing; from
    the result pruned tokens take their values.
    """
    before, (height, width) = tokens.positions, tokens.grid
    positions = kept if before is None else before.gather(1, kept)

    def resampled(values: Tensor) -> Tensor:
        x = put_tokens(values, positions, values.new_zeros(values.shape[0], height * width, values.shape[2]))
        x = at_least_float32(rearrange(x, "b (h w) c -> b c h w", h=height))
        x = F.interpolate(x, ((height + 1) // 2, (width + 1) // 2), mode="bicubic", align_corners=False)
        x = F.interpolate(x, (height, width), mode="bicubic", align_corners=False)
        x = rearrange(x, "b c h w -> b (h w) c").to(values.dtype)
        return x if before is None else take_tokens(x, before)

    return Fill(kept, tokens.grid, before, resampled)


def put_tokens(values: Tensor, indices: Tensor, background: Tensor) -> Tensor:
    """A copy of ``background`` (B, n, C) with ``values`` (B, k, C) at ``indices`` (B, k)."""
    return background.scatter(1, indices.unsqueeze(-1).expand_as(values), values)


def check_kept(tokens: TokenSet, kept: tuple[int, int], grid: tuple[int, int]) -> None:
    """Raise ``ValueError`` unless ``tokens`` are as many, in a batch as large, and of the grid, as pruning kept."""
    if tuple(tokens.values.shape[:2]) != kept or tokens.grid != grid:
        raise ValueError(
            f"cannot restore {tuple(tokens.values.shape[:2])} tokens (B, n) of grid {tokens.grid}: "
            f"pruning kept {kept} of grid {grid}"
        )
