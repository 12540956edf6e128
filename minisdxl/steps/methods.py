"""Published methods that skip work from step to step, each as the plans of a run. Settings are those of the papers.

A method fills in what it decides and leaves the rest of each plan as it is, so that methods compose. Static ones know
all plans before the run; adaptive ones look at what has been evaluated.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from minisdxl.steps.forecast import lagrange, scaled
from minisdxl.steps.kept import Kept
from minisdxl.steps.plan import FORECASTS, SHALLOW, UNET_LETTERS, WHOLE, StepPlan


@dataclass(frozen=True)
class RunFacts:
    """What methods may know of a run before it starts."""

    steps: int  # of the whole schedule
    first: int  # the first one that is run: 0, except with an image
    sigmas: tuple[float, ...]  # noise levels of all steps
    cfg: float  # guidance scale
    fresh_noise: bool  # whether the solver adds noise: not an ODE solver

    @property
    def numbers(self) -> range:
        """The steps that are run."""
        return range(self.first, self.steps)

    def check_ode(self, method: str) -> None:
        """Raises ``ValueError`` for a solver that adds noise, under which predictions do not follow a smooth path."""
        if self.fresh_noise:
            raise ValueError(
                f"{method} forecasts predictions, which needs a solver of the ODE, such as euler or dpm++-2m; "
                "this sampling adds fresh noise at every step"
            )


Plans = list[StepPlan]


class Static(Protocol):
    """A method that knows its plans before the run."""

    def plans(self, base: Plans, facts: RunFacts) -> Plans:
        """The plans of the steps that are run, made out of those of ``base``.

        Raises ``ValueError`` where the method does not fit the run.
        """


@runtime_checkable
class Adaptive(Protocol):
    """A method that decides at each step, from what the run has seen of one picture."""

    def decide(self, step: int, kept: Kept, x: Tensor, facts: RunFacts) -> str:
        """``StepPlan.unet`` of a step, counted from the first that is run, which starts from ``x`` (1, C, H, W)."""


@dataclass(frozen=True)
class DeepCache:
    """Whole steps at every N-th, between them only what lies outside of a skip branch (CVPR 2024, arXiv:2312.00858)."""

    every: int = 3
    branch: int = 0

    def __post_init__(self) -> None:
        _at_least(self, every=2, branch=0)

    def plans(self, base: Plans, facts: RunFacts) -> Plans:
        """See :class:`Static`."""
        return [
            replace(plan, unet=SHALLOW if (step - facts.first) % self.every else WHOLE, branch=self.branch)
            for step, plan in zip(facts.numbers, base, strict=True)
        ]


@dataclass(frozen=True)
class TGate:
    """From step ``gate`` on, cross-attention is that of the step before it, and guidance is off (arXiv:2404.02747).

    Before it, from step ``warm`` on, self-attention is computed at every ``every``-th step alone. After the gate the
    unconditional branch runs, whose text no longer matters: only its pooled embedding does. That is what the authors'
    code for SDXL does; ``branch=conditional`` takes the other.
    """

    gate: int = 10  # of 25 steps, as all numbers here; other numbers of steps are scaled
    warm: int = 2
    every: int = 5
    branch: str = "unconditional"

    def __post_init__(self) -> None:
        _at_least(self, gate=1, warm=0, every=1)
        if self.branch not in ("conditional", "unconditional"):
            raise ValueError(f"branch is {self.branch!r}, expected conditional or unconditional")

    def plans(self, base: Plans, facts: RunFacts) -> Plans:
        """See :class:`Static`."""
        plans = []
        for index, plan in enumerate(base):
            if index >= self.gate:
                guidance = "both" if facts.cfg == 1 else self.branch
                plans.append(replace(plan, cross_attention="reused", guidance=guidance))
                continue
            last = index == self.gate - 1
            fresh = last or index <= self.warm or index % self.every == 0
            kept = "kept" if index >= self.warm and self.every > 1 and not last else "computed"
            cross = ("kept" if facts.cfg == 1 else "averaged") if last else "computed"
            plans.append(replace(plan, self_attention=kept if fresh else "reused", cross_attention=cross))
        return plans


@dataclass(frozen=True)
class Zeus:
    """One evaluation in three; the steps between are forecast, in turn linear and the last again (arXiv:2604.01552).

    From step ``lagrange`` on, forecasts follow the denoised latent by a polynomial of degree ``degree``. Steps count in
    50ths of the run. NOTE: the linear forecast is the line through the last two evaluations, wherever they are; the
    authors' 2 e_0 - e_1 is the same for neighbours.
    """

    start: int = 10
    end: int = 45
    every: int = 3
    lagrange: int = 24
    degree: int = 2

    def __post_init__(self) -> None:
        _at_least(self, start=2, end=self.start + 1, every=2, lagrange=0, degree=1)
        if self.degree > 4:
            raise ValueError(f"degree is {self.degree}, expected 1 to 4")

    def plans(self, base: Plans, facts: RunFacts) -> Plans:
        """See :class:`Static`."""
        facts.check_ode("zeus")
        plans, skipped, evaluations = [], 0, 0
        for step, plan in zip(facts.numbers, base, strict=True):
            inside = _of_50(self.start, facts) <= step < _of_50(self.end, facts)
            if not inside or evaluations <= self.degree or skipped == self.every - 1:
                plans.append(plan)
                skipped, evaluations = 0, evaluations + 1
                continue
            late = step >= _of_50(self.lagrange, facts)
            plans.append(replace(plan, unet=f"latent-{self.degree}" if late else f"noise-{1 - skipped % 2}"))
            skipped += 1
        return plans


@dataclass(frozen=True)
class Spaced:
    """A share of the steps is evaluated; between them the denoised latent follows a line in sigma.

    Of this project. Evaluation k of K is at the share (k / (K - 1)) ** ``power`` of the steps: above 1 they lie closer
    at high noise. Until two are there, the last denoised latent is taken again. With ``shallow`` N, one in N of the
    other steps is shallow instead (as DeepCache's, at branch 0), and forecasts go on from it.
    """

    share: float = 0.32
    power: float = 1.4
    shallow: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.share < 1:
            raise ValueError(f"share is {self.share}, expected more than 0 and less than 1")
        if not 0.2 <= self.power <= 5:
            raise ValueError(f"power is {self.power}, expected 0.2 to 5")
        if self.shallow < 0:
            raise ValueError(f"shallow is {self.shallow}, expected 0 for no shallow step, or 1 or more")

    def plans(self, base: Plans, facts: RunFacts) -> Plans:
        """See :class:`Static`."""
        facts.check_ode("spaced")
        count, last = max(2, round(self.share * len(base))), len(base) - 1
        evaluated = {round(last * (k / (count - 1)) ** self.power) for k in range(count)}
        between = [index for index in range(len(base)) if index not in evaluated]
        shallow = set(between[self.shallow - 1 :: self.shallow]) if self.shallow else set()
        branch, plans = 0 if shallow else None, Plans()
        for index, plan in enumerate(base):
            if index in evaluated:
                plans.append(replace(plan, branch=branch))
            elif index in shallow:
                plans.append(replace(plan, unet=SHALLOW, branch=branch))
            else:
                points = sum(each.runs for each in plans)
                plans.append(replace(plan, unet="sigma-1" if points > 1 else "latent-0", branch=branch))
        return plans


@dataclass(frozen=True)
class Given:
    """Each step as its letter says: W whole, S shallow, others a forecast (``minisdxl/steps/plan.py``).

    It is how the plans of an adaptive method, or found by a search, are written down and run again.
    """

    steps: str
    branch: int = 0

    def __post_init__(self) -> None:
        unknown = sorted(set(self.steps) - set(UNET_LETTERS))
        if unknown or not self.steps:
            raise ValueError(f"steps is {self.steps!r}, expected a letter a step out of {''.join(UNET_LETTERS)}")

    def plans(self, base: Plans, facts: RunFacts) -> Plans:
        """See :class:`Static`. Raises ``ValueError`` for another number of steps."""
        if len(self.steps) != len(base):
            raise ValueError(f"steps has {len(self.steps)} letters for the {len(base)} steps of the run")
        names = [UNET_LETTERS[letter] for letter in self.steps]
        if set(names) & set(FORECASTS):
            facts.check_ode("given")
        branch = self.branch if SHALLOW in names else None
        return [replace(plan, unet=name, branch=branch) for plan, name in zip(base, names, strict=True)]


@dataclass(frozen=True)
class Sada:
    """Skips a step where the path of the latent is stable (SADA, ICML 2025); late ones at fixed intervals.

    With y the noise, dx/dsigma, and x^ the parabola through the last three latents, a step is stable if the mean of
    (x - x^) times the second difference of y is 0 or less: the step rule of the paper, not its token-wise part. From
    step ``lagrange`` on, every ``every``-th step is evaluated, and the denoised latent is followed by a polynomial
    through four evaluations. Steps count in 50ths of the run.
    """

    start: int = 10
    end: int = 47
    most: int = 4  # skipped steps in a row
    lagrange: int = 24
    every: int = 4

    def __post_init__(self) -> None:
        _at_least(self, start=3, end=self.start + 1, most=1, lagrange=0, every=2)

    def decide(self, step: int, kept: Kept, x: Tensor, facts: RunFacts) -> str:
        """See :class:`Adaptive`."""
        number = facts.first + step
        if not _of_50(self.start, facts) <= number < _of_50(self.end, facts) or len(kept.past) < 4:
            return WHOLE
        if (late := _of_50(self.lagrange, facts)) <= number:
            return WHOLE if (number - late) % self.every == 0 else "latent-3"
        last = kept.trail[-3:]
        weights = lagrange([point.time for point in last], step)
        extrapolated = sum((weight * point.x for weight, point in zip(weights, last, strict=True)), torch.zeros_like(x))
        second = last[2].noise - 2 * last[1].noise + last[0].noise
        skipped = len(kept.since())
        return "noise-1" if skipped < self.most and float(((x - extrapolated) * second).mean()) <= 0 else WHOLE


@dataclass(frozen=True)
class EasyCache:
    """Skips steps until the output is expected to have changed by ``threshold`` (arXiv:2507.02860; as in ComfyUI).

    The change is |change of the input| times the rate |change of the output| / |change of the input| of the last two
    evaluations, relative to |output|, summed over skipped steps. A skipped step adds the network's last residual.
    """

    threshold: float = 0.2
    start: float = 0.15  # shares of the steps between which it may skip
    end: float = 0.95

    def __post_init__(self) -> None:
        if not self.threshold > 0:
            raise ValueError(f"threshold is {self.threshold}, expected more than 0")
        if not 0 <= self.start < self.end <= 1:
            raise ValueError(f"start is {self.start} and end {self.end}, expected 0 <= start < end <= 1")

    def decide(self, step: int, kept: Kept, x: Tensor, facts: RunFacts) -> str:
        """See :class:`Adaptive`."""
        number = facts.first + step
        if not self.start * facts.steps <= number < self.end * facts.steps or len(kept.past) < 2:
            return WHOLE
        before, last = kept.past[-2:]
        rate = _size(last.noise - before.noise) / _size(scaled(last.x, last.sigma) - scaled(before.x, before.sigma))
        inputs = [scaled(point.x, point.sigma) for point in (last, *kept.since())] + [scaled(x, facts.sigmas[number])]
        moved = sum(_size(now - earlier) for earlier, now in pairwise(inputs))
        return WHOLE if rate * moved / _size(last.noise) >= self.threshold else "residual"


def _size(values: Tensor) -> float:
    return float(values.abs().mean())


def _of_50(step: int, facts: RunFacts) -> int:
    """Step ``step`` of 50 in a run of another number of steps, rounded."""
    return round(step * facts.steps / 50)


def _at_least(method: object, **least: int) -> None:
    for name, number in least.items():
        if getattr(method, name) < number:
            raise ValueError(f"{name} is {getattr(method, name)}, expected {number} or more")
