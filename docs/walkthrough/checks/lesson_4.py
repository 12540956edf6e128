"""Lesson 4: the tokens that stay, the sources of the others, and the whole set again."""

from __future__ import annotations

from typing import Any

import torch

from checks.lesson_3 import random_map
from checks.verdict import Checker, Wrong, compare, run


def stay(answer: Any) -> str | None:
    """``answer(scores, rho)`` for several numbers of tokens; one of them at a half, which does not matter."""
    for count, rho in ((10, 0.63), (16, 0.3), (7, 0.0), (5, 0.99)):
        scores = torch.rand(count, generator=torch.Generator().manual_seed(count), dtype=torch.float64)
        number = max(1, round(count * (1 - rho)))
        order = scores.argsort(descending=True)
        right, said = order[:number].sort().values, f"of {count} tokens at rho = {rho}: "
        found = run(answer, scores, rho)
        try:
            given = torch.as_tensor(found)
        except (TypeError, ValueError, RuntimeError):
            raise Wrong(f"{said}this is {found!r:.60}, expected indices.") from None
        if given.dtype == torch.bool:
            return f"{said}this is a mask, expected indices."
        if given.numel() == 0:
            return f"{said}nothing stays, expected one token at least."
        if given.numel() == count - number != number:
            return f"{said}rho is the share that is pruned, not the share that stays."
        if given.numel() != number:
            return f"{said}{given.numel()} stay, expected round(N (1 - rho)) = {number}."
        if torch.equal(given, order[:number]) and not torch.equal(given, right):
            return f"{said}these are the right tokens, but in order of their scores; sort the indices."
        if torch.equal(given.sort().values, order.flip(0)[:number].sort().values) and number < count:
            return f"{said}you keep the lowest scores."
        off = compare(given, right)
        if off is not None:
            return said + off
    return None


def sources(answer: Any) -> str | None:
    """``answer(A, kept, pruned)`` is the argmax over kept queries of each pruned token's column."""
    attention = random_map(12, 12, seed=4)
    kept, pruned = torch.tensor([1, 2, 5, 8, 11]), torch.tensor([0, 3, 4, 6, 7, 9, 10])
    columns = attention[kept][:, pruned]
    mistakes = {
        "that is where the pruned token looks, A[b, i]. The paper takes who looks at it: column b, A[i, b].": kept[
            attention[pruned][:, kept].argmax(dim=1)
        ],
        "these count among the kept tokens. Take kept[...] to count among all.": columns.argmax(dim=0),
        "some of these tokens are pruned themselves: look among the kept ones alone.": attention[:, pruned].argmax(
            dim=0
        ),
        "that is the least attention, not the most.": kept[columns.argmin(dim=0)],
    }
    return compare(run(answer, attention, kept, pruned), kept[columns.argmax(dim=0)], mistakes)


def restored(answer: Any) -> str | None:
    """``answer(values, kept, source)`` is the whole set (N, C)."""
    kept, source = torch.tensor([1, 3, 4]), torch.tensor([3, 1, 1, 3, 4, 3])
    values = torch.randn(3, 2, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    places = torch.searchsorted(kept, source)
    zeros = torch.zeros(6, 2, dtype=torch.float64).index_copy(0, kept, values)
    return compare(
        run(answer, values, kept, source),
        values[places],
        {
            "the pruned tokens are zeros: they should copy their source.": zeros,
            "the kept tokens stand in front. Each belongs at its own position.": torch.cat([values, zeros[[0, 0, 0]]]),
        },
    )


CHECKERS: dict[str, Checker] = {"4.1": stay, "4.2": sources, "4.3": restored}
