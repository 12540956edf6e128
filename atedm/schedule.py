"""Schedules: which attention blocks reduce their tokens, and how, at each denoising step. A schedule makes token plans.

Source: the AT-EDM paper, sections 3.3 (denoising-steps-aware pruning, DSAP), 4.1 (its numbers) and 4.3 (AT-EDM-dagger).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from atedm.coverage import SHIFTS
from atedm.plan import BlockPlan, Site, TokenPlan
from atedm.pruning import Pruning
from atedm.reduction import Reduction

EARLY = ("less", "more")


@dataclass(frozen=True)
class Schedule:
    """A method of token reduction, and the blocks and steps to which it applies.

    DSAP: in the first ``tau`` of every 50 steps, the blocks at the ends of the U-Net are not reduced. That is ``early``
    "less", the paper's prune-less schedule. With "more" they are not reduced in the later steps instead.

    Raises ``ValueError`` for values out of range.
    """

    name: str
    method: Pruning | Reduction  # of every attention block, unless the fields below say otherwise
    tau: int = 15  # section 4.1
    early: str = "less"
    ends: tuple[str, ...] | None = None  # by name; None: first block of each down-stage, last of each up-stage
    spared: tuple[str, ...] = ()  # blocks that are never reduced, by name
    levels: tuple[int, ...] = ()  # the feature levels whose blocks are reduced; (): all of them
    spare_largest: bool = False  # nor are those of the level with the most tokens (AT-EDM-dagger, section 4.3)
    ratios: tuple[tuple[str, float], ...] = ()  # single blocks' own ratios, by name
    layers: tuple[int, ...] = (0,)  # that prune (section 4.1). More than one repeats the pruning (3.1, step 5)
    before_feed_forward: bool = False  # where in the layer it prunes

    def __post_init__(self) -> None:
        if not 0 <= self.tau <= 50:
            raise ValueError(f"tau is {self.tau}, expected 0 to 50: early steps of every 50")
        if self.early not in EARLY:
            raise ValueError(f"early is {self.early!r}, expected one of {', '.join(EARLY)}")
        if not self.layers or len(set(self.layers)) < len(self.layers) or min(self.layers) < 0:
            raise ValueError(f"layers is {self.layers}, expected one or more different layers, counted from 0")
        if isinstance(self.method, Reduction) and (self.layers, self.before_feed_forward) != ((0,), False):
            raise ValueError(f"{self.name} merges tokens in all layers: layers and before_feed_forward are for pruning")
        if len(dict(self.ratios)) < len(self.ratios):
            raise ValueError(f"ratios is {self.ratios}, expected each block at most once")
        for _, ratio in self.ratios:
            replace(self.method, ratio=ratio)  # checks it

    def early_steps(self, steps: int) -> int:
        """How many of ``steps`` denoising steps are early: tau of every 50, rounded, halves up.

        The paper's 15 of 50 is 8 of 25, 6 of 20, 3 of 10, 2 of 8, 1 of 4, 1 of 2 and 0 of 1.
        """
        return (2 * self.tau * steps + 50) // 100  # in whole numbers, so that 7.5 and 4.5 are both rounded up

    def plan(self, step: int, steps: int, sites: Iterable[Site]) -> TokenPlan:
        """The token plan of denoising step ``step`` of ``steps``; step 0 is the noisiest. ``sites`` are all blocks.

        Raises ``ValueError`` for a step out of range, for names of blocks and numbers of layers that do not exist, for
        a spared block with its own ratio, and if a ratio is above 0 but no block would be reduced.
        """
        if not 0 <= step < steps:
            raise ValueError(f"step is {step}, expected 0 to {steps - 1} for {steps} steps")
        sites = list(sites)
        spared = {*self.spared, *(_largest(sites) if self.spare_largest else ())}
        spared |= {site.name for site in sites if self.levels and site.level not in self.levels}
        self._check(sites, spared)
        is_early = step < self.early_steps(steps)
        if self.tau > 0 and is_early == (self.early == "less"):
            spared |= _ends(sites) if self.ends is None else set(self.ends)
        blocks, reduces = {}, False
        for number, site in enumerate(sites):
            method = self._method(site.name, step, number, len(sites))
            block = self._block(method, site)
            if block.layers and site.name not in spared:
                blocks[site.name] = block
                reduces |= method.ratio > 0
        most = max([self.method.ratio, *dict(self.ratios).values()])
        if most > 0 and not reduces:
            raise ValueError(
                f"{self.name} with ratio {most} would reduce no tokens at step {step}: the blocks "
                f"{', '.join(site.name for site in sites)} are all left out, have ratio 0, or have too few layers"
            )
        return TokenPlan(blocks)

    def _check(self, sites: list[Site], spared: set[str]) -> None:
        """Raises ``ValueError`` for blocks and layers that do not exist, and for ``spared`` blocks with a ratio."""
        names, levels = [site.name for site in sites], sorted({site.level for site in sites})
        unknown = {*(self.ends or ()), *self.spared, *dict(self.ratios)} - set(names)
        unknown |= {f"level {level}" for level in set(self.levels) - set(levels)}
        if unknown:
            raise ValueError(
                f"{self.name} names {', '.join(sorted(unknown))}, expected attention blocks out of {', '.join(names)}, "
                f"or levels with attention out of {', '.join(map(str, levels))}"
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

    def _method(self, name: str, step: int, number: int, blocks: int) -> Pruning | Reduction:
        """The method at ``step`` in the block ``name``, which is ``number`` of so many ``blocks``."""
        method = replace(self.method, ratio=dict(self.ratios).get(name, self.method.ratio))
        if isinstance(method, Pruning) and method.ranking == "random":
            return replace(method, seed=method.seed + step * blocks + number)
        if isinstance(method, Pruning) and method.ranking == "moving-grid":  # cyclic, so that few plans differ
            return replace(method, seed=(method.seed + step) % len(SHIFTS))
        return method if isinstance(method, Pruning) else method.at(step, number)

    def _block(self, method: Pruning | Reduction, site: Site) -> BlockPlan:
        """No block prunes in its last layer, which is followed by a ResBlock (section 3.1, step 5)."""
        if isinstance(method, Reduction):
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
