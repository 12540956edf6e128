"""The VAE's training: balanced latents, what is held and what is taught."""

from __future__ import annotations

import argparse
import random
from pathlib import Path

import numpy as np
import pytest
import torch

from minisdxl.bundled import BUNDLED
from minisdxl.config import SHAPES
from minisdxl.pipeline import SDXL
from minisdxl.vae import VAE
from tools.drawn.painting import draw
from tools.drawn.world import random_scene
from tools.training.batches import BatchSize, draw_batch, to_images
from tools.training.vae import balance_latents, train_vae


@torch.no_grad()
def test_balanced_latents_decode_to_the_same_pictures() -> None:
    torch.manual_seed(0)
    vae = VAE(SHAPES.vae).double()
    vae.quant_conv.weight.mul_(torch.tensor([0.1, 3, 1, 7, 1, 1, 1, 1])[:, None, None, None])
    images = to_images(draw_batch(random.Random(5), BatchSize(8, 64, 64))[0]).double()
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
def test_the_bundled_vae_gives_unseen_pictures_back(shapes: SDXL) -> None:
    vae, rng = shapes.vae, random.Random(7)
    for named in ("", "cyan"):  # the color that came last
        scenes = [scene for scene in (random_scene(rng, "test") for _ in range(400)) if named in scene.caption][:8]
        pictures = torch.from_numpy(np.stack([draw(scene, SHAPES.size) for scene in scenes]))
        images = pictures.permute(0, 3, 1, 2) / 127.5 - 1
        errors = (vae.decode(vae.encode(images)).clamp(-1, 1) - images).square().mean(dim=(1, 2, 3))
        found = 10 * (4 / errors).log10()
        print(
            f"{len(scenes)} pictures {named}: PSNR {found.mean():.1f} dB, from {found.min():.1f} to {found.max():.1f}"
        )
        assert found.mean() > 32


def options(tmp_path: Path, teach: str | None, seed: int = 0, steps: int = 1) -> argparse.Namespace:
    return argparse.Namespace(
        init=BUNDLED["shapes"], teach=teach, run=tmp_path, device="cpu", vae_steps=steps, seed=seed, batch=32, workers=0
    )


@pytest.mark.parametrize("teach", ["cyan", "open"])
def test_what_is_not_taught_is_held(teach: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of an encoder that starts from the known one, no picture is held further than rounding in the first step."""
    train_vae(options(tmp_path, teach))
    assert " held 0 " in capsys.readouterr().out


def test_open_scenes_are_taught_to_the_encoder_too(shapes: SDXL, tmp_path: Path) -> None:
    before = shapes.vae
    after = train_vae(options(tmp_path, "open", steps=2))
    assert not torch.equal(before.quant_conv.weight, after.quant_conv.weight)
    unchanged = train_vae(options(tmp_path / "decoder", None, steps=2))
    assert torch.equal(before.quant_conv.weight, unchanged.quant_conv.weight)
