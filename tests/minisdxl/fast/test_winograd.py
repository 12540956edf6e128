"""Convolutions in few multiplications, beside the plain ones in float64."""

from __future__ import annotations

from fractions import Fraction
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.utils import convert_conv2d_weight_memory_format

from minisdxl.fast import cpu, winograd
from minisdxl.fast.winograd import INPUTS, OUTPUT, OUTPUTS, TILE, WEIGHT, convolve
from minisdxl.operators import Conv3x3
from tests.minisdxl.fast.test_cpu import needs_onednn, relative_error
from tests.minisdxl.tiny import SMALL_UNET, random_unet, unet_inputs


def plain(layer: Conv3x3, x: Tensor) -> Tensor:
    assert layer.bias is not None
    return F.conv2d(x.double(), layer.weight.double(), layer.bias.double(), padding=1)


def layer_and_input(
    channels: tuple[int, int], size: tuple[int, int], batch: int, scale: float
) -> tuple[Conv3x3, Tensor]:
    torch.manual_seed(0)
    layer = Conv3x3(*channels).requires_grad_(False)
    convert_conv2d_weight_memory_format(layer, torch.channels_last)
    x = scale * torch.randn(batch, channels[0], *size)
    return layer, x.contiguous(memory_format=torch.channels_last)


def test_the_three_transforms_are_a_convolution_exactly() -> None:
    """Output p of a tile is the sum of weights times inputs at p, p + 1, p + 2, in fractions."""
    for output, weight, tile in product(range(OUTPUTS), range(3), range(INPUTS)):
        found = sum(
            Fraction(OUTPUT[output][point]) * Fraction(WEIGHT[point][weight], 15) * Fraction(TILE[point][tile], 2)
            for point in range(INPUTS)
        )
        assert found == (tile == output + weight)


@pytest.mark.parametrize("scale", [1.0, 1e-3], ids=["ordinary", "small"])
@pytest.mark.parametrize(
    ("channels", "size", "batch"),
    [((320, 320), (40, 52), 1), ((960, 320), (33, 18), 2), ((64, 640), (64, 64), 1), ((5, 3), (1, 1), 3)],
    ids=str,
)
@torch.no_grad()
def test_it_is_the_convolution(channels: tuple[int, int], size: tuple[int, int], batch: int, scale: float) -> None:
    layer, x = layer_and_input(channels, size, batch, scale)
    assert layer.bias is not None
    layer.bias.mul_(scale)
    exact = plain(layer, x)
    ours = relative_error(convolve(x, layer.weight, layer.bias), exact)
    direct = relative_error(F.conv2d(x, layer.weight, layer.bias, padding=1), exact)
    double = relative_error(convolve(x.double(), layer.weight.double(), layer.bias.double()), exact)
    print(f"{channels} {size}: max error {ours:.1e} of the largest, direct {direct:.1e}, in float64 {double:.1e}")
    assert ours < 1e-5 and double < 1e-13


@settings(deadline=None, max_examples=40)
@given(
    channels=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    size=st.tuples(st.integers(1, 30), st.integers(1, 30)),
    batch=st.integers(1, 3),
    tiles=st.integers(1, 40),
    at_a_time=st.integers(1, 9),
    last=st.booleans(),
)
def test_any_size_in_any_strips(
    channels: tuple[int, int], size: tuple[int, int], batch: int, tiles: int, at_a_time: int, last: bool
) -> None:
    """Maps that are no whole number of tiles, strips and pieces that do not divide them, channels outside or last."""
    layer, x = layer_and_input(channels, size, batch, 1.0)
    x = x if last else x.contiguous()
    assert layer.bias is not None
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(winograd, "TILES", tiles)
        patch.setattr(winograd, "CHANNELS", at_a_time)
        y = convolve(x.double(), layer.weight.double(), layer.bias.double())
    assert y.shape == (batch, channels[1], *size)
    assert channels[1] == 1 or y.stride(1) == 1  # channels last
    torch.testing.assert_close(y, plain(layer, x), rtol=0, atol=1e-13)


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("size", [(8, 12), (7, 12), (7, 10)], ids=["whole tiles", "whole rows", "neither"])
@torch.no_grad()
def test_what_follows_has_its_channels_last_too(batch: int, size: tuple[int, int]) -> None:
    """torch tells by all strides, those of axes of one element too, and copies where they are off."""
    layer, x = layer_and_input((4, 6), size, batch, 1.0)
    assert layer.bias is not None
    y = convolve(x, layer.weight, layer.bias)
    assert F.group_norm(y, 2).is_contiguous(memory_format=torch.channels_last)


@needs_onednn
@pytest.mark.parametrize("scale", [1.0, 1e-2], ids=["ordinary", "small"])
@pytest.mark.parametrize("size", [(16, 24), (13, 19)], ids=["even", "odd"])
@torch.no_grad()
def test_the_unet_is_the_same_without_it(scale: float, size: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    unet, inputs = random_unet(SMALL_UNET, torch.float32, scale), unet_inputs(SMALL_UNET, size, torch.float32, scale)
    direct = unet(*inputs)
    monkeypatch.setattr(winograd, "LEAST_CHANNELS", 1)
    monkeypatch.setattr(winograd, "LEAST_TILES", 1)
    error = relative_error(unet(*inputs), direct.double())
    print(f"few multiplications and direct, scale {scale:g}: max error {error:.1e} of the largest")
    assert 0 < error < 1e-5


def test_it_stays_away_where_it_does_not_belong(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = layer_and_input((256, 288), (31, 16), 1, 1.0)  # 8 x 4 tiles
    small, _ = layer_and_input((255, 288), (31, 16), 1, 1.0)

    def forbidden(*_: Tensor) -> Tensor:
        raise AssertionError("in few multiplications")

    monkeypatch.setattr(winograd, "convolve", forbidden)
    layer.requires_grad_(True)
    layer(x).sum().backward()
    assert layer.weight.grad is not None
    with torch.no_grad():
        small(x[:, :255])
        layer(x[:, :, :28])
        layer.double()(x.double())
        layer.bfloat16()(x.bfloat16())
        layer.float()
        with torch.autocast("cpu", torch.bfloat16):
            assert layer(x).dtype == torch.bfloat16
        if cpu.usable(x):
            with pytest.raises(AssertionError, match="few"):
                layer(x)
