"""Methods of skipping: their plans, letter by letter, and the decisions of adaptive ones by brute force."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from minisdxl.config import SHAPES
from minisdxl.sampler import sigmas
from minisdxl.steps.forecast import Point
from minisdxl.steps.guides import Alternate, Interval, Until
from minisdxl.steps.kept import Kept
from minisdxl.steps.methods import DeepCache, EasyCache, Given, RunFacts, Sada, Spaced, Static, TGate, Zeus
from minisdxl.steps.plan import StepPlan, describe


def facts(steps: int = 50, first: int = 0, cfg: float = 7.0, fresh_noise: bool = False) -> RunFacts:
    return RunFacts(steps, first, tuple(sigmas(steps, SHAPES.noise).tolist()), cfg, fresh_noise)


def letters(method: Static, run: RunFacts) -> str:
    return describe(method.plans([StepPlan()] * len(run.numbers), run))


@pytest.mark.parametrize(
    ("method", "steps", "first", "expected"),
    [
        (DeepCache(), 8, 0, "WSSWSSWS"),
        (DeepCache(every=2, branch=3), 8, 3, "WSWSW"),  # with an image it counts from the first step that is run
        (Zeus(), 50, 0, "W" * 10 + "lrW" * 4 + "lr" + "W22" * 7 + "W" * 5),
        (Zeus(start=2, end=10, lagrange=50), 10, 0, "WWWWWWWWWW"),
        (Given("WWlrW2S", branch=1), 7, 0, "WWlrW2S"),
        # Of ten steps three, 0, 9 / 2 and 9, with the second for a line, or the second and third for a parabola.
        (Spaced(share=0.3), 10, 0, "W00WnnnnnW"),  # 9 / 2 ** 1.4 = 3.4 in the middle
        (Spaced(share=0.3, power=1), 10, 0, "W000WnnnnW"),
        (Spaced(share=0.3, power=2), 10, 0, "W0WnnnnnnW"),
        (Spaced(share=0.3, shallow=2), 10, 0, "W0SWnSnSnW"),
        (Spaced(share=0.3, shallow=1), 10, 0, "WSSWSSSSSW"),
        (TGate(gate=3), 6, 0, "WWWWWW BBBUUU"),
        (TGate(gate=3, branch="conditional"), 6, 0, "WWWWWW BBBCCC"),
        (Until(share=0.5), 6, 0, "WWWWWW BBBCCC"),
        (Until(share=0.5, off="kept"), 6, 2, "WWWW BKKK"),
        (Alternate(), 6, 0, "WWWWWW BKBKBK"),
        (Alternate(every=3, off="conditional"), 6, 0, "WWWWWW BCCBCC"),
    ],
)
def test_plans_in_letters(method: Static, steps: int, first: int, expected: str) -> None:
    found = letters(method, facts(steps, first))
    print(found)
    assert found == expected


def test_tgate_keeps_and_reuses_attention() -> None:
    """Before the gate self-attention is computed at every fifth step alone; from the gate on no cross-attention is."""
    plans = TGate(gate=9, warm=2, every=5).plans([StepPlan()] * 12, facts(12))
    own = [plan.self_attention for plan in plans]
    assert own == [*["computed"] * 2, "kept", *["reused"] * 2, "kept", *["reused"] * 2, *["computed"] * 4]
    cross = [plan.cross_attention for plan in plans]
    assert cross == [*["computed"] * 8, "averaged", *["reused"] * 3]


def test_interval_is_by_noise_level() -> None:
    run = facts(32)
    plans = Interval(0.28, 5.42).plans([StepPlan()] * 32, run)
    for step, plan in enumerate(plans):
        inside = 0.28 < run.sigmas[step] <= 5.42
        assert (plan.guidance == "both") == inside
    kept = [plan.guidance for plan in Interval(0.28, 5.42, off="kept").plans([StepPlan()] * 32, run)]
    first = kept.index("both")
    assert set(kept[:first]) == {"conditional"}  # there is no difference yet
    assert set(kept[first:]) == {"both", "kept"}


def test_forecasts_need_an_ode_solver() -> None:
    for method in (Zeus(), Given("WWr")):
        with pytest.raises(ValueError, match="needs a solver of the ODE"):
            letters(method, facts(3, fresh_noise=True))
    assert letters(Given("WSS"), facts(3, fresh_noise=True)) == "WSS"


def walk(noises: list[float], xs: list[float], times: list[float], evaluated: list[bool]) -> Kept:
    kept = Kept()
    for noise, x, time, was in zip(noises, xs, times, evaluated, strict=True):
        size = (1, 4, 2, 3)
        kept.trail.append(Point(time, 2.0, torch.full(size, x).double(), torch.full(size, noise).double(), was))
    return kept


@pytest.mark.parametrize("seed", range(12))
def test_sada_by_brute_force(seed: int) -> None:
    rng = np.random.default_rng(seed)
    run, step, size = facts(), 14, (1, 4, 2, 3)
    kept = Kept()
    for time in range(9, step):
        x, noise = (torch.from_numpy(rng.normal(size=size)) for _ in range(2))
        kept.trail.append(Point(float(time), 2.0, x, noise, True))
    x = torch.from_numpy(rng.normal(size=size))
    xs, ys = ([getattr(point, name).numpy() for point in kept.trail[-3:]] for name in ("x", "noise"))
    extrapolated = 3 * xs[2] - 3 * xs[1] + xs[0]
    second = (ys[2] - ys[1]) - (ys[1] - ys[0])
    stable = np.mean((x.numpy() - extrapolated) * second) <= 0
    assert Sada().decide(step, kept, x, run) == ("noise-1" if stable else "whole")


def test_sada_skips_at_most_four_in_a_row_and_is_regular_at_the_end() -> None:
    run, kept = facts(), walk([1.0] * 12, [1.0] * 12, [float(t) for t in range(12)], [True] * 12)
    x = torch.ones(1, 4, 2, 3).double()
    chosen = []
    for step in range(12, 50):
        name = Sada().decide(step, kept, x, run)
        chosen.append(name)
        kept.trail.append(Point(float(step), 2.0, x, kept.trail[-1].noise, name == "whole"))
    print(chosen)
    assert chosen[:12] == ["noise-1"] * 4 + ["whole"] + ["noise-1"] * 4 + ["whole"] + ["noise-1"] * 2
    assert chosen[12:35] == [["whole", "latent-3", "latent-3", "latent-3"][n % 4] for n in range(23)]
    assert chosen[35:] == ["whole"] * 3


def test_easycache_by_brute_force() -> None:
    """Skips until the summed change is over the threshold; numbers worked out by hand, step by step."""
    rng = np.random.default_rng(3)
    run, size, method = facts(40), (1, 4, 3, 5), EasyCache(threshold=0.2)
    kept, decisions, expected = Kept(), [], []
    xs = np.cumsum(rng.normal(size=(40, *size)) * 0.05, axis=0) + rng.normal(size=size)
    noises = np.cumsum(rng.normal(size=(40, *size)) * 0.02, axis=0) + rng.normal(size=size)
    spent, rate, before = 0.0, math.nan, 0
    for step in range(40):
        scaled = [xs[n] / math.sqrt(1 + run.sigmas[n] ** 2) for n in range(step + 1)]
        x = torch.from_numpy(xs[step])
        decisions.append(method.decide(step, kept, x, run))
        skip = False
        if 6 <= step < 38 and step >= 2:
            moved = np.abs(scaled[step] - scaled[step - 1]).mean()
            spent += rate * moved / np.abs(noises[before]).mean()
            skip = spent < 0.2
        expected.append("residual" if skip else "whole")
        if not skip:
            if step > 0:
                rate = np.abs(noises[step] - noises[before]).mean() / np.abs(scaled[step] - scaled[before]).mean()
            before, spent = step, 0.0
        noise = torch.from_numpy(noises[step])
        kept.trail.append(Point(float(step), run.sigmas[step], x, noise, not skip))
    print(decisions)
    assert decisions == expected
    assert 3 < decisions.count("residual") < 32


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DeepCache(every=1), "every is 1, expected 2 or more"),
        (lambda: DeepCache(branch=-1), "branch is -1, expected 0 or more"),
        (lambda: TGate(branch="both"), "branch is 'both', expected conditional or unconditional"),
        (lambda: Zeus(end=5), "end is 5, expected 11 or more"),
        (lambda: Zeus(degree=5), "degree is 5, expected 1 to 4"),
        (lambda: Spaced(shallow=-1), "shallow is -1, expected 0"),
        (lambda: Given("WX"), "steps is 'WX', expected a letter a step out of"),
        (lambda: EasyCache(threshold=0), "threshold is 0, expected more than 0"),
        (lambda: EasyCache(start=0.9, end=0.5), "start is 0.9 and end 0.5"),
        (lambda: Interval(3, 1), "interval is 3 to 1"),
        (lambda: Until(share=1), "share is 1"),
        (lambda: Alternate(off="never"), "off is 'never', expected one of conditional, kept"),
        (lambda: Given("WWW").plans([StepPlan()] * 2, facts(2)), "steps has 3 letters for the 2 steps"),
        (lambda: Interval().plans([StepPlan()] * 2, facts(2, cfg=1.0)), "no guidance"),
    ],
)
def test_bad_settings(make: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()  # type: ignore[operator]
