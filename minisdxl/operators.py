"""The four operators in which the U-Net spends nearly all its FLOPs, in plain PyTorch.

``@faster`` replaces an operator by faster code for the hardware at hand, where there is some. Without it (delete the
folder ``fast``, its import and the four decorators) the program is slower, and its output is the same up to rounding.
Shapes: B batch, h heads, n queries, T keys, d channels per head.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from minisdxl.fast import faster


@faster
def attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor | None]:
    """softmax(scale q k^T) v (B, h, n, d), and the log-sum-exp (B, h, n) of each row of scale q k^T if it is known."""
    return F.scaled_dot_product_attention(q, k, v, scale=scale), None


@faster
def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The linear map x weight^T + bias: (..., C) -> (..., C')."""
    return F.linear(x, weight, bias)


@faster
def geglu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """One half of a linear map times the exact GELU of the other half (Shazeer 2020): (..., C) -> (..., hidden).

    ``weight`` is (2 hidden, C), with the gate in its second half.
    """
    value, gate = F.linear(x, weight, bias).chunk(2, dim=-1)
    return value * F.gelu(gate, approximate="none")


@faster
def conv3x3(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """3x3 convolution with padding 1: (B, C, H, W) -> (B, O, H, W)."""
    return F.conv2d(x, weight, bias, padding=1)


class Linear(nn.Linear):
    """``nn.Linear`` that runs the operator :func:`linear`."""

    def forward(self, input: Tensor) -> Tensor:
        """(..., C) -> (..., C')."""
        return linear(input, self.weight, self.bias)


class Conv3x3(nn.Conv2d):
    """3x3 convolution with padding 1 that runs the operator :func:`conv3x3`."""

    bias: Tensor

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, 3, padding=1)

    def forward(self, input: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, O, H, W)."""
        return conv3x3(input, self.weight, self.bias)
