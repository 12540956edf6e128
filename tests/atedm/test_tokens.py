"""Token sets: there and back, views, positions, errors."""

from __future__ import annotations

import pytest
import torch

from atedm import TokenSet


def test_raster_order_there_and_back() -> None:
    x = torch.randn(2, 3, 4, 5)
    tokens = TokenSet.from_feature_map(x)
    assert (tokens.count, tokens.size, tokens.is_dense, tokens.grid) == (20, 20, True, (4, 5))
    for row in range(4):
        for column in range(5):
            assert torch.equal(tokens.values[:, row * 5 + column], x[:, :, row, column])
    assert torch.equal(tokens.to_feature_map(), x)


def test_no_copy_on_the_way() -> None:
    x = torch.randn(1, 3, 4, 5)
    tokens = TokenSet.from_feature_map(x)
    assert tokens.values.data_ptr() == x.data_ptr() == tokens.to_feature_map().data_ptr()
    channels_last = x.to(memory_format=torch.channels_last)
    assert TokenSet.from_feature_map(channels_last).values.is_contiguous()


def test_keep_holds_grid_positions_also_when_repeated() -> None:
    tokens = TokenSet.from_feature_map(torch.arange(24.0).reshape(2, 1, 3, 4))
    once = tokens.keep(torch.tensor([[0, 2, 3, 7, 11], [1, 4, 5, 6, 10]]))
    twice = once.keep(torch.tensor([[1, 4], [0, 2]]))
    assert twice.positions is not None
    assert twice.positions.tolist() == [[2, 11], [1, 5]]
    assert twice.values.squeeze(-1).tolist() == [[2, 11], [12 + 1, 12 + 5]]
    assert (twice.count, twice.size, twice.is_dense, twice.grid) == (2, 12, False, (3, 4))


def test_keeping_all_is_dense() -> None:
    x = torch.randn(2, 3, 4, 5)
    tokens = TokenSet.from_feature_map(x)
    everything = tokens.keep(torch.arange(20).expand(2, -1))
    assert torch.equal(everything.to_feature_map(), x)


def test_with_values_keeps_positions() -> None:
    tokens = TokenSet.from_feature_map(torch.randn(2, 3, 2, 2)).keep(torch.tensor([[0, 3], [1, 2]]))
    wider = tokens.with_values(torch.ones(2, 2, 7))
    assert wider.positions is tokens.positions
    assert wider.values.shape == (2, 2, 7)
    with pytest.raises(ValueError, match=r"positions have shape \(2, 2\), expected \(2, 3\)"):
        tokens.with_values(torch.ones(2, 3, 7))


def test_sparse_set_is_no_feature_map() -> None:
    tokens = TokenSet.from_feature_map(torch.randn(1, 3, 2, 4)).keep(torch.tensor([[0, 3, 5]]))
    with pytest.raises(ValueError, match=r"holds 3 of 8 tokens of grid \(2, 4\).*recovered"):
        tokens.to_feature_map()


def test_shapes_that_do_not_belong_together() -> None:
    with pytest.raises(ValueError, match=r"feature map has shape \(3, 4, 5\)"):
        TokenSet.from_feature_map(torch.randn(3, 4, 5))
    with pytest.raises(ValueError, match=r"token values have shape \(4, 5\)"):
        TokenSet(torch.randn(4, 5), (2, 2))
    with pytest.raises(ValueError, match=r"5 tokens without positions, expected 6"):
        TokenSet(torch.randn(1, 5, 3), (2, 3))
    with pytest.raises(ValueError, match=r"5 tokens on grid \(2, 2\), expected at most 4"):
        TokenSet(torch.randn(1, 5, 3), (2, 2), torch.arange(5).unsqueeze(0))
