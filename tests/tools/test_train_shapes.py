"""The training tool: its schedules, the balanced latents, and that a run goes on where it was."""

from __future__ import annotations

import argparse
import csv
import random
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tools.shapes import draw, held_out, parse_caption, random_scene
from tools.train_vae import balance_latents, train_vae

from minisdxl.checkpoint import load
from minisdxl.config import SHAPES
from minisdxl.pipeline import BUNDLED
from minisdxl.vae import VAE
from tools.train_shapes import main, parse_stages
from tools.training import Balance, batch_of_pictures, noise_levels, warm_then_decay


def test_pictures_are_of_training_captions_and_repeatable() -> None:
    images, captions = batch_of_pictures(random.Random(3), 40, 64)
    again, _ = batch_of_pictures(random.Random(3), 40, 64)
    assert images.shape == (40, 3, 64, 64)
    assert (images.min().item(), images.max().item()) == (-1, 1)
    assert torch.equal(images, again)
    assert not any(held_out(parse_caption(caption)) for caption in captions)


@torch.no_grad()
def test_balanced_latents_decode_to_the_same_pictures() -> None:
    torch.manual_seed(0)
    vae = VAE(SHAPES.vae).double()
    vae.quant_conv.weight.mul_(torch.tensor([0.1, 3, 1, 7, 1, 1, 1, 1])[:, None, None, None])
    images, _ = batch_of_pictures(random.Random(5), 8, 64)
    images = images.double()
    before = vae.decode(vae.encode(images))
    log_variance = vae.moments(images)[1]
    deviation = vae.moments(images)[0].std(dim=(0, 2, 3))
    balance_latents(vae, images)
    error = (vae.decode(vae.encode(images)) - before).abs().max()
    mean, balanced_log_variance = vae.moments(images)
    print(f"decoded: max error {error:.2e}; deviations {mean.std(dim=(0, 2, 3)).tolist()}")
    assert error <= 1e-12
    assert mean.std(dim=(0, 2, 3)).sub(1).abs().max() <= 1e-12
    assert mean.mean(dim=(0, 2, 3)).abs().max() <= 1e-12
    shift = (balanced_log_variance - log_variance + 2 * deviation.log()[:, None, None]).abs().max()
    assert shift <= 1e-12  # the posterior scales along


@torch.no_grad()
def test_the_bundled_vae_gives_unseen_pictures_back() -> None:
    vae, rng = load(BUNDLED["shapes"])[1].vae, random.Random(7)
    for named in ("", "cyan"):  # the color that came last
        scenes = [scene for scene in (random_scene(rng, "test") for _ in range(400)) if named in scene.caption][:24]
        pictures = torch.from_numpy(np.stack([draw(scene, SHAPES.size) for scene in scenes]))
        images = pictures.permute(0, 3, 1, 2) / 127.5 - 1
        errors = (vae.decode(vae.encode(images)).clamp(-1, 1) - images).square().mean(dim=(1, 2, 3))
        found = 10 * (4 / errors).log10()
        print(
            f"{len(scenes)} pictures {named}: PSNR {found.mean():.1f} dB, from {found.min():.1f} to {found.max():.1f}"
        )
        assert found.mean() > 32


def test_learning_rate_warms_up_stays_and_decays() -> None:
    factors = [warm_then_decay(step, 100, warm=10, decay=0.3) for step in range(100)]
    assert factors[0] == pytest.approx(0.1)
    assert factors[10:70] == [1.0] * 60
    assert factors[99] == pytest.approx(1 / 30)
    assert factors == sorted(factors[:50]) + sorted(factors[50:], reverse=True)


def test_noise_levels_are_spread_over_all() -> None:
    torch.manual_seed(0)
    share = torch.cat([noise_levels(16) for _ in range(2000)])
    counts = torch.histc(share, bins=8, min=0, max=1) / len(share)
    print(f"shares of eighths: {counts.tolist()}")
    assert share.min() >= 0
    assert share.max() < 1
    assert (counts - torch.tensor([1 / 16] * 2 + [7 / 48] * 6)).abs().max() <= 1e-3
    assert all((noise_levels(16) < 0.25).sum() == 2 for _ in range(50))  # in every batch


def test_errors_are_balanced_over_noise_levels() -> None:
    """Errors of known typical values, 1e-4 to 1 from one level to the other, come out alike, around 1."""
    torch.manual_seed(0)
    balance = Balance()
    for step in range(300):
        share = torch.rand(32)
        errors = 10 ** (-4 * share) * torch.empty(32).log_normal_(0, 0.5)
        balanced = balance(errors, share)
        if step == 0:
            assert balanced.isfinite().all()
        if step >= 250:
            low, high = balanced[share < 0.5], balanced[share >= 0.5]
            assert 0.5 < low.log().mean().exp() < 2
            assert 0.5 < high.log().mean().exp() < 2
    wanted = 10 ** (-4 * (torch.arange(20) + 0.5) / 20)
    print(f"typical, of expected: {(balance.typical.exp() / wanted).tolist()}")
    assert (balance.typical - wanted.log()).abs().max() < 0.4


def test_stages_are_read_and_refused() -> None:
    assert parse_stages("64:10,256:5") == [(64, 10), (256, 5)]
    for text in ("64", "64:ten", "65:10", "64:-1"):
        with pytest.raises(ValueError, match=r"."):
            parse_stages(text)


def test_run_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def train(steps: int, *more: str) -> None:
        options = ["--vae-steps", "1", "--text-steps", "1", "--batch", "2", "--grid-every", "100", "--seed", "1", *more]
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
    assert not list(tmp_path.glob("*.part"))


def test_a_new_color_changes_the_encoder_and_not_the_unet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = BUNDLED["shapes"]
    options = ["--vae-steps", "3", "--text-steps", "0", "--stages", "64:0", "--init", str(weights), "--teach", "cyan"]
    monkeypatch.setattr(sys, "argv", ["train_shapes", "--run", str(tmp_path), *options, "--out", str(tmp_path / "out")])
    main()
    (_, before), (_, after) = load(weights), load(tmp_path / "out")
    assert not torch.equal(before.vae.quant_conv.weight, after.vae.quant_conv.weight)
    kept = before.unet.state_dict()
    assert all(torch.equal(kept[name], tensor) for name, tensor in after.unet.state_dict().items())


def test_a_new_color_without_a_checkpoint_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["train_shapes", "--teach", "cyan"])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    assert "--teach is cyan without --init, expected both" in capsys.readouterr().err


def test_what_is_not_taught_is_held(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of an encoder that starts from the known one, no picture is held further than rounding in the first step."""
    options = argparse.Namespace(init=BUNDLED["shapes"], teach="cyan", run=tmp_path, device="cpu", vae_steps=1, seed=0)
    train_vae(options)
    assert " held 0 " in capsys.readouterr().out


def test_a_run_from_a_checkpoint_keeps_its_latents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = BUNDLED["shapes"]
    options = ["--vae-steps", "3", "--text-steps", "0", "--stages", "64:0", "--init", str(weights)]
    monkeypatch.setattr(sys, "argv", ["train_shapes", "--run", str(tmp_path), *options, "--out", str(tmp_path / "out")])
    main()
    (_, before), (_, after) = load(weights), load(tmp_path / "out")
    images, _ = batch_of_pictures(random.Random(6), 2, 64)
    with torch.no_grad():
        latents = before.vae.encode(images)
        assert torch.equal(latents, after.vae.encode(images))
        assert not torch.equal(before.vae.decode(latents), after.vae.decode(latents))
    kept = before.unet.state_dict()
    assert all(torch.equal(kept[name], tensor) for name, tensor in after.unet.state_dict().items())
