"""SiTo (similarity-based token pruning): self-attention runs without the tokens that are most similar to others.

Source: Zhang, Tang, Ning and Zhang, AAAI 2025, "Training-Free and Hardware-Friendly Acceleration for Diffusion Models
via Similarity-based Token Pruning", and their code. A token's SimScore is the sum of its cosine similarities to all
tokens. The token of each window with the best noisy SimScore is a base. Of the others, those most similar to a base are
pruned; each takes the output of the most similar token that stayed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor

from atedm.cosine import nearest
from atedm.coverage import WINDOW, cover
from atedm.ranking import top_k
from atedm.recovery import nearest_kept
from atedm.reduction import Merge, Reduction, check_dense, check_number
from atedm.tokens import TokenSet, at_least_float32, take_tokens

SEEDS = 2**32  # as many as a CPU's generator tells apart
TURNS = 4  # other noise at each of so many steps, then again: few plans differ, so that few graphs are compiled


@dataclass(frozen=True, eq=False)
class Without(Merge):
    """Leaves all but the tokens ``kept`` (B, k) out; afterwards token i takes the value of kept token source[:, i]."""

    kept: Tensor
    source: Tensor

    def merge(self, values: Tensor) -> Tensor:
        """See :class:`Merge`."""
        return take_tokens(values, self.kept)

    def unmerge(self, values: Tensor) -> Tensor:
        """See :class:`Merge`."""
        return take_tokens(values, self.source)


@dataclass(frozen=True)
class SiTo(Reduction):
    """Pruning around self-attention alone, as in their code: they advise against the other sub-layers (table 2)."""

    alpha: float = 0.1  # of the noise
    beta: float = 1.0  # of the SimScore
    seed: int = 0  # of the noise, which is the same on every device and for every row of a batch

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("alpha", self.alpha)
        check_number("beta", self.beta)
        if not 0 <= self.seed < SEEDS:
            raise ValueError(f"seed is {self.seed}, expected 0 to {SEEDS - 1}")

    @property
    def most(self) -> float:
        """All but the bases."""
        return 1 - 1 / WINDOW**2

    def match(self, tokens: TokenSet) -> tuple[Merge, Merge, Merge]:
        """See :class:`Reduction`."""
        check_dense(tokens)
        count = self.kept(tokens.grid)
        if count == tokens.count:
            return Merge(), Merge(), Merge()
        score = self.beta * sim_score(tokens.values)
        score = score + self.alpha * noise(tokens.count, self.seed, tokens.values.device).to(score.dtype)
        base = top_k(cover(score, tokens), bases(tokens.grid))
        like, _ = nearest(tokens.values, take_tokens(tokens.values, base))
        kept = top_k((-like[..., 0]).scatter(1, base, 2.0), count)  # bases stay, then the least similar
        return Without(kept, nearest_kept(tokens, kept, 1)[..., 0]), Merge(), Merge()

    def kept(self, grid: tuple[int, int]) -> int:
        """How many tokens of a ``grid`` stay: all but int(N r), and the bases in any case."""
        n = math.prod(grid)
        return max(n - int(n * self.ratio), bases(grid))

    def counts(self, grid: tuple[int, int]) -> tuple[int, int, int, int]:
        """See :class:`Reduction`."""
        n, kept = math.prod(grid), self.kept(grid)
        return kept, kept, n, n

    def flops(self, grid: tuple[int, int], channels: int) -> int:
        """Of the SimScores, and of similarities: of all tokens to the bases, and of pruned tokens to those that stay.

        NOTE: their code computes the whole cosine graph, N x N. Its row sums are the product of each direction with the
        sum of all, and of the rest only these similarities are needed.
        """
        n, kept = math.prod(grid), self.kept(grid)
        return 2 * channels * (n + n * bases(grid) + (n - kept) * kept) if kept < n else 0

    def at(self, step: int, block: int) -> Self:
        """With a seed of its own for each block and, in turn, for ``TURNS`` steps; a block's layers share the noise."""
        return replace(self, seed=(self.seed + TURNS * block + step % TURNS) % SEEDS)


def bases(grid: tuple[int, int]) -> int:
    """How many windows a ``grid`` has.

    NOTE: windows that the last row or column of an odd grid cuts off have a base, too. In their code they have none.
    """
    height, width = grid
    return -(-height // WINDOW) * -(-width // WINDOW)


def sim_score(values: Tensor) -> Tensor:
    """The sums (B, n) of each token's cosine similarities to all of ``values`` (B, n, C), itself included."""
    directions = F.normalize(at_least_float32(values), dim=-1, eps=1e-12)
    return (directions @ directions.sum(dim=1).unsqueeze(-1)).squeeze(-1)


def noise(count: int, seed: int, device: torch.device) -> Tensor:
    """Standard normal noise (n,), drawn on the CPU."""
    return torch.randn(count, generator=torch.Generator("cpu").manual_seed(seed), device="cpu").to(device)


# A constant to the compiler, as the plan with its seed is. This is what torch.compiler.assume_constant_result does; to
# call that here would import the compiler with the package, which takes a second and 80 MB.
noise._dynamo_marked_constant = True  # type: ignore[attr-defined]
