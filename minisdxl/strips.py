"""Layers of a convolutional network on a feature map in strips, for large maps in little memory.

A map (B, C, H, W) is cut along H and its layers are applied strip by strip. Nothing is approximate: a convolution gets
one row of each neighbouring strip, and a normalization has the statistics of the whole map, so there is no seam. A
strip is taken away as it is read: a map and the next one that is made of it take little more than the larger of them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from itertools import chain

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

Strips = deque[Tensor]  # of one map, from top to bottom


def drain(strips: Strips) -> Iterator[Tensor]:
    """Every strip, which the map then has no longer."""
    while strips:
        yield strips.popleft()


def convolve(conv: nn.Conv2d, strips: Iterable[Tensor]) -> Iterator[Tensor]:
    """A 3x3 convolution that pads with zeros, of a map whose strips come one by one."""
    strips = iter(strips)
    strip = next(strips)
    above = edge = torch.zeros_like(strip[:, :, :1])
    for below in chain(strips, [edge]):
        window = torch.cat([above[:, :, -1:], strip, below[:, :, :1]], dim=2)
        yield F.conv2d(window, conv.weight, conv.bias, padding=(0, 1))
        above, strip = strip, below


def normalization(norm: nn.GroupNorm, strips: Strips) -> Callable[[Tensor], Tensor]:
    """``norm`` for single strips, with the means and variances of the whole map that ``strips`` are."""
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
