"""``SDXL.inspect``: draws a prompt dense, with a plan and with another plan, from the same noise, and records each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor

from atedm.merging import Merging
from atedm.plan import DENSE, TokenPlan
from atedm.presets import parse_preset
from atedm.pruning import Pruning
from atedm.schedule import Schedule
from minisdxl.config import ModelConfig
from minisdxl.cost import Kind, count
from minisdxl.images import check_finite, to_image
from minisdxl.inspector.page import Inspection, page
from minisdxl.inspector.recorder import Recorder, Step
from minisdxl.inspector.words import Word, find_words
from minisdxl.runtime.strips import decode_in_strips
from minisdxl.settings import CheckedSettings, Settings, check_settings

if TYPE_CHECKING:
    from minisdxl.pipeline import SDXL

Prune = str | bool | Schedule | None
Progress = Callable[[str, int], None]  # (name of the plan, step from 0)


@dataclass(frozen=True)
class Cost:
    """FLOPs of one step, both halves of guidance together; ranking and recovery are in none of the others."""

    total: int
    ranking: int
    blocks: dict[str, int]  # by attention block


@dataclass(frozen=True)
class RecordedRun:
    """A picture drawn with one plan: ``name`` is "dense" or the preset, ``pictures`` are those that steps head for."""

    name: str
    schedule: Schedule | None
    image: Image.Image
    steps: list[Step]
    pictures: list[Image.Image]
    costs: list[Cost]  # of each step


@dataclass(frozen=True)
class Recording:
    """All that a page shows."""

    prompt: str
    words: list[Word]
    config: ModelConfig
    settings: Settings
    run: CheckedSettings
    runs: list[RecordedRun]


def inspect_picture(
    sdxl: SDXL,
    prompt: str,
    settings: Settings | None = None,
    *,
    against: Prune = None,
    attention_steps: Sequence[int] | None = None,
    on_step: Progress | None = None,
    **changes: Any,
) -> Inspection:
    """Draws a prompt and returns a page that shows what happened inside.

    The picture is drawn dense, with ``prune`` where it is set, and with ``against``, all from the same noise. They are
    the pictures that :meth:`SDXL.generate` draws without the compiler: recording changes no number.

    Args:
        sdxl: the model.
        prompt: one prompt, in the syntax of :mod:`minisdxl.prompting.syntax`.
        settings: how to draw it; ``None`` for the model's own.
        against: a second plan, to compare with ``prune``.
        attention_steps: steps, from 1, of which attention is recorded. The default are the first one, the first after
            DSAP's early steps, and the last.
        on_step: called after each step with the plan's name and the step's number from 0.
        changes: single settings by name, such as ``steps=20, prune="at-edm"``.

    Raises:
        ValueError: for a setting out of range, for several images per prompt, for steps that are not run, and for
            ``against`` without ``prune``.
        ArithmeticError: if a part of the model overflows.
    """
    asked = replace(settings or Settings(), **changes)
    if not isinstance(prompt, str):
        raise ValueError(f"prompt is {prompt!r}, expected one string")
    if sdxl.refiner is not None:
        raise ValueError(f"{sdxl.config.name} has a refiner, expected none: the page shows the steps of one model")
    if asked.images_per_prompt != 1:
        raise ValueError(f"images_per_prompt is {asked.images_per_prompt}, expected 1: the page shows one picture")
    plans = [None, *(each for each in (asked.prune, against) if each not in (None, False))]
    if against not in (None, False) and len(plans) < 3:
        raise ValueError(f"against is {against!r} without prune, expected both: two plans are compared")
    checked = [check_settings(replace(asked, prune=plan), sdxl.config) for plan in plans]
    schedules = [find_schedule(plan, sdxl.config) for plan in plans]
    chosen = check_attention_steps(attention_steps, checked[0], schedules)
    words = find_words(prompt, sdxl.tokenizer, sdxl.text.embeddings)
    text_length = context_length(sdxl, prompt, asked, checked[0])
    runs = []
    for index, (plan, schedule, check) in enumerate(zip(plans, schedules, checked, strict=True)):
        name = plan_name(plan, schedule)
        watches = index > 0 or len(plans) == 1
        recorder = Recorder(sdxl.unet, check.first, chosen if watches else (), [word.tokens for word in words])
        drawn = replace(asked, prune=plan, sampling=check.sampling.with_denoiser(recorder.watch))
        tell = None if on_step is None else _telling(on_step, name)
        image = replace(sdxl, compiled=recorder).generate([prompt], drawn, on_step=tell)[0]
        pictures = [decoded(sdxl, step.denoised, asked.strip_rows) for step in recorder.steps]
        costs = step_costs(sdxl.config, check, text_length)
        runs.append(RecordedRun(name, schedule, image, recorder.steps, pictures, costs))
    return page(Recording(prompt, words, sdxl.config, asked, checked[0], runs))


def _telling(on_step: Progress, name: str) -> Callable[[int, Tensor], None]:
    return lambda step, _: on_step(name, step)


def find_schedule(plan: Prune, config: ModelConfig) -> Schedule | None:
    """The schedule of a preset, of the model's own preset (true), or as it is given; ``None`` for dense.

    Raises ``ValueError`` for methods that the page cannot show: it knows pruning, and ToMe's matching.
    """
    preset = config.defaults.prune if plan is True else plan
    schedule = parse_preset(preset) if isinstance(preset, str) else preset or None
    if schedule is not None and not isinstance(schedule.method, Pruning | Merging):
        raise ValueError(f"{schedule.name} is {type(schedule.method).__name__}, expected pruning or ToMe to inspect")
    return schedule


def plan_name(plan: Prune, schedule: Schedule | None) -> str:
    """The preset as it was written, or the schedule's name; "dense" without one."""
    return "dense" if schedule is None else plan if isinstance(plan, str) else schedule.name


def check_attention_steps(
    asked: Sequence[int] | None, run: CheckedSettings, schedules: Sequence[Schedule | None]
) -> set[int]:
    """The steps, from 0, of which attention is recorded. Raises ``ValueError`` for one that is not run."""
    last = run.steps - 1
    if asked is None:
        early = max((each.early_steps(run.steps) for each in schedules if each is not None), default=run.steps // 2)
        return {run.first, min(max(early, run.first), last), last}
    for step in asked:
        if not run.first < step <= run.steps:
            raise ValueError(f"attention step is {step}, expected {run.first + 1} to {run.steps}")
    return {step - 1 for step in asked}


def context_length(sdxl: SDXL, prompt: str, asked: Settings, run: CheckedSettings) -> int:
    """Text tokens that the U-Net attends to: those of the longer of prompt and negative prompt."""
    return sdxl.text.context_length([prompt] if run.cfg == 1 else [prompt, asked.negative], sdxl.tokenizer)


@torch.no_grad()
def decoded(sdxl: SDXL, latent: Tensor, strip_rows: int | None) -> Image.Image:
    """The picture of a denoised latent (4, h, w)."""
    x = latent[None].to(sdxl.device)
    picture = sdxl.vae.decode(x) if strip_rows is None else decode_in_strips(sdxl.vae, x, strip_rows)
    return to_image(check_finite("the VAE decoder", picture)[0])


def step_costs(config: ModelConfig, run: CheckedSettings, text_length: int) -> list[Cost]:
    """The cost of each step that is run."""
    f, names = config.vae.downscale, {site.name for site in config.unet.attention_sites()}
    width, height = run.size
    calls = run.sampling.calls(run.steps)
    known: dict[TokenPlan, list[tuple[str, bool, int]]] = {}
    for plan in {DENSE, *run.plans}:
        works = count(config, height // f, width // f, plan, text_length).works
        known[plan] = [(work.name, work.kind == Kind.RANKING, work.flops) for work in works]
    costs = []
    for step in range(run.first, run.steps):
        times = calls[step] * (1 if run.cfg == 1 else 2)
        works_of_step = known[run.plans[step]]
        blocks = dict.fromkeys(names, 0)
        for name, ranks, flops in works_of_step:
            if name in names and not ranks:
                blocks[name] += times * flops
        ranking = sum(times * flops for _, ranks, flops in works_of_step if ranks)
        total = sum(times * flops for _, ranks, flops in works_of_step if not ranks)
        costs.append(Cost(total, ranking, blocks))
    return costs
