"""Where guidance is worth its second call of the U-Net: methods that leave it out at some steps."""

from __future__ import annotations

from dataclasses import dataclass, replace

from minisdxl.steps.methods import Plans, RunFacts
from minisdxl.steps.plan import GUIDANCE_LETTERS


def _check_guided(method: str, facts: RunFacts) -> None:
    if facts.cfg == 1:
        raise ValueError(f"{method} would change nothing: the run has no guidance (cfg is 1)")


OFF = ("conditional", "kept")


def _check_off(off: str) -> None:
    if off not in OFF:
        raise ValueError(f"off is {off!r}, expected one of {', '.join(OFF)}")


@dataclass(frozen=True)
class Interval:
    """Guidance for noise levels in (low, high] alone (arXiv:2404.07724; for SDXL section 4.3)."""

    low: float = 0.28
    high: float = 5.42
    off: str = "conditional"  # elsewhere: the conditional branch alone, or with the last difference "kept"

    def __post_init__(self) -> None:
        if not 0 <= self.low < self.high:
            raise ValueError(
                f"interval is {self.low} to {self.high}, expected noise levels, 0 or more, the lower first"
            )
        _check_off(self.off)

    def plans(self, base: Plans, facts: RunFacts) -> Plans:
        """See :class:`Static`."""
        _check_guided("interval", facts)
        inside = [self.low < facts.sigmas[step] <= self.high for step in facts.numbers]
        first = inside.index(True) if True in inside else len(inside)  # before it there is no difference to keep
        off = ["conditional" if index < first else self.off for index in range(len(inside))]
        return [
            plan if guided or not plan.runs else replace(plan, guidance=without)
            for plan, guided, without in zip(base, inside, off, strict=True)
        ]


@dataclass(frozen=True)
class Until:
    """Guidance in the first ``share`` of the steps alone (Step AG, arXiv:2506.08351)."""

    share: float = 0.4
    off: str = "conditional"

    def __post_init__(self) -> None:
        if not 0 <= self.share < 1:
            raise ValueError(f"share is {self.share}, expected 0 or more, less than 1")
        _check_off(self.off)

    def plans(self, base: Plans, facts: RunFacts) -> Plans:
        """See :class:`Static`."""
        _check_guided("until", facts)
        last = round(self.share * facts.steps)
        return [
            replace(plan, guidance=self.off) if step >= last and plan.runs else plan
            for step, plan in zip(facts.numbers, base, strict=True)
        ]


@dataclass(frozen=True)
class Alternate:
    """Guidance at one in ``every`` evaluations, from noise level ``below`` on (web UIs: NGMS, every second step)."""

    every: int = 2
    below: float = 1e9
    off: str = "kept"

    def __post_init__(self) -> None:
        if self.every < 2:
            raise ValueError(f"every is {self.every}, expected 2 or more")
        if not self.below > 0:
            raise ValueError(f"below is {self.below}, expected a noise level above 0")
        _check_off(self.off)

    def plans(self, base: Plans, facts: RunFacts) -> Plans:
        """See :class:`Static`."""
        _check_guided("alternate", facts)
        plans, evaluations = [], 0
        for step, plan in zip(facts.numbers, base, strict=True):
            if plan.runs and facts.sigmas[step] <= self.below:
                plans.append(replace(plan, guidance=self.off) if evaluations % self.every else plan)
                evaluations += 1
            else:
                plans.append(plan)
        return plans


@dataclass(frozen=True)
class GivenGuidance:
    """Each step as its letter says: B both branches, C or U one, K the conditional one and the last difference."""

    steps: str

    def __post_init__(self) -> None:
        unknown = sorted(set(self.steps) - {*GUIDANCE_LETTERS, "-"})
        if unknown or not self.steps:
            raise ValueError(f"steps is {self.steps!r}, expected a letter a step out of {''.join(GUIDANCE_LETTERS)}-")

    def plans(self, base: Plans, facts: RunFacts) -> Plans:
        """See :class:`Static`. Raises ``ValueError`` for another number of steps."""
        _check_guided("given", facts)
        if len(self.steps) != len(base):
            raise ValueError(f"steps has {len(self.steps)} letters for the {len(base)} steps of the run")
        return [
            plan if letter == "-" else replace(plan, guidance=GUIDANCE_LETTERS[letter])
            for plan, letter in zip(base, self.steps, strict=True)
        ]
