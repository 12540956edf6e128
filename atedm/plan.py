"""Token plans: what each attention block of a model does with its tokens at one denoising step. Plans are data.

A plan can be printed, compared, counted and tested without a model. A transformer layer is handed its part of the plan
and asks it what to do; nothing is switched inside modules.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from atedm.graph import AttentionInputs
from atedm.merging import Merge, Merging
from atedm.pruning import Pruning, prune
from atedm.ranking import kept_count
from atedm.recovery import Restore
from atedm.tokens import TokenSet


class Site(Protocol):
    """What plans and schedules need to know of an attention block: its name and where in the model it sits."""

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


class Counts(NamedTuple):
    """Number of tokens that the three sub-layers of a transformer layer see, and that it hands on."""

    self_attention: int
    cross_attention: int
    feed_forward: int
    out: int


@dataclass(frozen=True)
class LayerPlan:
    """What one transformer layer does with its tokens: prune some, merge some around sub-layers, or neither.

    Raises ``ValueError`` for both: the attention of merged tokens ranks no others.
    """

    pruning: Pruning | None = None
    before_feed_forward: bool = False  # prune there (the paper's supplement), not after the feed-forward
    merging: Merging | None = None

    def __post_init__(self) -> None:
        if self.pruning is not None and self.merging is not None:
            raise ValueError(f"layer plan has {self.pruning} and {self.merging}, expected one of them")

    def merges(self, tokens: TokenSet) -> tuple[Merge, Merge, Merge]:
        """How to merge around self-attention, cross-attention and feed-forward: one matching, of what enters."""
        return (self.merging or Merging(0.0)).match(tokens)

    def prune(
        self,
        tokens: TokenSet,
        self_attention: AttentionInputs,
        cross_attention: AttentionInputs,
        *,
        before_feed_forward: bool,
    ) -> tuple[TokenSet, list[Restore]]:
        """The tokens that stay, and the way back: nothing to undo where this is not the place to prune."""
        if self.pruning is None or before_feed_forward != self.before_feed_forward:
            return tokens, []
        kept, restore = prune(tokens, self_attention, cross_attention, self.pruning)
        return kept, [restore]

    def counts(self, tokens: int) -> Counts:
        """How many of ``tokens`` each part of the layer sees."""
        if self.merging is not None:
            return Counts(*self.merging.counts(tokens), tokens)
        kept = tokens if self.pruning is None else kept_count(tokens, self.pruning.ratio)
        return Counts(tokens, tokens, kept if self.before_feed_forward else tokens, kept)


UNTOUCHED = LayerPlan()


@dataclass(frozen=True)
class BlockPlan:
    """What the transformer layers of one attention block do, by their number from 0; layers not named do nothing.

    Raises ``ValueError`` for a layer that is negative or named twice.
    """

    layers: tuple[tuple[int, LayerPlan], ...]

    def __post_init__(self) -> None:
        for index, _ in self.layers:
            if index < 0:
                raise ValueError(f"plan names the transformer layer {index}, expected 0 or more")
        if len(dict(self.layers)) < len(self.layers):
            named = ", ".join(str(index) for index, _ in self.layers)
            raise ValueError(f"plan names the transformer layers {named}, expected each at most once")

    @classmethod
    def pruning(cls, how: Pruning, after: Iterable[int] = (0,), before_feed_forward: bool = False) -> BlockPlan:
        """Prune in the layers ``after``, after or before their feed-forward. Section 4.1 prunes once, in the first."""
        return cls(tuple((index, LayerPlan(how, before_feed_forward)) for index in after))

    @classmethod
    def merging(cls, how: Merging, depth: int) -> BlockPlan:
        """Merge around the sub-layers of all ``depth`` layers."""
        return cls(tuple((index, LayerPlan(merging=how)) for index in range(depth)))

    def layer(self, index: int) -> LayerPlan:
        """What layer ``index`` does."""
        return dict(self.layers).get(index, UNTOUCHED)

    def check(self, name: str, depth: int) -> None:
        """Raise ``ValueError`` unless the block called ``name`` has these layers, and one after each that prunes.

        The last one before a ResBlock does not, neither after its feed-forward nor before it (section 3.1, step 5).
        """
        for index, layer in self.layers:
            if index >= depth:
                raise ValueError(f"plan names layer {index} of {name}, expected 0 to {depth - 1}")
            if layer.pruning is not None and index == depth - 1:
                raise ValueError(
                    f"plan prunes {name} in layer {index} of its {depth} (0 to {depth - 1}), "
                    "expected a layer before the last one"
                )

    def describe(self) -> str:
        """One line."""
        return "; ".join(
            f"layer {index}: {layer.pruning or layer.merging}{' before the feed-forward' * layer.before_feed_forward}"
            for index, layer in self.layers
        )


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
        return "\n".join(f"{name}: {block.describe()}" for name, block in self.items()) or "every block runs dense"

    def check(self, sites: Iterable[Site]) -> None:
        """Raise ``ValueError`` if the plan names a block that is not there, or layers that it does not have."""
        depths = {site.name: site.depth for site in sites}
        for name, block in self.items():
            if name not in depths:
                raise ValueError(f"plan names the attention block {name!r}, expected one of {', '.join(depths)}")
            block.check(name, depths[name])


DENSE = TokenPlan()
