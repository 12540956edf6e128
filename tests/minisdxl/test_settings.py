"""Settings of a run: their defaults, checks, token plans and size numbers."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from diffusers import StableDiffusionXLImg2ImgPipeline

from minisdxl.config import SDXL_BASE, SHAPES, ModelConfig
from minisdxl.samplings import trailing_timesteps
from minisdxl.settings import Settings, check_settings, first_step, micro_conditioning, token_plans
from tests.minisdxl.denoisers import NOISE
from tests.minisdxl.test_images import drawing
from tests.minisdxl.test_sampler import scheduler

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # inside diffusers


@pytest.mark.parametrize(
    ("config", "asked", "sampling", "steps", "cfg", "size"),
    [
        (SDXL_BASE, {}, "euler", 50, 7.0, (1024, 1024)),
        (SHAPES, {}, "euler-ancestral", 50, 4.0, (256, 256)),
        (SHAPES, {"sampling": "heun"}, "heun", 25, 4.0, (256, 256)),
        (SDXL_BASE, {"sampling": "turbo"}, "turbo", 1, 1.0, (512, 512)),
        (SDXL_BASE, {"sampling": "turbo", "steps": 4, "cfg": 2.0, "size": (64, 96)}, "turbo", 4, 2.0, (64, 96)),
    ],
)
@pytest.mark.filterwarnings("ignore:sdxl-base was not trained on pictures of 64x96")
def test_defaults_are_those_of_the_model_and_its_sampling(
    config: ModelConfig, asked: dict[str, Any], sampling: str, steps: int, cfg: float, size: tuple[int, int]
) -> None:
    run = check_settings(Settings(**asked), config)
    assert (run.sampling.name, run.steps, run.cfg, run.size) == (sampling, steps, cfg, size)
    assert (len(run.sigmas), len(run.plans), run.first) == (steps + 1, steps, 0)


def test_each_step_has_its_plan() -> None:
    plans = token_plans(SHAPES, "at-edm:rho=0.5,tau=10", 10)
    assert [len(plan) for plan in plans] == [3] * 2 + [7] * 8  # prune-less: mid, up.2.0 and up.1.0 alone
    assert set(token_plans(SHAPES, None, 5)) == {token_plans(SHAPES, None, 5)[0]}
    assert not token_plans(SHAPES, None, 1)[0]


def test_size_numbers_are_in_the_official_order() -> None:
    # Official: height, width; crop top, left; height, width.
    assert micro_conditioning((1, 2), (3, 4), (5, 6), (7, 8)) == [4, 3, 6, 5, 8, 7]
    assert micro_conditioning((1216, 832), None, (0, 0), None) == [832, 1216, 0, 0, 832, 1216]


@pytest.mark.parametrize(
    ("n", "strength"), [(50, 0.6), (50, 1.0), (10, 0.7), (100, 0.29), (4, 0.5), (3, 0.34), (1, 1.0)]
)
def test_first_step_equals_diffusers(n: int, strength: float) -> None:
    kind: Any = StableDiffusionXLImg2ImgPipeline
    pipeline = SimpleNamespace(scheduler=scheduler(n))
    left, count = kind.get_timesteps(pipeline, n, strength, "cpu")
    first = first_step(n, strength)
    assert (n - first, trailing_timesteps(n, NOISE)[first:].tolist()) == (count, left.tolist())
    assert pipeline.scheduler.begin_index == first


@pytest.mark.parametrize("strength", [0.0, -0.1, 1.1, math.inf, math.nan])
def test_strength_outside_its_range_is_refused(strength: float) -> None:
    with pytest.raises(ValueError, match=rf"strength is {strength}, expected more than 0 and at most 1"):
        first_step(50, strength)


def test_strength_that_leaves_no_step_is_refused() -> None:
    with pytest.raises(ValueError, match=r"strength 0\.2 leaves none of 4 steps"):
        first_step(4, 0.2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"size": (100, 128)}, "width is 100 pixels"),
        ({"size": (128, 8192)}, "height is 8192 pixels"),
        ({"steps": 0}, "steps is 0"),
        ({"prune": "nonesuch"}, "unknown preset 'nonesuch'"),
        ({"cfg": math.nan}, "cfg is nan"),
        ({"sampling": "nonesuch"}, "unknown sampling 'nonesuch'"),
        ({"sampling": "lcm", "steps": 51}, "steps is 51, expected 1 to 50"),
        ({"images_per_prompt": 0}, "images_per_prompt is 0"),
        ({"original_size": (0, 64)}, "original_size is 0 x 64"),
        ({"target_size": (64, -1)}, "target_size is 64 x -1"),
        ({"crop": (-1, 0)}, "crop is -1 x 0"),
        ({"strip_rows": 0}, "strip_rows is 0, expected 1 or more, or None"),
        ({"image": drawing()}, "strength is None with an image"),
        ({"strength": 0.5}, r"strength is 0\.5 without an image"),
        ({"image": drawing(), "strength": 0.0}, r"strength is 0\.0, expected more than 0"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_settings_out_of_range_are_named(change: dict[str, Any], message: str) -> None:
    asked = replace(Settings(steps=1, size=(64, 64)), **change)
    with pytest.raises(ValueError, match=message):
        check_settings(asked, SHAPES)
