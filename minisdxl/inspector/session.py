"""``SDXL.inspect``: draws a prompt dense, with one method and with another, from the same noise, and records each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor

from atedm.presets import parse_preset
from atedm.schedule import Schedule
from minisdxl.config import ModelConfig
from minisdxl.cost import Kind
from minisdxl.images import check_finite, to_image
from minisdxl.inspector.page import Inspection, page
from minisdxl.inspector.recorder import Recorder, Step, has_all_maps
from minisdxl.inspector.words import Word, find_words
from minisdxl.runtime.strips import decode_in_strips
from minisdxl.settings import CheckedSettings, Settings, check_settings
from minisdxl.steps.cost import step_works
from minisdxl.steps.plan import StepPlan
from minisdxl.steps.presets import FAST

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
    """A picture drawn with one method: ``name`` is "dense" or the presets, ``pictures`` are those that steps head for.

    ``plans`` are those of each step, as they were carried out.
    """

    name: str
    schedule: Schedule | None
    image: Image.Image
    plans: list[StepPlan]
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

    The picture is drawn dense, with ``prune``, ``skip`` and ``guide`` where one is set, and with ``against``, all from
    the same noise. They are the pictures that :meth:`SDXL.generate` draws without the compiler: recording changes no
    number.

    Args:
        sdxl: the model.
        prompt: one prompt, in the syntax of :mod:`minisdxl.prompting.syntax`.
        settings: how to draw it; ``None`` for the model's own.
        against: another preset to compare with, one of ``prune`` or of the command's ``--fast``.
        attention_steps: steps, from 1, of which attention is recorded. The default are the first one, the first after
            DSAP's early steps, and the last. Where a method does not run the whole U-Net at a step, the next one at
            which it does is recorded.
        on_step: called after each step with the method's name and the step's number from 0.
        changes: single settings by name, such as ``steps=20, prune="at-edm"``.

    Raises:
        ValueError: for a setting out of range, for several images per prompt, for attention steps that are not run,
            and for ``against`` without a method.
        ArithmeticError: if a part of the model overflows.
    """
    asked = replace(settings or Settings(), **changes)
    if not isinstance(prompt, str):
        raise ValueError(f"prompt is {prompt!r}, expected one string")
    if sdxl.refiner is not None:
        raise ValueError(f"{sdxl.config.name} has a refiner, expected none: the page shows the steps of one model")
    if asked.images_per_prompt != 1:
        raise ValueError(f"images_per_prompt is {asked.images_per_prompt}, expected 1: the page shows one picture")
    methods = compared(asked, against)
    checked = [check_settings(method, sdxl.config) for method in methods]
    schedules = [find_schedule(method.prune, sdxl.config) for method in methods]
    chosen = check_attention_steps(attention_steps, checked, schedules)
    words = find_words(prompt, sdxl.tokenizer, sdxl.text.embeddings)
    text_length = context_length(sdxl, prompt, asked, checked[0])
    runs = []
    for index, (method, schedule, check) in enumerate(zip(methods, schedules, checked, strict=True)):
        name = method_name(method, schedule)
        watches = index > 0 or len(methods) == 1
        recorder = Recorder(sdxl.unet, check.first, chosen if watches else (), [word.tokens for word in words])
        drawn = replace(method, sampling=check.sampling.with_denoiser(recorder.watch))
        tell = None if on_step is None else _telling(on_step, name)
        realized: list[Sequence[StepPlan]] = []
        image = replace(sdxl, compiled=recorder).generate([prompt], drawn, on_step=tell, realized=realized)[0]
        plans = list(realized[0]) if realized else [StepPlan(plan) for plan in check.plans[check.first :]]
        pictures = [decoded(sdxl, step.denoised, asked.strip_rows) for step in recorder.steps]
        costs = step_costs(sdxl.config, check, plans, text_length)
        runs.append(RecordedRun(name, schedule, image, plans, recorder.steps, pictures, costs))
    return page(Recording(prompt, words, sdxl.config, asked, checked[0], runs))


def compared(asked: Settings, against: Prune) -> list[Settings]:
    """The settings of each picture: dense, with the methods asked for, and with ``against`` in their place.

    Raises ``ValueError`` for ``against`` without a method to compare with.
    """
    dense = replace(asked, prune=None, skip=None, guide=None)
    has_method = asked.prune not in (None, False) or asked.skip is not None or asked.guide is not None
    if against in (None, False):
        return [dense, asked] if has_method else [dense]
    if not has_method:
        raise ValueError(f"against is {against!r} without a method, expected both: two methods are compared")
    if isinstance(against, str) and against in FAST:
        other = FAST[against]
        return [dense, asked, replace(dense, prune=other.prune, skip=other.skip, guide=other.guide)]
    return [dense, asked, replace(dense, prune=against)]


def _telling(on_step: Progress, name: str) -> Callable[[int, Tensor], None]:
    return lambda step, _: on_step(name, step)


def find_schedule(plan: Prune, config: ModelConfig) -> Schedule | None:
    """The schedule of a preset, of the model's own preset (true), or as it is given; ``None`` for dense."""
    preset = config.defaults.prune if plan is True else plan
    return parse_preset(preset) if isinstance(preset, str) else preset or None


def method_name(method: Settings, schedule: Schedule | None) -> str:
    """The name of a composed preset, or its methods as they were written; "dense" without any."""
    preset = method.prune if isinstance(method.prune, str) or schedule is None else schedule.name
    parts = [each for each in (preset, method.skip, method.guide) if each not in (None, False)]
    for name, known in FAST.items():
        if [preset, method.skip, method.guide] == [known.prune, known.skip, known.guide]:
            return name
    return " + ".join(each if isinstance(each, str) else type(each).__name__ for each in parts) or "dense"


def check_attention_steps(
    asked: Sequence[int] | None, runs: Sequence[CheckedSettings], schedules: Sequence[Schedule | None]
) -> set[int]:
    """The steps, from 0, of which attention is recorded.

    Raises ``ValueError`` for one that is not run, and for one after which no step has maps to record.
    """
    run = runs[0]
    last = min(last_maps(each) for each in runs)
    if asked is None:
        early = max((each.early_steps(run.steps) for each in schedules if each is not None), default=run.steps // 2)
        return {run.first, min(max(early, run.first), last), last}
    for step in asked:
        if not run.first < step <= run.steps:
            raise ValueError(f"attention step is {step}, expected {run.first + 1} to {run.steps}")
        if step > last + 1:
            raise ValueError(
                f"attention step is {step}, expected {run.first + 1} to {last + 1}: no later one runs the whole U-Net"
            )
    return {step - 1 for step in asked}


def last_maps(run: CheckedSettings) -> int:
    """The last step, from 0, at which every block computes its attention. Of an adaptive method: the last step."""
    if run.planner is None:
        return run.steps - 1
    return run.first + max((step for step, plan in enumerate(run.planner.base) if has_all_maps(plan)), default=0)


def context_length(sdxl: SDXL, prompt: str, asked: Settings, run: CheckedSettings) -> int:
    """Text tokens that the U-Net attends to: those of the longer of prompt and negative prompt."""
    return sdxl.text.context_length([prompt] if run.cfg == 1 else [prompt, asked.negative], sdxl.tokenizer)


@torch.no_grad()
def decoded(sdxl: SDXL, latent: Tensor, strip_rows: int | None) -> Image.Image:
    """The picture of a denoised latent (4, h, w)."""
    x = latent[None].to(sdxl.device)
    picture = sdxl.vae.decode(x) if strip_rows is None else decode_in_strips(sdxl.vae, x, strip_rows)
    return to_image(check_finite("the VAE decoder", picture)[0])


def step_costs(config: ModelConfig, run: CheckedSettings, plans: Sequence[StepPlan], text_length: int) -> list[Cost]:
    """The cost of each step that is run, with these ``plans``."""
    f, names = config.vae.downscale, [site.name for site in config.unet.attention_sites()]
    width, height = run.size
    works = {plan: step_works(config, height // f, width // f, plan, text_length) for plan in set(plans)}
    costs = []
    for plan, calls in zip(plans, run.sampling.calls(run.steps)[run.first :], strict=True):
        times = calls * (min(plan.halves, 1) if run.cfg == 1 else plan.halves)
        ranking = sum(times * work.flops for work in works[plan] if work.kind == Kind.RANKING)
        others = [work for work in works[plan] if work.kind != Kind.RANKING]
        blocks = {name: sum(times * work.flops for work in others if work.name == name) for name in names}
        costs.append(Cost(sum(times * work.flops for work in others), ranking, blocks))
    return costs
