"""Lesson 7: similarity of tokens, recovery by it, and attention that says the same for all."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from atedm import rank
from checks.verdict import Checker, compare, run


def centered_cosine(answer: Any) -> str | None:
    """``answer(values)`` is (N, N)."""
    values = torch.randn(6, 4, generator=torch.Generator().manual_seed(8), dtype=torch.float64) + 2
    centered = values - values.mean(dim=0)
    right = F.cosine_similarity(centered[:, None], centered[None], dim=-1)
    across = values - values.mean(dim=1, keepdim=True)
    mistakes = {
        "the mean is still in: this is the cosine of the values as they are.": F.cosine_similarity(
            values[:, None], values[None], dim=-1
        ),
        "these are products, not cosines: divide by both lengths.": centered @ centered.T,
        "you take away the mean over channels. Take away the mean token, over tokens.": F.cosine_similarity(
            across[:, None], across[None], dim=-1
        ),
    }
    return compare(run(answer, values), right, mistakes)


def nearest_kept(answer: Any) -> str | None:
    """``answer(values, kept)`` is (N,): indices of kept tokens among all."""
    values = torch.randn(9, 3, generator=torch.Generator().manual_seed(10), dtype=torch.float64)
    values = values * torch.linspace(0.05, 9, 9, dtype=torch.float64)[:, None]  # lengths that mislead products
    kept = torch.tensor([2, 5, 8])
    directions = F.normalize(values, dim=1)
    cosines = directions @ directions[kept].T
    everyone = (directions @ directions.T).fill_diagonal_(-2).argmax(dim=1)
    mistakes = {
        "you compare products of values: long tokens win. A cosine divides by both lengths.": kept[
            (values @ values[kept].T).argmax(dim=1)
        ],
        "these count among the kept tokens. Take kept[...] to count among all.": cosines.argmax(dim=1),
        "some of these are pruned themselves: look among the kept ones alone.": everyone,
        "that is the least similar one.": kept[cosines.argmin(dim=1)],
    }
    return compare(run(answer, values, kept), kept[cosines.argmax(dim=1)], mistakes)


def scores_of_equal_rows(answer: Any) -> str | None:
    """``answer(row)`` is what G-WPR gives on a map whose rows are all ``row``."""
    row = torch.tensor([0.5, 0.1, 0.25, 0.15], dtype=torch.float64)
    ranking = rank(row.expand(1, 1, 4, 4))
    mistakes = {
        "equal rows do not make equal scores: all tokens vote alike, but not for all alike.": torch.full_like(
            row, 0.25
        ),
        "each token receives its weight from all N, but the scores sum to 1.": 4 * row,
    }
    return compare(run(answer, row), ranking.scores[0], mistakes)


CHECKERS: dict[str, Checker] = {"7.1": centered_cosine, "7.2": nearest_kept, "7.3": scores_of_equal_rows}
