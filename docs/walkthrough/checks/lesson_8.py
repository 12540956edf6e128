"""Lesson 8: a ranking by neighbors, a judge of paired differences, and a schedule within a budget."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from atedm import Pruning, parse_preset
from checks.verdict import Checker, Wrong, compare, number, run
from minisdxl.config import SDXL_BASE
from minisdxl.cost import count, summary


def neighbor_score(answer: Any) -> str | None:
    """``answer(values, grid)`` on a grid that is not square."""
    rows, columns = 3, 4
    values = torch.randn(rows * columns, 5, generator=torch.Generator().manual_seed(11), dtype=torch.float64)
    mistakes = {
        "the grid wraps around: a token at the border has no neighbor on the other side.": _scores(
            values, (rows, columns), wrap=True
        ),
        "rows and columns have changed places: token i is at row i // columns.": _scores(values, (columns, rows)),
        "a token at the border has fewer neighbors. Divide by how many there are, not by 4.": _scores(
            values, (rows, columns), always=4
        ),
        "this is a sum over channels: take the mean.": 5 * _scores(values, (rows, columns)),
        "this is a sum over neighbors: take the mean.": _scores(values, (rows, columns), always=1),
    }
    return compare(run(answer, values, (rows, columns)), _scores(values, (rows, columns)), mistakes)


def _scores(values: Tensor, grid: tuple[int, int], wrap: bool = False, always: int | None = None) -> Tensor:
    rows, columns = grid
    scores = []
    for place in range(rows * columns):
        row, column = divmod(place, columns)
        around = [(row - 1, column), (row + 1, column), (row, column - 1), (row, column + 1)]
        if wrap:
            around = [(r % rows, c % columns) for r, c in around]
        there = [r * columns + c for r, c in around if 0 <= r < rows and 0 <= c < columns]
        differences = [(values[place] - values[other]).square().mean() for other in there]
        scores.append(torch.stack(differences).sum() / (always or len(there)))
    return torch.stack(scores)


def judge(answer: Any) -> str | None:
    """``answer(ours, theirs)`` on errors whose verdict is beyond doubt."""
    rng = random.Random(12)
    hard = [rng.uniform(1, 100) for _ in range(40)]  # pictures differ far more than methods
    noise = [rng.gauss(0, 1) for _ in hard]
    ours = [each + 0.1 * gap for each, gap in zip(hard, noise, strict=True)]
    cases = (
        ("ours is lower by 1 on every one of 40 pictures, which differ much", [x - 1 for x in ours], hard, "better"),
        ("ours is higher by 1 on every one of 40 pictures", [x + 1 for x in ours], hard, "worse"),
        ("they differ by noise alone", [x - 3 * (i % 2) + 1.49 for i, x in enumerate(hard)], hard, "undecided"),
    )
    for said, a, b, right in cases:
        found = run(answer, list(a), list(b))
        if found not in ("better", "worse", "undecided"):
            raise Wrong(f'this is {found!r:.60}, expected "better", "worse" or "undecided".')
        if found == right:
            continue
        if found == "undecided":
            return f"{said}: that is {right}, but you say undecided. Take the differences pair by pair."
        if right == "undecided":
            return f"{said}, and you say {found}. A mean below the other is not enough: does the interval hold 0?"
        return f"{said}: that is {right}, but you say {found}. Errors are better if they are lower."
    return None


def rho_of(answer: Any) -> str | None:
    """``answer(step)`` for 50 steps of SDXL."""
    rhos = [number(run(answer, step)) for step in range(50)]
    if not all(0 <= rho < 1 for rho in rhos):
        return f"rho must be 0 or more and below 1; yours are from {min(rhos):.2f} to {max(rhos):.2f}."
    if not sum(rhos[:15]) / 15 < sum(rhos[15:]) / 35:
        return "this does not prune less in the first 15 steps than in the others."
    sites = list(SDXL_BASE.unet.attention_sites())
    budget = summary(SDXL_BASE, 128, 128, parse_preset("moving-grid"), 50)["average"]
    schedule = parse_preset("moving-grid:tau=0")
    assert isinstance(schedule.method, Pruning)
    plans = {rho: replace(schedule, method=replace(schedule.method, ratio=rho)).plan(0, 50, sites) for rho in rhos}
    costs = {rho: count(SDXL_BASE, 128, 128, plan) for rho, plan in plans.items()}
    average = sum(costs[rho].total for rho in rhos) / 50
    if not abs(average / budget - 1) <= 0.01:
        more = "too little" if average < budget else "too much"
        return f"the average is {average / 1e12:.3f} T, expected {budget / 1e12:.3f} T to 1 %: that is {more}."
    return None


CHECKERS: dict[str, Checker] = {"8.1": neighbor_score, "8.2": judge, "8.3": rho_of}
