"""The VAE decoder strip by strip, for large pictures in little memory.

A feature map (B, C, H, W) is cut along H, and layers are applied to one strip at a time. The result is exact, without
seams: a convolution reads one row of each neighboring strip, and a normalization uses the statistics of the whole map.
A strip is freed once it is read, so the input and the output of a layer together take little more than the larger one.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from itertools import chain

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from minisdxl.vae import VAE
from minisdxl.vae_decoder import Decoder, ResnetBlock, UpLevel, Upsample

Strips = deque[Tensor]  # of one map, from top to bottom


def drain(strips: Strips) -> Iterator[Tensor]:
    """Removes and yields every strip."""
    while strips:
        yield strips.popleft()


def convolve(conv: nn.Conv2d, strips: Iterable[Tensor]) -> Iterator[Tensor]:
    """A 3x3 convolution with zero padding, of a feature map that comes strip by strip."""
    strips = iter(strips)
    strip = next(strips)
    above = edge = torch.zeros_like(strip[:, :, :1])
    for below in chain(strips, [edge]):
        window = torch.cat([above[:, :, -1:], strip, below[:, :, :1]], dim=2)
        yield F.conv2d(window, conv.weight, conv.bias, padding=(0, 1))
        above, strip = strip, below


def normalization(norm: nn.GroupNorm, strips: Strips) -> Callable[[Tensor], Tensor]:
    """``norm`` as a function of one strip, with the means and variances of the whole feature map."""
    dtype = torch.promote_types(strips[0].dtype, torch.float32)  # as GroupNorm itself
    rows = torch.tensor([strip.shape[2] for strip in strips], dtype=dtype, device=strips[0].device)
    grouped = (rearrange(strip.to(dtype), "b (g c) h w -> b g c h w", g=norm.num_groups) for strip in strips)
    moments = [torch.var_mean(groups, dim=(2, 3, 4), correction=0) for groups in grouped]
    variances, means = (torch.stack(values, dim=-1) for values in zip(*moments, strict=True))  # (B, groups, strips)
    share = rows / rows.sum()
    mean = (share * means).sum(dim=-1, keepdim=True)
    variance = (share * (variances + (means - mean) ** 2)).sum(dim=-1, keepdim=True)  # within strips, and among them
    scale = rearrange(norm.weight, "(g c) -> g c", g=norm.num_groups) / (variance + norm.eps).sqrt()
    shift = rearrange(norm.bias, "(g c) -> g c", g=norm.num_groups) - mean * scale
    scale, shift = (rearrange(values, "b g c -> b (g c) 1 1") for values in (scale, shift))
    return lambda strip: (strip * scale + shift).to(strip.dtype)


def decode_in_strips(vae: VAE, latents: Tensor, rows: int) -> Tensor:
    """``vae.decode(latents)`` up to rounding, one picture at a time, in strips of ``rows`` latent rows.

    Raises ``ValueError`` for ``rows`` below 1.
    """
    if rows < 1:
        raise ValueError(f"strip_rows is {rows}, expected 1 or more rows of the latent, or None to decode all at once")
    return torch.cat([_decode(vae.decoder, vae.unscaled(latent), rows) for latent in torch.split(latents, 1)])


def _decode(decoder: Decoder, x: Tensor, rows: int) -> Tensor:
    """``decoder(x)`` of a latent (B, z, h, w). The middle runs at once, the levels in strips of ``rows`` latent rows.

    For the official decoder, 1024 x 1024 pixels and fp32, the largest feature map takes 1 GiB, and decoding at once
    takes three times as much.
    """
    strips = deque(decoder.mid(decoder.conv_in(x)).split(rows, dim=2))
    for level in reversed(decoder.up):
        strips = _in_strips(level, strips)
    norm = normalization(decoder.norm_out, strips)
    return torch.cat(list(convolve(decoder.conv_out, (F.silu(norm(strip)) for strip in drain(strips)))), dim=2)


def _in_strips(part: nn.Module, strips: Strips) -> Strips:
    """The forward of a part of the decoder."""
    match part:
        case ResnetBlock():
            return _resnet_in_strips(part, strips)
        case Upsample():
            larger = (F.interpolate(strip, scale_factor=2.0, mode="nearest") for strip in drain(strips))
            return deque(convolve(part.conv, larger))
        case UpLevel() | nn.Sequential():
            for child in part.children():
                strips = _in_strips(child, strips)
            return strips
        case nn.Identity():
            return strips
    raise TypeError(f"{type(part).__name__} has no way to compute in strips")


def _resnet_in_strips(block: ResnetBlock, strips: Strips) -> Strips:
    norm1, shortcut = normalization(block.norm1, strips), Strips()

    def activated() -> Iterator[Tensor]:
        for strip in drain(strips):
            shortcut.append(block.nin_shortcut(strip))
            yield F.silu(norm1(strip))

    h = deque(convolve(block.conv1, activated()))
    norm2 = normalization(block.norm2, h)
    residual = convolve(block.conv2, (F.silu(norm2(strip)) for strip in drain(h)))
    return deque(x + h for x, h in zip(drain(shortcut), residual, strict=True))
