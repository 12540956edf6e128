"""The preset from the options of a command, and the list of all presets with their cost."""

from __future__ import annotations

import argparse
import sys

from atedm.presets import PRESETS, current_spelling, parse_preset
from minisdxl.budget import preset_within
from minisdxl.config import ModelConfig
from minisdxl.cost import summary
from minisdxl.samplings import find_sampling
from minisdxl.settings import Settings, check_settings, first_step, token_plans
from minisdxl.steps.cost import picture_cost
from minisdxl.steps.methods import RunFacts
from minisdxl.steps.plan import StepPlan
from minisdxl.steps.presets import FAST, GUIDES, LETTERS, SKIPS, plan_run


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


def settle_fast(options: argparse.Namespace, config: ModelConfig) -> None:
    """Fills in ``--prune``, ``--skip`` and ``--guide`` from ``--fast``. With ``list`` it prints and ends the program.

    Raises ``ValueError`` for an unknown preset, and for one beside an option that it sets.
    """
    if "list" in (options.skip, options.guide, options.fast):
        print(list_steps(config))
        raise SystemExit(0)
    if options.fast is None:
        return
    if options.fast not in FAST:
        raise ValueError(f"unknown composed preset {options.fast!r}, expected one of {', '.join(FAST)}")
    for name in ("prune", "skip", "guide"):
        if getattr(options, name) is not None:
            raise ValueError(f"--fast {options.fast} sets --{name}, expected one of them")
        setattr(options, name, getattr(FAST[options.fast], name))


def check_plans(options: argparse.Namespace, config: ModelConfig) -> None:
    """Raises ``ValueError`` for ``--skip`` and ``--guide`` that do not fit the run, before the weights are read."""
    if options.skip is None and options.guide is None:
        return
    sampling = find_sampling(options.sampling)
    sigmas = tuple(sampling.sigmas(options.steps, config.noise).tolist())
    first = 0 if options.strength is None else first_step(options.steps, options.strength)
    facts = RunFacts(options.steps, first, sigmas, options.cfg, sampling.fresh_noise)
    tokens = token_plans(config, options.prune, options.steps)
    plan_run(config.unet, tokens[first:], facts, options.skip, options.guide)


def list_steps(config: ModelConfig) -> str:
    """One line for each method of ``--skip`` and ``--guide`` and each preset of ``--fast``."""
    side, steps, sampling = config.size // config.vae.downscale, 50, find_sampling("euler")

    def share(prune: str | None, skip: str | None, guide: str | None) -> str:
        run = check_settings(Settings(sampling=sampling, steps=steps, prune=prune, skip=skip, guide=guide), config)
        plans = run.planner.base if run.planner else [StepPlan(plan) for plan in run.plans]
        text = config.text[0].context_length
        counted, dense = (
            picture_cost(config, side, side, each, text, run.cfg, sampling.calls(steps)).flops
            for each in (plans, [StepPlan()] * steps)
        )
        return "adaptive" if run.planner and run.planner.adaptive else f"{counted / dense:.1%}"

    lines = [f"{'':<12} {'picture':>8}   of the FLOPs of dense {config.name}, {steps} steps of euler"]
    for option, methods in (("skip", SKIPS), ("guide", GUIDES)):
        for name, method in methods.items():
            cost = "" if name == "given" else share(None, *((name, None) if option == "skip" else (None, name)))
            lines.append(f"--{option} {name:<10} {cost:>8}   {_first_line(method)}")
    for name, preset in FAST.items():
        cost = share(preset.prune, preset.skip, preset.guide)
        lines.append(f"--fast {name:<10} {cost:>8}   {preset.about}")
    return "\n".join([*lines, f"letters of 'given': {LETTERS}"])


def _first_line(method: object) -> str:
    return (method.__doc__ or "").splitlines()[0].replace("``", "'")


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
