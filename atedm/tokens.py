"""Token sets: the tokens of a feature map, all of them or some, with the grid positions they hold.

Shapes in this package: B batch, C channels, H x W grid, N = H * W positions of the grid, n <= N tokens held.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from einops import rearrange
from torch import Tensor


@dataclass(frozen=True, eq=False)
class TokenSet:
    """Tokens of a feature map. A dense set holds every position of the grid, a sparse set holds some.

    ``values`` is (B, n, C) and ``grid`` is (H, W). ``positions`` (B, n) int64 are raster positions (row * W + column)
    in ascending order; ``None`` means all N of them. Raises ``ValueError`` for shapes that do not fit together.
    """

    values: Tensor
    grid: tuple[int, int]
    positions: Tensor | None = None

    def __post_init__(self) -> None:
        if self.values.ndim != 3:
            raise ValueError(f"token values have shape {tuple(self.values.shape)}, expected (B, n, C)")
        held = tuple(self.values.shape[:2])
        if self.positions is None and self.count != self.size:
            raise ValueError(f"{self.count} tokens without positions, expected {self.size} for grid {self.grid}")
        if self.positions is not None and tuple(self.positions.shape) != held:
            raise ValueError(f"positions have shape {tuple(self.positions.shape)}, expected {held} as the values")
        if self.count > self.size:
            raise ValueError(f"{self.count} tokens on grid {self.grid}, expected at most {self.size}")

    @classmethod
    def from_feature_map(cls, x: Tensor) -> TokenSet:
        """The dense token set of a feature map (B, C, H, W). It is a view, nothing is copied."""
        if x.ndim != 4:
            raise ValueError(f"feature map has shape {tuple(x.shape)}, expected (B, C, H, W)")
        return cls(rearrange(x, "b c h w -> b (h w) c"), grid=(x.shape[2], x.shape[3]))

    def to_feature_map(self) -> Tensor:
        """The feature map (B, C, H, W) of a dense token set. Raises ``ValueError`` for a sparse one."""
        if not self.is_dense:
            raise ValueError(
                f"token set holds {self.count} of {self.size} tokens of grid {self.grid}: "
                "the pruned ones must be recovered before it can be a feature map"
            )
        height, width = self.grid
        return rearrange(self.values, "b (h w) c -> b c h w", h=height, w=width)

    @property
    def count(self) -> int:
        """Number of tokens held, n."""
        return self.values.shape[1]

    @property
    def size(self) -> int:
        """Number of positions of the grid, N = H * W."""
        return self.grid[0] * self.grid[1]

    @property
    def is_dense(self) -> bool:
        """Whether every position of the grid is held."""
        return self.count == self.size

    def with_values(self, values: Tensor) -> TokenSet:
        """The same positions with other values (B, n, C'); C' may differ from C."""
        return replace(self, values=values)

    def keep(self, indices: Tensor) -> TokenSet:
        """The subset at ``indices`` (B, k), which are ascending and count among the n tokens held."""
        positions = indices if self.positions is None else self.positions.gather(1, indices)
        return TokenSet(take_tokens(self.values, indices), self.grid, positions)


def take_tokens(values: Tensor, indices: Tensor) -> Tensor:
    """Gathers (B, k, C) from ``values`` (B, n, C) at ``indices`` (B, k)."""
    return values.gather(1, indices.unsqueeze(-1).expand(-1, -1, values.shape[-1]))


def at_least_float32(x: Tensor) -> Tensor:
    """``x`` in float32, or as it is in float64. Attention maps are computed in this precision."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
