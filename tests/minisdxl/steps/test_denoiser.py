"""The denoiser under step plans, on the bundled model: against the dense one, in batches, and with every sampling."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from minisdxl.pipeline import SDXL
from minisdxl.samplings import SAMPLINGS
from minisdxl.settings import check_settings
from minisdxl.steps.methods import RunFacts
from minisdxl.steps.plan import StepPlan, describe
from minisdxl.steps.presets import FAST, RunPlanner

PROMPTS = ["a small red circle on a white background", "a big blue square on a black background"]
QUICK: dict[str, Any] = {"size": (64, 64), "sampling": "euler", "steps": 12, "seed": 5}


def pixels(images: Any) -> np.ndarray[Any, Any]:
    return np.stack([np.asarray(image).astype(float) for image in images])


def dense_planner(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes every run go through the planned denoiser, under plans that change nothing."""
    check = check_settings

    def planned(*given: Any) -> Any:
        run = check(*given)
        facts = RunFacts(run.steps, run.first, tuple(run.sigmas.tolist()), run.cfg, run.sampling.fresh_noise)
        return replace(run, planner=RunPlanner(tuple(StepPlan(plan) for plan in run.plans[run.first :]), facts))

    monkeypatch.setattr("minisdxl.pipeline.check_settings", planned)


@pytest.mark.parametrize("settings", [{}, {"cfg": 1.0}, {"prune": "at-edm"}, {"sampling": "heun", "steps": 4}], ids=str)
def test_plans_that_change_nothing_give_the_dense_picture(
    shapes: SDXL, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any]
) -> None:
    before = pixels(shapes.generate(PROMPTS, **{**QUICK, **settings}))
    dense_planner(monkeypatch)
    assert np.array_equal(pixels(shapes.generate(PROMPTS, **{**QUICK, **settings})), before)


METHODS: dict[str, dict[str, Any]] = {
    "deepcache": {"skip": "deepcache"},
    "deepcache and interval": {"skip": "deepcache:branch=4", "guide": "interval"},
    "tgate": {"skip": "tgate:gate=5"},
    "zeus": {"skip": "zeus"},
    "sada": {"skip": "sada"},
    "easycache": {"skip": "easycache"},
    "alternate": {"guide": "alternate"},
    "composed": {"prune": FAST["fast"].prune, "skip": FAST["fast"].skip},
    "all three": {"prune": "at-edm", "skip": "zeus", "guide": "until:share=0.7,off=kept"},
}


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS.keys())
def test_a_picture_is_the_same_alone_and_in_a_batch(shapes: SDXL, method: dict[str, Any]) -> None:
    """Up to rounding, and with the same plans: no row sees another's decision."""
    realized: list[Any] = []
    both = pixels(shapes.generate(PROMPTS, **QUICK, **method, realized=realized))
    alone: list[Any] = []
    one = pixels(shapes.generate(PROMPTS[1:], **{**QUICK, "seed": 6}, **method, realized=alone))
    dense = pixels(shapes.generate(PROMPTS[1:], **{**QUICK, "seed": 6}))
    error, moved = np.abs(both[1:] - one).max(), np.abs(one - dense).max()
    print(f"{describe(realized[1])}: {error} of 255 apart, {moved} from dense")
    assert len(realized) == 2 and len(alone) == 1 and len(alone[0]) == 12
    assert describe(realized[1]) == describe(alone[0])
    assert error <= 2 < moved


def test_what_was_realized_runs_again_bit_for_bit(shapes: SDXL) -> None:
    realized: list[Any] = []
    adaptive = pixels(shapes.generate(PROMPTS[:1], **QUICK, skip="easycache:threshold=0.4", realized=realized))
    written = describe(realized[0])
    print(written)
    assert "e" in written
    assert np.array_equal(pixels(shapes.generate(PROMPTS[:1], **QUICK, skip=f"given:{written}")), adaptive)


@pytest.mark.parametrize("name", SAMPLINGS)
def test_every_sampling_runs_under_plans_or_says_why_not(shapes: SDXL, name: str) -> None:
    size = (64, 64)
    dense, skipped = (
        pixels(shapes.generate(PROMPTS[:1], sampling=name, steps=4, size=size, skip=skip, cfg=2.0))
        for skip in (None, "deepcache:every=2")
    )
    assert not np.array_equal(dense, skipped)
    if SAMPLINGS[name].fresh_noise:
        with pytest.raises(ValueError, match="needs a solver of the ODE"):
            shapes.generate(PROMPTS[:1], sampling=name, steps=4, size=size, skip="given:WWlW", cfg=2.0)
    else:
        pixels(shapes.generate(PROMPTS[:1], sampling=name, steps=4, size=size, skip="given:WWlW", cfg=2.0))


def test_from_a_picture_plans_count_from_the_first_step_that_is_run(shapes: SDXL) -> None:
    image = shapes.generate(PROMPTS[:1], **QUICK)[0]
    realized: list[Any] = []
    given = {**QUICK, "image": image, "strength": 0.5}
    shapes.generate(PROMPTS[:1], **given, skip="deepcache", realized=realized)
    assert describe(realized[0]) == "WSSWSS"


def test_nothing_stays_behind(shapes: SDXL) -> None:
    """Runs one after the other do not see each other, also where sizes and guidance change between them."""
    first = pixels(shapes.generate(PROMPTS[:1], **QUICK, skip="tgate:gate=5"))
    shapes.generate(PROMPTS, **{**QUICK, "size": (96, 64)}, skip="deepcache", cfg=1.0)
    assert np.array_equal(pixels(shapes.generate(PROMPTS[:1], **QUICK, skip="tgate:gate=5")), first)
    assert np.array_equal(pixels(shapes.generate(PROMPTS[:1], **QUICK)), pixels(shapes.generate(PROMPTS[:1], **QUICK)))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"skip": "deepcache", "steps": 1}, "deepcache would change nothing: none of the 1 steps"),
        ({"guide": "interval", "cfg": 1.0}, "interval would change nothing: the run has no guidance"),
        ({"guide": "interval:0-1000"}, "interval:0-1000 would change nothing: guidance stays on"),
        ({"skip": "tgate:gate=40,every=1"}, "tgate:gate=40,every=1 would change nothing"),
        ({"skip": "deepcache:branch=80"}, "branch is 80, expected 0 to "),
        ({"skip": "given:SWWWWWWWWWWW"}, "step 0 is shallow at branch 0, and no step before it has kept that"),
        ({"skip": "given:WlWWWWWWWWWW"}, "step 1 is a forecast from 2 evaluations, of which there are 1 before it"),
        ({"skip": "tgate:gate=5", "guide": "interval"}, "tgate:gate=5 sets the guidance itself"),
        ({"skip": "given:WS", "steps": 12}, "steps has 2 letters for the 12 steps of the run"),
        ({"guide": "given:KKKKKKKKKKKK"}, "step 0 takes the last difference of guidance"),
        ({"skip": "sleep"}, "unknown skip method 'sleep', expected one of deepcache"),
        ({"guide": "interval:low=x"}, "setting low of interval is 'x', expected a number"),
        ({"skip": "deepcache:depth=1"}, "unknown setting 'depth=1' of deepcache, expected every, branch"),
        ({"skip": "given"}, "skip method given has no steps"),
    ],
)
def test_bad_plans_are_one_line(shapes: SDXL, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        shapes.generate(PROMPTS[:1], **{**QUICK, **settings})


def test_guidance_that_sets_in_at_a_shallow_step_makes_it_whole(shapes: SDXL) -> None:
    realized: list[Any] = []
    shapes.generate(PROMPTS[:1], **QUICK, skip="deepcache:every=4", guide="given:CCBBBBBBBBBB", realized=realized)
    assert describe(realized[0]) == "WSWSWSSSWSSS CCBBBBBBBBBB"
