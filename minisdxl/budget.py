"""The ratio that meets a FLOPs budget, and the list of presets with what they cost."""

from __future__ import annotations

import re
from dataclasses import replace

from atedm.presets import PRESETS
from atedm.pruning import Pruning
from atedm.schedule import Schedule
from minisdxl.config import ModelConfig
from minisdxl.flops import format_flops, summary

UNITS = {"T": 1e12, "G": 1e9, "M": 1e6}
MEASURES = ("average", "steady")  # of all steps, or of the last one alone


def parse_budget(text: str, dense: float) -> float:
    """FLOPs of one U-Net call: ``4.1T``, or ``61%`` of the ``dense`` model. Raises ``ValueError`` for other texts."""
    match = re.fullmatch(r"([0-9]*\.?[0-9]+) ?([TGM%])", text)
    if match is None:
        raise ValueError(f"budget is {text!r}, expected FLOPs of one U-Net call, as 4.1T, or a share of dense, as 61%")
    return float(match[1]) * (dense / 100 if match[2] == "%" else UNITS[match[2]])


def with_budget(
    config: ModelConfig, height: int, width: int, schedule: Schedule, steps: int, budget: str, measure: str = "average"
) -> Schedule:
    """The schedule with the smallest ratio whose cost on a latent of ``height`` x ``width`` is within ``budget``.

    ``measure`` says which cost: the ``"average"`` of all ``steps``, prune-less ones included, or the ``"steady"`` last
    step, which is what the paper's budgets name. Raises ``ValueError``, with the range that can be reached, for a
    budget outside it, and for a ``measure`` that is neither.
    """
    if measure not in MEASURES:
        raise ValueError(f"budget measure is {measure!r}, expected one of {', '.join(MEASURES)}")

    def at(ratio: float) -> Schedule:
        return replace(schedule, method=replace(schedule.method, ratio=ratio))

    def cost(ratio: float) -> float:
        calls = summary(config, height, width, at(ratio), steps)
        return float(calls[measure])

    low, high = 0.0, 0.999 if isinstance(schedule.method, Pruning) else 0.75  # ToMe merges at most 3 of 4 tokens
    dearest, cheapest = cost(low), cost(high)
    target = parse_budget(budget, summary(config, height, width, None, steps)["dense"])
    if not cheapest <= target <= dearest:
        raise ValueError(
            f"budget {budget} is out of reach of {schedule.name}: its {measure} U-Net call costs "
            f"{format_flops(cheapest)} to {format_flops(dearest)}"
        )
    while high - low > 1e-5:  # the cost falls in steps of a token
        middle = (low + high) / 2
        low, high = (low, middle) if cost(middle) <= target else (middle, high)
    return at(round(high, 5) if cost(round(high, 5)) <= target else high)


def list_presets(config: ModelConfig, steps: int) -> str:
    """One line for each preset: its name, its cost at the model's own size as shares of dense, and what it is."""
    side = config.size // config.vae.downscale
    lines = [f"{'preset':<15} {'steady':>7} {'average':>8}   of the FLOPs of dense {config.name}, {steps} steps"]
    for name, preset in PRESETS.items():
        calls = summary(config, side, side, preset.schedule, steps)
        letters = f"; budgets {', '.join(f'{name}:{letter}' for letter, _ in preset.budgets)}" if preset.budgets else ""
        steady, average = (calls[measure] / calls["dense"] for measure in ("steady", "average"))
        lines.append(f"{name:<15} {steady:>7.1%} {average:>8.1%}   {preset.about}{letters}")
    return "\n".join(lines)
