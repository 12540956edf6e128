"""Which attention blocks reduce their tokens, how, and at which denoising step: schedules make plans.

Source: the AT-EDM paper, sections 3.3 (denoising-steps-aware pruning, DSAP), 4.1 (its numbers) and 4.3 (AT-EDM-dagger).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from atedm.coverage import SHIFTS
from atedm.merging import Merging
from atedm.plan import BlockPlan, Site, TokenPlan
from atedm.pruning import Pruning

EARLY = ("less", "more")


@dataclass(frozen=True)
class Schedule:
    """A method of token reduction over all steps of a sampling run.

    ``method`` is what every attention block does unless told otherwise: a :class:`Pruning` or a :class:`Merging`.
    DSAP: the first ``tau`` of every 50 steps treat the ends of the U-Net in another way than the rest. With ``early``
    "less" the early steps leave them untouched, the paper's prune-less schedule; with "more" it is the later steps that
    do. ``ends`` are the blocks in question, ``None`` for the paper's: the first of each down-stage and the last of each
    up-stage. ``spared`` blocks are never touched; ``spare_largest`` spares those of the level with the most tokens.
    ``ratios`` gives single blocks another ratio. Pruning happens in the layers ``layers``, in each block in those that
    have another layer after them; merging happens in all layers.

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
        if not self.layers or len(set(self.layers)) < len(self.layers) or min(self.layers) < 0:
            raise ValueError(f"layers is {self.layers}, expected one or more different layers, counted from 0")
        if isinstance(self.method, Merging) and (self.layers, self.before_feed_forward) != ((0,), False):
            raise ValueError(f"{self.name} merges tokens in all layers: layers and before_feed_forward are for pruning")
        if len(dict(self.ratios)) < len(self.ratios):
            raise ValueError(f"ratios is {self.ratios}, expected each block at most once")
        for _, ratio in self.ratios:
            replace(self.method, ratio=ratio)  # checks it

    def early_steps(self, steps: int) -> int:
        """How many of ``steps`` denoising steps are early: tau of every 50, to the nearest step, half a step up.

        The paper's 15 of 50 is 8 of 25, 6 of 20, 3 of 10, 2 of 8, 1 of 4, 1 of 2 and 0 of 1.
        """
        return (2 * self.tau * steps + 50) // 100  # whole numbers: 7.5 and 4.5 are rounded alike

    def plan(self, step: int, steps: int, sites: Iterable[Site]) -> TokenPlan:
        """The token plan of denoising step ``step`` (from 0, the noisiest) of ``steps``.

        Raises ``ValueError`` for a step that is none of the ``steps``, for names of blocks and numbers of layers that
        are not there, for a block that is spared and given a ratio, and if nothing would be reduced although a ratio is
        above 0.
        """
        if not 0 <= step < steps:
            raise ValueError(f"step is {step}, expected 0 to {steps - 1} for {steps} steps")
        sites, ratios = list(sites), dict(self.ratios)
        spared = {*self.spared, *(_largest(sites) if self.spare_largest else ())}
        self._check(sites, spared)
        is_early = step < self.early_steps(steps)
        skips_ends = self.tau > 0 and is_early == (self.early == "less")
        ends = (_ends(sites) if self.ends is None else set(self.ends)) if skips_ends else set()
        blocks, reduces = {}, False
        for number, site in enumerate(sites):
            method = replace(self.method, ratio=ratios.get(site.name, self.method.ratio))
            if isinstance(method, Pruning) and method.ranking == "random":  # other tokens in every block and step
                method = replace(method, seed=method.seed + step * len(sites) + number)
            if isinstance(method, Pruning) and method.ranking == "moving-grid":  # round and round, so few plans differ
                method = replace(method, seed=(method.seed + step) % len(SHIFTS))
            block = self._block(method, site)
            if block.layers and site.name not in spared | ends:
                blocks[site.name] = block
                reduces |= method.ratio > 0
        most = max([self.method.ratio, *ratios.values()])
        if most > 0 and not reduces:
            raise ValueError(
                f"{self.name} with ratio {most} would reduce no tokens at step {step}: the blocks "
                f"{', '.join(site.name for site in sites)} are all left out, have ratio 0, or have too few layers"
            )
        return TokenPlan(blocks)

    def _check(self, sites: list[Site], spared: set[str]) -> None:
        """Raise ``ValueError`` unless what is named is there, and not spared where it is given a ratio."""
        names = [site.name for site in sites]
        unknown = {*(self.ends or ()), *self.spared, *dict(self.ratios)} - set(names)
        if unknown:
            raise ValueError(
                f"{self.name} names {', '.join(sorted(unknown))}, expected attention blocks out of {', '.join(names)}"
            )
        both = spared & set(dict(self.ratios))
        if both:
            raise ValueError(f"{self.name} spares {', '.join(sorted(both))}, expected no other ratio there")
        deepest = max((site.depth for site in sites), default=0)
        if max(self.layers) > max(0, deepest - 2):
            raise ValueError(
                f"{self.name} prunes in layer {max(self.layers)}, expected 0 to {max(0, deepest - 2)}: "
                f"the attention blocks have up to {deepest} layers and never prune in their last"
            )

    def _block(self, method: Pruning | Merging, site: Site) -> BlockPlan:
        """None prunes in its last layer, the one before a ResBlock (section 3.1, step 5)."""
        if isinstance(method, Merging):
            return BlockPlan.merging(method, site.depth)
        return BlockPlan.pruning(method, (i for i in self.layers if i < site.depth - 1), self.before_feed_forward)


def _ends(sites: list[Site]) -> set[str]:
    """The first attention block of each down-stage and the last of each up-stage (section 3.3)."""
    first = {site.level: site.name for site in sorted(sites, key=lambda s: -s.index) if site.stage == "down"}
    last = {site.level: site.name for site in sorted(sites, key=lambda s: s.index) if site.stage == "up"}
    return {*first.values(), *last.values()}


def _largest(sites: list[Site]) -> set[str]:
    """The attention blocks of the shallowest level that has any: the second feature level of SDXL."""
    return {site.name for site in sites if site.level == min(other.level for other in sites)}
