"""The denoiser of a run under step plans: some steps are shallow or forecast, or leave out a branch of guidance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from minisdxl.config import NoiseConfig
from minisdxl.preconditioning import preconditioner
from minisdxl.sampler import Denoiser, NoisePredictor, UNetInputs, denoise
from minisdxl.steps.evaluate import Tensors, evaluator
from minisdxl.steps.forecast import Point, forecast
from minisdxl.steps.kept import Kept
from minisdxl.steps.plan import StepPlan
from minisdxl.transformer import ContextKV
from minisdxl.unet import PromptKV

Realized = list[Sequence[StepPlan]] | None  # gets the plans of each picture as they were carried out
Branches = tuple[str, ...]  # of guidance, in the order in which the U-Net gets them
BRANCHES: Mapping[str, Branches] = {
    "both": ("unconditional", "conditional"),
    "conditional": ("conditional",),
    "unconditional": ("unconditional",),
    "kept": ("conditional",),
}


class Planner(Protocol):
    """Gives the plan of each step of a run."""

    @property
    def adaptive(self) -> bool:
        """Whether plans depend on the picture. Then each picture of a batch is evaluated by itself."""

    def plan(self, step: int, kept: Kept, x: Tensor) -> StepPlan:
        """The plan of step ``step``, for the latent ``x`` (B, C, H, W) that it starts from."""


def planned_denoiser(
    unet: NoisePredictor[PromptKV],
    conditional: UNetInputs,
    unconditional: UNetInputs,
    scale: float,
    planner: Planner,
    noise: NoiseConfig,
    sigmas: Sequence[float],
    realized: Realized = None,
) -> Denoiser:
    """D(x; sigma) as :func:`minisdxl.sampler.guided_denoiser`, under the step plans of ``planner``.

    ``sigmas`` are the noise levels of all steps of the run. The plans that were carried out are added to ``realized``,
    a list for each picture.
    """
    pictures = len(conditional.context)
    groups = [slice(row, row + 1) for row in range(pictures)] if planner.adaptive else [slice(0, pictures)]
    runs = [_Run(unet, conditional, unconditional, scale, planner, noise, sigmas, rows) for rows in groups]
    if realized is not None:
        realized += [run.kept.plans for run in runs for _ in range(pictures // len(runs))]

    def denoiser(x: Tensor, sigma: float, step: int) -> Tensor:
        return torch.cat([run(x[run.rows], sigma, step) for run in runs])

    return denoiser


class _Run:
    """The denoiser of the pictures ``rows`` of a batch, which share all plans and what is kept."""

    def __init__(
        self,
        unet: NoisePredictor[PromptKV],
        conditional: UNetInputs,
        unconditional: UNetInputs,
        scale: float,
        planner: Planner,
        noise: NoiseConfig,
        sigmas: Sequence[float],
        rows: slice,
    ) -> None:
        self.scale, self.planner, self.rows = scale, planner, rows
        self.evaluate = evaluator(unet)
        self.preconditioning, self.sigmas = preconditioner(noise), list(sigmas)
        inputs = {"unconditional": unconditional, "conditional": conditional}
        if scale == 1:
            del inputs["unconditional"]
        self.dtype = conditional.context.dtype
        self.vectors = {name: each.vector[rows] for name, each in inputs.items()}
        texts = {name: unet.project_context(each.context[rows]) for name, each in inputs.items()}
        self.texts: dict[Branches, PromptKV] = {(name,): text for name, text in texts.items()}
        if len(texts) == 2:
            self.texts[BRANCHES["both"]] = _joined([texts[name] for name in BRANCHES["both"]])
        self.kept, self.step = Kept(), -1

    def __call__(self, x: Tensor, sigma: float, step: int) -> Tensor:
        if step != self.step:  # a solver of second order calls twice a step
            self.step = step
            self.kept.plans.append(self.planner.plan(step, self.kept, x))
        plan = self.kept.plans[-1]
        time = float(step if sigma == self.sigmas[step] else step + 1)
        if plan.runs:
            denoised = self._guided(self._branches(x, sigma, plan), sigma, plan)
        else:
            denoised = x - sigma * forecast(plan.unet, self.kept.past, time, x, sigma)
        self.kept.trail.append(Point(time, sigma, x, (x - denoised) / sigma, plan.runs))
        return denoised

    def _branches(self, x: Tensor, sigma: float, plan: StepPlan) -> dict[str, Tensor]:
        """D(x; sigma) of each branch of guidance that runs."""
        branches = tuple(name for name in BRANCHES[plan.guidance] if name in self.vectors)
        text = self.texts[branches]
        vector = torch.cat([self.vectors[name] for name in branches])
        new: Tensors = {}

        def network(scaled: Tensor, c_noise: Tensor) -> Tensor:
            inputs = scaled.to(self.dtype), c_noise, text, vector
            predicted, found = self.evaluate(plan, *inputs, self.kept.take(branches))
            new.update(found)
            return predicted.float()

        denoised = denoise(network, torch.cat([x] * len(branches)), sigma, self.preconditioning)
        averaged = {kind for kind in ("self", "cross") if getattr(plan, f"{kind}_attention") == "averaged"}
        self.kept.put(new, branches, frozenset(averaged))
        return dict(zip(branches, denoised.chunk(len(branches)), strict=True))

    def _guided(self, denoised: dict[str, Tensor], sigma: float, plan: StepPlan) -> Tensor:
        """Classifier-free guidance, u + scale (c - u), from the branches that ran."""
        if len(denoised) == 2:
            u, c = denoised["unconditional"], denoised["conditional"]
            self.kept.difference = (u - c) / sigma  # of the noise: conditional less unconditional
            return u + self.scale * (c - u)
        (one,) = denoised.values()
        if plan.guidance != "kept" or self.kept.difference is None:
            return one
        return one - (self.scale - 1) * sigma * self.kept.difference


def _joined(texts: list[PromptKV]) -> PromptKV:
    """Keys and values of several branches of guidance as one batch."""

    def layers(name: str) -> list[ContextKV]:
        parts = zip(*(text[name] for text in texts), strict=True)
        return [ContextKV(*map(torch.cat, zip(*layer, strict=True))) for layer in parts]

    return {name: layers(name) for name in texts[0]}
