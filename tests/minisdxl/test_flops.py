"""The formula against torch's operator counter on the real U-Net, the paper's numbers, and the command."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from atedm import DENSE, AttentionGraph, AttentionInputs, BlockPlan, TokenPlan, parse_preset, rank
from atedm.ranking import MAX_ITERATIONS
from minisdxl.checkpoint import Modules, save
from minisdxl.config import SDXL_BASE, SHAPES, Level, UNetConfig
from minisdxl.flops import Kind, Work, count, format_flops, main, summary
from minisdxl.text import TextEncoders
from minisdxl.transformer import Attention, AttentionBlock
from minisdxl.unet import UNet
from minisdxl.vae import VAE

SDXL_SITES = list(SDXL_BASE.unet.attention_sites())


def measure(unet: UNet, height: int, width: int, plan: TokenPlan, context_length: int = 77) -> Counter[tuple[str, str]]:
    """What the operator counter sees in each module while the U-Net runs, sorted by block and kind of work.

    Fused attention is unknown to the counter on these devices, so attention is run as two matrix products.
    """
    c = unet.config
    device = next(unet.parameters()).device
    x, time = torch.randn(1, c.in_channels, height, width, device=device), torch.ones(1, device=device)
    context = torch.randn(1, context_length, c.context_channels, device=device)
    vector = torch.randn(1, c.vector_channels, device=device)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        unet(x, time, context, vector, plan)
    totals = {
        path: sum(operators.values()) for path, operators in counter.get_flop_counts().items() if path != "Global"
    }
    own = Counter(totals)
    for path, flops in totals.items():
        parent = path.rpartition(".")[0]
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
    if isinstance(module, nn.Linear):
        return "feed-forward" if ".ff." in name else "projections"
    if isinstance(module, Attention):
        return {"attn1": "self-attention", "attn2": "cross-attention"}[name.split(".")[-1]]
    return {nn.Conv2d: "convolution", AttentionBlock: "ranking and recovery"}[type(module)]


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


@pytest.mark.parametrize(
    ("preset", "step", "height", "width"),
    [
        ("at-edm", 49, 128, 128),
        ("at-edm", 0, 75, 101),
        ("at-edm-dagger", 49, 33, 21),
        ("at-edm:rho=0.001", 49, 33, 21),  # removes tokens of some blocks only
    ],
)
def test_pruned_sdxl_to_the_flop(
    sdxl: UNet, monkeypatch: pytest.MonkeyPatch, preset: str, step: int, height: int, width: int
) -> None:
    """Without numbers there is no iteration: the scores are made up, and of ranking only the map remains."""

    def made_up(graph: AttentionGraph) -> Tensor:
        return torch.zeros(graph.shape[0], graph.shape[2], device="meta")

    monkeypatch.setattr("atedm.pruning.gwpr", made_up)
    plan = parse_preset(preset).plan(step, 50, SDXL_SITES)
    measured = measure(sdxl, height, width, plan)
    counted = count(SDXL_BASE, height, width, plan)
    maps = {site.name: 2 * site.tokens(height, width) ** 2 * site.channels for site in SDXL_SITES}
    ranking = {name: measured.pop((name, "ranking and recovery")) for name in plan}
    assert ranking == {name: maps[name] for name in plan}
    assert counted.total == measured.total()
    assert table(work for work in counted.works if work.kind != Kind.RANKING) == measured


SHAPES_SITES = {site.name: site for site in SHAPES.unet.attention_sites()}
PLANS = {
    "at-edm": parse_preset("at-edm").plan(49, 50, SHAPES_SITES.values()),
    "prune-less": parse_preset("at-edm").plan(0, 50, SHAPES_SITES.values()),
    "later layer": TokenPlan({"mid": BlockPlan(0.5, after_layer=2), "up.1.1": BlockPlan(0.9)}),
    "nothing removed": TokenPlan({"down.1.0": BlockPlan(0.0), "down.2.0": BlockPlan(1e-6)}),
}


@pytest.mark.parametrize(("height", "width"), [(48, 64), (25, 18)])
@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS.keys())
def test_pruned_shapes_to_the_flop(plan: TokenPlan, height: int, width: int) -> None:
    """Numbers and real ranking: how many iterations each map took is asked of the ranking itself, afterwards."""
    torch.manual_seed(0)
    unet = UNet(SHAPES.unet)
    inputs: dict[str, AttentionInputs] = {}
    for block in unet.modules():
        if isinstance(block, AttentionBlock) and block.name in plan:
            layer = block.transformer_blocks[plan[block.name].after_layer]
            sharpen(layer)
            layer.register_forward_hook(lambda _, __, output, name=block.name: inputs.update({name: output[1]}))
    measured = measure(unet, height, width, plan)
    counted = count(SHAPES, height, width, plan)
    pieces = table(counted.works)
    assert counted.total == sum(flops for (_, kind), flops in measured.items() if kind != "ranking and recovery")
    for name, block_plan in plan.items():
        site = SHAPES_SITES[name]
        tokens = site.tokens(height, width)
        vote = 2 * tokens**2 * (site.channels // SHAPES.unet.head_channels)
        removes = round(tokens * (1 - block_plan.ratio)) < tokens
        iterations = int(rank(inputs[name].graph()).iterations.max()) if removes else 0
        print(f"{name}: {tokens} tokens, {iterations} iterations of at most {MAX_ITERATIONS}")
        assert measured[name, "ranking and recovery"] == 2 * tokens**2 * site.channels + iterations * vote
        spared = (MAX_ITERATIONS - iterations) * vote if removes else 0
        assert pieces.pop((name, "ranking and recovery")) == measured.pop((name, "ranking and recovery")) + spared
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
    ],
)
def test_numbers_of_the_paper(preset: str | None, step: int, counted: float) -> None:
    plan = DENSE if preset is None else parse_preset(preset).plan(step, 50, SDXL_SITES)
    ours = count(SDXL_BASE, 128, 128, plan).total
    print(f"{preset} at step {step}: {ours / 1e12:.4f} T, there {counted} T")
    assert ours / 1e12 == pytest.approx(counted, rel=5e-3)


def test_average_of_the_paper() -> None:
    schedule = parse_preset("at-edm")
    plans = [schedule.plan(step, 50, SDXL_SITES) for step in range(50)]
    average = sum(count(SDXL_BASE, 128, 128, plan).total for plan in plans) / 50
    print(f"average {average / 1e12:.4f} T, there 4.34 T")
    assert average / 1e12 == pytest.approx(4.34, rel=5e-3)


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


def test_bad_numbers() -> None:
    with pytest.raises(ValueError, match="latent is 0x5 and context_length 77, expected 1 or more"):
        count(SHAPES, 0, 5)
    with pytest.raises(ValueError, match=r"plan names the attention block 'up\.7\.0'"):
        count(SHAPES, 8, 8, TokenPlan({"up.7.0": BlockPlan(0.5)}))
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


def test_json_command(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--model", "shapes", "--size", "128x256", "--steps", "20", "--prune", "at-edm:rho=0.5", "--json"])
    assert json.loads(capsys.readouterr().out) == summary(SHAPES, 64, 32, parse_preset("at-edm:rho=0.5"), 20)
    main(["--json", "--prune"])
    assert json.loads(capsys.readouterr().out) == summary(SDXL_BASE, 128, 128, parse_preset("at-edm"), 50)


def test_table_command(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--prune"])
    out = capsys.readouterr().out
    found = summary(SDXL_BASE, 128, 128, parse_preset("at-edm"), 50)
    heads = {"dense": "dense", "steady": "steady step", "pruneless": "prune-less step", "average": "average"}
    for key, head in heads.items():
        assert f"{head:<19}{format_flops(found[key]):>7}" in out
    assert "50 steps, at-edm" in out
    assert all(f"\n{name} " in out for name in {block["name"] for block in found["blocks"]})
    bars = {line.split()[0]: line.split()[-1] for line in out.splitlines() if "##" in line}
    assert bars["down.2.0"] == bars["mid"] == "#" * 17 + "." * 23  # 288 G of the longest bar's 674 G
    assert bars["convolution"] == "#" * 23  # 1.62 T of 2.86 T
    assert max(map(len, out.splitlines())) <= 80
    main([])
    dense = capsys.readouterr().out
    assert "50 steps, dense" in dense
    assert not any("#." in line for line in dense.splitlines())


def test_model_in_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    clip, openclip = (replace(encoder, context_length=33) for encoder in SHAPES.text)
    unet = replace(SHAPES.unet, levels=(Level(1, 0), Level(1, 2)), middle_depth=1)
    config = replace(SHAPES, name="mine", unet=unet, text=(clip, openclip), size=64)
    path = tmp_path / "mine.safetensors"
    save(path, config, Modules(UNet(unet), VAE(config.vae), TextEncoders(config.text)))
    main(["--model", str(path), "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found == summary(config, 16, 16, None, 50)
    assert found["dense"] == count(config, 16, 16, DENSE, 33).total != count(config, 16, 16, DENSE, 77).total


BAD = {
    "--size 1023x1024": "picture width is 1023 pixels, expected a multiple of 8 from 32 to ",
    "--size 1024x0": "picture height is 0 pixels",
    "--size 1024x1048576": "picture height is 1048576 pixels",
    "--size 1024": "argument --size: size is '1024', expected WIDTHxHEIGHT in pixels",
    "--size=-64x64": "size is '-64x64'",
    "--size=": "size is ''",
    "--size 64x99999999999999999999": "size is '64x99999999999999999999'",
    "--steps 0": "steps is 0, expected 1 to 1000",
    "--steps 1001": "steps is 1001, expected 1 to 1000",
    "--steps 5.5": "argument --steps: invalid int value: '5.5'",
    "--prune nothing": "unknown preset 'nothing', expected one of at-edm",
    "--prune=": "unknown preset ''",
    "--prune at-edm:rho=1": "rho is 1.0, expected 0 <= rho < 1",
    "--prune at-edm:rho=nan": "rho is nan",
    "--model sd15": "unknown model 'sd15', expected sdxl-base, shapes, or the path of a .safetensors file",
    "--model absent.safetensors": "absent.safetensors",
    "--weights shapes": "unrecognized arguments: --weights shapes",
}


@pytest.mark.parametrize("arguments", BAD)
def test_bad_input_is_one_line(arguments: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(arguments.split())
    out, error = capsys.readouterr()
    print(error, end="")
    assert exit_.value.code == 2
    assert out == ""
    assert error.count("\n") == 1
    assert error.endswith("\n")
    assert BAD[arguments] in error


def test_as_a_module() -> None:
    """Exit codes, nothing but one line of error, and a reader that leaves before the end."""
    command = [sys.executable, "-m", "minisdxl.flops", "--model", "shapes"]
    bad = subprocess.run([*command, "--size", "7x8"], capture_output=True, text=True, timeout=300, check=False)
    assert (bad.returncode, bad.stdout) == (2, "")
    assert bad.stderr.startswith("python -m minisdxl.flops: error: picture width is 7 pixels")
    assert bad.stderr.count("\n") == 1
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.close()
        process.stdout = None
        _, error = process.communicate(timeout=300)
    assert (process.returncode, error) == (0, b"")
