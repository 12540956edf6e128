"""3x3 convolution by Winograd's algorithm, with a quarter of the multiplications, for inference on a CPU.

Source: Lavin and Gray 2016, "Fast Algorithms for Convolutional Neural Networks", F(4x4, 3x3). Convolution is a product
of polynomials: evaluate both at some points, multiply the values, interpolate. Here a tile of 6x6 inputs and the 3x3
weights become 36 values each, and their products become a tile of 4x4 outputs. Summed over input channels, for all
tiles at once, these are 36 matrix products. The points 0, 1, -1, 1/2, -2 and infinity amplify rounding least (Barabasz
et al. 2020, "Error Analysis and Improving the Accuracy of Winograd Convolution for Deep Neural Networks"). The largest
error is about twice that of oneDNN's direct convolution in fp32. ``tools.bench`` measures the gain.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

OUTPUTS, INPUTS = 4, 6  # of a tile along one axis; the inputs of neighboring tiles overlap by two
TILE = ((2, -3, -4, 3, 2, 0), (0, -2, 1, 5, 2, 0), (0, 2, -5, 1, 2, 0),
        (0, -4, -2, 4, 2, 0), (0, 1, -2, -1, 2, 0), (0, 2, -3, -4, 3, 2))  # fmt: skip
"""Transform of input tiles along one axis, times 2 to make the numbers whole."""
WEIGHT = ((15, 0, 0), (5, 5, 5), (-5, 5, -5), (-16, -8, -4), (1, -2, 4), (0, 0, 15))
"""Transform of weights, times 15: values at each point, divided by the product of its distances to the others."""
OUTPUT = ((1, 1, 1, 1, 1, 0), (0, 1, -1, 1 / 2, -2, 0), (0, 1, 1, 1 / 4, 4, 0), (0, 1, -1, 1 / 8, -8, 1))
"""Transform of products to outputs: powers of the points."""

# With fewer channels or tiles the transforms take more time than the multiplications save.
LEAST_CHANNELS, LEAST_TILES = 256, 32
TILES, CHANNELS = 256, 320  # at a time: enough for matrix products, few enough for the caches


def _both_axes(matrix: tuple[tuple[float, ...], ...], divisor: int = 1) -> Tensor:
    """The transform of a whole tile, flattened row by row, from that of one axis."""
    one = torch.tensor(matrix, dtype=torch.float64) / divisor
    return torch.kron(one, one)


def transform(weight: Tensor, out: Tensor | None = None) -> Tensor:
    """Weights (O, C, 3, 3) to 36 matrices (36, C, O), stored in ``out`` (O, 36, C)."""
    rows = rearrange(weight, "o c p q -> o (p q) c")  # a view where channels are last
    return rearrange(torch.matmul(_both_axes(WEIGHT, 15).to(weight), rows, out=out), "o point c -> point c o")


def convolve(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """3x3 convolution with padding 1: (B, C, H, W) -> (B, O, H, W), channels last.

    Works on some rows of tiles at a time, in the same memory; if all fit, on some output channels at a time. Weights
    are transformed in every call. Keeping the transformed weights of SDXL, four times as large, would take 4.7 GiB and
    save 2 % of a step.
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
    """The matrices (36, C, n) of ``at_a_time`` output channels after the other, all in the same memory."""
    room = weight.new_empty(min(at_a_time, len(weight)), INPUTS * INPUTS, weight.shape[1])
    for piece in torch.split(weight, at_a_time):
        yield transform(piece, room[: len(piece)])


def _seen(x: Tensor, rows: int, columns: int, step: int) -> Iterator[Tensor]:
    """The transformed tiles (36, tiles, C) of ``step`` rows of tiles at a time, all in the same memory."""
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
    """Number of rows and columns of tiles."""
    return -(-x.shape[2] // OUTPUTS), -(-x.shape[3] // OUTPUTS)


def pays(x: Tensor, weight: Tensor) -> bool:
    """Whether this is faster than direct convolution, for ``x`` (B, C, H, W) and ``weight`` (O, C, 3, 3)."""
    return min(weight.shape[:2]) >= LEAST_CHANNELS and len(x) * math.prod(_tiles(x)) >= LEAST_TILES
