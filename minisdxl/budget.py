"""The pruning ratio that meets a FLOPs budget."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import replace

from atedm.presets import parse_preset
from atedm.pruning import Pruning
from atedm.schedule import Schedule
from minisdxl.config import ModelConfig
from minisdxl.cost import format_flops, summary

UNITS = {"T": 1e12, "G": 1e9, "M": 1e6}
MEASURES = ("average", "steady")  # of all steps, or of the last one alone


def parse_budget(text: str, dense: float) -> float:
    """FLOPs of one U-Net call: ``4.1T``, or ``61%`` of the ``dense`` model. Raises ``ValueError`` for other texts."""
    match = re.fullmatch(r"([0-9]*\.?[0-9]+) ?([TGM%])", text)
    if match is None:
        raise ValueError(f"budget is {text!r}, expected FLOPs of one U-Net call, as 4.1T, or a share of dense, as 61%")
    number = float(match[1])
    return number * dense / 100 if match[2] == "%" else number * UNITS[match[2]]  # 100% is dense to the FLOP


def with_budget(
    config: ModelConfig, height: int, width: int, schedule: Schedule, steps: int, budget: str, measure: str = "average"
) -> Schedule:
    """The schedule with the smallest ratio whose cost on a latent of ``height`` x ``width`` is within ``budget``.

    ``measure`` is ``"average"``, the mean of all ``steps`` with the prune-less ones, or ``"steady"``, the last step,
    which the paper's budgets are for. Raises ``ValueError`` for another ``measure``, and for a budget out of reach; the
    message then gives the range that can be reached.
    """
    if measure not in MEASURES:
        raise ValueError(f"budget measure is {measure!r}, expected one of {', '.join(MEASURES)}")

    def at(ratio: float) -> Schedule:
        return replace(schedule, method=replace(schedule.method, ratio=ratio))

    def cost(ratio: float) -> float:
        calls = summary(config, height, width, at(ratio), steps)
        return float(calls[measure])

    most = 0.999 if isinstance(schedule.method, Pruning) else schedule.method.most
    low, high = 0.0, most
    dearest, cheapest = cost(low), cost(high)
    target = parse_budget(budget, summary(config, height, width, None, steps)["dense"])
    if not cheapest <= target <= dearest:
        raise ValueError(
            f"budget {budget} is out of reach of {schedule.name}: its {measure} U-Net call costs "
            f"{format_flops(_three_digits(cheapest, math.ceil))} to {format_flops(_three_digits(dearest, math.floor))}"
        )
    high = low if target == dearest else high
    while high - low > 1e-6:  # the cost changes by whole tokens, so bisection ends at a ratio and not at a cost
        middle = (low + high) / 2
        low, high = (low, middle) if cost(middle) <= target else (middle, high)
    return at(min(math.ceil(high * 1e5) / 1e5, most))


def _three_digits(n: float, rounded: Callable[[float], int]) -> float:
    """``n`` rounded up or down to three digits, so that a printed end of a range lies within it."""
    digit = 10.0 ** (math.floor(math.log10(n)) - 2)
    return rounded(n / digit) * digit


def preset_within(
    config: ModelConfig, size: tuple[int, int] | None, preset: str, steps: int, budget: str, measure: str = "average"
) -> str:
    """A preset's text with the ratio that :func:`with_budget` finds for pictures of ``size``, as at-edm:rho=0.7.

    Raises ``ValueError`` as :func:`with_budget`, and for a preset whose text already has a ratio or a budget.
    """
    width, height = config.picture_size(size)
    f = config.vae.downscale
    method = with_budget(config, height // f, width // f, parse_preset(preset), steps, budget, measure).method
    letter = "rho" if isinstance(method, Pruning) else "r"
    text = f"{preset}{',' if ':' in preset else ':'}{letter}={method.ratio:.5f}"
    parse_preset(text)
    return text
