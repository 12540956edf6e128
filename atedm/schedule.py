"""Which attention blocks reduce their tokens, how, and at which denoising step: schedules make plans.

Source: the AT-EDM paper, sections 3.3 (denoising-steps-aware pruning, DSAP), 4.1 (its numbers) and 4.3 (AT-EDM-dagger).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from atedm.merging import Merging
from atedm.plan import BlockPlan, Site, TokenPlan
from atedm.pruning import Pruning

EARLY = ("less", "more")


@dataclass(frozen=True)
class Schedule:
    """A method of token reduction over all steps of a sampling run.

    ``method`` is what every attention block does unless told otherwise: a :class:`Pruning` or a :class:`Merging`.
    DSAP: of every 50 steps the first ``tau`` treat the ends of the U-Net in another way than the rest do. With ``early``
    "less" the early steps leave them untouched, the paper's prune-less schedule; with "more" it is the later steps that
    do. ``ends`` are the blocks in question, ``None`` for the paper's: the first of each down-stage and the last of each
    up-stage. ``spared`` blocks are never touched; ``spare_largest`` spares those of the level with the most tokens.
    ``ratios`` gives single blocks another ratio. Pruning happens in the layers ``layers``.

    Raises ``ValueError`` for values out of range.
    """

    name: str
    method: Pruning | Merging
    tau: int = 15  # section 4.1
    early: str = "less"
    ends: tuple[str, ...] | None = None
    spared: tuple[str, ...] = ()
    spare_largest: bool = False  # AT-EDM-dagger, section 4.3: the second feature level is not pruned
    ratios: tuple[tuple[str, float], ...] = ()
    layers: tuple[int, ...] = (0,)  # section 4.1; more than one repeats the pruning, step 5 of section 3.1
    before_feed_forward: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.tau <= 50:
            raise ValueError(f"tau is {self.tau}, expected 0 to 50: early steps of every 50")
        if self.early not in EARLY:
            raise ValueError(f"early is {self.early!r}, expected one of {', '.join(EARLY)}")
        if not self.layers or len(set(self.layers)) < len(self.layers):
            raise ValueError(f"layers is {self.layers}, expected one or more different layers")
        for _, ratio in self.ratios:
            replace(self.method, ratio=ratio)  # checks it

    def early_steps(self, steps: int) -> int:
        """How many of ``steps`` denoising steps are early: the first round(tau * steps / 50)."""
        return round(self.tau * steps / 50)

    def plan(self, step: int, steps: int, sites: Iterable[Site]) -> TokenPlan:
        """The token plan of denoising step ``step`` (from 0, the noisiest) of ``steps``.

        Raises ``ValueError`` for a step that is none of the ``steps``, for names of blocks that are not there, and if
        nothing would be reduced although a ratio is above 0.
        """
        if not 0 <= step < steps:
            raise ValueError(f"step is {step}, expected 0 to {steps - 1} for {steps} steps")
        sites = list(sites)
        ratios = dict(self.ratios)
        named = {*(self.ends or ()), *self.spared, *ratios}
        unknown = named - {site.name for site in sites}
        if unknown:
            raise ValueError(
                f"{self.name} names {', '.join(sorted(unknown))}, expected attention blocks out of "
                f"{', '.join(site.name for site in sites)}"
            )
        untouched = {*self.spared, *(_largest(sites) if self.spare_largest else ())}
        is_early = step < self.early_steps(steps)
        if self.tau > 0 and is_early == (self.early == "less"):
            untouched |= _ends(sites) if self.ends is None else set(self.ends)
        blocks = {}
        for site in sites:
            method = replace(self.method, ratio=ratios.get(site.name, self.method.ratio))
            if site.name not in untouched and self._fits(site):
                blocks[site.name] = self._block(method, site)
        if not blocks and self.method.ratio > 0:
            raise ValueError(
                f"{self.name} with ratio {self.method.ratio} would reduce no tokens at step {step}: the attention blocks "
                f"{', '.join(site.name for site in sites)} are all left out or have too few layers"
            )
        return TokenPlan(blocks)

    def _fits(self, site: Site) -> bool:
        """Whether a block has the layers: nothing is pruned after the last one before a ResBlock (section 3.1, step 5)."""
        if isinstance(self.method, Merging):
            return True
        return any(index < site.depth - (not self.before_feed_forward) for index in self.layers)

    def _block(self, method: Pruning | Merging, site: Site) -> BlockPlan:
        if isinstance(method, Merging):
            return BlockPlan.merging(method, site.depth)
        last = site.depth - (not self.before_feed_forward)
        return BlockPlan.pruning(method, (i for i in self.layers if i < last), self.before_feed_forward)


def _ends(sites: list[Site]) -> set[str]:
    """The first attention block of each down-stage and the last of each up-stage (section 3.3)."""
    first = {site.level: site.name for site in sorted(sites, key=lambda s: -s.index) if site.stage == "down"}
    last = {site.level: site.name for site in sorted(sites, key=lambda s: s.index) if site.stage == "up"}
    return {*first.values(), *last.values()}


def _largest(sites: list[Site]) -> set[str]:
    """The attention blocks of the shallowest level that has any: the second feature level of SDXL."""
    return {site.name for site in sites if site.level == min(other.level for other in sites)}
