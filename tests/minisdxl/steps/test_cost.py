"""FLOPs of steps under plans, against torch's operator counter on the real U-Net."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from atedm import DENSE, parse_preset
from minisdxl.config import SDXL_BASE, ModelConfig
from minisdxl.cost import count
from minisdxl.steps.cost import kept_bytes, picture_cost, step_cost
from minisdxl.steps.evaluate import evaluate
from minisdxl.steps.plan import SHALLOW, StepPlan
from minisdxl.unet import UNet

MERGED = parse_preset("tome-dsap").plan(0, 50, list(SDXL_BASE.unet.attention_sites()))  # some blocks stay dense
PLANS = [
    *(StepPlan(unet=SHALLOW, branch=branch) for branch in (0, 2, 3, 5, 7)),
    StepPlan(cross_attention="reused"),
    StepPlan(cross_attention="reused", self_attention="reused"),
    StepPlan(MERGED, cross_attention="reused"),
    StepPlan(MERGED, SHALLOW, branch=4),
]


class Anything(dict[str, torch.Tensor]):
    """Kept tensors of whatever name and shape are asked for."""

    def __init__(self, unet: UNet, height: int, width: int) -> None:
        self.sites = {site.name: site for site in unet.config.attention_sites()}
        self.size, self.unet = (height, width), unet

    def __missing__(self, name: str) -> torch.Tensor:
        kind, place = name.split(" ", 1)
        if kind == "below":
            level, index = divmod(int(place), self.unet.config.res_blocks + 1)
            last = len(self.unet.config.levels) - 1
            channels = self.unet.config.channels(min(level + (index == self.unet.config.res_blocks), last))
            return torch.empty(1, channels, *(-(-side >> level) for side in self.size), device="meta")
        site = self.sites[place.split(" ")[0]]
        tokens = (-(-self.size[0] >> site.level)) * (-(-self.size[1] >> site.level))
        return torch.empty(1, tokens, site.channels, device="meta")


@pytest.mark.parametrize("plan", PLANS, ids=lambda plan: f"{plan.unet}-{plan.branch}-{plan.cross_attention}")
def test_a_call_to_the_flop(plan: StepPlan) -> None:
    with torch.device("meta"):
        unet = UNet(SDXL_BASE.unet)
    height, width, text = 36, 28, 77
    c = unet.config
    x, time = torch.empty(1, c.in_channels, height, width, device="meta"), torch.ones(1, device="meta")
    context = torch.empty(1, text, c.context_channels, device="meta")
    vector = torch.empty(1, c.vector_channels, device="meta")
    kept: Any = Anything(unet, height, width)
    counter = FlopCounterMode(display=False)
    projected = FlopCounterMode(display=False)  # of keys and values of the text, which the formula counts by block
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        with projected:
            keys_and_values = unet.project_context(context)
        with counter:
            evaluate(unet, plan, x, time, keys_and_values, vector, kept)
    counted, beside = step_cost(SDXL_BASE, height, width, plan, text)
    of_text = text_flops(plan, text)
    print(f"{counted} counted, {counter.get_total_flops()} measured, {of_text} of the text, {beside} to match")
    assert counted + beside == counter.get_total_flops() + of_text


def text_flops(plan: StepPlan, text: int) -> int:
    """Keys and values of the text in the blocks that run and attend to it."""
    c = SDXL_BASE.unet
    blocks = len(c.levels) * (c.res_blocks + 1)
    order = [site.name for site in c.attention_sites()]
    # The numbered blocks of SDXL that have attention, in running order (official checkpoint).
    places = [("in", 4), ("in", 5), ("in", 7), ("in", 8), ("mid", 0), *(("out", n) for n in range(6))]
    total = 0
    for name, (way, number), site in zip(order, places, c.attention_sites(), strict=True):
        outside = {"in": number, "out": blocks - 1 - number, "mid": blocks}[way]
        runs = plan.unet != SHALLOW or outside <= (plan.branch or 0)
        attends = plan.cross_attention != "reused" or name in plan.tokens
        total += runs * attends * site.depth * 2 * text * c.context_channels * 2 * site.channels
    return total


def test_a_picture_is_the_sum_of_its_steps() -> None:
    config, text = SDXL_BASE, 77
    dense, shallow = count(config, 64, 64).total, step_cost(config, 64, 64, StepPlan(unet=SHALLOW, branch=0), text)[0]
    plans = [StepPlan(branch=0), StepPlan(unet=SHALLOW, branch=0), StepPlan(unet="noise-0")]
    plans += [StepPlan(guidance="conditional"), StepPlan(guidance="kept", unet=SHALLOW, branch=0)]
    found = picture_cost(config, 64, 64, plans, text, 7.0, [1, 1, 1, 2, 1])
    assert found.flops == 2 * dense + 2 * shallow + 2 * dense + shallow
    assert (found.whole, found.shallow, found.forecast, found.single) == (2, 2, 1, 2)
    without = picture_cost(config, 64, 64, plans, text, 1.0, [1, 1, 1, 2, 1])
    assert without.flops == dense + shallow + 2 * dense + shallow
    assert picture_cost(config, 64, 64, [StepPlan()], text, 7.0, [1]).steps() == {}


def test_deepcache_on_sdxl_costs_what_is_known() -> None:
    """A shallow step of branch 0 is 98 of 6,760 GFLOPs at 1024 px (shared facts: acceleration)."""
    shallow = step_cost(SDXL_BASE, 128, 128, StepPlan(unet=SHALLOW, branch=0), 77)[0]
    print(f"{shallow / 1e9:.1f} GFLOPs, {shallow / count(SDXL_BASE, 128, 128).total:.2%}")
    assert shallow == pytest.approx(98e9, rel=0.01)


def kept_by(config: ModelConfig, plans: list[StepPlan]) -> int:
    return kept_bytes(config, 128, 128, plans, 2)


def test_memory_of_what_is_kept() -> None:
    """210 MB for averaged cross-attention of SDXL at 1024 px in bf16, as the formula of its blocks gives."""
    tokens = {1: 4096 * 640 * 2 * 5, 2: 1024 * 1280 * 10 * 6}  # level: positions, channels, layers, blocks
    gate = kept_by(SDXL_BASE, [StepPlan(cross_attention="averaged"), StepPlan(cross_attention="reused")])
    print(f"{gate / 1e6:.1f} MB")
    assert gate == 2 * sum(tokens.values())
    assert gate == pytest.approx(210e6, rel=0.01)
    assert kept_by(SDXL_BASE, [StepPlan(branch=0), StepPlan(unet=SHALLOW, branch=0)]) == 2 * 2 * 320 * 128 * 128
    assert kept_by(SDXL_BASE, [StepPlan(branch=2)]) == 2 * 2 * 640 * 128 * 128  # an upsampling before it
    assert kept_by(SDXL_BASE, [StepPlan()]) == 0


def test_the_default_step_is_dense() -> None:
    assert step_cost(SDXL_BASE, 128, 128, StepPlan(), 77)[0] == count(SDXL_BASE, 128, 128, DENSE).total
    assert step_cost(SDXL_BASE, 128, 128, StepPlan(unet="latent-2"), 77) == (0, 0)
