"""The measurement of memory and time, at a small size: what it measures is there, and what it says of it."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from safetensors import safe_open

from minisdxl.checkpoint.modules import load, official_shapes, read_config
from minisdxl.config import SDXL_BASE, SHAPES
from minisdxl.tokenizer import Tokenizer, read_vocabulary
from tests import manifest
from tests.minisdxl.peers import diffusers_unet
from tools.benchmark.machine import machine
from tools.benchmark.model_files import write_description, write_random
from tools.benchmark.processes import measure
from tools.memory import PROMISE, loading_table, main, picture_table

VOCABULARY = Path(__file__).parents[2] / "weights" / "shapes" / "tokenizer"
pytestmark = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak memory from /proc")


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("small") / "small.safetensors"
    main(["write", str(path), "--scale", "small"])
    return path


def test_the_file_has_official_names_and_random_numbers(small: Path) -> None:
    shapes = official_shapes(SHAPES)
    with safe_open(small, "pt") as file:
        assert set(file.keys()) == shapes.keys()
        for name, shape in shapes.items():
            tensor = file.get_tensor(name)
            assert (tensor.dtype, tuple(tensor.shape)) == (torch.float16, shape)
            if len(shape) > 1 and tensor.numel() > 1000:
                spread = float(tensor.float().std()) * (tensor.numel() / shape[0]) ** 0.5
                assert 0.8 < spread < 1.2, name
    assert read_config(small) == SHAPES
    # Of full size it would be what is published, but for two tensors that make no picture.
    assert set(manifest.official_shapes()) - set(official_shapes(SDXL_BASE)) == {
        "conditioner.embedders.0.transformer.text_model.embeddings.position_ids",
        "conditioner.embedders.1.model.logit_scale",
    }


@torch.no_grad()
def test_diffusers_loads_the_same_model_with_no_network(
    tmp_path: Path, small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    write_description(tmp_path, SHAPES, small, VOCABULARY)
    pipeline = StableDiffusionXLPipeline.from_single_file(small, config=str(tmp_path), local_files_only=True)
    config, modules = load(small)
    peer = diffusers_unet(modules.unet, size_channels=config.size_channels).state_dict()
    theirs = pipeline.unet.state_dict()
    assert theirs.keys() == peer.keys()
    assert all(torch.equal(theirs[name], peer[name]) for name in peer)
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    error = (pipeline.vae.decode(latents).sample - modules.vae.decode(latents * config.vae.scale_factor)).abs().max()
    ids, ids_2 = Tokenizer(*read_vocabulary(VOCABULARY), config.text)(["a red circle"])
    ours = modules.text(ids, ids_2)
    tokens = pipeline.tokenizer("a red circle", padding="max_length", return_tensors="pt").input_ids
    assert torch.equal(tokens, ids)
    hidden = pipeline.text_encoder(tokens, output_hidden_states=True).hidden_states[-2]
    pooled = pipeline.text_encoder_2(ids_2).text_embeds
    errors = [error, (hidden - ours.context[..., :64]).abs().max(), (pooled - ours.pooled).abs().max()]
    print("max errors, VAE and text encoders: " + ", ".join(f"{error:.1e}" for error in errors))
    assert max(errors) < 1e-4


def test_loading_is_measured_side_by_side(small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(
        [
            "load",
            "--weights",
            str(small),
            "--tokenizer",
            str(VOCABULARY),
            "--dtypes",
            "fp16",
            "--repeats",
            "1",
            "--json",
        ]
    )
    output = capsys.readouterr()
    report = json.loads(output.out)
    (row,) = report["rows"]
    numbers = sum(torch.Size(shape).numel() for shape in official_shapes(SHAPES).values())
    vae = sum(torch.Size(s).numel() for n, s in official_shapes(SHAPES).items() if n.startswith("first_"))
    assert row["ours"]["weights"] == row["diffusers"]["weights"] == 2 * numbers + 2 * vae  # which is in fp32
    assert report["bytes"] == small.stat().st_size
    for library in ("ours", "diffusers"):
        run = row[library]
        assert run["weights"] + 1e8 < run["peak"] < 2e9  # with Python and torch
        assert 0 < run["runs"][0]["called"] <= run["loading"] <= run["seconds"] < 120
        assert run["runs"][0]["processor"] > 0
    assert row["ratio"]["peak"] == row["ours"]["peak"] / row["diffusers"]["peak"]
    print(loading_table(report["rows"]))
    assert f"fp16, diffusers: {row['diffusers']['seconds']:.2f} s" in output.err


def test_a_picture_is_measured(capsys: pytest.CaptureFixture[str]) -> None:
    main(["picture", "--scale", "small", "--size", "64x64", "--steps", "2"])
    output = capsys.readouterr().out
    print(output)
    stages = [line.split(" | ")[0] for line in output.splitlines() if line.startswith("| ")]
    expected = ["after", "---", "loading", "encoding the prompt", "step 1 of 2", "step 2 of 2", "decoding"]
    assert stages == [f"| {stage}" for stage in expected]
    assert output.startswith(machine())
    assert "within 12.00 GiB" in output


def test_the_verdict_is_on_the_promise() -> None:
    assert picture_table({"stages": {}, "peak": PROMISE}).endswith("peak 12.00 GiB, within 12.00 GiB")
    assert picture_table({"stages": {}, "peak": 2 * PROMISE}).endswith("peak 24.00 GiB, above 12.00 GiB")


def test_both_libraries_are_measured_in_turns(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls = []

    def pretend(kind: str, arguments: dict[str, Any]) -> dict[str, Any]:
        calls.append((kind, arguments["dtype"]))
        seconds = {"ours": 1.0, "diffusers": 2.0}[kind] * len(calls)
        times = dict.fromkeys(("seconds", "loading", "processor", "called"), seconds)
        return {**times, "peak": len(calls) * 2**30, "weights": 1}

    monkeypatch.setattr("tools.memory.measure", pretend)
    where = ["--weights", str(small), "--tokenizer", str(VOCABULARY), "--folder", str(tmp_path)]
    main(["load", *where, "--dtypes", "fp32", "bf16", "--repeats", "3"])
    one, other = ["ours", "diffusers"], ["diffusers", "ours"]
    assert [kind for kind, _ in calls] == one * 2 + other * 2 + one * 2
    assert [dtype for _, dtype in calls] == (["float32"] * 2 + ["bfloat16"] * 2) * 3
    table = capsys.readouterr().out.splitlines()
    # The median of runs 1, 6 and 9 beside that of 2, 5 and 10; the last of each has the largest peak.
    assert table[-2] == "| fp32 | 6.00 | 10.00 | 0.60 | 0.60 | 0.60 | 9.00 | 10.00 | 0.90 |"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["load", "--weights", "nowhere.safetensors"], "nowhere.safetensors does not exist"),
        (["load", "--repeats", "0"], "--repeats is 0, expected 1 or more"),
        (["load", "--folder", "nowhere"], "nowhere"),
        (["load", "--dtypes", "fp8"], "invalid choice: 'fp8'"),
        (["picture", "--scale", "small", "--strip-rows", "0"], "--strip-rows is 0, expected 1 or more"),
        (["write", "nowhere/file.safetensors"], "nowhere"),
        ([], "command"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_cannot_be_measured_is_said_in_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert message in lines[-1]
    assert not any(line.startswith("Traceback") for line in lines)


def test_a_full_disk_is_found_before_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=5e9))
    with pytest.raises(OSError, match=r"needs 6\.94 GB of disk, 5\.00 are free"):
        write_random(tmp_path / "full.safetensors", SDXL_BASE)
    assert list(tmp_path.iterdir()) == []


def test_a_process_that_fails_is_reported(tmp_path: Path, small: Path) -> None:
    arguments = {"weights": str(small), "folder": str(tmp_path), "dtype": "float32"}
    with pytest.raises(RuntimeError, match=r"measuring ours float32 failed: exit code 1 FileNotFoundError: tokenizer"):
        measure("ours", arguments)
