"""Previews: the fitted map from latent to colors, and what is written of a run as it goes."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from minisdxl.cli.previews import Preview, RGBMap, drawn_pictures, fit_rgb
from minisdxl.images import to_pixels
from minisdxl.pipeline import SDXL
from minisdxl.samplings import SAMPLINGS

PROMPTS = [
    "a small red circle above a big blue square on a white background",
    "a big green triangle on a black background",
]


class KnownVAE:
    """Latents that are mixed colors, by a known matrix, and in the fourth channel something that is no color."""

    def __init__(self, mix: Tensor, offset: Tensor) -> None:
        self.mix, self.offset = mix, offset
        self.config = SimpleNamespace(downscale=8)
        self.quant_conv = torch.nn.Conv2d(1, 1, 1)

    def encode(self, images: Tensor) -> Tensor:
        colors = F.avg_pool2d(images, 8)
        mixed = torch.einsum("zc,bchw->bzhw", self.mix, colors) + self.offset[:, None, None]
        return torch.cat([mixed, colors.prod(dim=1, keepdim=True)], dim=1)


def test_a_linear_map_is_found_exactly() -> None:
    generator = torch.Generator().manual_seed(0)
    mix = torch.eye(3) + torch.rand(3, 3, generator=generator) / 2
    vae: Any = KnownVAE(mix, torch.rand(3, generator=generator))
    rgb = fit_rgb(vae)
    colors = torch.rand(2, 3, 64, 64, generator=generator) * 2 - 1
    error = (rgb(vae.encode(colors)) - F.avg_pool2d(colors, 8)).abs().max()
    inverse = (rgb.weight[:, :3] - mix.inverse()).abs().max()
    print(f"known mixture of colors: max error {error:.1e}, of its inverse {inverse:.1e}")
    assert max(error, inverse) < 1e-5
    assert rgb.weight[:, 3].abs().max() < 1e-5


def test_overflow_of_the_encoder_is_named() -> None:
    vae: Any = KnownVAE(torch.full((3, 3), float("inf")), torch.zeros(3))
    with pytest.raises(ArithmeticError, match="the VAE encoder"):
        fit_rgb(vae)


def test_drawn_pictures_have_all_colors_and_are_always_the_same() -> None:
    pictures = drawn_pictures()
    assert torch.equal(pictures, drawn_pictures())
    assert pictures.shape == (2, 3, 256, 256)
    assert pictures.abs().max() <= 1
    assert pictures.std() > 0.4
    assert (torch.corrcoef(pictures.movedim(1, 0).flatten(1)) - torch.eye(3)).abs().max() < 0.5


@torch.no_grad()
def test_previews_look_like_the_decoded_pictures(shapes: SDXL) -> None:
    images = shapes.generate(PROMPTS, sampling="dpm++-2m", steps=8, cfg=3.0, size=(128, 128))
    latents = shapes.vae.encode(torch.cat([to_pixels(image, image.size) for image in images]))
    decoded = F.avg_pool2d(shapes.vae.decode(latents).clamp(-1, 1), shapes.config.vae.downscale)
    wrong = fit_rgb(shapes.vae)(latents) - decoded
    spread = decoded - decoded.mean(dim=(0, 2, 3), keepdim=True)
    explained = 1 - float(wrong.square().mean() / spread.square().mean())
    print(f"bundled VAE: {explained:.1%} of the variance explained, mean error {wrong.abs().mean() / 2:.3f} in [0, 1]")
    assert explained > 0.9


@pytest.mark.parametrize("name", SAMPLINGS)
def test_watching_changes_nothing_and_sees_the_last_latent(shapes: SDXL, name: str) -> None:
    settings: dict[str, Any] = {"steps": 4, "cfg": 3.0, "size": (64, 64), "seed": 1}
    preview = Preview(RGBMap(torch.zeros(3, 4), torch.zeros(3)), 1, [])
    seen: list[tuple[Tensor, Tensor]] = []

    def on_step(_: int, x: Tensor) -> None:
        assert preview.denoised is not None
        seen.append((preview.denoised, x))

    watched = shapes.generate(PROMPTS[:1], sampling=preview.watch(SAMPLINGS[name]), on_step=on_step, **settings)[0]
    plain = shapes.generate(PROMPTS[:1], sampling=name, **settings)[0]
    assert watched.tobytes() == plain.tobytes()
    final = seen[-1][1]
    error = (seen[-1][0] - final).abs().max()
    early = [float((latent - final).square().mean().sqrt()) for latent in seen[1]]
    print(f"{name}: last denoised and last latent {error:.1e}; after step 2 {early[0]:.2f}, with noise {early[1]:.2f}")
    assert error < 1e-4
    assert early[0] < early[1]  # why previews show the denoised latent and not the latent


def test_every_third_step_is_written_for_each_picture(tmp_path: Path) -> None:
    targets = [tmp_path / "a.png", tmp_path / "b.c.png"]
    preview = Preview(RGBMap(torch.eye(3, 4), torch.tensor([0.0, 0.0, 0.5])), 3, targets)
    preview.denoised = torch.stack([torch.zeros(4, 5, 6), torch.full((4, 5, 6), 9.0)])
    for step in range(7):
        preview.write(step)
    names = [f"{stem}-step-{step}.png" for stem in ("a", "b.c") for step in ("003", "006")]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    first = Image.open(tmp_path / "a-step-003.png")
    assert first.size == (6, 5)
    assert np.array_equal(np.asarray(first)[2, 3], [128, 128, 191])
    assert np.array_equal(np.asarray(Image.open(tmp_path / "b.c-step-006.png"))[0, 0], [255, 255, 255])


def test_nothing_is_written_before_anything_is_denoised(tmp_path: Path) -> None:
    Preview(RGBMap(torch.zeros(3, 4), torch.zeros(3)), 1, [tmp_path / "a.png"]).write(0)
    assert not list(tmp_path.iterdir())
