"""The command ``python -m minisdxl.flops``: FLOPs of one U-Net call, dense and pruned, by the formulas of ``cost``."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from atedm.presets import parse_preset
from minisdxl.cli.options import Parser, add_pruning, add_steps, parse_size
from minisdxl.cli.presets import settle_fast, settle_preset
from minisdxl.config import MODELS, SDXL_BASE, SDXL_REFINER, ModelConfig, check_refiner
from minisdxl.cost import Kind, format_flops, summary
from minisdxl.sampler import sigmas
from minisdxl.settings import REFINER_START, Settings, check_settings, split_step
from minisdxl.steps.cost import picture_cost
from minisdxl.steps.plan import StepPlan, describe

BAR = 40  # characters of the longest bar


def report(calls: dict[str, Any], dense: dict[str, Any]) -> str:
    """A :func:`summary` as text: totals, then bars for each kind of work and each block, beside the dense model's."""
    heads = {"dense": "dense", "steady": "steady step", "pruneless": "prune-less step", "average": "average"}
    lines = [f"{head:<19}{format_flops(calls[k]):>7}{calls[k] / calls['dense']:>9.1%}" for k, head in heads.items()]
    lines += ["", "steady step, # spent, . saved by pruning:"]
    for column in "kind", "name":
        spent, full = _sums(calls, column), _sums(dense, column)
        for label in full:
            hashes, width = (round(BAR * sums[label] / max(full.values())) for sums in (spent, full))
            share = f"{format_flops(spent[label]):>7}{spent[label] / calls['steady']:>9.1%}"
            lines.append(f"{label:<19}{share}  {('#' * hashes).ljust(width, '.')}".rstrip())
        lines.append("")
    ranking = sum(work["flops"] for work in calls["blocks"] if work["kind"] == Kind.RANKING)
    return "\n".join([*lines, f"not included: {Kind.RANKING}, at most {format_flops(ranking)}"])


def _sums(calls: dict[str, Any], column: str) -> Counter[str]:
    """FLOPs by ``name`` or ``kind``, without ranking and recovery."""
    sums: Counter[str] = Counter()
    for work in calls["blocks"]:
        if work["kind"] != Kind.RANKING:
            sums[work[column]] += work["flops"]
    return sums


def picture(
    options: argparse.Namespace, config: ModelConfig, prune: str | None, height: int, width: int
) -> tuple[dict[str, Any], str]:
    """What the U-Net costs for a whole picture, ready for JSON and as text.

    Raises ``ValueError`` as :func:`check_settings`.
    """
    asked = Settings(sampling=options.sampling, steps=options.steps, cfg=options.cfg, prune=prune)
    run = check_settings(replace(asked, skip=options.skip, guide=options.guide), config)
    plans = run.planner.base if run.planner else [StepPlan(plan) for plan in run.plans]
    text, calls = config.text[0].context_length, run.sampling.calls(run.steps)
    spent, dense = (
        picture_cost(config, height, width, each, text, run.cfg, calls) for each in (plans, [StepPlan()] * run.steps)
    )
    lines = [
        f"one picture: {format_flops(spent.flops)}, {spent.flops / dense.flops:.1%} of dense; "
        f"{run.steps} steps of {run.sampling.name}, CFG {run.cfg:g}"
    ]
    if run.planner:
        lines += [
            f"  {spent.whole} steps whole, {spent.shallow} shallow, {spent.forecast} forecast; "
            f"{spent.single} with one branch of guidance",
            *(f"  {letters}" for letters in describe(plans).split()),
        ]
        if run.planner.adaptive:
            lines.append(f"  at most: {options.skip} decides at each step")
    return {**spent._asdict(), "dense_flops": dense.flops, "plan": describe(plans)}, "\n".join(lines)


def find_config(model: str) -> ModelConfig:
    """The config with the name ``model``, or the one stored in the file or folder ``model``. Raises ``ValueError``."""
    if model in MODELS:
        return MODELS[model]
    if not model.endswith(".safetensors") and not Path(model).is_dir():
        raise ValueError(
            f"unknown model {model!r}, expected {', '.join(MODELS)}, or the path of a .safetensors file or of a folder"
        )
    from minisdxl.checkpoint.modules import read_config  # imports the whole model, which nothing else here needs

    return read_config(model)


class Counted(NamedTuple):
    """One model that takes part in a picture: its steps, and a :func:`summary` as asked for and dense."""

    config: ModelConfig
    steps: range
    calls: dict[str, Any]
    dense: dict[str, Any]


def _stages(config: ModelConfig, options: argparse.Namespace) -> list[tuple[ModelConfig, range]]:
    """The models that take part and the steps of each, in the official spacing. Raises ``ValueError``."""
    if options.refiner is None:
        if options.refiner_start is not None:
            raise ValueError(f"--refiner-start is {options.refiner_start} without --refiner, expected both")
        return [(config, range(options.steps))]
    refiner = find_config(options.refiner)
    check_refiner(options.refiner, refiner, config)
    if options.skip is not None or options.guide is not None:
        raise ValueError("--refiner with --skip or --guide, expected one of them")
    split = split_step(options.refiner_start, sigmas(options.steps, config.noise), config.noise)
    return [(config, range(split)), (refiner, range(split, options.steps))]


def _of_both(base: Counted, refiner: Counted) -> tuple[dict[str, Any], str]:
    """The average call of a picture that two models make, ready for JSON and as text."""
    steps = refiner.steps.stop
    average, dense = (
        round(sum(each.calls[key] * len(each.steps) for each in (base, refiner)) / steps)
        for key in ("average", "dense")
    )
    text = (
        f"average of all {steps} steps  {format_flops(average)}, {average / dense:.1%} of dense ({format_flops(dense)})"
    )
    lengths = [len(base.steps), len(refiner.steps)]
    return {"average": average, "dense": dense, "base": base.calls, "refiner": refiner.calls, "steps": lengths}, text


def _parser() -> Parser:
    parser = Parser(
        prog="python -m minisdxl.flops",
        usage="%(prog)s [options]",
        description="Counts the FLOPs of one U-Net call and of a whole picture, dense and pruned.",
    )
    add = parser.add_argument
    add("--model", default=SDXL_BASE.name, help=f"{', '.join(MODELS)}, or a path (default: %(default)s)")
    add("--size", type=parse_size, metavar="WxH", help="in pixels (default: the model's own)")
    add("--steps", type=int, default=50, help="denoising steps (default: %(default)s)")
    add("--cfg", type=float, help="classifier-free guidance scale; 1 is none (default: the model's own)")
    add("--sampling", metavar="NAME", help="its calls of the U-Net are counted (default: the model's best)")
    add_pruning(parser)
    add_steps(parser)
    add("--refiner", metavar="NAME|PATH", help=f"count the last steps for this refiner, such as {SDXL_REFINER.name}")
    add(
        "--refiner-start",
        type=float,
        metavar="SHARE",
        help=f"with --refiner: share of the noise schedule that the base model does (default: {REFINER_START})",
    )
    add("--json", action="store_true", help="print JSON")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command; exit code 0 on success, 2 with one line on bad input."""
    parser = _parser()
    options = parser.parse_args(arguments)
    with parser.one_line("nothing was printed"):
        config = find_config(options.model)
        size = config.picture_size(options.size)
        settle_fast(options, config)  # these two may end the program with a list of presets
        prune = settle_preset(config, options)
        schedule = parse_preset(prune) if prune is not None else None
        _, height, width = config.latent_shape(size)
        counted = [
            Counted(each, span, *(summary(each, height, width, plan, options.steps, span) for plan in (schedule, None)))
            for each, span in _stages(config, options)
        ]
        if len(counted) == 1:
            of_picture, about = picture(options, config, prune, height, width)
            result = {**counted[0].calls, "picture": of_picture}
        else:
            result, about = _of_both(*counted)
    predicts = ""
    if config.noise.prediction != "noise":
        from minisdxl.checkpoint.predictions import prediction_text  # as in find_config

        result["prediction"] = prediction_text(config.noise)
        predicts = f", predicts {result['prediction']}"
    texts = []
    for each in counted:
        first, last = each.steps[0], each.steps[-1]
        steps = f"steps {first} to {last} of {options.steps}" if len(counted) > 1 else f"{options.steps} steps"
        title = f"{each.config.name}{predicts}, {size[0]}x{size[1]} pixels, {steps}, {prune or 'dense'}"
        texts.append(f"FLOPs of one U-Net call: {title}\n\n{report(each.calls, each.dense)}")
    try:
        print(json.dumps(result, indent=1) if options.json else "\n\n".join([*texts, about]), flush=True)
    except BrokenPipeError:  # the reader, such as `head`, closed the pipe; Python would report that at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    main()
