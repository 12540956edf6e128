"""Recoveries that fill pruned positions with zeros, interpolated values, old values, or old values plus a change.

Source: the AT-EDM paper, section 4.4, "Similarity-based Copy", and figure 9. :func:`add_change` is not in the paper.
Arguments of all four: ``tokens`` is the set before pruning, ``kept`` (B, k) are the indices of the tokens that stay.
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
    """The restore that writes the kept tokens over a background.

    ``kept`` (B, k) are their indices in the set before pruning; ``grid`` and ``positions`` are those of that set.
    ``background`` computes values (B, n, C) for all of its n tokens from the values (B, k, C) of the kept ones. Where
    it reads m kept tokens for each, ``sources`` (B, n, m) are their indices into ``kept``.
    """

    kept: Tensor
    grid: tuple[int, int]
    positions: Tensor | None
    background: Callable[[Tensor], Tensor]
    sources: Tensor | None = None

    def __call__(self, tokens: TokenSet) -> TokenSet:
        """See :class:`~atedm.recovery.Restore`."""
        check_kept(tokens, (self.kept.shape[0], self.kept.shape[1]), self.grid)
        return TokenSet(put_tokens(tokens.values, self.kept, self.background(tokens.values)), self.grid, self.positions)


def zero_padding(tokens: TokenSet, kept: Tensor) -> Fill:
    """Pruned tokens become zero."""
    count = tokens.count

    def zeros(values: Tensor) -> Tensor:
        return values.new_zeros(values.shape[0], count, values.shape[2])

    return Fill(kept, tokens.grid, tokens.positions, zeros)


def direct_copy(tokens: TokenSet, kept: Tensor) -> Fill:
    """Pruned tokens take the value that they had when they were pruned.

    NOTE: the paper copies "values before the first pruning layer". Where pruning is repeated, those are older.
    """
    before = tokens.values
    return Fill(kept, tokens.grid, tokens.positions, lambda _: before)


def add_change(tokens: TokenSet, kept: Tensor, sources: Tensor) -> Fill:
    """A pruned token keeps the value that it had when pruned, and adds the mean change of m kept tokens since then.

    ``sources`` (B, n, m) are indices into ``kept``. A residual stream is a sum of changes. The change of similar tokens
    replaces the one that the pruned token missed; what the token was before stays.
    """
    before, kept_before = tokens.values, take_tokens(tokens.values, kept)

    def changed(now: Tensor) -> Tensor:
        changes = (now - kept_before) / sources.shape[-1]
        return sum((take_tokens(changes, source) for source in sources.unbind(-1)), start=before)

    return Fill(kept, tokens.grid, tokens.positions, changed, sources)


def bicubic_interpolation(tokens: TokenSet, kept: Tensor) -> Fill:
    """Pruned tokens are interpolated from the kept ones around them.

    NOTE: the paper does not say how. It reports values near zero among other pruned tokens. Here the grid, with zeros
    at pruned positions, is resampled to half its sides (rounded up) and back, bicubic and without antialiasing. Pruned
    tokens take their values from the result.
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
    """Raises ``ValueError`` unless ``tokens`` have the (B, k) and the grid of what pruning kept."""
    if tuple(tokens.values.shape[:2]) != kept or tokens.grid != grid:
        raise ValueError(
            f"cannot restore {tuple(tokens.values.shape[:2])} tokens (B, n) of grid {tokens.grid}: "
            f"pruning kept {kept} of grid {grid}"
        )
