"""Which attention blocks prune at which denoising step: plans are data, made by a schedule.

Source: the AT-EDM paper, sections 3.3 (denoising-steps-aware pruning, DSAP) and 4.1 (its numbers).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from atedm.ranking import check_ratio


class Site(Protocol):
    """What a schedule needs to know of an attention block: its name and where in the U-Net it sits."""

    @property
    def name(self) -> str:
        """The name by which plans call it."""

    @property
    def stage(self) -> str:
        """``down``, ``mid`` or ``up``."""

    @property
    def level(self) -> int:
        """Feature level, 0 is the full latent resolution."""

    @property
    def index(self) -> int:
        """Place among the blocks of this stage and level, in running order."""

    @property
    def depth(self) -> int:
        """Number of transformer layers."""


@dataclass(frozen=True)
class BlockPlan:
    """What one attention block does with its tokens: remove the share ``ratio`` after the layer ``after_layer``.

    Layers count from 0. Raises ``ValueError`` for a ratio outside [0, 1) or a negative layer.
    """

    ratio: float
    after_layer: int = 0  # section 4.1: after the first layer

    def __post_init__(self) -> None:
        check_ratio(self.ratio)
        if self.after_layer < 0:
            raise ValueError(f"after_layer is {self.after_layer}, expected 0 or more")


@dataclass(frozen=True, eq=False)
class TokenPlan(Mapping[str, BlockPlan]):
    """What every attention block does with its tokens at one step, by name; blocks not named run dense.

    Equal plans are equal, in whatever order their blocks are named, and have equal hashes.
    """

    blocks: Mapping[str, BlockPlan] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "blocks", dict(self.blocks))

    def __getitem__(self, name: str) -> BlockPlan:
        return self.blocks[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.blocks)

    def __len__(self) -> int:
        return len(self.blocks)

    def __hash__(self) -> int:
        return hash(frozenset(self.blocks.items()))

    def describe(self) -> str:
        """One line per block."""
        if not self:
            return "every block runs dense"
        return "\n".join(
            f"{name}: removes {100 * block.ratio:.4g} % of its tokens after layer {block.after_layer}"
            for name, block in self.items()
        )

    def check(self, sites: Iterable[Site]) -> None:
        """Raise ``ValueError`` if the plan names a block that is not there, or prunes where no layer follows."""
        depths = {site.name: site.depth for site in sites}
        for name, block in self.items():
            if name not in depths:
                raise ValueError(f"plan names the attention block {name!r}, expected one of {', '.join(depths)}")
            if block.after_layer >= depths[name] - 1:
                raise ValueError(
                    f"plan prunes {name} after layer {block.after_layer} of its {depths[name]} (0 to "
                    f"{depths[name] - 1}), expected a layer before the last one"
                )


DENSE = TokenPlan()


@dataclass(frozen=True)
class Schedule:
    """DSAP: all attention blocks prune, but for some of them not in the first, prune-less, steps.

    Raises ``ValueError`` for a ratio outside [0, 1) or tau outside 0 to 50.
    """

    name: str
    ratio: float = 0.63  # rho, section 4.1
    tau: int = 15  # prune-less steps of every 50, section 4.1
    spare_largest: bool = False  # AT-EDM-dagger, section 4.3: no pruning where token sets are largest

    def __post_init__(self) -> None:
        check_ratio(self.ratio)
        if not 0 <= self.tau <= 50:
            raise ValueError(f"tau is {self.tau}, expected 0 to 50: prune-less steps of every 50")

    def prune_less_steps(self, steps: int) -> int:
        """How many of ``steps`` denoising steps are prune-less: the first round(tau * steps / 50)."""
        return round(self.tau * steps / 50)

    def plan(self, step: int, steps: int, sites: Iterable[Site]) -> TokenPlan:
        """The token plan of denoising step ``step`` (from 0, the noisiest) of ``steps``.

        Blocks of one layer are never pruned: no layer would follow. Raises ``ValueError`` for a step that is none of
        the ``steps``, and if nothing would be pruned although rho > 0.
        """
        if not 0 <= step < steps:
            raise ValueError(f"step is {step}, expected 0 to {steps - 1} for {steps} steps")
        sites = list(sites)
        spared = _largest(sites) if self.spare_largest else set()
        if step < self.prune_less_steps(steps):
            spared |= _ends(sites)
        blocks = {site.name: BlockPlan(self.ratio) for site in sites if site.depth >= 2 and site.name not in spared}
        if self.ratio > 0 and not blocks:
            raise ValueError(
                f"{self.name} with rho {self.ratio} would prune nothing at step {step}: of the attention blocks "
                f"{[site.name for site in sites]} all are to be spared or have fewer than 2 layers"
            )
        return TokenPlan(blocks)


def _ends(sites: list[Site]) -> set[str]:
    """The first attention block of each down-stage and the last of each up-stage (section 3.3)."""
    first = {site.level: site.name for site in sorted(sites, key=lambda s: -s.index) if site.stage == "down"}
    last = {site.level: site.name for site in sorted(sites, key=lambda s: s.index) if site.stage == "up"}
    return {*first.values(), *last.values()}


def _largest(sites: list[Site]) -> set[str]:
    """The attention blocks of the shallowest level that has any: the second feature level of SDXL."""
    return {site.name for site in sites if site.level == min(other.level for other in sites)}


PRESETS: dict[str, Schedule] = {
    schedule.name: schedule for schedule in (Schedule("at-edm"), Schedule("at-edm-dagger", spare_largest=True))
}

_SETTINGS = {"rho": ("ratio", float, "a number"), "tau": ("tau", int, "a whole number")}


def parse_preset(text: str) -> Schedule:
    """The schedule that ``text`` asks for: a preset's name, then settings if any, as ``at-edm:rho=0.5,tau=10``.

    Raises ``ValueError`` for an unknown preset or setting, and for values that are unreadable or out of range.
    """
    name, colon, settings = text.partition(":")
    if name not in PRESETS:
        raise ValueError(f"unknown preset {name!r}, expected one of {', '.join(PRESETS)}")
    changes: dict[str, Any] = {}
    for setting in settings.split(",") if colon else []:
        key, _, value = setting.partition("=")
        if key not in _SETTINGS:
            raise ValueError(f"unknown setting {setting!r} of {name}, expected one of {', '.join(_SETTINGS)}")
        attribute, number, kind = _SETTINGS[key]
        if attribute in changes:
            raise ValueError(f"setting {key} of {name} is given twice")
        try:
            changes[attribute] = number(value)
        except ValueError as error:
            raise ValueError(f"setting {key} of {name} is {value!r}, expected {kind}") from error
    return replace(PRESETS[name], **changes)
