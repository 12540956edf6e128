"""The comparison of speed, at a small size: that it compares the same model, and says what it measured."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.minisdxl.tiny import BENCH_MODEL
from tools import bench
from tools.benchmark.bench_models import CONFIGS, Contender
from tools.benchmark.machine import machine

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CONFIGS, "small", BENCH_MODEL)


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
