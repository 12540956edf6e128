"""Token plans: what each attention block does with its tokens at one denoising step, as data.

A plan is passed down the forward call, and a transformer layer asks its part of the plan what to do. So a plan can be
printed, compared, counted and tested without a model, and modules have no state to switch between steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from atedm.graph import AttentionInputs
from atedm.pruning import Pruning, prune
from atedm.recovery import Restore
from atedm.reduction import Merge, Reduction
from atedm.tokens import TokenSet

Attended = tuple[Tensor, AttentionInputs]  # what attention returns: values (B, n, C), and what its map is made of


@dataclass(frozen=True)
class Site:
    """Where an attention block sits in the U-Net: all that plans and schedules need to know of it."""

    stage: str  # "down", "mid" or "up"
    level: int  # feature level; 0 has the full latent resolution
    index: int  # in running order, among the blocks of the same stage and level
    depth: int  # number of transformer layers

    @property
    def name(self) -> str:
        """The display name, which plans use: ``down.1.0``, ``mid``, ``up.2.2``."""
        return "mid" if self.stage == "mid" else f"{self.stage}.{self.level}.{self.index}"


@dataclass(frozen=True)
class LayerPlan:
    """What one transformer layer does: prune tokens, merge them around its sub-layers, or neither.

    Raises ``ValueError`` for both, because the attention of merged tokens does not rank single ones.
    """

    pruning: Pruning | None = None
    before_feed_forward: bool = False  # prune there, as in the paper's supplement, and not after the feed-forward
    merging: Reduction | None = None

    def __post_init__(self) -> None:
        if self.pruning is not None and self.merging is not None:
            raise ValueError(f"layer plan has {self.pruning} and {self.merging}, expected one of them")

    def merges(self, tokens: TokenSet) -> tuple[Merge, Merge, Merge]:
        """The merges around self-attention, cross-attention and feed-forward, for the ``tokens`` that enter."""
        return (Merge(), Merge(), Merge()) if self.merging is None else self.merging.match(tokens)

    def attend(self, kind: str, attention: Callable[[], Attended]) -> Attended:
        """The layer's "self" or "cross" ``attention``. Plans that reuse an earlier step's have another method."""
        return attention()

    def prune(
        self,
        tokens: TokenSet,
        self_attention: AttentionInputs,
        cross_attention: AttentionInputs,
        *,
        before_feed_forward: bool,
    ) -> tuple[TokenSet, list[Restore]]:
        """The kept tokens, and the restore if any were pruned: the layer asks at both places, one of them prunes."""
        if self.pruning is None or before_feed_forward != self.before_feed_forward:
            return tokens, []
        kept, restore = prune(tokens, self_attention, cross_attention, self.pruning)
        return kept, [restore]


UNTOUCHED = LayerPlan()


@dataclass(frozen=True)
class BlockPlan:
    """The layer plans of one attention block, as pairs of a layer's number (from 0) and its plan. Others run dense.

    Raises ``ValueError`` for a number that is negative or given twice.
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
        """Prunes in the layers ``after``. The paper prunes once, in the first layer (section 4.1)."""
        return cls(tuple((index, LayerPlan(how, before_feed_forward)) for index in after))

    @classmethod
    def merging(cls, how: Reduction, depth: int) -> BlockPlan:
        """Merges around the sub-layers of all ``depth`` layers."""
        return cls(tuple((index, LayerPlan(merging=how)) for index in range(depth)))

    def layer(self, index: int) -> LayerPlan:
        """The plan of layer ``index``."""
        return dict(self.layers).get(index, UNTOUCHED)

    def check(self, name: str, depth: int) -> None:
        """Raises ``ValueError`` unless the block ``name`` has these layers, and another one after each that prunes.

        The last layer before a ResBlock never prunes (section 3.1, step 5).
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
        """The plan in one line."""
        return "; ".join(
            f"layer {index}: {layer.pruning or layer.merging}{' before the feed-forward' * layer.before_feed_forward}"
            for index, layer in self.layers
        )


@dataclass(frozen=True, eq=False)
class TokenPlan(Mapping[str, BlockPlan]):
    """The block plans of one denoising step, by the attention block's name. Blocks that are not named run dense.

    Plans compare and hash by value, in any order of their blocks.
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
        """The plan in one line per block."""
        return "\n".join(f"{name}: {block.describe()}" for name, block in self.items()) or "every block runs dense"

    def check(self, sites: Iterable[Site]) -> None:
        """Raises ``ValueError`` if the plan names a block that is not among ``sites``, or a layer it does not have."""
        depths = {site.name: site.depth for site in sites}
        for name, block in self.items():
            if name not in depths:
                raise ValueError(f"plan names the attention block {name!r}, expected one of {', '.join(depths)}")
            block.check(name, depths[name])


DENSE = TokenPlan()
