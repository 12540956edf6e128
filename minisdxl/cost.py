"""FLOPs of a U-Net call under a token plan, by formula.

FLOPs are two per multiply-accumulate of convolutions, linear layers and attention, for one image and one call of the
U-Net (classifier-free guidance makes two a step), as in the AT-EDM paper (table 1, figure 2) and as
``torch.utils.flop_counter`` counts them when the model runs. Ranking and recovery are listed, but in no total.
Legend: N tokens of a feature map, n <= N tokens still held, T text tokens, C channels.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, NamedTuple

from atedm.cosine import ANCHORS
from atedm.graph.by_head import SUBSAMPLING_STRIDE
from atedm.gwpr import MAX_ITERATIONS
from atedm.plan import DENSE, UNTOUCHED, LayerPlan, TokenPlan
from atedm.pruning import Pruning
from atedm.ranking import kept_count
from atedm.schedule import Schedule
from minisdxl.config import AttentionSite, ModelConfig, UNetConfig


class Kind(StrEnum):
    """A kind of work in a block of the U-Net."""

    CONVOLUTION = "convolution"
    PROJECTIONS = "projections"  # every linear layer outside the feed-forwards
    SELF_ATTENTION = "self-attention"  # the two products with the attention map
    CROSS_ATTENTION = "cross-attention"  # likewise
    FEED_FORWARD = "feed-forward"
    RANKING = "ranking and recovery"


ATTENTION_KINDS = tuple(kind for kind in Kind if kind != Kind.CONVOLUTION)


class Work(NamedTuple):
    """FLOPs of one kind of work in one block: an attention block by its display name, others by their module names."""

    name: str
    kind: Kind
    flops: int


@dataclass(frozen=True)
class Flops:
    """FLOPs of one U-Net call: the works of all blocks, in running order."""

    works: tuple[Work, ...]

    @property
    def total(self) -> int:
        """Everything but ranking and recovery."""
        return sum(work.flops for work in self.works if work.kind != Kind.RANKING)


def count(
    config: UNetConfig | ModelConfig,
    height: int,
    width: int,
    plan: TokenPlan = DENSE,
    context_length: int = 77,
    reused: frozenset[str] = frozenset(),
) -> Flops:
    """The cost of one U-Net call for one latent of ``height`` x ``width`` and ``context_length`` text tokens.

    ``reused`` names the attention, "self" or "cross", that blocks the plan leaves alone take from an earlier step.

    The number of G-WPR iterations depends on the picture, so ranking is counted with the largest, ``MAX_ITERATIONS``.
    Recovery is a gather, without multiplications. Raises ``ValueError`` for sizes under 1 and for a plan that does not
    fit the U-Net.
    """
    if min(height, width, context_length) < 1:
        raise ValueError(f"latent is {height}x{width} and context_length {context_length}, expected 1 or more of each")
    unet = config.unet if isinstance(config, ModelConfig) else config
    plan.check(list(unet.attention_sites()))
    return Flops(tuple(_Formula(unet, height, width, plan, context_length, reused).unet()))


class TokenCounts(NamedTuple):
    """Number of tokens that each sub-layer of a transformer layer sees, and number that leave the layer."""

    self_attention: int
    keys: int  # of self-attention, and as many values
    cross_attention: int
    feed_forward: int
    out: int


def tokens_seen(layer: LayerPlan, tokens: int, grid: tuple[int, int]) -> TokenCounts:
    """How many of the ``tokens`` of a ``grid`` that enter a transformer layer each of its sub-layers sees."""
    if layer.merging is not None:
        return TokenCounts(*layer.merging.counts(grid), tokens)
    kept = tokens if layer.pruning is None else kept_count(tokens, layer.pruning.ratio)
    return TokenCounts(tokens, tokens, tokens, kept if layer.before_feed_forward else tokens, kept)


@dataclass(frozen=True)
class _Formula:
    """Walks the blocks of ``minisdxl/unet.py`` in the order in which they run."""

    config: UNetConfig
    height: int
    width: int
    plan: TokenPlan
    context_length: int
    reused: frozenset[str]

    def unet(self) -> Iterator[Work]:
        c, sites = self.config, self.config.attention_sites()
        last, embedding = len(c.levels) - 1, c.embedding_channels
        for name, channels in ("time_embed", c.model_channels), ("label_emb", c.vector_channels):
            yield Work(name, Kind.PROJECTIONS, _product(1, channels + embedding, embedding))

        channels = c.channels(0)
        yield self.conv("input_blocks.0.0", c.in_channels, channels, 0)
        skips = [channels]
        for level, spec in enumerate(c.levels):
            for _ in range(c.res_blocks):
                yield from self.res_block(f"input_blocks.{len(skips)}.0", channels, c.channels(level), level)
                yield from self.attention_block(next(sites)) if spec.depth else ()
                channels = c.channels(level)
                skips.append(channels)
            if level < last:
                yield self.conv(f"input_blocks.{len(skips)}.0", channels, channels, level + 1)
                skips.append(channels)

        yield from self.res_block("middle_block.0", channels, channels, last)
        yield from self.attention_block(next(sites)) if c.middle_depth else ()
        yield from self.res_block(f"middle_block.{2 if c.middle_depth else 1}", channels, channels, last)

        blocks = len(skips)
        for level, spec in reversed(list(enumerate(c.levels))):
            for index in range(c.res_blocks + 1):
                block = f"output_blocks.{blocks - len(skips)}"
                yield from self.res_block(f"{block}.0", channels + skips.pop(), c.channels(level), level)
                yield from self.attention_block(next(sites)) if spec.depth else ()
                channels = c.channels(level)
                if level > 0 and index == c.res_blocks:
                    yield self.conv(f"{block}.{2 if spec.depth else 1}", channels, channels, level - 1)
        yield self.conv("out", channels, c.out_channels, 0)

    def conv(self, name: str, in_channels: int, out_channels: int, level: int) -> Work:  # 3x3, writes to that level
        return Work(name, Kind.CONVOLUTION, _product(self.positions(level), 9 * in_channels, out_channels))

    def res_block(self, name: str, in_channels: int, out_channels: int, level: int) -> Iterator[Work]:
        # Two 3x3 convolutions, and a 1x1 one where the residual has to change its channels.
        taps = 9 * in_channels + 9 * out_channels + (in_channels if in_channels != out_channels else 0)
        yield Work(name, Kind.CONVOLUTION, _product(self.positions(level), taps, out_channels))
        yield Work(name, Kind.PROJECTIONS, _product(1, self.config.embedding_channels, out_channels))

    def attention_block(self, site: AttentionSite) -> Iterator[Work]:
        c, text, tokens = site.channels, self.context_length, self.positions(site.level)
        plan = self.plan.get(site.name)
        cost = dict.fromkeys(ATTENTION_KINDS, 0)
        cost[Kind.PROJECTIONS] = 2 * _product(tokens, c, c)  # in, and out
        held = tokens
        for index in range(site.depth):
            layer = UNTOUCHED if plan is None else plan.layer(index)
            seen = tokens_seen(layer, held, self.grid(site.level))
            # Both project tokens to q and out. Self-attention projects some or all of them to k and v, too; k and v of
            # cross-attention are of the text. The products Q K^T and A V are those of all heads together.
            if plan is not None or "self" not in self.reused:
                cost[Kind.PROJECTIONS] += _product(seen.self_attention + seen.keys, c, 2 * c)
                cost[Kind.SELF_ATTENTION] += 2 * _product(seen.self_attention, c, seen.keys)
            if plan is not None or "cross" not in self.reused:
                cost[Kind.PROJECTIONS] += _product(seen.cross_attention, c, 2 * c)
                cost[Kind.PROJECTIONS] += _product(text, self.config.context_channels, 2 * c)
                cost[Kind.CROSS_ATTENTION] += 2 * _product(seen.cross_attention, c, text)
            # GEGLU makes two vectors of 4 C channels; their product, one such vector, goes back to C.
            cost[Kind.FEED_FORWARD] += _product(seen.feed_forward, c, 8 * c + 4 * c)
            if layer.merging is not None:
                cost[Kind.RANKING] += layer.merging.flops(self.grid(site.level), c)
            if layer.pruning is not None and seen.out < held:
                cost[Kind.RANKING] += self.ranking(layer.pruning, held, seen.out, c)
            held = seen.out
        yield from (Work(site.name, kind, flops) for kind, flops in cost.items() if flops)

    def ranking(self, how: Pruning, tokens: int, kept: int, channels: int) -> int:
        """FLOPs of ranking and recovery: attention maps, G-WPR iterations, the search for sources of pruned tokens.

        Maps are counted because fused attention does not return its own. Two effects are left out: known row sums, as
        on a CPU, save work, and maps of more than ``MAPS_BYTES`` a head are streamed, which costs more.
        """
        ranks = how.ranking not in ("random", "grid", "moving-grid", "dissimilarity")
        cross, searches = how.ranking == "ca-wpr", how.recovery.startswith("similarity")
        iterations = 0 if not ranks else 1 if how.ranking == "one-vote" else how.iterations or MAX_ITERATIONS
        keys = self.context_length if cross else tokens
        voters = -(-tokens // SUBSAMPLING_STRIDE) if how.graph == "subsampled" else tokens

        def logits(rows: int, columns: int) -> int:
            return _product(rows, channels, columns)

        def weighted(rows: int) -> int:  # A^T s or A s, head by head
            return _product(channels // self.config.head_channels, 1, rows * keys)

        anchors = max(1, tokens // ANCHORS) if how.ranking == "dissimilarity" else 0
        found = kept if how.recovery.startswith(("nearest", "own")) else 0
        cosines = logits(tokens, anchors) + logits(tokens - kept, found)

        match how.graph:
            case "streamed":  # all logits for the row sums, and again for each A^T s, A s and entropy
                read = [keys] * ranks + [tokens] * (searches and (cross or not ranks))
                sums = sum(logits(tokens, columns) for columns in read)
                again = (iterations * (1 + cross) + cross) * logits(tokens, keys)
                answers = sums + again + cross * iterations * weighted(tokens)
            case "subsampled" if cross:  # equation (1) needs an exact graph, streamed anew for each question
                exact = (iterations + 1) * logits(tokens, keys)
                answers = 2 * (iterations * logits(voters, keys) + exact) + iterations * weighted(tokens)
            case _:  # one map of the voting queries; A^T s, and in equation (1) also A s
                answers = ranks * logits(voters, keys) + iterations * (1 + cross) * weighted(voters)
        match how.graph:
            case "dense":  # no new map if the ranking has made one
                search = (cross or not ranks) * logits(tokens, tokens)
            case "streamed":
                search = logits(kept, tokens - kept)
            case _:  # first the row sums of the kept tokens
                search = logits(kept, tokens) + logits(kept, tokens - kept)
        return cosines + answers + searches * search

    def grid(self, level: int) -> tuple[int, int]:
        """(H, W) of a feature level: each halving rounds up, as -(-n >> 1) does."""
        return -(-self.height >> level), -(-self.width >> level)

    def positions(self, level: int) -> int:
        """H * W of a feature level."""
        height, width = self.grid(level)
        return height * width


def _product(rows: int, inner: int, columns: int) -> int:
    """A (rows, inner) x (inner, columns) matrix product."""
    return 2 * rows * inner * columns


def summary(
    config: ModelConfig, height: int, width: int, schedule: Schedule | None, steps: int, span: range | None = None
) -> dict[str, Any]:
    """FLOPs of one U-Net call on a latent of ``height`` x ``width``, ready for JSON.

    ``dense`` is the dense model, ``steady`` the last of ``steps`` steps, ``pruneless`` the first one and ``average``
    the mean of all; of those in ``span``, where a model does not run all. ``blocks`` lists each :class:`Work` of the
    steady step, with ranking and recovery. A ``schedule`` of ``None`` is dense. Raises ``ValueError`` as :func:`count`,
    for steps out of range, or if nothing is pruned.
    """
    if not 1 <= steps <= config.noise.steps:
        raise ValueError(f"steps is {steps}, expected 1 to {config.noise.steps}")
    sites = list(config.unet.attention_sites())
    plans = [DENSE if schedule is None else schedule.plan(step, steps, sites) for step in span or range(steps)]
    calls = {plan: count(config, height, width, plan, config.text[0].context_length) for plan in {DENSE, *plans}}
    steady = calls[plans[-1]]
    return {
        "dense": calls[DENSE].total,
        "steady": steady.total,
        "pruneless": calls[plans[0]].total,
        "average": round(sum(calls[plan].total * times for plan, times in Counter(plans).items()) / len(plans)),
        "blocks": [work._asdict() for work in steady.works],
    }


def format_flops(n: float) -> str:
    """Three digits and a unit: ``6.76 T``."""
    n = float(f"{n:.3g}")  # rounded first: 999.9 G are 1.00 T
    for unit, size in ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3):
        if n >= size:
            return f"{n / size:.{2 if n < 10 * size else 1 if n < 100 * size else 0}f} {unit}"
    return f"{n:.0f}"
