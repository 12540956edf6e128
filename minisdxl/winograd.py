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

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from minisdxl import cpu

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
TILES = 256  # at a time: enough for matrix products, few enough to stay in cache


def _both_axes(matrix: tuple[tuple[float, ...], ...], divisor: int = 1) -> Tensor:
    """The transform of a whole tile, read row by row, from that of one axis."""
    one = torch.tensor(matrix, dtype=torch.float64) / divisor
    return torch.kron(one, one)


def transform(weight: Tensor) -> Tensor:
    """The 36 matrices (36, C, O) of the weights (O, C, 3, 3) of a convolution."""
    rows = rearrange(weight, "o c p q -> o (p q) c")  # a view where channels are last
    return rearrange(_both_axes(WEIGHT, 15).to(weight) @ rows, "o point c -> point c o")


def convolve(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, O, H, W), channels last, as a 3x3 convolution with padding 1.

    The work goes strip by strip, some rows of tiles each, in the same memory. The matrices of the weights, four times
    as large, are made anew in every call: to keep those of SDXL takes 4.7 GiB and saves two hundredths of a step.
    """
    batch, channels, height, width = x.shape
    matrices = transform(weight)
    out_channels = matrices.shape[2]
    rows, columns = _tiles(x)
    step = min(rows, -(-TILES // (batch * columns)))
    strips, at_once = -(-rows // step), step * batch * columns
    of_tiles, of_products = _both_axes(TILE, 2).to(x), _both_axes(OUTPUT).to(x)
    tiles, seen = x.new_empty(2, INPUTS * INPUTS, at_once, channels)
    products = x.new_empty(INPUTS * INPUTS, at_once, out_channels)
    y = x.new_empty(batch, strips * step, OUTPUTS, columns, OUTPUTS, out_channels)
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
        torch.mm(of_tiles, tiles.flatten(1), out=seen.flatten(1))
        torch.bmm(seen, matrices, out=products)
        outputs = (of_products @ products.flatten(1)).view(OUTPUTS, OUTPUTS, batch, step, columns, out_channels)
        y[:, first : first + step] = rearrange(outputs.add_(bias), "p q b row column o -> b row p column q o")
    whole = rearrange(y, "b row p column q o -> b o (row p) (column q)")
    return whole[:, :, :height, :width]


def _tiles(x: Tensor) -> tuple[int, int]:
    """How many tiles there are below and beside each other."""
    return -(-x.shape[2] // OUTPUTS), -(-x.shape[3] // OUTPUTS)


class Conv3x3(nn.Conv2d):
    """A 3x3 convolution, padded by 1, the faster way where there is one."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, 3, padding=1)

    def forward(self, input: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, O, H, W)."""
        wide = min(self.in_channels, self.out_channels) >= LEAST_CHANNELS
        large = len(input) * math.prod(_tiles(input)) >= LEAST_TILES
        if wide and large and cpu.usable(input):
            assert self.bias is not None
            return convolve(input, self.weight, self.bias)
        return super().forward(input)
