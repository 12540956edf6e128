"""The denoising U-Net: predicts the noise in a latent.

Names are those of the official single-file checkpoint (prefix ``model.diffusion_model.``): numbered ``input_blocks``,
``middle_block``, ``output_blocks``. ``UNetConfig.attention_sites`` lists the attention blocks by display names.
Shapes: x (B, in_channels, H, W); timestep (B,); context (B, T, c); vector (B, v); embedding (B, 4 * model_channels).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from atedm.plan import DENSE, TokenPlan
from minisdxl.config import AttentionSite, UNetConfig
from minisdxl.embedding import sinusoidal_embedding
from minisdxl.operators import Conv3x3
from minisdxl.transformer import AttentionBlock, ContextKV

# Keys and values of a prompt for each transformer layer of each attention block, by the block's name.
PromptKV = Mapping[str, Sequence[ContextKV]]


class ResBlock(nn.Module):
    """Two normalized 3x3 convolutions and a residual, with the time embedding added between the convolutions."""

    def __init__(self, in_channels: int, out_channels: int, config: UNetConfig) -> None:
        super().__init__()
        groups = config.norm_groups
        # SiLU works in place, because nothing else reads the normalized feature map.
        self.in_layers = nn.Sequential(
            nn.GroupNorm(groups, in_channels, eps=1e-5), nn.SiLU(inplace=True), Conv3x3(in_channels, out_channels)
        )
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(config.embedding_channels, out_channels))
        # Index 2 is the official code's dropout, which is 0.
        self.out_layers = nn.Sequential(
            nn.GroupNorm(groups, out_channels, eps=1e-5),
            nn.SiLU(inplace=True),
            nn.Identity(),
            Conv3x3(out_channels, out_channels),
        )
        same = in_channels == out_channels
        self.skip_connection = nn.Identity() if same else nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """(B, in, H, W) -> (B, out, H, W)."""
        h = self.in_layers(x) + self.emb_layers(embedding)[:, :, None, None]
        return self.skip_connection(x) + self.out_layers(h)


class Downsample(nn.Module):
    """Halves height and width, rounding up, by a convolution of stride 2."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.op = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, ceil(H / 2), ceil(W / 2))."""
        return self.op(x)


class Upsample(nn.Module):
    """Repeats pixels up to the size of the next skip connection, then convolves."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = Conv3x3(channels, channels)

    def forward(self, x: Tensor, size: torch.Size) -> Tensor:
        """(B, C, h, w) -> (B, C, *size). The size is twice h and w, or one less where the way down rounded up."""
        return self.conv(F.interpolate(x, size=size, mode="nearest"))


class Block(nn.Sequential):
    """One numbered block: the input convolution, or a ResBlock with or without attention, or a change of resolution."""

    def forward(  # type: ignore[override]  # nn.Sequential takes one input
        self, x: Tensor, embedding: Tensor, text: PromptKV, plan: TokenPlan, size: torch.Size
    ) -> Tensor:
        """Runs each part with the inputs that it needs. ``size`` is the (H, W) that an upsampling must reach."""
        for part in self:
            if isinstance(part, ResBlock):
                x = part(x, embedding)
            elif isinstance(part, AttentionBlock):
                x = part(x, text[part.name], plan.get(part.name))
            elif isinstance(part, Upsample):
                x = part(x, size)
            else:
                x = part(x)
        return x


class UNet(nn.Module):
    """The U-Net: ``unet(x, timestep, context, vector, plan)`` -> predicted noise (B, 4, H, W)."""

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.config = config
        width = config.embedding_channels
        self.time_embed = nn.Sequential(nn.Linear(config.model_channels, width), nn.SiLU(), nn.Linear(width, width))
        self.label_emb = nn.Sequential(
            nn.Sequential(nn.Linear(config.vector_channels, width), nn.SiLU(), nn.Linear(width, width))
        )
        sites = config.attention_sites()
        top, bottom = config.channels(0), config.channels(len(config.levels) - 1)
        self.input_blocks = nn.ModuleList(self._down(sites))
        self.middle_block = Block(
            ResBlock(bottom, bottom, config),
            *([AttentionBlock(next(sites), config)] if config.middle_depth else []),
            ResBlock(bottom, bottom, config),
        )
        self.output_blocks = nn.ModuleList(self._up(sites))
        self.out = nn.Sequential(
            nn.GroupNorm(config.norm_groups, top, eps=1e-5),
            nn.SiLU(),
            nn.Conv2d(top, config.out_channels, 3, padding=1),
        )

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that it computes in."""
        return next(self.parameters()).dtype

    def _down(self, sites: Iterator[AttentionSite]) -> Iterator[Block]:
        """The numbered blocks of the way down. The output of each is a skip connection to the way up."""
        c = self.config
        yield Block(nn.Conv2d(c.in_channels, c.channels(0), 3, padding=1))
        channels = c.channels(0)
        for level, spec in enumerate(c.levels):
            for _ in range(c.res_blocks):
                res = ResBlock(channels, c.channels(level), c)
                yield Block(res, AttentionBlock(next(sites), c)) if spec.depth else Block(res)
                channels = c.channels(level)
            if level < len(c.levels) - 1:
                yield Block(Downsample(channels))

    def _up(self, sites: Iterator[AttentionSite]) -> Iterator[Block]:
        """The numbered blocks of the way up, which ends with level 0. Each takes one skip connection."""
        c = self.config
        channels = c.channels(len(c.levels) - 1)
        for level, spec in reversed(list(enumerate(c.levels))):
            # The skips of a level, last one first: its ResBlocks, then what entered the level.
            skips = [c.channels(level)] * c.res_blocks + [c.channels(max(level - 1, 0))]
            for index, skip in enumerate(skips):
                parts: list[nn.Module] = [ResBlock(channels + skip, c.channels(level), c)]
                if spec.depth:
                    parts.append(AttentionBlock(next(sites), c))
                if level > 0 and index == c.res_blocks:
                    parts.append(Upsample(c.channels(level)))
                yield Block(*parts)
                channels = c.channels(level)

    def project_context(self, context: Tensor) -> PromptKV:
        """Keys and values of a context (B, T, c). They are the same at every step, so one call serves a whole run."""
        blocks = (block for block in self.modules() if isinstance(block, AttentionBlock))
        return {block.name: block.project_context(context) for block in blocks}

    def forward(
        self, x: Tensor, timestep: Tensor, context: Tensor | PromptKV, vector: Tensor, plan: TokenPlan = DENSE
    ) -> Tensor:
        """The predicted noise (B, 4, H, W).

        ``context`` is the encoded prompt (B, T, c), or the result of :meth:`project_context`, which saves time.
        ``plan`` says what each attention block does with its tokens; blocks that it does not name run dense. Raises
        ``ValueError`` for a plan that names a block this U-Net does not have.
        """
        plan.check(self.config.attention_sites())
        embedding = self.time_embed(sinusoidal_embedding(timestep, self.config.model_channels).to(x.dtype))
        embedding = embedding + self.label_emb(vector.to(x.dtype))
        text = self.project_context(context) if isinstance(context, Tensor) else context
        skips = []
        for block in self.input_blocks:
            x = block(x, embedding, text, plan, x.shape[-2:])
            skips.append(x)
        x = self.middle_block(x, embedding, text, plan, x.shape[-2:])
        for block in self.output_blocks:
            skip = skips.pop()
            next_size = skips[-1].shape[-2:] if skips else x.shape[-2:]
            x = block(torch.cat([x, skip], dim=1), embedding, text, plan, next_size)
        return self.out(x)
