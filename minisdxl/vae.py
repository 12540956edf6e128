"""The autoencoder: pictures to latents and back.

Names are those of the official single-file checkpoint (prefix ``first_stage_model.``).
Shapes: pictures (B, 3, H, W) in [-1, 1]; latents (B, 4, H/f, W/f), where f is ``VAEConfig.downscale``.
Every GroupNorm has eps 1e-6 (official: ``Normalize``), other than the U-Net's ResBlocks.
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from minisdxl.config import VAEConfig


def group_norm(groups: int, channels: int) -> nn.GroupNorm:
    """The VAE's normalization; eps as in the official code."""
    return nn.GroupNorm(groups, channels, eps=1e-6)


class ResnetBlock(nn.Module):
    """Two normalized 3x3 convolutions with a residual; (B, in, H, W) -> (B, out, H, W)."""

    def __init__(self, in_channels: int, out_channels: int, groups: int) -> None:
        super().__init__()
        self.norm1 = group_norm(groups, in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = group_norm(groups, out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        same = in_channels == out_channels
        self.nin_shortcut = nn.Identity() if same else nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Residual of norm, SiLU, convolution, twice."""
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return self.nin_shortcut(x) + h


class VAEAttention(nn.Module):
    """Single-head self-attention over all positions; its linear maps are stored as 1x1 convolutions."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.norm = group_norm(groups, channels)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W), every position attending to every other."""
        normed = self.norm(x)
        # Contiguous, because fused attention, which never holds all scores at once, takes nothing else.
        q, k, v = (
            rearrange(project(normed), "b c h w -> b 1 (h w) c").contiguous() for project in (self.q, self.k, self.v)
        )
        attended = F.scaled_dot_product_attention(q, k, v, scale=q.shape[-1] ** -0.5)
        return x + self.proj_out(rearrange(attended, "b 1 (h w) c -> b c h w", h=x.shape[2]))


class Middle(nn.Module):
    """ResNet block, attention, ResNet block: the lowest resolution of encoder and decoder."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.block_1 = ResnetBlock(channels, channels, groups)
        self.attn_1 = VAEAttention(channels, groups)
        self.block_2 = ResnetBlock(channels, channels, groups)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        return self.block_2(self.attn_1(self.block_1(x)))


class Downsample(nn.Module):
    """Halves height and width. Pads right and bottom only, as the official code does: not the same as padding=1."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H // 2, W // 2)."""
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Doubles height and width by repeating pixels, then convolves."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, 2 H, 2 W)."""
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class DownLevel(nn.Module):
    """ResNet blocks of one encoder level, then a downsampling where another level follows."""

    def __init__(self, in_channels: int, out_channels: int, res_blocks: int, groups: int, last: bool) -> None:
        super().__init__()
        widths = [in_channels] + [out_channels] * res_blocks
        self.block = nn.Sequential(*(ResnetBlock(a, b, groups) for a, b in pairwise(widths)))
        self.downsample = nn.Identity() if last else Downsample(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in, H, W) -> (B, out, H // 2, W // 2), or (B, out, H, W) on the last level."""
        return self.downsample(self.block(x))


class UpLevel(nn.Module):
    """ResNet blocks of one decoder level (one more than the encoder has), then an upsampling unless it is the last."""

    def __init__(self, in_channels: int, out_channels: int, res_blocks: int, groups: int, last: bool) -> None:
        super().__init__()
        widths = [in_channels] + [out_channels] * (res_blocks + 1)
        self.block = nn.Sequential(*(ResnetBlock(a, b, groups) for a, b in pairwise(widths)))
        self.upsample = nn.Identity() if last else Upsample(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in, H, W) -> (B, out, 2 H, 2 W), or (B, out, H, W) on the last level."""
        return self.upsample(self.block(x))


class Encoder(nn.Module):
    """Picture (B, 3, H, W) to the moments of its latent, before ``quant_conv`` (B, 2 z, H/f, W/f)."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        widths = [config.channels * multiplier for multiplier in config.multipliers]
        inputs = [config.channels, *widths[:-1]]
        final = len(widths) - 1
        self.conv_in = nn.Conv2d(config.image_channels, config.channels, 3, padding=1)
        self.down = nn.Sequential(
            *(
                DownLevel(inputs[i], widths[i], config.res_blocks, config.norm_groups, last=i == final)
                for i in range(len(widths))
            )
        )
        self.mid = Middle(widths[-1], config.norm_groups)
        self.norm_out = group_norm(config.norm_groups, widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], 2 * config.latent_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Down through the levels, through the middle, out."""
        x = self.mid(self.down(self.conv_in(x)))
        return self.conv_out(F.silu(self.norm_out(x)))


class Decoder(nn.Module):
    """Latent after ``post_quant_conv`` (B, z, h, w) to a picture (B, 3, f h, f w)."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        widths = [config.channels * multiplier for multiplier in config.multipliers]
        inputs = [*widths[1:], widths[-1]]
        self.conv_in = nn.Conv2d(config.latent_channels, widths[-1], 3, padding=1)
        self.mid = Middle(widths[-1], config.norm_groups)
        # Named by resolution as in the checkpoint (0 is full size), run from the last to the first.
        self.up = nn.ModuleList(
            UpLevel(inputs[i], widths[i], config.res_blocks, config.norm_groups, last=i == 0)
            for i in range(len(widths))
        )
        self.norm_out = group_norm(config.norm_groups, widths[0])
        self.conv_out = nn.Conv2d(widths[0], config.image_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Through the middle, up through the levels, out."""
        x = self.mid(self.conv_in(x))
        for level in reversed(self.up):
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class VAE(nn.Module):
    """The whole autoencoder, with the scaling that brings latents to about unit variance."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quant_conv = nn.Conv2d(2 * config.latent_channels, 2 * config.latent_channels, 1)
        self.post_quant_conv = nn.Conv2d(config.latent_channels, config.latent_channels, 1)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that it computes in."""
        return self.quant_conv.weight.dtype

    def moments(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance of the unscaled latent of ``images``, each (B, z, h, w).

        The log-variance is clamped to [-30, 20] as in the official ``DiagonalGaussianDistribution``.
        """
        mean, log_variance = self.quant_conv(self.encoder(images.to(self.dtype))).chunk(2, dim=1)
        return mean, log_variance.clamp(-30.0, 20.0)

    def encode(self, images: Tensor) -> Tensor:
        """Pictures (B, 3, H, W) in [-1, 1] to the mean of their latent, scaled: (B, z, h, w)."""
        return self.moments(images)[0] * self.config.scale_factor

    def decode(self, latents: Tensor) -> Tensor:
        """Scaled latents (B, z, h, w) to pictures (B, 3, f h, f w), about [-1, 1], not clamped."""
        return self.decoder(self.unscaled(latents))

    def unscaled(self, latents: Tensor) -> Tensor:
        """What the decoder takes, (B, z, h, w), of scaled latents."""
        return self.post_quant_conv(latents.to(self.dtype) / self.config.scale_factor)
