"""What a transformer layer can do around its sub-layers: run them on fewer tokens, or let it attend to fewer.

ToMe is in ``merging``, ToDo, SiTo and ToMA are in files of their own. None of them needs an attention map.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Self

from torch import Tensor

from atedm.tokens import TokenSet


@dataclass(frozen=True, eq=False)
class Merge:
    """Merges the tokens before a sub-layer, and undoes it after. This one merges nothing."""

    def merge(self, values: Tensor) -> Tensor:
        """Values (B, n, C) of all tokens to those of the merged tokens, (B, m, C)."""
        return values

    def context(self, values: Tensor) -> Tensor:
        """Values (B, m, C) of the merged tokens to those that self-attention reads keys and values from, (B, k, C)."""
        return values

    def unmerge(self, values: Tensor) -> Tensor:
        """Values (B, m, C) of the merged tokens to those of all, (B, n, C)."""
        return values


@dataclass(frozen=True)
class Reduction(ABC):
    """How a transformer layer reduces its tokens around its sub-layers.

    Raises ``ValueError`` for a ratio outside 0 to ``most``, and subclasses for their own numbers out of range.
    """

    ratio: float  # r: the share of tokens, or of keys and values, that a sub-layer is spared

    def __post_init__(self) -> None:
        if not 0 <= self.ratio <= self.most:
            raise ValueError(f"{type(self).__name__}'s ratio r is {self.ratio}, expected 0 to {self.most:.4g}")

    @property
    def most(self) -> float:
        """The largest ratio."""
        return 0.999

    @abstractmethod
    def match(self, tokens: TokenSet) -> tuple[Merge, Merge, Merge]:
        """The merges around self-attention, cross-attention and feed-forward.

        ``tokens`` are what enters the layer, before any norm. Raises ``ValueError`` for sparse tokens.
        """

    @abstractmethod
    def counts(self, grid: tuple[int, int]) -> tuple[int, int, int, int]:
        """How many tokens of a ``grid`` ask in self-attention, are asked there, and enter the other two sub-layers."""

    @abstractmethod
    def flops(self, grid: tuple[int, int], channels: int) -> int:
        """Two for each multiply-accumulate of the matrix products of :meth:`match` and of its merges."""

    def at(self, step: int, block: int) -> Self:
        """The reduction in attention block number ``block`` at denoising step ``step``: by default the same in all."""
        return self


def check_dense(tokens: TokenSet) -> None:
    """Raises ``ValueError`` for sparse tokens."""
    if not tokens.is_dense:
        raise ValueError(f"cannot match {tokens.count} of {tokens.size} tokens of grid {tokens.grid}, expected all")


def check_number(name: str, value: float) -> None:
    """Raises ``ValueError`` unless ``value`` is finite and 0 or more."""
    if not 0 <= value < math.inf:
        raise ValueError(f"{name} is {value}, expected a finite number of 0 or more")
