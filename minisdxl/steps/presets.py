"""Step methods by name, their text form (``deepcache:every=3``), and composed presets of tokens, steps and guidance."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

from torch import Tensor

from atedm.plan import TokenPlan
from atedm.pruning import WITH_HISTORY
from minisdxl.config import UNetConfig
from minisdxl.steps.guides import Alternate, GivenGuidance, Interval, Until
from minisdxl.steps.kept import Kept
from minisdxl.steps.methods import (
    Adaptive,
    DeepCache,
    EasyCache,
    Given,
    Plans,
    RunFacts,
    Sada,
    Spaced,
    Static,
    TGate,
    Zeus,
)
from minisdxl.steps.plan import GUIDANCE_LETTERS, SHALLOW, UNET_LETTERS, WHOLE, StepPlan, check_run

SKIPS: dict[str, Callable[..., Static | Adaptive]] = {
    "deepcache": DeepCache,
    "tgate": TGate,
    "zeus": Zeus,
    "sada": Sada,
    "easycache": EasyCache,
    "spaced": Spaced,
    "given": Given,
}
GUIDES: dict[str, Callable[..., Static]] = {
    "interval": Interval,
    "until": Until,
    "alternate": Alternate,
    "given": GivenGuidance,
}


class Composed(NamedTuple):
    """A preset of tokens, steps and guidance together; what is ``None`` stays as it is."""

    about: str
    prune: str | None = None
    skip: str | None = None
    guide: str | None = None


FAST: dict[str, Composed] = {
    "faithful": Composed("close to the dense picture: 32 % of the steps evaluated", skip="spaced:share=0.32"),
    "fast": Composed("cheaper: 22 % of the steps evaluated", skip="spaced:share=0.22"),
}


def parse_skip(text: str) -> Static | Adaptive:
    """The method of a text as ``deepcache:every=3``. Raises ``ValueError`` for an unknown name or setting."""
    return _parse("skip", SKIPS, text)


def parse_guide(text: str) -> Static:
    """The method of a text as ``interval:0.28-5.42``. Raises ``ValueError`` for an unknown name or setting."""
    return _parse("guide", GUIDES, text)


def _parse(what: str, known: Mapping[str, Callable[..., Any]], text: str) -> Any:
    name, colon, settings = text.partition(":")
    if name not in known:
        raise ValueError(f"unknown {what} method {name!r}, expected one of {', '.join(known)}")
    types = {each.name: str(each.type) for each in fields(known[name])}  # type: ignore[arg-type]
    values: dict[str, Any] = {}
    for setting in settings.split(",") if colon else []:
        for key, value in _named(name, setting):
            if key not in types:
                raise ValueError(f"unknown setting {setting!r} of {name}, expected {', '.join(types)}")
            if key in values:
                raise ValueError(f"setting {key} of {name} is given twice")
            values[key] = _value(name, key, value, types[key])
    try:
        return known[name](**values)
    except TypeError:
        raise ValueError(f"{what} method {name} has no {', '.join(types)}, expected it after a colon") from None
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def _named(method: str, setting: str) -> list[tuple[str, str]]:
    """The settings that a piece of text gives: key=value, an interval's LOW-HIGH, or the letters of given steps."""
    key, equals, value = setting.partition("=")
    if equals:
        return [(key, value)]
    if method == "interval" and (found := re.fullmatch(r"([0-9.]+)-([0-9.]+)", setting)):
        return [("low", found[1]), ("high", found[2])]
    if method == "given":
        return [("steps", setting)]
    return [(setting, "")]


def _value(method: str, key: str, value: str, kind: str) -> int | float | str:
    try:
        return {"int": int, "float": float, "str": str}[kind](value)
    except ValueError:
        wanted = {"int": "a whole number", "float": "a number"}[kind]
        raise ValueError(f"setting {key} of {method} is {value!r}, expected {wanted}") from None


@dataclass(frozen=True)
class RunPlanner:
    """The plans of a run: ``base`` of all steps that are run, which an adaptive method may change at each step."""

    base: tuple[StepPlan, ...]
    facts: RunFacts
    method: Adaptive | None = None

    @property
    def adaptive(self) -> bool:
        """Whether plans depend on the picture."""
        return self.method is not None

    def plan(self, step: int, kept: Kept, x: Tensor) -> StepPlan:
        """See :class:`minisdxl.steps.denoiser.Planner`."""
        plan = self.base[step]
        return plan if self.method is None else replace(plan, unet=self.method.decide(step, kept, x, self.facts))


def plan_run(
    unet: UNetConfig,
    tokens: Sequence[TokenPlan],
    facts: RunFacts,
    skip: str | Static | Adaptive | None,
    guide: str | Static | None,
) -> RunPlanner:
    """Composes the plans of a run from the ``tokens`` of its steps, a method that skips work and one for guidance.

    A step in which guidance sets in is made whole where it would be shallow: the steps before it have kept one branch.
    Raises ``ValueError`` for a method that is unknown, does not fit the run, or would change nothing in it.
    """
    skipper = parse_skip(skip) if isinstance(skip, str) else skip
    guider = parse_guide(guide) if isinstance(guide, str) else guide
    dense: Plans = [StepPlan(plan) for plan in tokens]
    plans, method = dense, None
    if skipper is not None:
        if isinstance(skipper, Adaptive):
            facts.check_ode(_name(skip))
            method = skipper
        else:
            plans = skipper.plans(plans, facts)
            if plans == dense or not any(_skips(plan) for plan in plans):
                raise ValueError(f"{_name(skip)} would change nothing: none of the {len(dense)} steps skips any work")
    if guider is not None:
        guided = guider.plans(plans, facts)
        if any(plan.guidance != "both" for plan in plans):
            raise ValueError(f"{_name(skip)} sets the guidance itself, expected no {_name(guide)} beside it")
        if guided == plans:
            raise ValueError(f"{_name(guide)} would change nothing: guidance stays on at all {len(plans)} steps")
        plans = _whole_where_guidance_sets_in(guided)
    check_run(plans, facts.cfg, unet)
    return RunPlanner(tuple(plans), facts, method)


def with_history(tokens: TokenPlan) -> bool:
    """Whether a token plan recovers tokens by what earlier steps have kept."""
    layers = (layer for block in tokens.values() for _, layer in block.layers)
    return any(layer.pruning is not None and layer.pruning.recovery in WITH_HISTORY for layer in layers)


def _skips(plan: StepPlan) -> bool:
    return plan.unet != WHOLE or plan.guidance != "both" or "reused" in (plan.self_attention, plan.cross_attention)


def _whole_where_guidance_sets_in(plans: Plans) -> Plans:
    settled, kept = [], "both"
    for plan in plans:
        if plan.unet == SHALLOW and plan.guidance == "both" and kept != "both":
            plan = replace(plan, unet=WHOLE)
        if plan.unet == WHOLE:
            kept = plan.guidance
        settled.append(plan)
    return settled


def _name(method: object) -> str:
    return method if isinstance(method, str) else type(method).__name__


LETTERS = (
    "W whole, S shallow, "
    + ", ".join(f"{letter} {name}" for letter, name in UNET_LETTERS.items() if name not in (WHOLE, SHALLOW))
    + "; guidance "
    + ", ".join(f"{letter} {name}" for letter, name in GUIDANCE_LETTERS.items())
)
