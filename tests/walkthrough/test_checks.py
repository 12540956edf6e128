"""The checkers of docs/walkthrough: a solution is right, and of a typical wrong answer they say what is off."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from tests.walkthrough.lessons import LESSONS, exercises, load_module, solution

EXERCISES = [exercise for lesson in LESSONS for exercise in exercises(lesson)]


def cosines(values: Tensor) -> Tensor:
    return normalize(values, dim=1) @ normalize(values, dim=1).T


def around(values: Tensor, grid: tuple[int, int], wrap: bool = False) -> Tensor:
    """Mean squared differences from the neighbors on the grid, by shifts."""
    x = values.view(*grid, -1)
    inside = torch.ones(grid, dtype=values.dtype)
    total, count = torch.zeros_like(inside), torch.zeros_like(inside)
    for shift, axis in ((1, 0), (-1, 0), (1, 1), (-1, 1)):
        there = inside.clone()
        if not wrap:
            there.select(axis, 0 if shift == 1 else -1).zero_()  # what would come from the other side
        total += there * (x - x.roll(shift, axis)).square().mean(dim=-1)
        count += there
    return (total / count).flatten()


# Wrong answers, each with a part of what must be said about it.
WRONG: dict[str, list[tuple[Any, str]]] = {
    "1.1": [
        (lambda x, d, s, t: x + (s - t) * (x - d) / s, "wrong sign"),
        (lambda x, d, s, t: x + (t - s) * (x - d), "left out the division"),
        (lambda x, d, s, t: d, "denoised latent itself"),
        (lambda x, d, s, t: x.sum(), "the shape is"),
        (lambda x, d, s, t: 1 / 0, "ZeroDivisionError"),
        (lambda x, d, s, t: x, "the numbers differ"),
        (3, "expected a function"),
    ],
    "1.2": [
        (lambda u, c, scale: c + scale * (u - c), "changed places"),
        (lambda u, c, scale: c + scale * (c - u), "scale + 1"),
    ],
    "1.3": [
        (64, "counts positions"),
        (6, "both sides"),
        (1 / 48, "other way round"),
        (47, "47 times"),
        ("a", "number"),
    ],
    "2.1": [
        ("output_blocks.5.1", "is up.1.2"),
        ("output_blocks.4", "numbered block"),
        ("output_blocks.4.0", "ResBlock, not attention"),
        ("up.1.1", "there is no up.1.1"),
        (4, "name in quotes"),
    ],
    "2.2": [(11, "attention blocks"), (60, "left out the middle"), (34, "left out the way up"), (69, "not 69")],
    "2.3": [
        (lambda level, w, h: (w >> level) * (h >> level), "8 times shorter"),
        (lambda level, w, h: (w // 8) * (h // 8), "positions at level 0"),
        (lambda level, w, h: (w // 8) * (h // 8) / 2**level, "quarter"),
        (lambda level, w, h: (w // 8 >> level) * (h // 8 >> level), "rounded up"),
        (lambda level, w, h: 5, "expected 64 x 64"),
    ],
    "3.1": [
        (lambda A, s: A @ s, "A^T s"),
        (lambda A, s: A.T @ s, "do not sum to 1"),
        (lambda A, s: A.T @ s / (A.T @ s).norm(), "Euclidean"),
        (lambda A, s: A.sum(dim=0) / A.sum(), "voters count the same"),
    ],
    "3.2": [
        (lambda A, s: A @ s, "entropy is missing"),
        (lambda A, s: (A @ s) / (A * A.log()).sum(dim=1), "negative"),
        (lambda A, s: (A @ s) / -(A * A.log2()).sum(dim=1), "natural"),
        (lambda A, s: (A @ s) * -(A * A.log()).sum(dim=1), "multiply"),
    ],
    "3.3": [
        (torch.eye(4)[[1, 0, 0, 0]], "do not settle"),
        (torch.full((4, 4), 0.25), "does not receive most"),
        (torch.tensor([[1.0, 0, 0, 0]]).expand(4, 4), "does not win"),
        (torch.ones(4, 4), "share"),
        (torch.ones(3, 3), "the shape is (3, 3)"),
        ("a map", "4 rows"),
    ],
    "4.1": [
        (lambda s, rho: s.topk(max(1, round(len(s) * rho))).indices.sort().values, "share that is pruned"),
        (lambda s, rho: s.topk(max(1, round(len(s) * (1 - rho)))).indices, "sort the indices"),
        (lambda s, rho: (-s).topk(max(1, round(len(s) * (1 - rho)))).indices.sort().values, "lowest scores"),
        (lambda s, rho: s.topk(round(len(s) * (1 - rho))).indices.sort().values, "one token at least"),
        (lambda s, rho: s > s.quantile(rho), "mask"),
        (lambda s, rho: s.topk(1).indices, "1 stay, expected"),
    ],
    "4.2": [
        (lambda A, kept, pruned: kept[A[pruned][:, kept].argmax(dim=1)], "where the pruned token looks"),
        (lambda A, kept, pruned: A[kept][:, pruned].argmax(dim=0), "count among the kept"),
        (lambda A, kept, pruned: A[:, pruned].argmax(dim=0), "pruned themselves"),
    ],
    "4.3": [
        (lambda v, kept, source: torch.zeros(6, 2, dtype=v.dtype).index_copy(0, kept, v), "should copy their source"),
        (lambda v, kept, source: torch.cat([v, 0 * v]), "stand in front"),
        (lambda v, kept, source: v[source], "IndexError"),
    ],
    "5.1": [
        (lambda steps, tau: tau, "of every 50 steps"),
        (lambda steps, tau: tau * steps / 50, "whole number"),
        (lambda steps, tau: round(tau * steps / 50), "to the even number"),
        (lambda steps, tau: tau * steps // 50, "rounds down"),
        (lambda steps, tau: 3, "you have 3, expected 15"),
    ],
    "5.2": [
        (lambda sites: {site.name for site in sites if site.index == 0}, "mid block"),
        (lambda sites: {site.name for site in sites if site.stage == "down" and site.index == 0}, "down-stages alone"),
        (lambda sites: {site.name for site in sites if site.stage == "up"}, "too many: up.1.0, up.1.1"),
        (lambda sites: {"down.1.0", "up.1.2"}, "each level"),
        (lambda sites: {"down.1.1", "down.2.1", "up.1.0", "up.2.0"}, "changed places"),
        (lambda sites: set(sites), "names of the blocks"),
        (lambda sites: "down.1.0", "set of names"),
        (
            lambda sites: (
                {{s.level: s.name for s in sites if s.stage == "up"}[level] for level in (1, 2)}
                | {{s.level: s.name for s in reversed(sites) if s.stage == "down"}[level] for level in (1, 2)}
            ),
            "order of the list",
        ),
    ],
    "5.3": [
        (lambda A: A.var(correction=0), "variance of A itself"),
        (lambda A: (len(A) * A).var(), "minus one"),
        (lambda A: (len(A) * A).std(correction=0), "standard deviation"),
        (lambda A: (len(A) * A).square().mean(), "the mean"),
    ],
    "6.1": [
        (lambda n, C: 4 * n * C * C + 2 * n * n * C, "multiply-accumulates"),
        (lambda n, C: 8 * n * C * C + 2 * n * n * C, "two products"),
        (lambda n, C: 8 * n * C * C, "products with the map are missing"),
        (lambda n, C: 4 * n * n * C, "projections are missing"),
        (lambda n, C: 6 * n * C * C + 4 * n * n * C, "four projections"),
        (lambda n, C: n, "you have 4,096"),
    ],
    "6.2": [
        (lambda a, b, early, steps: (a + b) / 2, "equally many"),
        (lambda a, b, early, steps: (early * b + (steps - early) * a) / steps, "changed places"),
        (lambda a, b, early, steps: early * a + (steps - early) * b, "Divide by the steps"),
        (lambda a, b, early, steps: a, "expected 4.339"),
    ],
    "6.3": [
        (0.63, "in later steps alone"),
        (0.5, "above 4.1 T."),
        (0.9, "smaller rho"),
        (63, "between 0 and 1"),
        (0.705, "hundredths"),
    ],
    "7.1": [
        (lambda v: normalize(v, dim=1) @ normalize(v, dim=1).T, "mean is still in"),
        (lambda v: (v - v.mean(dim=0)) @ (v - v.mean(dim=0)).T, "products, not cosines"),
        (lambda v: cosines(v - v.mean(dim=1, keepdim=True)), "over tokens"),
    ],
    "7.2": [
        (lambda v, kept: kept[(v @ v[kept].T).argmax(dim=1)], "long tokens win"),
        (lambda v, kept: (normalize(v, dim=1) @ normalize(v[kept], dim=1).T).argmax(dim=1), "count among the kept"),
        (lambda v, kept: cosines(v).fill_diagonal_(-2).argmax(dim=1), "pruned themselves"),
    ],
    "7.3": [
        (lambda row: torch.full_like(row, 1 / len(row)), "equal scores"),
        (lambda row: row * len(row), "sum to 1"),
        (lambda row: row.square(), "the numbers differ"),
    ],
    "8.1": [
        (lambda v, grid: around(v, grid, wrap=True), "wraps around"),
        (lambda v, grid: around(v, grid[::-1]), "changed places"),
        (lambda v, grid: around(v, grid) * 5, "over channels"),
        (lambda v, grid: around(v, grid) + 1, "the numbers differ"),
    ],
    "8.2": [
        (lambda a, b: "better" if sum(a) < sum(b) else "worse", "does the interval hold 0"),
        (lambda a, b: "undecided", "pair by pair"),
        (lambda a, b: "worse" if sum(a) < sum(b) else "better", "lower"),
        (lambda a, b: True, 'expected "better"'),
    ],
    "8.3": [
        (lambda step: 0.63, "does not prune less"),
        (lambda step: step / 50, "too much"),
        (lambda step: 0.3 if step < 15 else 0.9, "too little"),
        (lambda step: step, "below 1"),
    ],
}


@pytest.fixture(scope="module")
def checks() -> ModuleType:
    return load_module("checks")


@pytest.mark.parametrize("exercise", EXERCISES)
def test_the_solution_is_right(checks: ModuleType, exercise: str) -> None:
    verdict = checks.check(exercise, solution(exercise))
    assert verdict.right, verdict.message
    assert repr(verdict) == f"Exercise {exercise}: right."


@pytest.mark.parametrize(
    ("exercise", "answer", "said"),
    [pytest.param(key, *each, id=f"{key}-{each[1]}") for key, answers in WRONG.items() for each in answers],
)
def test_of_a_wrong_answer_the_checker_says_what_is_off(
    checks: ModuleType, exercise: str, answer: Any, said: str
) -> None:
    verdict = checks.check(exercise, answer)
    assert not verdict.right
    assert said in verdict.message, verdict.message


def test_every_exercise_has_wrong_answers() -> None:
    assert [exercise for exercise in EXERCISES if exercise not in WRONG] == []


@pytest.mark.parametrize("nothing", [None, ..., lambda *_: None, lambda *_: ...])
def test_an_open_exercise_is_no_error(checks: ModuleType, nothing: Any) -> None:
    for exercise in EXERCISES:
        verdict = checks.check(exercise, nothing)
        assert not verdict.right
        assert "yet" in verdict.message or "expected" in verdict.message, verdict.message


def test_an_exercise_that_there_is_not_is_refused(checks: ModuleType) -> None:
    with pytest.raises(ValueError, match=r"expected one of 1\.1, 1\.2, 1\.3"):
        checks.check("1.9", 1)
    with pytest.raises(ValueError, match="there is no lesson '9'"):
        checks.check("9.1", 1)
