"""3x3 convolutions with a quarter of the multiplications (Lavin and Gray 2016, "Fast Algorithms for Convolutional
Neural Networks", F(4x4, 3x3)).

A polynomial product is cheap between values: evaluate both at some points, multiply there, interpolate. So a tile of
6x6 inputs and the 3x3 weights become 36 numbers each, whose products become a tile of 4x4 outputs. Summed over input
channels, for all tiles at once, that is 36 matrix products. The points are 0, 1, -1, 1/2, -2 and infinity, under which
rounding grows least (Barabasz et al. 2020, "Error Analysis and Improving the Accuracy of Winograd Convolution for Deep
Neural Networks"): the largest error is about twice that of oneDNN's direct convolution in the same fp32.

For inference on a CPU. ``tools.bench`` measures what it gains.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

OUTPUTS, INPUTS = 4, 6  # of a tile along one axis; inputs overlap by two. What transforms each of three things there:
TILE = ((2, -3, -4, 3, 2, 0), (0, -2, 1, 5, 2, 0), (0, 2, -5, 1, 2, 0),
        (0, -4, -2, 4, 2, 0), (0, 1, -2, -1, 2, 0), (0, 2, -3, -4, 3, 2))  # fmt: skip
"""Twice the transform of a tile along one axis, which makes the numbers whole."""
WEIGHT = ((15, 0, 0), (5, 5, 5), (-5, 5, -5), (-16, -8, -4), (1, -2, 4), (0, 0, 15))
"""Fifteen times that of the weights: their values at each point, over the product of its distances to the others."""
OUTPUT = ((1, 1, 1, 1, 1, 0), (0, 1, -1, 1 / 2, -2, 0), (0, 1, 1, 1 / 4, 4, 0), (0, 1, -1, 1 / 8, -8, 1))
"""That of products: powers of the points."""

# Fewer channels or fewer tiles are convolved no faster this way than directly, because of the transforms.
LEAST_CHANNELS, LEAST_TILES = 256, 32
TILES, CHANNELS = 256, 320  # at a time: enough for matrix products, few enough for caches and memory


def _both_axes(matrix: tuple[tuple[float, ...], ...], divisor: int = 1) -> Tensor:
    """The transform of a whole tile, read row by row, from that of one axis."""
    one = torch.tensor(matrix, dtype=torch.float64) / divisor
    return torch.kron(one, one)


def transform(weight: Tensor, out: Tensor | None = None) -> Tensor:
    """The 36 matrices (36, C, O) of the weights (O, C, 3, 3) of a convolution; they lie in ``out`` (O, 36, C)."""
    rows = rearrange(weight, "o c p q -> o (p q) c")  # a view where channels are last
    return rearrange(torch.matmul(_both_axes(WEIGHT, 15).to(weight), rows, out=out), "o point c -> point c o")


def convolve(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, O, H, W), channels last, as a 3x3 convolution with padding 1.

    The work goes strip by strip, some rows of tiles each, in the same memory; where one strip is all, some output
    channels at a time. The matrices of the weights, four times as large, are made anew in every call: to keep those of
    SDXL takes 4.7 GiB and saves two hundredths of a step.
    """
    batch, _, height, width = x.shape
    rows, columns = _tiles(x)
    step = min(rows, -(-TILES // (batch * columns)))
    strips = -(-rows // step)
    at_a_time = CHANNELS if strips == 1 else len(weight)
    matrices = _matrices(weight, at_a_time)
    matrices = list(matrices) if strips > 1 else matrices  # strips share them
    of_products = _both_axes(OUTPUT).to(x)
    size = (batch, len(weight), strips * step * OUTPUTS, columns * OUTPUTS)
    y = torch.empty(size, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    by_tiles = rearrange(y, "b o (row p) (column q) -> b row p column q o", p=OUTPUTS, q=OUTPUTS)
    for first, seen in zip(range(0, rows, step), _seen(x, rows, columns, step), strict=True):
        pieces = torch.split(by_tiles[:, first : first + step], at_a_time, dim=-1)
        for piece, matrix, shift in zip(pieces, matrices, torch.split(bias, at_a_time), strict=True):
            outputs = of_products @ torch.bmm(seen, matrix).flatten(1)
            outputs = outputs.view(OUTPUTS, OUTPUTS, batch, step, columns, -1).add_(shift)
            piece.copy_(rearrange(outputs, "p q b row column o -> b row p column q o"))
    return y[:, :, :height, :width]


def _matrices(weight: Tensor, at_a_time: int) -> Iterable[Tensor]:
    """The matrices (36, C, ...) of some output channels at a time, which lie in the same memory."""
    room = weight.new_empty(min(at_a_time, len(weight)), INPUTS * INPUTS, weight.shape[1])
    for piece in torch.split(weight, at_a_time):
        yield transform(piece, room[: len(piece)])


def _seen(x: Tensor, rows: int, columns: int, step: int) -> Iterator[Tensor]:
    """The transformed tiles (36, tiles, C) of ``step`` rows of tiles at a time, which lie in the same memory."""
    batch, channels, height, width = x.shape
    of_tiles = _both_axes(TILE, 2).to(x)
    tiles, seen = x.new_empty(2, INPUTS * INPUTS, batch * step * columns, channels)
    for first in range(0, rows, step):
        top, bottom = OUTPUTS * first - 1, OUTPUTS * (first + step) + 1
        strip = F.pad(
            x[:, :, max(top, 0) : bottom],
            (1, OUTPUTS * columns + 1 - width, int(top < 0), max(bottom - height, 0)),
        )
        overlapping = strip.unfold(2, INPUTS, OUTPUTS).unfold(3, INPUTS, OUTPUTS)
        tiles.view(INPUTS, INPUTS, batch, step, columns, channels).copy_(
            rearrange(overlapping, "b c row column p q -> p q b row column c")
        )
        yield torch.mm(of_tiles, tiles.flatten(1), out=seen.flatten(1)).view_as(seen)


def _tiles(x: Tensor) -> tuple[int, int]:
    """How many tiles there are below and beside each other."""
    return -(-x.shape[2] // OUTPUTS), -(-x.shape[3] // OUTPUTS)


def pays(x: Tensor, weight: Tensor) -> bool:
    """Whether (B, C, H, W) is convolved with (O, C, 3, 3) faster this way than directly."""
    return min(weight.shape[:2]) >= LEAST_CHANNELS and len(x) * math.prod(_tiles(x)) >= LEAST_TILES
