"""The preset that a command's options ask for, and the list of all presets with what they cost."""

from __future__ import annotations

import argparse
import sys

from atedm.presets import PRESETS, current_spelling, parse_preset
from minisdxl.budget import preset_within
from minisdxl.config import ModelConfig
from minisdxl.cost import summary


def settle_preset(config: ModelConfig, options: argparse.Namespace) -> str | None:
    """The preset's text that the options of :func:`minisdxl.cli.options.add_pruning` ask for, ``None`` for dense.

    Says what a budget came to, on stderr; prints the presets and ends the program where that is ``list``. Raises
    ``ValueError`` for options that contradict each other, and as :func:`preset_within`.
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
    """What is known of a preset on this model: that it is its best one, or what it does to pictures."""
    name = None if prune is None else prune.partition(":")[0]
    if name == config.defaults.prune != "at-edm":
        return f"--prune is {name}, the best preset on {config.name}"
    return dict(config.defaults.prune_notes).get(name or "")


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
