"""The VAE decoder: latents to pictures.

Names are those of the official single-file checkpoint (prefix ``first_stage_model.decoder.``). The blocks that the
encoder has as well are here too. Every GroupNorm has eps 1e-6 (official: ``Normalize``), unlike the U-Net's ResBlocks.
"""

from __future__ import annotations

from itertools import pairwise

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from minisdxl.config import VAEConfig


def group_norm(groups: int, channels: int) -> nn.GroupNorm:
    """The VAE's normalization."""
    return nn.GroupNorm(groups, channels, eps=1e-6)


class ResnetBlock(nn.Module):
    """Two normalized 3x3 convolutions and a residual."""

    def __init__(self, in_channels: int, out_channels: int, groups: int) -> None:
        super().__init__()
        self.norm1 = group_norm(groups, in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = group_norm(groups, out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        same = in_channels == out_channels
        self.nin_shortcut = nn.Identity() if same else nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in, H, W) -> (B, out, H, W)."""
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return self.nin_shortcut(x) + h


class VAEAttention(nn.Module):
    """Single-head self-attention over all positions. Its linear maps are stored as 1x1 convolutions."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.norm = group_norm(groups, channels)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        normed = self.norm(x)
        # Contiguous, because fused attention, which never holds the whole map, takes nothing else.
        q, k, v = (
            rearrange(project(normed), "b c h w -> b 1 (h w) c").contiguous() for project in (self.q, self.k, self.v)
        )
        attended = F.scaled_dot_product_attention(q, k, v, scale=q.shape[-1] ** -0.5)
        return x + self.proj_out(rearrange(attended, "b 1 (h w) c -> b c h w", h=x.shape[2]))


class Middle(nn.Module):
    """ResNet block, attention, ResNet block, at the lowest resolution of encoder and decoder."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.block_1 = ResnetBlock(channels, channels, groups)
        self.attn_1 = VAEAttention(channels, groups)
        self.block_2 = ResnetBlock(channels, channels, groups)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        return self.block_2(self.attn_1(self.block_1(x)))


class Upsample(nn.Module):
    """Doubles height and width by repeating pixels, then convolves."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, 2 H, 2 W)."""
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class UpLevel(nn.Module):
    """The ResNet blocks of one level, one more than in the encoder, then an upsampling unless the level is the last."""

    def __init__(self, in_channels: int, out_channels: int, res_blocks: int, groups: int, last: bool) -> None:
        super().__init__()
        widths = [in_channels] + [out_channels] * (res_blocks + 1)
        self.block = nn.Sequential(*(ResnetBlock(a, b, groups) for a, b in pairwise(widths)))
        self.upsample = nn.Identity() if last else Upsample(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in, H, W) -> (B, out, 2 H, 2 W), or (B, out, H, W) on the last level."""
        return self.upsample(self.block(x))


class Decoder(nn.Module):
    """Latent (B, 4, h, w) after ``post_quant_conv`` to picture (B, 3, f h, f w), with f = ``VAEConfig.downscale``."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        widths = [config.channels * multiplier for multiplier in config.multipliers]
        inputs = [*widths[1:], widths[-1]]
        self.conv_in = nn.Conv2d(config.latent_channels, widths[-1], 3, padding=1)
        self.mid = Middle(widths[-1], config.norm_groups)
        # Numbered by resolution as in the checkpoint, 0 is full size. They run from the last to the first.
        self.up = nn.ModuleList(
            UpLevel(inputs[i], widths[i], config.res_blocks, config.norm_groups, last=i == 0)
            for i in range(len(widths))
        )
        self.norm_out = group_norm(config.norm_groups, widths[0])
        self.conv_out = nn.Conv2d(widths[0], config.image_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """The middle, the levels from low to full resolution, and the output convolution."""
        x = self.mid(self.conv_in(x))
        for level in reversed(self.up):
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(x)))
