"""FLOPs of a step, and of a whole picture, under step plans; bytes of what is kept between steps."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from minisdxl.config import ModelConfig
from minisdxl.cost import Kind, Work, count
from minisdxl.steps.plan import SHALLOW, WHOLE, StepPlan


class PictureCost(NamedTuple):
    """What the U-Net costs for one picture."""

    flops: int  # of all steps and both branches of guidance, without ranking and recovery
    ranking: int  # FLOPs of ranking and recovery, at most
    whole: int  # steps in which all blocks run
    shallow: int  # steps in which only the outer blocks run
    forecast: int  # steps in which none runs
    single: int  # steps in which the U-Net runs for one branch of guidance alone

    def steps(self) -> dict[str, int]:
        """The numbers of steps, for a report; nothing where all are whole, with both branches."""
        counts = {"whole_steps": self.whole, "shallow_steps": self.shallow, "forecast_steps": self.forecast}
        return {**counts, "single_branch_steps": self.single} if self.shallow or self.forecast or self.single else {}


def picture_cost(
    config: ModelConfig, height: int, width: int, plans: Sequence[StepPlan], text: int, cfg: float, calls: Sequence[int]
) -> PictureCost:
    """The cost of a picture with a latent of ``height`` x ``width`` and ``text`` tokens of context.

    ``calls`` is the number of U-Net calls in each step.
    """
    flops, ranking = 0, 0
    for (plan, times), many in Counter(zip(plans, calls, strict=True)).items():
        one, beside = step_cost(config, height, width, plan, text)
        halves = min(plan.halves, 1) if cfg == 1 else plan.halves
        flops, ranking = flops + many * times * halves * one, ranking + many * times * halves * beside
    kinds = Counter(plan.unet if plan.runs else "forecast" for plan in plans)
    single = sum(plan.halves == 1 for plan in plans)
    return PictureCost(flops, ranking, kinds[WHOLE], kinds[SHALLOW], kinds["forecast"], single)


def step_cost(config: ModelConfig, height: int, width: int, plan: StepPlan, text: int) -> tuple[int, int]:
    """FLOPs of one U-Net call for one latent, and beside them those of ranking and recovery."""
    works = step_works(config, height, width, plan, text)
    ranking = sum(work.flops for work in works if work.kind == Kind.RANKING)
    return sum(work.flops for work in works) - ranking, ranking


def step_works(config: ModelConfig, height: int, width: int, plan: StepPlan, text: int) -> tuple[Work, ...]:
    """What one U-Net call computes for one latent: nothing where the prediction is a forecast."""
    if not plan.runs:
        return ()
    reused = frozenset(
        kind for kind, state in (("self", plan.self_attention), ("cross", plan.cross_attention)) if state == "reused"
    )
    works = count(config, height, width, plan.tokens, text, reused).works
    return tuple(_outer(works, plan.branch or 0)) if plan.unet == SHALLOW else works


def _outer(works: Sequence[Work], branch: int) -> Iterator[Work]:
    """The works of the ``branch`` + 1 outermost blocks on both ways, and of what lies outside of all blocks."""
    last = max(int(work.name.split(".")[1]) for work in works if work.name.startswith("output_blocks."))
    outer = {f"input_blocks.{index}" for index in range(branch + 1)}
    outer |= {f"output_blocks.{last - index}" for index in range(branch + 1)}
    block = ""
    for work in works:  # in running order: an attention block follows a part of its numbered block
        if work.name.startswith(("input_blocks.", "output_blocks.", "middle_block.")):
            block = ".".join(work.name.split(".")[:2])
        if block in outer or work.name in ("time_embed", "label_emb", "out"):
            yield work


def kept_bytes(config: ModelConfig, height: int, width: int, plans: Sequence[StepPlan], bytes_each: int) -> int:
    """Bytes that a run keeps of one picture from step to step, without the latents of its trail."""
    unet, total = config.unet, 0
    for kind in ("self_attention", "cross_attention"):
        states = {getattr(plan, kind) for plan in plans}
        if states & {"kept", "averaged"}:
            halves = 1 if "averaged" in states else 2
            total += halves * sum(
                site.depth * site.channels * (-(-height >> site.level)) * (-(-width >> site.level))
                for site in unet.attention_sites()
            )
    for branch in {plan.branch for plan in plans if plan.branch is not None}:
        level, index = divmod(branch, unet.res_blocks + 1)
        below = min(level + (index == unet.res_blocks), len(unet.levels) - 1)  # where the channels come from
        total += 2 * unet.channels(below) * (-(-height >> level)) * (-(-width >> level))
    return total * bytes_each
