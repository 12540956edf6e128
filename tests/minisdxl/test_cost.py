"""The cost formula against torch's operator counter on the real U-Net, and the paper's numbers."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from atedm import (
    DENSE,
    GRAPHS,
    PRESETS,
    AttentionInputs,
    BlockPlan,
    LayerPlan,
    Merging,
    Pruning,
    SiTo,
    ToDo,
    TokenPlan,
    ToMA,
    parse_preset,
    rank,
)
from atedm.gwpr import MAX_ITERATIONS
from minisdxl.config import SDXL_BASE, SHAPES, Level, UNetConfig
from minisdxl.cost import Work, count, format_flops, summary, tokens_seen
from minisdxl.transformer import Attention, AttentionBlock, TransformerLayer
from minisdxl.unet import UNet
from tests.minisdxl.tiny import DEEP_UNET

SDXL_SITES = list(SDXL_BASE.unet.attention_sites())


def measure(unet: UNet, height: int, width: int, plan: TokenPlan, context_length: int = 77) -> Counter[tuple[str, str]]:
    """What the operator counter sees in each module while the U-Net runs, sorted by block and kind of work.

    Fused attention is unknown to the counter on these devices, so attention is run as two matrix products, or the
    counter is told what it costs, as it is of oneDNN's linear maps.
    """
    c = unet.config
    device = next(unet.parameters()).device
    x, time = torch.randn(1, c.in_channels, height, width, device=device), torch.ones(1, device=device)
    context = torch.randn(1, context_length, c.context_channels, device=device)
    vector = torch.randn(1, c.vector_channels, device=device)
    fast = {
        torch.ops.mkldnn._linear_pointwise: lambda x, *_, out_shape: 2 * math.prod(out_shape) * x[-1],
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, *_, **__: 4 * math.prod(q) * k[2],
    }
    counter = FlopCounterMode(display=False, custom_mapping=fast)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:
        unet(x, time, context, vector, plan)
    totals = {
        path: sum(operators.values()) for path, operators in counter.get_flop_counts().items() if path != "Global"
    }
    own = Counter(totals)
    for path, flops in totals.items():
        parent = path.rpartition(".")[0]
        if path.endswith((".to_k", ".to_v")):  # keys and values are read before their attention runs
            parent = "UNet" if ".attn2." in path else parent.rpartition(".")[0]
        while parent and parent not in totals:  # lists of modules do not run, so they are not seen
            parent = parent.rpartition(".")[0]
        if parent:
            own[parent] -= flops
    measured: Counter[tuple[str, str]] = Counter()
    for path, flops in own.items():
        if flops:
            name = path.removeprefix("UNet").removeprefix(".")
            measured[block_name(unet, name), kind_of_work(name, unet.get_submodule(name))] += flops
    assert measured.total() == counter.get_total_flops()
    return measured


def block_name(unet: UNet, module: str) -> str:
    """The block that the module is part of, by the name that tables call it."""
    parts = module.split(".")
    block = ".".join(parts[: {"input_blocks": 3, "output_blocks": 3, "middle_block": 2}.get(parts[0], 1)])
    instance = unet.get_submodule(block)
    return instance.name if isinstance(instance, AttentionBlock) else block


def kind_of_work(name: str, module: nn.Module) -> str:
    """What a module does itself, as opposed to the modules inside it."""
    if ".ff." in name:
        return "feed-forward"
    if isinstance(module, nn.Linear):
        return "projections"
    if isinstance(module, Attention):
        return {"attn1": "self-attention", "attn2": "cross-attention"}[name.split(".")[-1]]
    if isinstance(module, nn.Conv2d):
        return "convolution"
    assert isinstance(module, TransformerLayer), name
    return "ranking and recovery"


def table(works: Iterable[Work]) -> dict[tuple[str, str], int]:
    """The formula's pieces; none may come twice or be empty."""
    works = list(works)
    pieces = {(work.name, work.kind.value): work.flops for work in works}
    assert len(pieces) == len(works)
    assert all(flops > 0 for flops in pieces.values())
    return pieces


def on_meta(config: UNetConfig) -> UNet:
    with torch.device("meta"):
        return UNet(config)


@pytest.fixture(scope="module")
def sdxl() -> UNet:
    return on_meta(SDXL_BASE.unet)


@pytest.mark.parametrize(("height", "width", "text"), [(128, 128, 77), (75, 101, 154), (1, 3, 1)])
def test_dense_sdxl_to_the_flop(sdxl: UNet, height: int, width: int, text: int) -> None:
    measured = measure(sdxl, height, width, DENSE, text)
    counted = count(SDXL_BASE, height, width, DENSE, text)
    print(f"{height}x{width}, {text} text tokens: {counted.total} counted, {measured.total()} measured")
    assert counted.total == measured.total()
    assert table(counted.works) == measured


def fixed(preset: str, iterations: int = 3) -> str:
    """The preset with as many iterations whatever the picture: without numbers, nothing can settle."""
    name, _, settings = preset.partition(":")
    asked = [settings] * bool(settings) + [f"iterations={iterations}"] * name.startswith(PRUNING)
    return ":".join([name, *[",".join(asked)] * bool(asked)])


PRUNING = tuple(name for name, preset in PRESETS.items() if isinstance(preset.schedule.method, Pruning))
ON_SDXL = [
    ("at-edm", 49, 128, 128),
    ("at-edm", 0, 33, 21),
    ("tome-dsap", 0, 75, 101),
    ("at-edm:rho=0.001", 49, 33, 21),  # removes tokens of some blocks only
    ("at-edm:graph=streamed", 49, 75, 101),  # in several pieces
    ("todo", 49, 128, 128),
    ("todo:levels=1+2", 49, 75, 101),
    ("sito", 49, 128, 128),
    ("toma", 49, 75, 101),
]


@pytest.mark.parametrize(("preset", "step", "height", "width"), ON_SDXL)
def test_presets_on_sdxl_to_the_flop(sdxl: UNet, preset: str, step: int, height: int, width: int) -> None:
    """All kinds of work, ranking and recovery among them."""
    plan = parse_preset(fixed(preset)).plan(step, 50, SDXL_SITES)
    measured = measure(sdxl, height, width, plan)
    counted = count(SDXL_BASE, height, width, plan)
    beside = sum(flops for (_, kind), flops in measured.items() if kind == "ranking and recovery")
    print(f"{fixed(preset)} at step {step}, {height}x{width}: {counted.total} counted, {beside} to rank and recover")
    assert table(counted.works) == measured
    assert counted.total == measured.total() - beside


SMALL_SITES = list(DEEP_UNET.attention_sites())
SETTINGS = [
    *((name, 49) for name in PRESETS if name not in PRUNING),
    ("at-edm:layers=0+1+2", 49),
    ("at-edm:layers=1+2,rho=0.4", 49),
    ("at-edm:place=before-ff", 49),
    ("at-edm:place=before-ff,layers=0+1,rho=0.5", 0),
    ("at-edm:rho=0,ratios=0.3@mid+0.9@up.2.0+0.63@down.1.0", 49),
    ("at-edm:early=more", 0),
    ("at-edm:early=more,ends=mid+up.2.1", 49),
    ("at-edm-dagger:spare=mid", 0),
    *((f"{name}:graph={graph}", 49) for name in PRUNING for graph in ("streamed", "subsampled", "dense")),
    *((f"ca-wpr:recovery=zeros,graph={graph}", 49) for graph in GRAPHS),
    *((f"random:recovery=direct,graph={graph}", 49) for graph in GRAPHS),
    *((f"at-edm:ranking=lowest,recovery=similarity-change,graph={graph}", 49) for graph in GRAPHS),
    ("random:ranking=grid,recovery=nearest", 49),
    ("moving-grid:layers=0+1,rho=0.4", 49),
    ("random:ranking=covered,recovery=nearest-two-change", 49),
    ("dissimilarity:layers=0+1,rho=0.4", 49),
    ("tome:r=0.75", 49),
    ("tome-dsap:r=0.1,ratios=0.7@mid+0@up.1.0", 0),
    ("todo:r=0.888889,levels=1+2", 49),
    ("sito:r=0.75,levels=1+2", 49),
    ("sito:r=0.001,levels=1+2", 0),  # removes no token
    ("toma:r=0.3,tiles=9", 49),
    ("toma:ratios=0@mid+0.9@up.1.0,levels=1+2", 0),
]


@pytest.fixture(scope="module")
def small() -> UNet:
    return on_meta(DEEP_UNET)


# Of the first, 35 text tokens are as many as there are image tokens at the deepest level.
@pytest.mark.parametrize("size", [(25, 18, 35), pytest.param((36, 20, 77), marks=pytest.mark.slow)])
@pytest.mark.parametrize(("preset", "step"), SETTINGS)
def test_settings_to_the_flop(small: UNet, preset: str, step: int, size: tuple[int, int, int]) -> None:
    height, width, text = size
    plan = parse_preset(fixed(preset, iterations=4)).plan(step, 50, SMALL_SITES)
    assert table(count(DEEP_UNET, height, width, plan, text).works) == measure(small, height, width, plan, text)


def test_other_mergings_to_the_flop(small: UNet) -> None:
    """Only around some sub-layers, in cells of other sizes."""
    plan = TokenPlan(
        {
            "down.1.0": BlockPlan.merging(Merging(0.4, cross_attention=False, stride=(3, 2)), depth=2),
            "mid": BlockPlan.merging(Merging(0.8, self_attention=False, feed_forward=False, stride=(3, 5)), depth=3),
            "up.1.1": BlockPlan.merging(Merging(0.01), depth=2),
        }
    )
    assert table(count(DEEP_UNET, 31, 42, plan).works) == measure(small, 31, 42, plan)


def test_fixed_iterations_are_the_ones_asked_for(small: UNet) -> None:
    """Each costs one product with the map, head by head."""
    ranking = []
    for iterations in (1, 2, 7):
        plan = parse_preset(fixed("at-edm", iterations)).plan(49, 50, SMALL_SITES)
        ranking.append(measure(small, 16, 16, plan)["mid", "ranking and recovery"])
    vote = 2 * (4 * 4) ** 2 * 8  # 16 tokens, 8 heads
    kept = 16 - 10  # rho 0.63
    search = 2 * (kept * 16 + kept * (16 - kept)) * 128
    assert ranking == [2 * 16**2 * 128 + search + iterations * vote for iterations in (1, 2, 7)]


SHAPES_SITES = {site.name: site for site in SHAPES.unet.attention_sites()}
PLANS = {
    "at-edm": parse_preset("at-edm").plan(49, 50, SHAPES_SITES.values()),
    "prune-less": parse_preset("at-edm").plan(0, 50, SHAPES_SITES.values()),
    "later layer": TokenPlan(
        {"mid": BlockPlan.pruning(Pruning(0.5), after=(2,)), "up.1.1": BlockPlan.pruning(Pruning(0.9))}
    ),
    "repeated": TokenPlan({"mid": BlockPlan.pruning(Pruning(0.5), after=(0, 2), before_feed_forward=True)}),
    "nothing removed": TokenPlan(
        {"down.1.0": BlockPlan.pruning(Pruning(0.0)), "down.2.0": BlockPlan.pruning(Pruning(1e-6))}
    ),
}


@pytest.mark.parametrize(("height", "width"), [(48, 64), (25, 18)])
@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS.keys())
def test_pruned_shapes_to_the_flop(plan: TokenPlan, height: int, width: int) -> None:
    """Numbers and ranking until it settles: how many iterations each map took is asked of the ranking afterwards."""
    torch.manual_seed(0)
    unet = UNet(SHAPES.unet)
    seen: dict[tuple[str, int], AttentionInputs] = {}
    for block in unet.modules():
        if isinstance(block, AttentionBlock) and block.name in plan:
            for index, _ in plan[block.name].layers:
                layer = block.transformer_blocks[index]
                assert isinstance(layer, TransformerLayer)
                sharpen(layer)
                key = (block.name, index)
                layer.attn1.register_forward_hook(lambda _, __, output, key=key: seen.update({key: output[1]}))
    measured = measure(unet, height, width, plan)
    counted = count(SHAPES, height, width, plan)
    pieces = table(counted.works)
    assert counted.total == sum(flops for (_, kind), flops in measured.items() if kind != "ranking and recovery")
    for name, block_plan in plan.items():
        site = SHAPES_SITES[name]
        rows, columns = (-(-side // 2**site.level) for side in (height, width))  # each halving rounds up
        tokens, cost, spared = rows * columns, 0, 0
        for index, layer_plan in block_plan.layers:
            assert layer_plan.pruning is not None
            kept = round(tokens * (1 - layer_plan.pruning.ratio))
            vote = 2 * tokens**2 * (site.channels // SHAPES.unet.head_channels)
            if kept < tokens:
                iterations = int(rank(seen[name, index].graph()).iterations.max())
                print(f"{name}, layer {index}: {tokens} tokens, {iterations} iterations of at most {MAX_ITERATIONS}")
                search = 2 * kept * (tokens - kept) * site.channels  # the sums of rows are known
                cost += 2 * tokens**2 * site.channels + iterations * vote + search
                spared += (MAX_ITERATIONS - iterations) * vote + 2 * kept * tokens * site.channels
            tokens = kept
        assert measured[name, "ranking and recovery"] == cost
        assert pieces.pop((name, "ranking and recovery"), 0) == cost + spared
        del measured[name, "ranking and recovery"]
    assert pieces == measured


def sharpen(layer: nn.Module) -> None:
    """Makes attention choosy, as in a trained model: maps that are almost uniform are ranked in two iterations."""
    with torch.no_grad():
        for name, weight in layer.named_parameters():
            if name in ("attn1.to_q.weight", "attn1.to_k.weight"):
                weight.mul_(4)


OTHERS = {
    "one level": UNetConfig(32, (Level(1, 3),), 0, 1, 16, 24, 40),
    "attention on top": UNetConfig(32, (Level(1, 1), Level(3, 0), Level(2, 0), Level(5, 2)), 3, 3, 32, 48, 16),
    "no attention at all": UNetConfig(32, (Level(1, 0), Level(2, 0)), 0, 2, 32, 48, 16, in_channels=9, out_channels=8),
}


@pytest.mark.parametrize("config", OTHERS.values(), ids=OTHERS.keys())
def test_other_unets_to_the_flop(config: UNetConfig) -> None:
    measured = measure(on_meta(config), 19, 34, DENSE)
    assert table(count(config, 19, 34).works) == measured


@pytest.mark.parametrize(
    ("preset", "step", "counted"),
    [
        (None, 49, 6.76),
        ("at-edm", 49, 4.06),
        ("at-edm", 0, 4.99),
        ("at-edm-dagger", 49, 4.44),
        ("at-edm:rho=0.52", 49, 4.51),
        ("at-edm:rho=0.75", 49, 3.59),
        ("at-edm:rho=0.94", 49, 2.88),
        ("at-edm:a", 49, 2.88),
        ("at-edm:b", 49, 3.59),
        ("at-edm:c", 49, 4.06),
        ("at-edm:d", 49, 4.51),
        ("tome:r=0.5", 0, 4.07),
        ("tome:r=0.4", 0, 4.57),
        ("tome:r=0.6", 0, 3.58),
        ("tome:r=0.75", 0, 2.86),
        ("tome:a", 49, 2.86),
        ("tome:b", 49, 3.58),
        ("tome:c", 49, 4.07),
        ("tome:d", 49, 4.57),
        ("tome-dsap:c", 49, 4.07),
    ],
)
def test_numbers_of_the_paper(preset: str | None, step: int, counted: float) -> None:
    plan = DENSE if preset is None else parse_preset(preset).plan(step, 50, SDXL_SITES)
    ours = count(SDXL_BASE, 128, 128, plan).total
    print(f"{preset} at step {step}: {ours / 1e12:.4f} T, there {counted} T")
    assert ours / 1e12 == pytest.approx(counted, rel=5e-3)


@pytest.mark.parametrize(("preset", "counted"), [("at-edm", 4.34), ("at-edm:rho=0.7", 4.1), ("tome", 4.07)])
def test_averages_of_the_paper(preset: str, counted: float) -> None:
    schedule = parse_preset(preset)
    plans = [schedule.plan(step, 50, SDXL_SITES) for step in range(50)]
    average = sum(count(SDXL_BASE, 128, 128, plan).total for plan in plans) / 50
    print(f"average of {preset} {average / 1e12:.4f} T, there {counted} T")
    assert average / 1e12 == pytest.approx(counted, rel=5e-3)


def test_attention_blocks_of_the_paper() -> None:
    names = {site.name for site in SDXL_SITES}
    works = [work for work in count(SDXL_BASE, 128, 128).works if work.name in names]
    attention = sum(work.flops for work in works)
    print(f"attention blocks {attention / 1e12:.4f} T, there 5.14 T")
    assert attention / 1e12 == pytest.approx(5.14, rel=5e-3)


def test_summary_is_of_the_plans_of_all_steps() -> None:
    schedule = parse_preset("at-edm:tau=20,rho=0.4")
    totals = [count(SHAPES, 64, 48, schedule.plan(step, 30, SHAPES_SITES.values())).total for step in range(30)]
    found = summary(SHAPES, 64, 48, schedule, 30)
    assert set(found) == {"dense", "steady", "pruneless", "average", "blocks"}
    assert (found["pruneless"], found["steady"]) == (totals[0], totals[-1])
    assert found["average"] == pytest.approx(sum(totals) / 30, abs=0.5)
    assert found["dense"] == count(SHAPES, 64, 48).total > found["pruneless"] > found["average"] > found["steady"]
    assert all(set(block) == {"name", "kind", "flops"} for block in found["blocks"])
    in_totals = sum(block["flops"] for block in found["blocks"] if block["kind"] != "ranking and recovery")
    assert in_totals == found["steady"]


@pytest.mark.parametrize("steps", [1, 7, 1000])
def test_without_schedule_all_is_dense(steps: int) -> None:
    found = summary(SDXL_BASE, 128, 128, None, steps)
    assert found["dense"] == found["steady"] == found["pruneless"] == found["average"]
    assert found["dense"] == sum(block["flops"] for block in found["blocks"])


@pytest.mark.parametrize("tau", [0, 50])
def test_schedule_of_equal_steps(tau: int) -> None:
    found = summary(SDXL_BASE, 128, 128, parse_preset(f"at-edm:tau={tau}"), 20)
    assert found["dense"] > found["steady"] == found["pruneless"] == found["average"]


@pytest.mark.parametrize(
    ("plan", "grid", "counts"),
    [
        (LayerPlan(), (10, 10), (100, 100, 100, 100, 100)),
        (LayerPlan(Pruning(0.63)), (10, 10), (100, 100, 100, 100, 37)),
        (LayerPlan(Pruning(0.63), before_feed_forward=True), (10, 10), (100, 100, 100, 37, 37)),
        (LayerPlan(Pruning(0.25)), (1, 37), (37, 37, 37, 37, 28)),  # 27.75
        (LayerPlan(Pruning(0.99)), (7, 1), (7, 7, 7, 7, 1)),
        (LayerPlan(merging=Merging(0.5)), (9, 11), (50, 50, 50, 50, 99)),
        (LayerPlan(merging=Merging(0.5, cross_attention=False)), (9, 11), (50, 50, 99, 50, 99)),
        (LayerPlan(merging=Merging(0.0)), (9, 11), (99, 99, 99, 99, 99)),
        (LayerPlan(merging=ToDo(0.75)), (9, 11), (99, 20, 99, 99, 99)),
        (LayerPlan(merging=SiTo(0.5)), (9, 11), (50, 50, 99, 99, 99)),
        (LayerPlan(merging=SiTo(0.75)), (9, 11), (30, 30, 99, 99, 99)),  # its bases
        (LayerPlan(merging=ToMA(0.5, tiles=4)), (9, 11), (49, 49, 49, 49, 99)),  # 15 + 12 + 12 + 10 of 30, 25, 24, 20
    ],
)
def test_tokens_that_each_sub_layer_sees(plan: LayerPlan, grid: tuple[int, int], counts: tuple[int, ...]) -> None:
    assert tokens_seen(plan, grid[0] * grid[1], grid) == counts


def test_bad_numbers() -> None:
    with pytest.raises(ValueError, match="latent is 0x5 and context_length 77, expected 1 or more"):
        count(SHAPES, 0, 5)
    with pytest.raises(ValueError, match=r"plan names the attention block 'up\.7\.0'"):
        count(SHAPES, 8, 8, TokenPlan({"up.7.0": BlockPlan.pruning(Pruning(0.5))}))
    with pytest.raises(ValueError, match="steps is 0, expected 1 to 1000"):
        summary(SHAPES, 8, 8, None, 0)


@pytest.mark.parametrize(
    ("flops", "text"),
    [
        (6_761_236_398_080, "6.76 T"),
        (67.6123e12, "67.6 T"),
        (999.4e9, "999 G"),
        (999.6e9, "1.00 T"),
        (12_345, "12.3 k"),
        (9_996_000, "10.0 M"),
        (1234.4e12, "1230 T"),
        (999, "999"),
        (0, "0"),
    ],
)
def test_format(flops: float, text: str) -> None:
    assert format_flops(flops) == text
