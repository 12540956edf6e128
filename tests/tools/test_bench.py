"""The comparison of speed, at a small size: that it compares the same model, and says what it measured."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from minisdxl.config import SDXL_BASE, Level, ModelConfig, UNetConfig
from minisdxl.unet import UNet
from tools import bench
from tools.benchmark import bench_models
from tools.benchmark.bench_models import CONFIGS, PEERS, Contender, blocks, unets
from tools.benchmark.machine import machine
from tools.benchmark.profile_parts import PARTS, spent

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
TINY = replace(
    SDXL_BASE,
    name="tiny",
    unet=UNetConfig(32, (Level(1, 0), Level(2, 2), Level(4, 2)), 2, 2, 32, 2048, 2816),
)
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CONFIGS, "small", TINY)


@torch.no_grad()
def test_all_contenders_are_one_model_with_one_set_of_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[nn.Module] = []
    build = bench_models.diffusers_unet

    def remember(unet: UNet, config: ModelConfig, plain: dict[Tensor, Tensor] | None) -> nn.Module:
        built.append(build(unet, config, plain))
        return built[-1]

    monkeypatch.setattr(bench_models, "diffusers_unet", remember)
    made = list(unets(TINY, 128, 2, ["dense", "at-edm"], PEERS, CPU, torch.float32))
    assert [contender.name for contender in made] == ["dense", "at-edm", *PEERS]
    dense, pruned, *peers = (contender.call() for contender in made)
    errors = [float((output - dense).abs().max() / dense.abs().max()) for output in (*peers, pruned)]
    print("off the dense output: " + ", ".join(f"{error:.1e}" for error in errors))
    assert max(errors[:2]) < 1e-5
    assert min(errors[2:]) > 1e-3  # tomesd merges tokens, and at-edm prunes them
    ordinary, inside, merged = (dict(peer.named_parameters()) for peer in built)
    for name, weight in ordinary.items():
        assert weight.data_ptr() == merged[name].data_ptr()
        apart = weight.ndim == 4 and min(weight.shape[1], weight.shape[2]) > 1
        assert (weight.data_ptr() != inside[name].data_ptr()) == apart, name
        assert weight.is_contiguous()
        assert not apart or inside[name].is_contiguous(memory_format=torch.channels_last)


@torch.no_grad()
def test_parts_add_up_to_what_is_spent() -> None:
    for contender in unets(TINY, 128, 1, ["dense", "at-edm", "dissimilarity", "tome"], [], CPU, torch.float32):
        parts = spent(contender, CPU)
        print(contender.name, {part: f"{ms:.2f} ms" for part, ms in parts.items()})
        assert tuple(parts) == PARTS
        for part in ("convolution", "projections", "attention", "normalization"):
            assert parts[part] > 0
        for part in ("ranking", "gather", "recovery"):
            assert (parts[part] > 0) == (contender.name != "dense")


@torch.no_grad()
def test_a_block_alone() -> None:
    dense, pruned = blocks(TINY, "down.1.1", 128, 1, ["dense", "at-edm"], CPU, torch.float32)
    assert dense.call().shape == pruned.call().shape == (1, 64, 8, 8)
    assert not torch.allclose(dense.call(), pruned.call())
    assert spent(pruned, CPU)["ranking"] > 0


def test_contenders_take_turns_and_ratios_are_of_one_round(monkeypatch: pytest.MonkeyPatch) -> None:
    turns: list[str] = []
    made = [Contender(name, lambda: torch.ones(1)) for name in ("dense", "at-edm", "diffusers")]
    speed = {"dense": 2.0, "at-edm": 1.0, "diffusers": 4.0}

    def pretend(contender: Contender, device: torch.device) -> float:
        turns.append(contender.name)
        return speed[contender.name] * (1 + (len(turns) - 1) // 3)  # the machine gets slower all the time

    monkeypatch.setattr(bench, "seconds", pretend)
    rows = bench.measure(made, 3, CPU)
    there, back = list(speed), list(reversed(speed))
    assert turns == [*there, *there, *back, *back, *there, *there]  # before freed memory is kept, and after
    assert [row["unkept"] for row in rows] == [[2.0, 6.0, 10.0], [1.0, 3.0, 5.0], [4.0, 12.0, 20.0]]
    assert [row["seconds"] for row in rows] == [[4.0, 8.0, 12.0], [2.0, 4.0, 6.0], [8.0, 16.0, 24.0]]
    expected = {"dense": [0.5] * 3, "diffusers": [0.25] * 3, "diffusers unkept": [0.5, 4 / 12, 0.3]}
    assert rows[1]["ratios"] == expected
    cells = ["4.000 (2.000 to 6.000)", "0.500 (0.500 to 0.500)", "0.250 (0.250 to 0.250)", "0.333 (0.300 to 0.500)"]
    assert " | ".join(["| at-edm", *cells, "3.000 (1.000 to 5.000) |"]) in bench.table(rows)


@torch.no_grad()
def test_memory_is_that_of_the_call() -> None:
    rows = bench.measure(
        [Contender("large", lambda: torch.ones(2**26)[:1].clone()), Contender("small", lambda: torch.ones(1))], 1, CPU
    )
    assert math.isclose(rows[0]["memory"], 2**28, rel_tol=0.05)
    assert rows[1]["memory"] < 2**26


def test_the_command_prints_tables_and_json(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--device", "cpu", "--scale", "small", "--size", "128", "--repeats", "2"]
    bench.main([*arguments, "--peers", "diffusers"])
    output = capsys.readouterr().out
    assert output.startswith(machine())
    assert "tiny, 128 px, batch 1, fp32" in output
    heads = [line.split(" | ")[0] for line in output.splitlines() if line.startswith("| ")]
    contestants = ["| dense", "| at-edm", "| at-edm-subsampled", "| moving-grid", "| diffusers"]
    assert heads == ["| ", "| ---", *contestants, "| ms of one step, profiled", "| ---", *contestants]
    bench.main([*arguments, "--block", "mid", "--json"])
    report = json.loads(capsys.readouterr().out)
    assert [(row["name"], len(row["seconds"])) for row in report["rows"]] == [
        (name, 2) for name in ("dense", "at-edm", "at-edm-subsampled", "moving-grid")
    ]
    assert report["dtype"] == "fp32"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--presets", "at-edmm"], "unknown preset 'at-edmm'"),
        (["--size", "100"], "picture width is 100 pixels, expected a multiple of 8"),
        (["--repeats", "0"], "--repeats is 0, expected 1 or more"),
        (["--batch", "-1"], "--batch is -1, expected 1 or more"),
        (["--block", "down.0.0"], "no attention block 'down.0.0', expected one of down.1.0"),
        (["--block", "mid", "--peers", "tomesd"], "--peers are tomesd with --block"),
        (["--peers", "comfy"], "invalid choice: 'comfy'"),
    ],
    ids=lambda value: " ".join(value)[:30],
)
def test_what_cannot_be_measured_is_said_in_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        bench.main(["--device", "cpu", "--scale", "small", *arguments])
    assert caught.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert message in lines[-1]


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a CUDA device")
def test_a_missing_gpu_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        bench.main(["--device", "cuda"])
    assert capsys.readouterr().err.endswith("error: --device is 'cuda', torch finds none here; expected cpu\n")


@pytest.mark.gpu
@torch.no_grad()
def test_on_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    bench.main(["--device", "cuda", "--scale", "small", "--size", "128", "--repeats", "2", "--json"])
    for row in json.loads(capsys.readouterr().out)["rows"]:
        assert min(row["seconds"]) > 0
        assert row["parts"]["projections"] > 0
        assert row["memory"] > 0


@pytest.mark.parametrize("way", [["tools/bench.py"], ["-m", "tools.bench"]])
def test_command_runs_both_ways(way: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, *way, "--device", "cpu", "--size", "9"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "width is 9 pixels, expected a multiple of 8" in done.stderr.splitlines()[-1]
