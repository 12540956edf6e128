"""The compiled U-Net: the same numbers, a graph for each plan, and one line where it cannot be compiled."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx import GraphModule

from atedm import BlockPlan, Pruning, TokenPlan, parse_preset
from minisdxl.config import Level
from minisdxl.runtime.compiled import CompiledUNet
from minisdxl.unet import UNet
from tests.minisdxl.tiny import SHALLOW_UNET


@pytest.fixture(scope="module")
def unet() -> UNet:
    torch.manual_seed(0)
    return UNet(SHALLOW_UNET).eval()


def inputs(seed: int = 0) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    x, context = torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 7, 24, generator=generator)
    return x, torch.tensor([500, 20]), context, torch.randn(2, 40, generator=generator)


@pytest.mark.slow
@torch.no_grad()
def test_each_plan_gives_what_it_gives_uncompiled(unet: UNet) -> None:
    """Each is one graph, with no wait for the device in it; but G-WPR that runs until it settles breaks its graph."""
    graphs: list[GraphModule] = []

    def backend(graph: GraphModule, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    compiled = CompiledUNet(unet, backend=backend)  # type: ignore[arg-type]
    assert compiled.dtype == torch.float32
    sites = list(SHALLOW_UNET.attention_sites())
    whole = {name: parse_preset(name).plan(49, 50, sites) for name in ("dissimilarity", "at-edm:iterations=2")}
    broken = TokenPlan({"down.0.0": BlockPlan.pruning(Pruning(0.63))})
    for name, plan in {**whole, "broken": broken}.items():
        graphs.clear()
        for seed in (0, 1):
            x, timestep, context, vector = inputs(seed)
            text = compiled.project_context(context)
            plain = unet(x, timestep, text, vector, plan)
            error = (compiled(x, timestep, text, vector, plan) - plain).abs().max() / plain.abs().max()
            print(f"{name}, {len(graphs)} graphs, compiled or not: differs by {error:.1e}")
            assert error < 1e-5
        assert (len(graphs) == 1) == (name != "broken")
    assert len(compiled.graphs) == 3


@torch.no_grad()
def test_a_compiler_that_fails_is_one_line() -> None:
    def broken(graph: Any, example: Any) -> Any:
        raise FileNotFoundError("no g++ here")

    convolutions = UNet(replace(SHALLOW_UNET, levels=(Level(1, 0),)))
    compiled = CompiledUNet(convolutions, backend=broken)  # type: ignore[arg-type]
    x, timestep, context, vector = inputs()
    with pytest.raises(ValueError, match=r"the U-Net could not be compiled, expected a C\+\+ compiler.*no g\+\+ here"):
        compiled(x, timestep, compiled.project_context(context), vector)
