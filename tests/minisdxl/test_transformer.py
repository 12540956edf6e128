"""Transformer layers and attention blocks against loops in float64, token by token, as the papers write them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import pytest
import torch
from torch import Tensor, nn

from atedm import BlockPlan, LayerPlan, Merging, Pruning, Reduction, SiTo, ToDo, TokenSet, ToMA
from atedm.plan import UNTOUCHED
from minisdxl.config import AttentionSite, Level, UNetConfig
from minisdxl.transformer import GEGLU, Attention, AttentionBlock, TransformerLayer
from tests.atedm.reductions import ByLoops, sito_by_loops, todo_by_loops, toma_by_loops
from tests.atedm.reference import Map, algorithm_1, root_mean_square

CHANNELS, HEADS, TEXT, CONTEXT, GROUPS, DEPTH = 8, 2, 5, 6, 4, 3


def norm_by_hand(x: Sequence[float], norm: nn.LayerNorm) -> Tensor:
    mean = sum(x) / len(x)
    variance = sum((value - mean) ** 2 for value in x) / len(x)
    normed = torch.tensor([(value - mean) / math.sqrt(variance + 1e-5) for value in x], dtype=torch.float64)
    return normed * norm.weight + norm.bias


def softmax(logits: list[float]) -> list[float]:
    weights = [math.exp(logit) for logit in logits]
    return [weight / sum(weights) for weight in weights]


def attention_by_loops(x: list[Tensor], context: list[Tensor], attention: Attention) -> tuple[list[Tensor], list[Map]]:
    """Each query by itself: softmax(q k / sqrt(d)) over the keys, then the values, head by head."""
    d = CHANNELS // HEADS
    queries = [attention.to_q.weight @ token for token in x]
    keys = [attention.to_k.weight @ token for token in context]
    values = [attention.to_v.weight @ token for token in context]
    maps: list[Map] = []
    for h in range(HEADS):
        part = slice(h * d, (h + 1) * d)
        maps.append([softmax([float(q[part] @ k[part]) / math.sqrt(d) for k in keys]) for q in queries])
    out = attention.to_out[0]
    assert isinstance(out, nn.Linear)
    attended = []
    for i in range(len(x)):
        heads = [
            sum((maps[h][i][j] * v[h * d : (h + 1) * d] for j, v in enumerate(values)), torch.zeros(d).double())
            for h in range(HEADS)
        ]
        attended.append(out.weight @ torch.cat(heads) + out.bias)
    return attended, maps


def feed_forward_by_hand(x: Tensor, layer: TransformerLayer) -> Tensor:
    """x (W x + b) GELU(V x + c), and back; GELU with the exact error function."""
    both, _, back = layer.ff.net
    assert isinstance(both, GEGLU)
    assert isinstance(back, nn.Linear)
    hidden = 4 * CHANNELS
    value = both.proj.weight[:hidden] @ x + both.proj.bias[:hidden]
    gate = both.proj.weight[hidden:] @ x + both.proj.bias[hidden:]
    gelu = torch.tensor([g * 0.5 * (1 + math.erf(g / math.sqrt(2))) for g in gate.tolist()], dtype=torch.float64)
    return back.weight @ (value * gelu) + back.bias


class NoMerging:
    """Around a sub-layer: nothing."""

    def merge(self, x: list[Tensor]) -> list[Tensor]:
        return x

    def context(self, x: list[Tensor]) -> list[Tensor]:
        return x

    def unmerge(self, x: list[Tensor]) -> list[Tensor]:
        return x


def reduction_by_loops(how: Reduction, x: list[Tensor], grid: tuple[int, int]) -> Sequence[NoMerging | ByLoops]:
    """Around self-attention, cross-attention and feed-forward."""
    nothing = NoMerging()
    match how:
        case Merging():
            matching = MergingByLoops(x, grid, how.ratio)
            where = (how.self_attention, how.cross_attention, how.feed_forward)
            return [matching if merges else nothing for merges in where]
        case ToDo():
            return todo_by_loops(x, grid, round((1 - how.ratio) ** -0.5)), nothing, nothing
        case SiTo():
            noise = torch.randn(len(x), generator=torch.Generator().manual_seed(how.seed)).tolist()
            return sito_by_loops(x, grid, how.ratio, noise, how.alpha, how.beta), nothing, nothing
        case ToMA():
            return [toma_by_loops(x, grid, how.ratio, round(how.tiles**0.5), how.scale)] * 3
    raise AssertionError(how)


class MergingByLoops(NoMerging):
    """ToMe: the tokens that are most like one of the top left corners of 2 x 2 cells become part of it, in the mean."""

    def __init__(self, x: list[Tensor], grid: tuple[int, int], r: float) -> None:
        height, width = grid
        cells = product(range(0, height - height % 2, 2), range(0, width - width % 2, 2))
        self.corners = [row * width + column for row, column in cells]
        best: dict[int, tuple[float, int]] = {}
        for i in range(len(x)):
            if i not in self.corners:
                cosine = {b: float(x[i] @ x[b] / (x[i].norm() * x[b].norm())) for b in self.corners}
                nearest = max(self.corners, key=cosine.__getitem__)
                best[i] = (cosine[nearest], nearest)
        ordered = sorted(best, key=lambda i: -best[i][0])
        self.into = {i: best[i][1] for i in ordered[: int(r * len(x))]}
        self.stay = [i for i in range(len(x)) if i not in self.into]
        self.count = len(x)

    def merge(self, x: list[Tensor]) -> list[Tensor]:
        groups = [[x[i]] + [x[gone] for gone, corner in self.into.items() if corner == i] for i in self.stay]
        return [sum(group[1:], group[0]) / len(group) for group in groups]

    def unmerge(self, x: list[Tensor]) -> list[Tensor]:
        return [x[self.stay.index(self.into.get(i, i))] for i in range(self.count)]


@dataclass
class LayerByLoops:
    """One layer in two halves, so that a reference can prune between them; remembers its maps."""

    layer: TransformerLayer
    merging: Sequence[NoMerging | ByLoops] = (NoMerging(), NoMerging(), NoMerging())

    def attend(self, x: list[Tensor], context: list[Tensor]) -> list[Tensor]:
        around_self, around_cross, _ = self.merging
        normed = around_self.merge([norm_by_hand(token.tolist(), self.layer.norm1) for token in x])
        attended, self.self_map = attention_by_loops(normed, around_self.context(normed), self.layer.attn1)
        x = [a + b for a, b in zip(x, around_self.unmerge(attended), strict=True)]
        normed = around_cross.merge([norm_by_hand(token.tolist(), self.layer.norm2) for token in x])
        attended, self.cross_map = attention_by_loops(normed, context, self.layer.attn2)
        return [a + b for a, b in zip(x, around_cross.unmerge(attended), strict=True)]

    def feed_forward(self, x: list[Tensor]) -> list[Tensor]:
        around = self.merging[2]
        normed = around.merge([norm_by_hand(token.tolist(), self.layer.norm3) for token in x])
        return [
            a + b for a, b in zip(x, around.unmerge([feed_forward_by_hand(t, self.layer) for t in normed]), strict=True)
        ]


def kept_by_loops(maps: list[Map], ratio: float, cross: bool) -> list[int]:
    """Places of the tokens that stay, by the root mean square of their scores over heads."""
    scores = root_mean_square([algorithm_1(a, cross)[0] for a in maps])
    count = round(len(scores) * (1 - ratio))
    return sorted(sorted(range(len(scores)), key=lambda i: -scores[i])[:count])


def block_by_loops(
    block: AttentionBlock, feature_map: Tensor, context: Tensor, how: Pruning | None, plan: BlockPlan
) -> Tensor:
    """Steps 1 to 6 of section 3.1 for one picture (C, H, W); ``how`` is the pruning of every layer that prunes."""
    _, height, width = feature_map.shape
    size = CHANNELS // GROUPS
    normed = []
    for g in range(GROUPS):
        part = feature_map[g * size : (g + 1) * size]
        normed.append((part - part.mean()) / (part.var(unbiased=False) + 1e-6).sqrt())
    x_in = torch.cat(normed) * block.norm.weight[:, None, None] + block.norm.bias[:, None, None]
    raster = list(product(range(height), range(width)))
    x = [block.proj_in.weight @ x_in[:, row, column] + block.proj_in.bias for row, column in raster]
    text = list(context)

    undo: list[tuple[list[int], dict[int, int], list[Tensor]]] = []  # kept places, source of pruned ones, values before
    for index, layer in enumerate(block.transformer_blocks):
        assert isinstance(layer, TransformerLayer)
        layer_plan = plan.layer(index)
        loops = LayerByLoops(layer)
        if layer_plan.merging is not None:
            loops = LayerByLoops(layer, reduction_by_loops(layer_plan.merging, x, (height, width)))
        x = loops.attend(x, text)
        if not layer_plan.before_feed_forward:
            x = loops.feed_forward(x)
        if layer_plan.pruning is not None and how is not None:
            cross = how.ranking == "ca-wpr"
            kept = kept_by_loops(loops.cross_map if cross else loops.self_map, how.ratio, cross)
            received = {b: [sum(head[i][b] for head in loops.self_map) for i in kept] for b in range(len(x))}
            source = {b: received[b].index(max(received[b])) for b in range(len(x)) if b not in kept}
            undo.append((kept, source, x))
            x = [x[i] for i in kept]
        if layer_plan.before_feed_forward:
            x = loops.feed_forward(x)
    for kept, source, before in reversed(undo):
        assert how is not None
        filled = list(before)  # what direct copy leaves
        for b, place in source.items():
            if how.recovery == "similarity":
                filled[b] = x[place]
            elif how.recovery == "zeros":
                filled[b] = torch.zeros(CHANNELS).double()
        for place, i in enumerate(kept):
            filled[i] = x[place]
        x = filled

    out = feature_map.clone()
    for (row, column), token in zip(raster, x, strict=True):
        out[:, row, column] += block.proj_out.weight @ token + block.proj_out.bias
    return out


def random_block(scale: float = 1.0) -> AttentionBlock:
    """Attention as choosy as in a trained model, so that scores lie apart; inputs below may be small."""
    torch.manual_seed(0)
    config = UNetConfig(
        model_channels=CHANNELS,
        levels=(Level(1, DEPTH),),
        middle_depth=DEPTH,
        res_blocks=1,
        head_channels=CHANNELS // HEADS,
        context_channels=CONTEXT,
        vector_channels=1,
        norm_groups=GROUPS,
    )
    block = AttentionBlock(AttentionSite("mid", 0, 0, DEPTH, CHANNELS), config).double().requires_grad_(False)
    for name, weight in block.named_parameters():
        weight.normal_(std=0.4 if weight.ndim > 1 else 0.3).mul_(scale if "proj_in" in name else 1.0)
        if weight.ndim == 1 and "norm" in name and name.endswith("weight"):
            weight.add_(1)
    return block


def random_inputs(batch: int, height: int, width: int) -> tuple[Tensor, Tensor]:
    """A feature map and a context."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch, CHANNELS, height, width, generator=generator, dtype=torch.float64)
    return x, torch.randn(batch, TEXT, CONTEXT, generator=generator, dtype=torch.float64)


@torch.no_grad()
def test_a_layer_on_some_tokens_is_the_layer_on_those_alone() -> None:
    """On a sparse token set it sees the tokens held, and no others; positions play no part in it."""
    layer = random_block().transformer_blocks[0]
    assert isinstance(layer, TransformerLayer)
    x, context = random_inputs(2, 3, 4)
    held = torch.tensor([[0, 3, 4, 9, 11], [1, 2, 5, 6, 10]])
    tokens = TokenSet.from_feature_map(x).keep(held)
    after, restores = layer(tokens, layer.attn2.project_context(context), UNTOUCHED)
    assert restores == []
    assert after.positions is not None
    assert torch.equal(after.positions, held)
    for row in range(2):
        loops = LayerByLoops(layer)
        values = loops.feed_forward(
            loops.attend([x[row, :, p // 4, p % 4] for p in held[row].tolist()], list(context[row]))
        )
        error = (after.values[row] - torch.stack(values)).abs().max()
        print(f"layer on 5 of 12 tokens, row {row}: max error {error:.1e}")
        assert error < 1e-12


@torch.no_grad()
def test_an_untouched_block_is_dense_attention() -> None:
    block = random_block()
    x, context = random_inputs(2, 3, 4)
    ours = block(x, block.project_context(context), None)
    assert torch.equal(block(x, block.project_context(context), BlockPlan(())), ours)
    theirs = torch.stack([block_by_loops(block, *row, None, BlockPlan(())) for row in zip(x, context, strict=True)])
    error = (ours - theirs).abs().max()
    print(f"dense block: max error {error:.1e}")
    assert error < 1e-12


@pytest.mark.parametrize("scale", [1.0, 1e-2], ids=["ordinary", "small"])
@pytest.mark.parametrize(
    ("how", "layers", "before_feed_forward"),
    [
        (Pruning(0.63), (0,), False),
        (Pruning(0.63), (1,), False),
        (Pruning(0.4), (0, 1), False),
        (Pruning(0.63), (0,), True),
        (Pruning(0.4), (0, 1), True),
        (Pruning(0.5, graph="streamed"), (0,), False),
        (Pruning(0.5, recovery="zeros"), (0, 1), False),
        (Pruning(0.5, recovery="direct"), (0, 1), False),
        (Pruning(0.5, ranking="ca-wpr"), (0,), False),
        (Pruning(0.5, ranking="ca-wpr", graph="streamed"), (0, 1), True),
    ],
)
@torch.no_grad()
def test_a_pruned_block_follows_the_steps_of_the_paper(
    how: Pruning, layers: tuple[int, ...], before_feed_forward: bool, scale: float
) -> None:
    block = random_block(scale)
    plan = BlockPlan.pruning(how, layers, before_feed_forward)
    x, context = random_inputs(2, 3, 5)
    ours = block(x, block.project_context(context), plan)
    theirs = torch.stack([block_by_loops(block, *row, how, plan) for row in zip(x, context, strict=True)])
    error, effect = (ours - theirs).abs().max(), (ours - block(x, block.project_context(context), None)).abs().max()
    print(f"{plan.describe()}: max error {error:.1e}, pruning changes {effect:.1e}")
    assert error < 1e-11
    assert effect > 1e-3


@torch.no_grad()
def test_pruning_before_the_feed_forward_gives_the_same_where_tokens_are_copied() -> None:
    """The feed-forward works on each token by itself: it only is cheaper. Direct copy takes other values then."""
    block = random_block()
    x, context = random_inputs(2, 4, 6)
    for recovery, same in (("similarity", True), ("zeros", True), ("bicubic", True), ("direct", False)):
        how = Pruning(0.6, recovery=recovery)
        plans = [BlockPlan.pruning(how, (0, 1), before_feed_forward=early) for early in (False, True)]
        after, before = (block(x, block.project_context(context), plan) for plan in plans)
        error = (after - before).abs().max()
        print(f"{recovery}: before and after the feed-forward differ by {error:.1e}")
        assert (error < 1e-12) == same


@pytest.mark.parametrize("grid", [(4, 6), (3, 5)], ids=["even", "odd"])
@pytest.mark.parametrize(
    "how",
    [
        Merging(0.5),
        Merging(0.2),
        Merging(0.45, cross_attention=False, feed_forward=False),
        Merging(0.45, self_attention=False),
        ToDo(0.75),
        SiTo(0.5, alpha=1.0, seed=7),
        ToMA(0.5, tiles=4),
    ],
)
@torch.no_grad()
def test_a_merged_block_merges_around_its_sublayers(how: Reduction, grid: tuple[int, int]) -> None:
    block = random_block()
    plan = BlockPlan.merging(how, DEPTH)
    x, context = random_inputs(2, *grid)
    ours = block(x, block.project_context(context), plan)
    theirs = torch.stack([block_by_loops(block, *row, None, plan) for row in zip(x, context, strict=True)])
    error, effect = (ours - theirs).abs().max(), (ours - block(x, block.project_context(context), None)).abs().max()
    print(f"{how} on {grid}: max error {error:.1e}, merging changes {effect:.1e}")
    assert error < 1e-11
    assert effect > 1e-3


@pytest.mark.parametrize("plan", [LayerPlan(Pruning(0.0)), LayerPlan(Pruning(0.01)), LayerPlan(merging=Merging(0.05))])
@torch.no_grad()
def test_a_share_of_no_token_changes_no_bit(plan: LayerPlan) -> None:
    block = random_block()
    x, context = random_inputs(2, 3, 4)
    assert torch.equal(
        block(x, block.project_context(context), BlockPlan(((0, plan),))),
        block(x, block.project_context(context), None),
    )


@torch.no_grad()
def test_merging_needs_all_tokens() -> None:
    layer = random_block().transformer_blocks[0]
    assert isinstance(layer, TransformerLayer)
    x, context = random_inputs(1, 3, 4)
    some = TokenSet.from_feature_map(x).keep(torch.tensor([[0, 1, 5]]))
    with pytest.raises(ValueError, match=r"cannot match 3 of 12 tokens of grid \(3, 4\), expected all"):
        layer(some, layer.attn2.project_context(context), LayerPlan(merging=Merging(0.5)))
