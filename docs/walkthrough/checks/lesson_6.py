"""Lesson 6: FLOPs of self-attention, averages over steps, and the ratio that meets a budget."""

from __future__ import annotations

import math
from typing import Any

from atedm import parse_preset
from checks.verdict import Checker, number, run
from minisdxl.config import SDXL_BASE
from minisdxl.cost import Kind, count, summary

BUDGET = 4.1e12


def self_attention_flops(answer: Any) -> str | None:
    """``answer(n, C)``. Its products are compared with those that the program counts for a block of SDXL."""
    site = next(iter(SDXL_BASE.unet.attention_sites()))
    rows = 128 >> site.level
    counted = sum(
        work.flops
        for work in count(SDXL_BASE, 128, 128).works
        if (work.name, work.kind) == (site.name, Kind.SELF_ATTENTION)
    )
    for n, channels, products in ((rows**2, site.channels, counted // site.depth), (7, 3, 4 * 7 * 7 * 3)):
        projections = 4 * 2 * n * channels * channels
        right = projections + products
        found = number(run(answer, n, channels))
        said = f"for n = {n} and C = {channels}, "
        if found == right:
            continue
        if found == right / 2:
            return f"{said}you count multiply-accumulates. Each is 2 FLOPs."
        if found == projections + products / 2:
            return f"{said}there are two products with the map, Q K^T and A V."
        if found == projections:
            return f"{said}the two products with the map are missing."
        if found == products:
            return f"{said}the four projections are missing: q, k, v and out."
        if found == projections * 3 / 4 + products:
            return f"{said}there are four projections: q, k, v, and out."
        return f"{said}you have {found:,.0f}, expected {right:,}."
    return None


def average_flops(answer: Any) -> str | None:
    """``answer(early_flops, later_flops, early, steps)``, at several sizes."""
    for early_flops, later_flops, early, steps in ((4.99, 4.06, 15, 50), (5.0, 3.0, 2, 8), (5.0, 3.0, 0, 10)):
        right = (early * early_flops + (steps - early) * later_flops) / steps
        found = number(run(answer, early_flops, later_flops, early, steps))
        if math.isclose(found, right, rel_tol=1e-9):
            continue
        said = f"for {early} of {steps} steps at {early_flops}, the others at {later_flops}, you have {found:g}"
        if math.isclose(found, (early_flops + later_flops) / 2):
            return f"{said}: there are not equally many steps of both."
        if math.isclose(found, (early * later_flops + (steps - early) * early_flops) / steps):
            return f"{said}: early and later have changed places."
        if math.isclose(found, right * steps):
            return f"{said}: that is the sum. Divide by the steps."
        return f"{said}, expected {right:g}."
    return None


def ratio(answer: Any) -> str | None:
    """The smallest rho in hundredths whose average call is within ``BUDGET``."""
    found = number(answer)
    if not 0 < found < 1:
        return f"rho is {found:g}, expected a share between 0 and 1."
    if abs(found * 100 - round(found * 100)) > 1e-6:
        return f"rho is {found:g}, expected hundredths, such as 0.63."
    cost, less = (_call(round(found * 100) - step) for step in (0, 1))
    if cost["average"] > BUDGET:
        only_later = " That meets the budget in later steps alone." if cost["steady"] <= BUDGET else ""
        return f"at rho = {found:g} the average is {cost['average'] / 1e12:.3f} T, above 4.1 T.{only_later}"
    if less["average"] <= BUDGET:
        return f"a smaller rho is enough: at {found - 0.01:.2f} the average is {less['average'] / 1e12:.3f} T."
    return None


def _call(hundredths: int) -> dict[str, Any]:
    return summary(SDXL_BASE, 128, 128, parse_preset(f"at-edm:rho={hundredths / 100}"), 50)


CHECKERS: dict[str, Checker] = {"6.1": self_attention_flops, "6.2": average_flops, "6.3": ratio}
