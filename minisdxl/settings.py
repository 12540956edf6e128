"""Settings of ``SDXL.generate``: what a caller may ask for, and the checked numbers that a run works with."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace

from PIL import Image
from torch import Tensor

from atedm.plan import DENSE, TokenPlan
from atedm.presets import parse_preset
from atedm.schedule import Schedule
from minisdxl.config import ModelConfig, NoiseConfig
from minisdxl.preconditioning import discrete_sigmas
from minisdxl.samplings import Sampling, find_sampling
from minisdxl.solvers import in_stages
from minisdxl.steps.methods import Adaptive, RunFacts, Static
from minisdxl.steps.presets import RunPlanner, plan_run, with_history

REFINER_START = 0.8  # the refiner is trained on the last 200 of 1000 noise levels; diffusers: denoising_end

Size = tuple[int, int]  # width and height, or left and top, in pixels


@dataclass(frozen=True)
class Settings:
    """How to generate pictures. ``None`` stands for the model's own value (``ModelConfig.defaults``)."""

    negative: str = ""  # what to guide away from; empty means the zeros that SDXL was trained with
    sampling: str | Sampling | None = None  # a name in `minisdxl.samplings.SAMPLINGS`, such as "dpm++-2m"
    steps: int | None = None  # denoising steps, 1 to 1000
    cfg: float | None = None  # classifier-free guidance scale; 1 turns guidance off, at half the cost
    seed: int = 0  # of the first picture, 0 to 2**64 - 1; picture i has seed + i
    images_per_prompt: int = 1  # returned one after the other
    prune: str | bool | Schedule | None = None  # a preset, as "at-edm:rho=0.5"; True: the model's own; None: dense
    skip: str | Static | Adaptive | None = None  # steps that skip work of the U-Net, as "deepcache:every=3"
    guide: str | Static | None = None  # steps without guidance, as "interval:0.28-5.42"
    size: Size | None = None  # multiples of 8
    original_size: Size | None = None  # micro-conditioning: size before training resized it; small ones look blurred
    crop: Size = (0, 0)  # micro-conditioning: where training cropped it
    target_size: Size | None = None  # micro-conditioning: size after training resized it
    image: Image.Image | None = None  # a picture to start from, stretched to the size
    strength: float | None = None  # with an image, and only then: share of the steps to run, above 0, up to 1
    mask: Image.Image | None = None  # with an image: only what is white in it is drawn anew; strength is 1 by default
    refiner_start: float | None = None  # with a refiner, and only then: share of the noise schedule that the base does
    strip_rows: int | None = None  # decode in strips of so many latent rows: less memory, the same picture


@dataclass(frozen=True)
class CheckedSettings:
    """:class:`Settings` for one model, in range and with all defaults filled in."""

    sampling: Sampling
    steps: int
    cfg: float
    size: Size
    micro_conditioning: list[int]  # six numbers
    sigmas: Tensor  # noise levels of all steps and a final 0, (steps + 1,) float64
    plans: list[TokenPlan]  # of all steps
    first: int  # the first step that is run: 0, except with an image
    split: int  # the first step of the refiner; ``steps`` without one
    planner: RunPlanner | None  # of the steps that are run, where settings skip work or guidance


def check_settings(settings: Settings, config: ModelConfig, refiner: ModelConfig | None = None) -> CheckedSettings:
    """Checks settings and fills in defaults. Warns of settings without effect.

    With the config of a ``refiner``, the last steps have its token plans, and the solver starts anew with it. Raises
    ``ValueError`` for a setting out of range.
    """
    if settings.images_per_prompt < 1:
        raise ValueError(f"images_per_prompt is {settings.images_per_prompt}, expected 1 or more")
    if settings.strip_rows is not None and settings.strip_rows < 1:
        raise ValueError(f"strip_rows is {settings.strip_rows}, expected 1 or more, or None to decode all at once")
    if (settings.image is None) != (settings.strength is None) and settings.mask is None:
        having = "without" if settings.image is None else "with"
        raise ValueError(f"strength is {settings.strength} {having} an image, expected both")
    sampling = find_sampling(settings.sampling or config.defaults.sampling)
    steps = sampling.own_steps(config) if settings.steps is None else settings.steps
    cfg = sampling.own_cfg(config) if settings.cfg is None else settings.cfg
    if not math.isfinite(cfg):
        raise ValueError(f"guidance scale cfg is {cfg}, expected a finite number, such as 7.0")
    if cfg == 1 and settings.negative:
        warnings.warn(f"negative prompt {settings.negative!r} has no effect without guidance, at cfg 1", stacklevel=4)
    sampling.check(config.noise)
    sigmas = sampling.sigmas(steps, config.noise)
    plans = token_plans(config, settings.prune, steps)
    first = 0 if settings.strength is None else first_step(steps, settings.strength)
    split = steps if refiner is None else split_step(settings.refiner_start, sigmas, config.noise, first)
    if refiner is not None:
        plans[split:] = token_plans(refiner, settings.prune, steps)[split:]
        sampling = replace(sampling, solver=in_stages(sampling.solver, split - first))
    elif settings.refiner_start is not None:
        raise ValueError(f"refiner_start is {settings.refiner_start} without a refiner, expected both")
    size = sampling.picture_size(config, settings.size)
    if settings.size not in (None, (sampling.size, sampling.size)):
        _warn_outside_buckets(config, size)
    sizes = micro_conditioning(size, settings.original_size, settings.crop, settings.target_size)
    planner = None
    if settings.skip is not None or settings.guide is not None or any(map(with_history, plans)):
        if refiner is not None:
            raise ValueError("there is a refiner, expected no skip, no guide, and no recovery own-change beside it")
        facts = RunFacts(steps, first, tuple(sigmas.tolist()), cfg, sampling.fresh_noise)
        planner = plan_run(config.unet, plans[first:], facts, settings.skip, settings.guide)
    return CheckedSettings(sampling, steps, cfg, size, sizes, sigmas, plans, first, split, planner)


def check_pictures(config: ModelConfig, image: bool, mask: bool) -> None:
    """Raises ``ValueError`` for a mask without an image, and for a model without what it needs of them."""
    if mask and not image:
        raise ValueError("there is a mask without an image, expected both: the image is kept where the mask is black")
    if config.refines and not image:
        raise ValueError(f"{config.name} finishes pictures, expected an image, or a base model beside it")
    if config.inpaints and not mask:
        raise ValueError(f"{config.name} is an inpainting model, expected an image and a mask to draw anew")


def check_prompts(prompts: Sequence[str]) -> None:
    """Raises ``ValueError`` for no prompts, and for one string, which would be read letter by letter."""
    if not prompts or isinstance(prompts, str):
        raise ValueError(f"prompts is {prompts!r}, there are no prompts in it; expected a list of strings")


def first_step(n: int, strength: float) -> int:
    """The first step to run when starting from a picture: of steps 0 to n - 1 the last int(n * strength) are run.

    As in diffusers' image-to-image pipelines. Raises ``ValueError`` unless 0 < strength <= 1 and a step is left.
    """
    if not 0 < strength <= 1:
        raise ValueError(f"strength is {strength}, expected more than 0 and at most 1")
    run = int(n * strength)
    if run == 0:
        raise ValueError(f"strength {strength} leaves none of {n} steps to run, expected more of either")
    return n - run


def split_step(start: float | None, sigmas: Tensor, noise: NoiseConfig, first: int = 0) -> int:
    """The refiner's first step: that whose timestep is among the last 1 - ``start`` of those of training.

    Of 50 steps in the official spacing these are numbers 40 to 49 at 0.8. As ``denoising_end`` and ``denoising_start``
    of diffusers' pipelines. ``sigmas`` are of all steps, and ``first`` is the first that is run. Raises ``ValueError``
    unless 0 < start < 1 and both models have a step.
    """
    start = REFINER_START if start is None else start
    if not 0 < start < 1:
        raise ValueError(f"refiner_start is {start}, expected more than 0 and less than 1, such as {REFINER_START}")
    levels = discrete_sigmas(noise)
    cutoff = round(noise.steps - start * noise.steps)
    steps = sigmas[:-1].tolist()
    split = sum(int((levels / sigma).log().abs().argmin()) >= cutoff for sigma in steps)
    if not first < split < len(steps):
        whom = "refiner" if split > first else "base model"
        raise ValueError(
            f"refiner_start {start} leaves the {whom} none of the steps {first} to {len(steps) - 1} of {len(steps)}"
        )
    return split


def token_plans(config: ModelConfig, prune: str | bool | Schedule | None, steps: int) -> list[TokenPlan]:
    """The token plan of each step. Raises ``ValueError`` for an unknown preset, or one that does not fit the U-Net."""
    if prune is None or prune is False:
        return [DENSE] * steps
    preset = config.defaults.prune if prune is True else prune
    schedule = parse_preset(preset) if isinstance(preset, str) else preset
    sites = list(config.unet.attention_sites())
    return [schedule.plan(step, steps, sites) for step in range(steps)]


def micro_conditioning(size: Size, original: Size | None, crop: Size, target: Size | None) -> list[int]:
    """SDXL's micro-conditioning: original height and width, crop top and left, target height and width.

    Arguments are (width, height) and (left, top); ``None`` stands for ``size``. Raises ``ValueError`` for sizes below 1
    and crops below 0.
    """
    original, target = original or size, target or size
    for name, pair, least in (("original_size", original, 1), ("crop", crop, 0), ("target_size", target, 1)):
        if min(pair) < least:
            raise ValueError(f"{name} is {pair[0]} x {pair[1]}, expected {least} or more pixels on both sides")
    return [*reversed(original), *reversed(crop), *reversed(target)]


def size_numbers(config: ModelConfig, sizes: list[int]) -> tuple[list[float], list[float]]:
    """The size numbers of both halves of guidance, conditional first: ``sizes``, or those of a refiner.

    A refiner is told the original size, the crop and an aesthetic score.
    """
    if not config.refines:
        return list(sizes), list(sizes)
    score, negative = config.scores
    return [*sizes[:4], score], [*sizes[:4], negative]


def _warn_outside_buckets(config: ModelConfig, size: Size) -> None:
    nearest = config.nearest_bucket(size)
    if nearest is not None and size not in config.buckets:
        warnings.warn(
            f"{config.name} was not trained on pictures of {size[0]}x{size[1]}; "
            f"the nearest size that it was trained on is {nearest[0]}x{nearest[1]}",
            stacklevel=5,
        )
