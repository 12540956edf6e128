"""Lesson 3: Algorithm 1, equation (1), and a map on which iterating matters."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import atedm
from checks.verdict import Checker, Wrong, compare, run


def random_map(rows: int, columns: int, seed: int) -> Tensor:
    """A row-stochastic map (rows, columns) in float64."""
    logits = 2 * torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return logits.softmax(dim=-1)


def iteration(answer: Any) -> str | None:
    """``answer(A, s)`` is s after one iteration on a self-attention map. The scores that come in need not sum to 1."""
    attention, s = random_map(7, 7, seed=0), torch.linspace(1, 3, 7, dtype=torch.float64)
    votes = attention.T @ s
    mistakes = {
        "A s lets keys vote for queries. Query i gives A[i, j] to key j, so it is A^T s.": attention @ s,
        "A s lets keys vote for queries; it is A^T s.": (attention @ s) / (attention @ s).sum(),
        "the scores do not sum to 1: divide by |s|, the sum.": votes,
        "|s| is the sum of the scores here, not their Euclidean length.": votes / votes.norm(),
        "these are the votes if all voters count the same. Weigh them by s.": attention.sum(dim=0) / 7,
    }
    return compare(run(answer, attention, s), votes / votes.sum(), mistakes)


def equation_1(answer: Any) -> str | None:
    """``answer(A, s_K)`` is f(A, s_K) for a map of 7 picture tokens to 5 words."""
    attention, s = random_map(7, 5, seed=1), torch.linspace(1, 3, 5, dtype=torch.float64)
    weighted, entropy = attention @ s, -(attention * attention.log()).sum(dim=1)
    mistakes = {
        "the entropy is missing below the line.": weighted,
        "entropy is minus the sum: yours is negative.": -weighted / entropy,
        "you multiply by the entropy. A token that has made up its mind should gain.": weighted * entropy,
        "the logarithm is the natural one, ln.": weighted / (entropy / torch.log(torch.tensor(2.0, dtype=s.dtype))),
        "that has the entropy alone: the scores of the keys are missing above the line.": 1 / entropy,
        "this normalizes as well. Equation (1) does not; Algorithm 1 does so after it.": (weighted / entropy)
        / (weighted / entropy).sum(),
    }
    return compare(run(answer, attention, s), weighted / entropy, mistakes)


def two_winners(answer: Any) -> str | None:
    """A map (4, 4) in which token 0 receives most, and token 1 has the highest score of G-WPR."""
    try:
        attention = torch.as_tensor(answer, dtype=torch.float64)
    except (TypeError, ValueError, RuntimeError):
        raise Wrong("expected 4 rows of 4 numbers.") from None
    if attention.shape != (4, 4):
        return f"the shape is {tuple(attention.shape)}, expected (4, 4)."
    if (attention < 0).any() or ((attention.sum(dim=1) - 1).abs() > 1e-6).any():
        return (
            f"each row shares out attention: 0 or more, and 1 in all. Your rows sum to {attention.sum(dim=1).tolist()}."
        )
    received = attention.sum(dim=0)
    ranking = atedm.rank(attention[None, None], max_iterations=10_000)
    scores = ranking.scores[0]
    if not ranking.converged.all():
        return "the scores do not settle: tokens pass them on in a circle. Let some attention stay where it is."
    if received[0] <= received[1:].max():
        return f"token 0 does not receive most: the columns sum to {[round(v, 3) for v in received.tolist()]}."
    if scores[1] <= scores[[0, 2, 3]].max():
        return f"token 1 does not win: the scores are {[round(v, 3) for v in scores.tolist()]}."
    return None


CHECKERS: dict[str, Checker] = {"3.1": iteration, "3.2": equation_1, "3.3": two_winners}
