"""Recoveries that fill pruned positions, against loops over plain Python numbers."""

from __future__ import annotations

import math

import pytest
import torch

from atedm import AttentionInputs, LazyGraph, TokenSet, recover

NO_GRAPH = LazyGraph(AttentionInputs(torch.empty(0), torch.empty(0), 1.0), "not to be built")


def random_tokens(batch: int, height: int, width: int) -> TokenSet:
    return TokenSet.from_feature_map(torch.randn(batch, 4, height, width, generator=torch.Generator().manual_seed(1)))


def cubic_taps(out: int, size: int, of: int) -> list[tuple[int, float]]:
    """Which samples of ``size`` make sample ``out`` of ``of``, and their weights: Keys' cubic kernel, a = -0.75."""
    a = -0.75
    center = (out + 0.5) * size / of - 0.5
    taps = []
    for sample in range(math.floor(center) - 1, math.floor(center) + 3):
        x = abs(center - sample)
        near, far = (a + 2) * x**3 - (a + 3) * x**2 + 1, a * (x**3 - 5 * x**2 + 8 * x - 4)
        taps.append((min(max(sample, 0), size - 1), near if x <= 1 else far))  # the border repeats
    return taps


def resize(grid: list[list[float]], height: int, width: int) -> list[list[float]]:
    rows, columns = len(grid), len(grid[0])
    return [
        [
            sum(p * q * grid[y][x] for y, p in cubic_taps(i, rows, height) for x, q in cubic_taps(j, columns, width))
            for j in range(width)
        ]
        for i in range(height)
    ]


@pytest.mark.parametrize("grid", [(4, 6), (5, 7), (1, 8)])
@pytest.mark.parametrize("recovery", ["zeros", "bicubic", "direct"])
def test_fillings_by_loops(recovery: str, grid: tuple[int, int]) -> None:
    height, width = grid
    tokens = random_tokens(2, height, width)
    tokens = tokens.with_values(tokens.values.double())
    order = torch.stack([torch.randperm(tokens.count, generator=torch.Generator().manual_seed(s)) for s in (3, 4)])
    kept = order[:, : tokens.count // 3 + 1].sort(dim=1).values
    restore = recover(recovery, tokens, kept, NO_GRAPH)
    generator = torch.Generator().manual_seed(6)
    later = tokens.keep(kept).with_values(torch.randn(2, kept.shape[1], 4, generator=generator, dtype=torch.float64))
    restored = restore(later)
    assert restored.is_dense
    worst = 0.0
    for row in range(2):
        held = kept[row].tolist()
        for channel in range(4):
            zeros = [[0.0] * width for _ in range(height)]
            for place, position in enumerate(held):
                zeros[position // width][position % width] = later.values[row, place, channel].item()
            smooth = resize(resize(zeros, (height + 1) // 2, (width + 1) // 2), height, width)
            for position in range(tokens.count):
                if position in held:
                    expected = later.values[row, held.index(position), channel].item()
                elif recovery == "zeros":
                    expected = 0.0
                elif recovery == "direct":
                    expected = tokens.values[row, position, channel].item()
                else:
                    expected = smooth[position // width][position % width]
                worst = max(worst, abs(restored.values[row, position, channel].item() - expected))
    print(f"{recovery} on {grid}: max error {worst:.1e}")
    assert worst < 1e-14


def test_interpolation_is_near_zero_amid_pruned_tokens() -> None:
    """What the paper reports of it (section 4.4); a token pruned alone is something like its neighbours."""
    tokens = TokenSet.from_feature_map(torch.ones(1, 1, 16, 16))
    alone = torch.tensor([[i for i in range(256) if i != 5 * 16 + 5]])
    frame = torch.tensor([[i for i in range(256) if i // 16 < 4 or i % 16 < 4]])
    restored = [recover("bicubic", tokens, kept, NO_GRAPH)(tokens.keep(kept)) for kept in (alone, frame)]
    inside, far = restored[0].to_feature_map()[0, 0, 5, 5], restored[1].to_feature_map()[0, 0, 8:, 8:].abs().max()
    print(f"bicubic, kept tokens of value 1: {inside:.2f} where one is pruned alone, {far:.2f} four and more away")
    assert inside > 0.5
    assert far < 0.05
