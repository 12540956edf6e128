"""The VAE: the encoder, and the whole autoencoder with its latent scale. ``vae_decoder`` has the decoder.

Names are those of the official single-file checkpoint (prefix ``first_stage_model.``).
Shapes: pictures (B, 3, H, W) in [-1, 1]; latents (B, 4, H/f, W/f), where f is ``VAEConfig.downscale``.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minisdxl.config import VAEConfig
from minisdxl.vae_decoder import Decoder, Middle, ResnetBlock, group_norm


class Downsample(nn.Module):
    """Halves height and width. Pads right and bottom only, as the official code does, which differs from padding=1."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H // 2, W // 2)."""
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class DownLevel(nn.Module):
    """The ResNet blocks of one level, then a downsampling unless the level is the last."""

    def __init__(self, in_channels: int, out_channels: int, res_blocks: int, groups: int, last: bool) -> None:
        super().__init__()
        widths = [in_channels] + [out_channels] * res_blocks
        self.block = nn.Sequential(*(ResnetBlock(a, b, groups) for a, b in pairwise(widths)))
        self.downsample = nn.Identity() if last else Downsample(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in, H, W) -> (B, out, H // 2, W // 2), or (B, out, H, W) on the last level."""
        return self.downsample(self.block(x))


class Encoder(nn.Module):
    """Picture (B, 3, H, W) to the moments of its latent, before ``quant_conv``: (B, 8, H/f, W/f)."""

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
        """The levels from full to low resolution, the middle, and the output convolution."""
        x = self.mid(self.down(self.conv_in(x)))
        return self.conv_out(F.silu(self.norm_out(x)))


class VAE(nn.Module):
    """The autoencoder. ``VAEConfig.scale_factor`` brings its latents to about unit variance."""

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
        """Mean and log-variance, each (B, 4, h, w), of the unscaled latents of ``images``.

        The log-variance is clamped to [-30, 20] as in the official ``DiagonalGaussianDistribution``.
        """
        mean, log_variance = self.quant_conv(self.encoder(images.to(self.dtype))).chunk(2, dim=1)
        return mean, log_variance.clamp(-30.0, 20.0)

    def encode(self, images: Tensor) -> Tensor:
        """Pictures (B, 3, H, W) in [-1, 1] to the scaled mean of their latents (B, 4, h, w)."""
        mean, scale = self.moments(images)[0], self.config.scale_factor
        if self.config.latents_std:
            return (mean - self._channels(self.config.latents_mean)) * scale / self._channels(self.config.latents_std)
        return mean * scale

    def decode(self, latents: Tensor) -> Tensor:
        """Scaled latents (B, 4, h, w) to pictures (B, 3, f h, f w), about in [-1, 1], not clamped."""
        return self.decoder(self.unscaled(latents))

    def unscaled(self, latents: Tensor) -> Tensor:
        """Scaled latents (B, 4, h, w) to the decoder's input, of the same shape."""
        latents, scale = latents.to(self.dtype), self.config.scale_factor
        if self.config.latents_std:
            std, mean = (self._channels(values) for values in (self.config.latents_std, self.config.latents_mean))
            return self.post_quant_conv(latents * std / scale + mean)
        return self.post_quant_conv(latents / scale)

    def _channels(self, values: Sequence[float]) -> Tensor:
        """Numbers of the latent channels as (4, 1, 1)."""
        return torch.tensor(values, dtype=self.dtype, device=self.quant_conv.weight.device)[:, None, None]
