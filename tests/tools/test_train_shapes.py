"""The training tool: its options, and that a run goes on where it was."""

from __future__ import annotations

import csv
import random
import sys
from pathlib import Path

import pytest
import torch

from minisdxl.bundled import BUNDLED
from minisdxl.checkpoint.modules import load
from tools.train_shapes import main, parse_options, parse_stages
from tools.training.batches import BatchSize, draw_batch, to_images


def test_stages_are_read_and_refused() -> None:
    assert parse_stages("64:10,256:5") == [(64, 10), (256, 5)]
    for text in ("64", "64:ten", "65:10", "64:-1"):
        with pytest.raises(ValueError, match=r"."):
            parse_stages(text)


def test_run_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def train(steps: int, *more: str) -> None:
        options = ["--vae-steps", "1", "--text-steps", "1", "--batch", "2", "--seed", "1", *more]
        options += ["--grid-every", "100", "--grid-pictures", "4", "--watch-every", "0"]
        monkeypatch.setattr(sys, "argv", ["train_shapes", "--run", str(tmp_path), "--stages", f"64:{steps}", *options])
        main()

    train(1)
    first = load(tmp_path / "shapes.safetensors")[1]
    train(3, "--out", str(tmp_path / "final.safetensors"))
    with (tmp_path / "grid.csv").open() as file:
        assert [row["step"] for row in csv.DictReader(file)] == ["1", "3"]
    assert torch.load(tmp_path / "unet.pt", weights_only=True)["step"] == 3
    assert len(list(tmp_path.glob("vae.csv"))) == 1
    final = load(tmp_path / "final.safetensors")[1]
    assert torch.equal(first.vae.quant_conv.weight, final.vae.quant_conv.weight)
    assert not torch.equal(first.unet.state_dict()["out.2.weight"], final.unet.state_dict()["out.2.weight"])
    assert not list(tmp_path.glob("*.part")) and not (tmp_path / "watch.csv").exists()


def test_self_attention_starts_from_the_kernel_only_from_nothing() -> None:
    assert parse_options([]).sharpness == 10
    assert parse_options(["--init", "weights.safetensors"]).sharpness == 0
    assert parse_options(["--init", "weights.safetensors", "--sharpness", "5"]).sharpness == 5
    assert parse_options(["--sharpness", "0"]).sharpness == 0


def test_processes_draw_for_a_gpu_only() -> None:
    assert parse_options(["--device", "cpu"]).workers == 0
    assert parse_options(["--device", "cuda"]).workers >= 1
    assert parse_options(["--device", "cuda", "--workers", "3"]).workers == 3


def test_bfloat16_is_the_default_only_where_it_is_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    for able in (True, False):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda able=able: {"avx512_bf16": able})
        assert parse_options(["--device", "cpu"]).bf16 is able
        assert parse_options(["--device", "cuda"]).bf16 is True
        assert parse_options(["--device", "cpu", "--no-bf16"]).bf16 is False
        assert parse_options(["--device", "cpu", "--bf16"]).bf16 is True


def test_a_new_color_changes_the_encoder_and_not_the_unet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = BUNDLED["shapes"]
    options = ["--vae-steps", "3", "--text-steps", "0", "--stages", "64:0", "--init", str(weights), "--teach", "cyan"]
    monkeypatch.setattr(sys, "argv", ["train_shapes", "--run", str(tmp_path), *options, "--out", str(tmp_path / "out")])
    main()
    (_, before), (_, after) = load(weights), load(tmp_path / "out")
    assert not torch.equal(before.vae.quant_conv.weight, after.vae.quant_conv.weight)
    kept = before.unet.state_dict()
    assert all(torch.equal(kept[name], tensor) for name, tensor in after.unet.state_dict().items())
    again = [option for option in options if option not in ("--teach", "cyan")]  # its VAE, in the run that goes on
    monkeypatch.setattr(sys, "argv", ["train_shapes", "--run", str(tmp_path), *again, "--out", str(tmp_path / "again")])
    main()
    assert torch.equal(load(tmp_path / "again")[1].vae.quant_conv.weight, after.vae.quant_conv.weight)


def test_a_new_color_without_a_checkpoint_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["train_shapes", "--teach", "cyan"])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    assert "--teach is cyan without --init, expected both" in capsys.readouterr().err


def test_a_run_from_a_checkpoint_keeps_its_latents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = BUNDLED["shapes"]
    options = ["--vae-steps", "3", "--text-steps", "0", "--stages", "64:0", "--init", str(weights)]
    monkeypatch.setattr(sys, "argv", ["train_shapes", "--run", str(tmp_path), *options, "--out", str(tmp_path / "out")])
    main()
    (_, before), (_, after) = load(weights), load(tmp_path / "out")
    images = to_images(draw_batch(random.Random(6), BatchSize(2, 64, 64))[0])
    with torch.no_grad():
        latents = before.vae.encode(images)
        assert torch.equal(latents, after.vae.encode(images))
        assert not torch.equal(before.vae.decode(latents), after.vae.decode(latents))
    kept = before.unet.state_dict()
    assert all(torch.equal(kept[name], tensor) for name, tensor in after.unet.state_dict().items())


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ([], "--own-sampling is given without --teacher, expected both"),
        (["--teacher", "a", "--stages", "64:1,256:1"], "--stages has a side other than 256 beside --own-sampling"),
    ],
)
def test_own_sampling_needs_a_teacher_and_full_size(
    more: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        parse_options(["--own-sampling", *more])
    assert stopped.value.code == 2
    assert said in capsys.readouterr().err
