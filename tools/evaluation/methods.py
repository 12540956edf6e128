"""What an evaluation compares, as texts: token presets, methods over steps, and the dense model in fewer steps.

A preset of ``--prune`` is its own text. Others name their parts: ``skip=zeus guide=alternate``, ``prune=tome
skip=zeus``, ``fast=NAME``; ``steps=17`` is a dense picture in 17 steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from atedm.presets import parse_preset
from minisdxl.config import ModelConfig
from minisdxl.samplings import Sampling
from minisdxl.settings import CheckedSettings, Settings, check_settings
from minisdxl.steps.cost import picture_cost
from minisdxl.steps.plan import StepPlan
from minisdxl.steps.presets import FAST, parse_guide, parse_skip
from tools.evaluation.rows import DENSE


class Method(NamedTuple):
    """The settings that a text stands for."""

    prune: str | None = None
    skip: str | None = None
    guide: str | None = None
    steps: int | None = None  # another number than that of the evaluation


def parse_method(text: str) -> Method:
    """The method of a text. Raises ``ValueError`` for parts that do not exist."""
    if text == DENSE:
        return Method()
    if not text.startswith(("prune=", "skip=", "guide=", "steps=", "fast=")):
        parse_preset(text)
        return Method(text)
    parts = dict(part.partition("=")[::2] for part in text.split())
    if parts.keys() == {"fast"}:
        if parts["fast"] not in FAST:
            raise ValueError(f"unknown composed preset {parts['fast']!r}, expected one of {', '.join(FAST)}")
        return Method(*FAST[parts["fast"]][1:])
    if unknown := parts.keys() - set(Method._fields):
        raise ValueError(f"{text!r} has {', '.join(sorted(unknown))}, expected prune, skip, guide, steps, or fast")
    steps = int(parts["steps"]) if "steps" in parts else None
    method = Method(parts.get("prune"), parts.get("skip"), parts.get("guide"), steps)
    for value, read in ((method.prune, parse_preset), (method.skip, parse_skip), (method.guide, parse_guide)):
        if value is not None:
            read(value)
    return method


def settings_of(method: Method, sampling: str | Sampling, steps: int, cfg: float, size: tuple[int, int]) -> Settings:
    """The settings of a picture by that method."""
    return Settings(
        sampling=sampling,
        steps=method.steps or steps,
        cfg=cfg,
        size=size,
        prune=method.prune,
        skip=method.skip,
        guide=method.guide,
    )


def picture_flops(config: ModelConfig, settings: Settings, realized: Sequence[StepPlan] | None = None) -> int:
    """FLOPs of a picture: of the plans that were carried out, or of those before the run."""
    run = check_settings(settings, config)
    width, height = (side // config.vae.downscale for side in run.size)
    text = config.text[0].context_length
    calls = run.sampling.calls(run.steps)
    return picture_cost(config, height, width, realized or _plans(run), text, run.cfg, calls).flops


def step_plans(config: ModelConfig, settings: Settings) -> Sequence[StepPlan]:
    """The plan of each step, before the run. Adaptive methods may carry out others."""
    return _plans(check_settings(settings, config))


def _plans(run: CheckedSettings) -> Sequence[StepPlan]:
    return run.planner.base if run.planner else [StepPlan(plan) for plan in run.plans]
