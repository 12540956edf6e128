"""The compiled U-Net: the same numbers, a graph for each plan, and one line where it cannot be compiled."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from atedm import DENSE, parse_preset
from minisdxl.runtime.compiled import CompiledUNet
from minisdxl.unet import UNet
from tests.minisdxl.tiny import SHALLOW_UNET

PRESETS = ("dissimilarity", "at-edm")  # one graph, and one that G-WPR breaks


@pytest.fixture(scope="module")
def unet() -> UNet:
    torch.manual_seed(0)
    return UNet(SHALLOW_UNET).eval()


def inputs(seed: int = 0) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    x, context = torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 7, 24, generator=generator)
    return x, torch.tensor([500, 20]), context, torch.randn(2, 40, generator=generator)


@torch.no_grad()
def test_each_plan_gives_what_it_gives_uncompiled(unet: UNet) -> None:
    compiled = CompiledUNet(unet, backend="eager")
    assert compiled.dtype == torch.float32
    plans = {preset: parse_preset(preset).plan(49, 50, SHALLOW_UNET.attention_sites()) for preset in PRESETS}
    for name, plan in {"dense": DENSE, **plans}.items():
        for seed in (0, 1):
            x, timestep, context, vector = inputs(seed)
            text = compiled.project_context(context)
            plain = unet(x, timestep, text, vector, plan)
            error = (compiled(x, timestep, text, vector, plan) - plain).abs().max() / plain.abs().max()
            print(f"{name}, compiled or not: differs by {error:.1e}")
            assert error < 1e-5
    assert len(compiled.graphs) == 1 + len(PRESETS)


@pytest.mark.parametrize("preset", ["at-edm:iterations=2", "dissimilarity"])
@torch.no_grad()
def test_nothing_breaks_the_graph(unet: UNet, preset: str) -> None:
    """All but the random ranking and G-WPR until it settles is one graph, with no wait for the device in it."""
    plan = parse_preset(preset).plan(49, 50, SHALLOW_UNET.attention_sites())
    x, timestep, context, vector = inputs()
    explained = torch._dynamo.explain(lambda *given: unet(*given, plan))(
        x, timestep, unet.project_context(context), vector
    )
    assert (explained.graph_count, explained.graph_break_count) == (1, 0)


@torch.no_grad()
def test_a_compiler_that_fails_is_one_line(unet: UNet) -> None:
    def broken(graph: Any, example: Any) -> Any:
        raise FileNotFoundError("no g++ here")

    compiled = CompiledUNet(unet, backend=broken)  # type: ignore[arg-type]
    x, timestep, context, vector = inputs()
    with pytest.raises(ValueError, match=r"the U-Net could not be compiled, expected a C\+\+ compiler.*no g\+\+ here"):
        compiled(x, timestep, compiled.project_context(context), vector)
