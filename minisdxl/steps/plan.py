"""Step plans: what the denoiser does at one step, as data, beside the token plan of that step.

Like token plans they are printed, compared, counted and tested without a model. A list of them is the plan of a run.
What is kept between steps lies in :class:`~minisdxl.steps.kept.Kept`, which the run makes and drops.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from atedm.plan import DENSE, TokenPlan
from minisdxl.config import UNetConfig

WHOLE, SHALLOW = "whole", "shallow"
# Forecasts of the prediction where the U-Net does not run: minisdxl/steps/forecast.py.
FORECASTS = (
    *("noise-0", "noise-1", "noise-2"),
    *("latent-0", "latent-1", "latent-2", "latent-3", "latent-4"),
    *("sigma-1", "residual"),
)
GUIDANCE = ("both", "conditional", "unconditional", "kept")
ATTENTION = ("computed", "kept", "averaged", "reused")

# One letter a step, in which plans are printed and read.
UNET_LETTERS = dict(zip("WSrlq01234ne", (WHOLE, SHALLOW, *FORECASTS), strict=True))
GUIDANCE_LETTERS = dict(zip("BCUK", GUIDANCE, strict=True))


@dataclass(frozen=True)
class StepPlan:
    """What the denoiser does at one step. The default is a dense step: all blocks, both branches of guidance.

    Raises ``ValueError`` for an unknown name, and for a shallow step without ``branch``.
    """

    tokens: TokenPlan = DENSE
    unet: str = WHOLE  # "whole", "shallow": outside of skip ``branch`` alone; or a forecast, and no block runs
    branch: int | None = None  # a whole step keeps what comes up to this skip connection, a shallow one takes it
    guidance: str = "both"  # the branches that run; "kept": the conditional one, and the last difference of both again
    self_attention: str = "computed"  # "kept": for later; "averaged": kept as the mean of both branches; "reused"
    cross_attention: str = "computed"  # likewise

    def __post_init__(self) -> None:
        for name, known in (
            ("unet", (WHOLE, SHALLOW, *FORECASTS)),
            ("guidance", GUIDANCE),
            ("self_attention", ATTENTION),
            ("cross_attention", ATTENTION),
        ):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} is {getattr(self, name)!r}, expected one of {', '.join(known)}")
        if self.unet == SHALLOW and self.branch is None:
            raise ValueError("a shallow step has no branch, expected the number of a skip connection")

    @property
    def runs(self) -> bool:
        """Whether the U-Net runs at all."""
        return self.unet in (WHOLE, SHALLOW)

    @property
    def halves(self) -> int:
        """How many latents go through the U-Net for each picture: one for each branch of guidance."""
        return 0 if not self.runs else 2 if self.guidance == "both" else 1


def describe(plans: Sequence[StepPlan]) -> str:
    """The plans of a run in one line: a letter a step for the U-Net, and for guidance where it is not always both."""
    unet = "".join(_letter(UNET_LETTERS, plan.unet) for plan in plans)
    if all(plan.guidance == "both" for plan in plans if plan.runs):
        return unet
    return f"{unet} {''.join(_letter(GUIDANCE_LETTERS, plan.guidance) if plan.runs else '-' for plan in plans)}"


def _letter(letters: dict[str, str], name: str) -> str:
    return next(letter for letter, known in letters.items() if known == name)


def check_run(plans: Sequence[StepPlan], cfg: float, unet: UNetConfig) -> None:
    """Raises ``ValueError`` for a step that takes what no step before it has kept, or a branch that is not there."""
    branches = len(unet.levels) * (unet.res_blocks + 1) - 1
    deep: dict[int, str] = {}  # branch -> guidance of the last whole step that kept it
    kept: dict[str, str] = {}  # kind of attention -> guidance with which it was kept
    evaluations, difference = 0, False
    for step, plan in enumerate(plans):
        if cfg == 1 and plan.guidance not in ("both", "conditional"):
            raise ValueError(f"step {step} has guidance {plan.guidance}, which does nothing at cfg 1")
        if plan.branch is not None and not 0 <= plan.branch < branches:
            raise ValueError(f"branch is {plan.branch}, expected 0 to {branches - 1}: the skip connections")
        if not plan.runs:
            needed = _points(plan.unet)
            if evaluations < needed:
                raise ValueError(
                    f"step {step} is a forecast from {needed} evaluations, of which there are {evaluations} before it"
                )
            continue
        if plan.unet == SHALLOW:
            _check_guidance(f"step {step} is shallow at branch {plan.branch}", plan, deep.get(plan.branch or 0), cfg)
        elif plan.branch is not None:
            deep[plan.branch] = plan.guidance
        for kind in ("self_attention", "cross_attention"):
            state = getattr(plan, kind)
            if state == "reused":
                _check_guidance(f"step {step} reuses {kind.replace('_', '-')}", plan, kept.get(kind), cfg)
            elif state == "averaged":
                kept[kind] = "averaged"
            elif state == "kept":
                kept[kind] = plan.guidance
        if plan.guidance == "kept" and not difference:
            raise ValueError(f"step {step} takes the last difference of guidance, and no step before it has one")
        difference |= plan.guidance == "both"
        evaluations += 1


def _check_guidance(what: str, plan: StepPlan, before: str | None, cfg: float) -> None:
    """What was kept must have the branches that run now. At ``cfg`` 1 there is one branch alone."""
    if before is None:
        raise ValueError(f"{what}, and no step before it has kept that")
    one = ("conditional", "kept")
    same = before == plan.guidance or (before in one and plan.guidance in one)
    if cfg != 1 and not same and before != "both" and not (before == "averaged" and plan.halves == 1):
        raise ValueError(f"{what} with guidance {plan.guidance}, and what was kept has {before}")


def _points(forecast: str) -> int:
    """How many evaluations a forecast is made from."""
    return 1 if forecast == "residual" else int(forecast.rpartition("-")[2]) + 1
