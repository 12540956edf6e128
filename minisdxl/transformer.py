"""The U-Net's attention block: a feature map becomes a token set, runs through transformer layers, and comes back.

Names are those of the official checkpoint (``SpatialTransformer`` and below).
Shapes: B batch, N tokens of a feature map, n <= N tokens held, T text tokens, C channels, h heads, d = C / h.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from einops import rearrange
from torch import Tensor, nn

from atedm.graph.inputs import AttentionInputs
from atedm.plan import UNTOUCHED, BlockPlan, LayerPlan
from atedm.recovery import Restore
from atedm.tokens import TokenSet
from minisdxl.config import AttentionSite, UNetConfig
from minisdxl.operators import Linear, attention, geglu


class ContextKV(NamedTuple):
    """``key`` and ``value`` (B, h, T, d) of the T tokens that queries attend to."""

    key: Tensor
    value: Tensor


class Attention(nn.Module):
    """Multi-head attention of tokens (B, n, C) to a context (B, T, c) (official: CrossAttention).

    Split in two: :meth:`project_context` computes keys and values, :meth:`forward` computes queries and attends. The
    prompt is the same at every step, so its keys and values are computed once per picture.
    """

    def __init__(self, channels: int, context_channels: int, head_channels: int) -> None:
        super().__init__()
        self.heads = channels // head_channels
        self.scale = head_channels**-0.5
        self.to_q = Linear(channels, channels, bias=False)
        self.to_k = Linear(context_channels, channels, bias=False)
        self.to_v = Linear(context_channels, channels, bias=False)
        self.to_out = nn.Sequential(Linear(channels, channels))

    def project_context(self, context: Tensor) -> ContextKV:
        """Keys and values of a context (B, T, c)."""
        k = rearrange(self.to_k(context), "b t (h d) -> b h t d", h=self.heads)
        v = rearrange(self.to_v(context), "b t (h d) -> b h t d", h=self.heads)
        return ContextKV(k, v)

    def forward(self, x: Tensor, context: ContextKV) -> tuple[Tensor, AttentionInputs]:
        """The attended values (B, n, C), and the inputs of the attention map, from which tokens are ranked."""
        q = rearrange(self.to_q(x), "b n (h d) -> b h n d", h=self.heads)
        attended, log_sum_exp = attention(q, *context, self.scale)
        inputs = AttentionInputs(q, context.key, self.scale, log_sum_exp)
        return self.to_out(rearrange(attended, "b h n d -> b n (h d)")), inputs


class GEGLU(nn.Module):
    """A linear map times the GELU of another (Shazeer 2020). Both are in one matrix."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.proj = Linear(channels, 2 * hidden)

    def forward(self, x: Tensor) -> Tensor:
        """(B, n, C) -> (B, n, hidden)."""
        return geglu(x, self.proj.weight, self.proj.bias)


class FeedForward(nn.Module):
    """GEGLU to four times the width, then a linear map back."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        # Index 1 is the official code's dropout, which is 0.
        self.net = nn.Sequential(GEGLU(channels, 4 * channels), nn.Identity(), Linear(4 * channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        """(B, n, C) -> (B, n, C)."""
        return self.net(x)


class TransformerLayer(nn.Module):
    """Self-attention, cross-attention and feed-forward on any token set (official: BasicTransformerBlock)."""

    def __init__(self, channels: int, context_channels: int, head_channels: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(channels, eps=1e-5)
        self.attn1 = Attention(channels, channels, head_channels)
        self.norm2 = nn.LayerNorm(channels, eps=1e-5)
        self.attn2 = Attention(channels, context_channels, head_channels)
        self.norm3 = nn.LayerNorm(channels, eps=1e-5)
        self.ff = FeedForward(channels)

    def forward(self, tokens: TokenSet, text: ContextKV, plan: LayerPlan) -> tuple[TokenSet, list[Restore]]:
        """Norm, attend, add, three times. Returns the tokens that ``plan`` keeps, and how to restore the others.

        ``text`` are the prompt's keys and values for :attr:`attn2`.
        """
        merge_1, merge_2, merge_3 = plan.merges(tokens)
        x = tokens.values
        normed = merge_1.merge(self.norm1(x))
        keys = merge_1.context(normed)
        attended, self_attention = plan.attend("self", lambda: self.attn1(normed, self.attn1.project_context(keys)))
        x = x + merge_1.unmerge(attended)
        query = merge_2.merge(self.norm2(x))
        attended, cross_attention = plan.attend("cross", lambda: self.attn2(query, text))
        x = x + merge_2.unmerge(attended)
        tokens, early = plan.prune(tokens.with_values(x), self_attention, cross_attention, before_feed_forward=True)
        x = tokens.values
        x = x + merge_3.unmerge(self.ff(merge_3.merge(self.norm3(x))))
        tokens, late = plan.prune(tokens.with_values(x), self_attention, cross_attention, before_feed_forward=False)
        return tokens, early + late


class AttentionBlock(nn.Module):
    """Feature map (B, C, H, W) to tokens, through all layers, and back (official: SpatialTransformer).

    ``name`` is the display name (``down.1.0``, ``mid``), by which token plans address the block.
    """

    def __init__(self, site: AttentionSite, config: UNetConfig) -> None:
        super().__init__()
        self.name, channels = site.name, site.channels
        self.norm = nn.GroupNorm(config.norm_groups, channels, eps=1e-6)  # official; the ResBlocks have 1e-5
        self.proj_in = Linear(channels, channels)
        self.transformer_blocks = nn.ModuleList(
            TransformerLayer(channels, config.context_channels, config.head_channels) for _ in range(site.depth)
        )
        self.proj_out = Linear(channels, channels)

    def project_context(self, context: Tensor) -> list[ContextKV]:
        """Keys and values of a prompt (B, T, c) for each layer."""
        layers = (layer for layer in self.transformer_blocks if isinstance(layer, TransformerLayer))
        return [layer.attn2.project_context(context) for layer in layers]

    def forward(self, x: Tensor, text: Sequence[ContextKV], plan: BlockPlan | None) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W). ``text`` is the result of :meth:`project_context`; plan ``None`` is dense."""
        tokens = TokenSet.from_feature_map(self.norm(x))
        tokens = tokens.with_values(self.proj_in(tokens.values))
        restores: list[Restore] = []
        for index, (layer, context) in enumerate(zip(self.transformer_blocks, text, strict=True)):
            tokens, pruned = layer(tokens, context, UNTOUCHED if plan is None else plan.layer(index))
            restores += pruned
        for restore in reversed(restores):
            tokens = restore(tokens)
        return x + tokens.with_values(self.proj_out(tokens.values)).to_feature_map()
