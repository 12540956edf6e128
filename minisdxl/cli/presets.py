"""The preset from the options of a command, and the list of all presets with their cost."""

from __future__ import annotations

import argparse
import sys

from atedm.presets import PRESETS, current_spelling, parse_preset
from minisdxl.budget import preset_within
from minisdxl.config import ModelConfig
from minisdxl.cost import summary


def settle_preset(config: ModelConfig, options: argparse.Namespace) -> str | None:
    """The preset's text from the options of :func:`minisdxl.cli.options.add_pruning`, or ``None`` for dense.

    With a budget it prints the preset that was found to stderr. With ``list`` it prints all presets and ends the
    program. Raises ``ValueError`` for options that contradict each other, and as :func:`preset_within`.
    """
    if options.prune == "list":
        print(list_presets(config, options.steps))
        raise SystemExit(0)
    prune = config.defaults.prune if options.prune is True else options.prune
    if prune is not None:
        parse_preset(prune)
        prune = current_spelling(prune)
    if options.budget is None:
        return prune
    if prune is None:
        raise ValueError(f"--budget is {options.budget} without --prune, expected both: it sets a preset's ratio")
    found = preset_within(config, options.size, prune, options.steps, options.budget, options.budget_for)
    measure = {"average": f"average of {options.steps} steps", "steady": "steady step"}[options.budget_for]
    print(f"{found}: its {measure} is within {options.budget}", file=sys.stderr)
    return found


def preset_note(config: ModelConfig, prune: str | None) -> str | None:
    """A note on a preset for this model: that it is the best one, or that it breaks pictures; else ``None``."""
    name = None if prune is None else prune.partition(":")[0]
    if name == config.defaults.prune != "at-edm":
        return f"--prune is {name}, the best preset on {config.name}"
    return dict(config.defaults.prune_notes).get(name or "")


def list_presets(config: ModelConfig, steps: int) -> str:
    """One line for each preset: name, FLOPs at the model's own size as shares of dense, and a description."""
    side = config.size // config.vae.downscale
    lines = [f"{'preset':<15} {'steady':>7} {'average':>8}   of the FLOPs of dense {config.name}, {steps} steps"]
    for name, preset in PRESETS.items():
        calls = summary(config, side, side, preset.schedule, steps)
        letters = f"; budgets {', '.join(f'{name}:{letter}' for letter, _ in preset.budgets)}" if preset.budgets else ""
        steady, average = (calls[measure] / calls["dense"] for measure in ("steady", "average"))
        lines.append(f"{name:<15} {steady:>7.1%} {average:>8.1%}   {preset.about}{letters}")
    return "\n".join(lines)
