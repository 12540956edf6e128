"""Lesson 5: early steps, the blocks that DSAP leaves unpruned, and the variance of a map."""

from __future__ import annotations

import random
from collections.abc import Iterable
from typing import Any

from checks.lesson_3 import random_map
from checks.verdict import Checker, Wrong, compare, number, run
from minisdxl.config import SDXL_BASE, SHAPES, AttentionSite


def early_steps(answer: Any) -> str | None:
    """``answer(steps, tau)`` is tau of every 50 steps, rounded with halves up."""
    for steps, tau in ((50, 15), (20, 15), (25, 15), (8, 15), (15, 15), (50, 0), (30, 22)):
        right = (2 * tau * steps + 50) // 100  # whole numbers, so that halves are exact
        found = number(run(answer, steps, tau))
        said = f"for {steps} steps and tau = {tau} you have {found:g}, expected {right}"
        if found == right:
            continue
        if found == tau != right:
            return f"{said}: tau counts of every 50 steps."
        if found == tau * steps / 50:
            return f"{said}: round to a whole number."
        if found == round(tau * steps / 50):
            return f"{said}: Python's round takes halves to the even number."
        if found == tau * steps // 50:
            return f"{said}: this rounds down."
        return f"{said}."
    return None


def unpruned(answer: Any) -> str | None:
    """``answer(sites)`` is the set of names, for SDXL and for the small model, also if the list is shuffled."""
    for config in (SDXL_BASE, SHAPES):
        sites = list(config.unet.attention_sites())
        stages = sorted({(site.stage, site.level) for site in sites if site.stage != "mid"})
        groups = [[site for site in sites if (site.stage, site.level) == stage] for stage in stages]
        downs = {_end(group, min).name for group in groups if group[0].stage == "down"}
        ups = {_end(group, max).name for group in groups if group[0].stage == "up"}
        off = _compare_names(run(answer, list(sites)), downs, ups, groups, config.name)
        if off is not None:
            return off
        shuffled = random.Random(0).sample(sites, len(sites))
        if _names(run(answer, shuffled)) != downs | ups:
            return "you rely on the order of the list. It is in running order here, but .index says it for certain."
    return None


def _end(group: Iterable[AttentionSite], which: Any) -> AttentionSite:
    end: AttentionSite = which(group, key=lambda site: site.index)
    return end


def _names(found: Any) -> set[str]:
    if isinstance(found, str) or not isinstance(found, Iterable):
        raise Wrong(f"this is {found!r:.60}, expected a set of names.")
    names = set(found)
    if not all(isinstance(name, str) for name in names):
        raise Wrong("expected the names of the blocks: site.name.")
    return names


def _compare_names(
    found: Any, downs: set[str], ups: set[str], groups: list[list[AttentionSite]], model: str
) -> str | None:
    names = _names(found)
    if names == downs | ups:
        return None
    if "mid" in names:
        return "the mid block is always pruned."
    if names == {_end(group, max if group[0].stage == "down" else min).name for group in groups}:
        return "first and last have changed places: it is the first of a down-stage and the last of an up-stage."
    if names in (downs, ups):
        return f"you have the {'down' if names == downs else 'up'}-stages alone."
    if len(names) == 2 and names < downs | ups:
        return "each level has stages of its own: take the first and the last for every level, not only once."
    extra, missing = sorted(names - downs - ups), sorted((downs | ups) - names)
    return f"for {model}, too many: {', '.join(extra) or 'none'}; missing: {', '.join(missing) or 'none'}."


def map_variance(answer: Any) -> str | None:
    """``answer(A)`` is the variance of N A[i, j] over all entries."""
    attention = random_map(6, 6, seed=7)
    scaled = 6 * attention
    mistakes = {
        "this is the variance of A itself. Times N it can be compared between blocks of different size.": attention.var(
            correction=0
        ),
        "you divide by N squared minus one; the formula divides by N squared (correction=0).": scaled.var(),
        "this is the standard deviation: the variance is its square.": scaled.std(correction=0),
        "you left out minus 1, the mean.": scaled.square().mean(),
    }
    return compare(run(answer, attention), scaled.var(correction=0), mistakes)


CHECKERS: dict[str, Checker] = {"5.1": early_steps, "5.2": unpruned, "5.3": map_variance}
