"""Recovery by a token's own history, against a loop over tokens and steps, and on the bundled model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from atedm import Pruning
from atedm.fills import direct_copy
from atedm.tokens import TokenSet
from minisdxl.pipeline import SDXL
from minisdxl.steps.own_change import OwnChange

BATCH, GRID, CHANNELS, STEPS, KEPT = 2, (3, 4), 5, 7, 4
COUNT = GRID[0] * GRID[1]


@pytest.mark.parametrize("linear", [False, True])
def test_equals_a_loop_over_tokens(linear: bool) -> None:
    """Neighbours are left out here: a token without a history is as it was when pruned."""
    torch.manual_seed(0)
    kept: dict[str, Tensor] = {}
    visits: dict[tuple[int, int], list[tuple[int, Tensor]]] = {}
    worst = 0.0
    for step in range(1, STEPS + 1):
        before = TokenSet(torch.randn(BATCH, COUNT, CHANNELS).double(), GRID)
        indices = torch.stack([torch.randperm(COUNT)[:KEPT].sort().values for _ in range(BATCH)])
        changes = torch.randn(BATCH, KEPT, CHANNELS).double()
        held = before.keep(indices)
        held = held.with_values(held.values + changes)
        new: dict[str, Tensor] = {}
        restore = OwnChange(before, indices, direct_copy(before, indices), linear, "mid 0", kept, new)
        found = restore(held).values
        kept |= new
        for row in range(BATCH):
            stay = {int(index): change for index, change in zip(indices[row], changes[row], strict=True)}
            for token in range(COUNT):
                past = visits.setdefault((row, token), [])
                if token in stay:
                    change = stay[token]
                elif not past:
                    change = torch.zeros(CHANNELS).double()
                elif linear and len(past) > 1:
                    (one, early), (two, late) = past[-2:]
                    change = late + (late - early) / (two - one) * (step - two)
                else:
                    change = past[-1][1]
                expected = before.values[row, token] + change
                worst = max(worst, float((found[row, token] - expected).abs().max()))
                if token in stay:
                    past.append((step, stay[token]))
    print(f"error {worst:.1e}")
    assert worst < 1e-6  # times are float32


@pytest.mark.parametrize("recovery", ["own-change", "own-change-linear"])
def test_tokens_without_a_history_take_their_neighbours_change(shapes: SDXL, recovery: str) -> None:
    """In the first step of a run all pruned tokens are without, so one step is as with ``nearest-change``."""
    given: dict[str, Any] = {"size": (64, 64), "sampling": "euler", "seed": 1}
    prompt = ["a small red circle on a white background"]
    first, later = ("moving-grid:tau=0,recovery=" + name for name in (recovery, "nearest-change"))
    one, other = (shapes.generate(prompt, steps=1, prune=preset, **given)[0].tobytes() for preset in (first, later))
    assert one == other
    one, other = (shapes.generate(prompt, steps=6, prune=preset, **given)[0].tobytes() for preset in (first, later))
    assert one != other


def test_it_needs_a_run_and_one_pruning(shapes: SDXL) -> None:
    assert Pruning(0.5, recovery="own-change").recovery == "own-change"
    with pytest.raises(ValueError, match="recovery own-change is for one pruning in a block"):
        shapes.generate(["a circle"], steps=1, size=(64, 64), prune="moving-grid:layers=0+1,recovery=own-change")
