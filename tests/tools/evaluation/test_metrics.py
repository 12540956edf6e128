"""PSNR, SSIM and the Frechet distance, each against an independent implementation in float64."""

from __future__ import annotations

import math
import random
from contextlib import ExitStack

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image, ImageFilter
from scipy.linalg import sqrtm
from torchmetrics.functional.image import structural_similarity_index_measure

from minisdxl.pipeline import SDXL
from tools.drawn.painting import draw
from tools.drawn.world import random_scene
from tools.evaluation.metrics import Picture, frechet_distance, latent_error, psnr, ssim, vae_features


def pictures(kind: str) -> tuple[Picture, Picture]:
    rng = np.random.default_rng(3)
    if kind == "noise":
        return rng.integers(0, 256, (40, 56, 3), dtype=np.uint8), rng.integers(0, 256, (40, 56, 3), dtype=np.uint8)
    drawn = draw(random_scene(random.Random(1)), 64)
    if kind == "blurred":
        return np.asarray(Image.fromarray(drawn).filter(ImageFilter.GaussianBlur(2))), drawn
    flat = np.full((32, 32, 3), 200, dtype=np.uint8)  # of small variance: one value off by one
    almost = flat.copy()
    almost[16, 16, 1] += 1
    return almost, flat


@pytest.mark.parametrize("kind", ["noise", "blurred", "flat"])
def test_psnr_is_its_formula_pixel_by_pixel(kind: str) -> None:
    ours, theirs = pictures(kind)
    squares = [(int(a) - int(b)) ** 2 for a, b in zip(ours.ravel(), theirs.ravel(), strict=True)]
    expected = 20 * math.log10(255) - 10 * math.log10(math.fsum(squares) / len(squares))
    error = abs(psnr(ours, theirs) - expected)
    print(f"{kind}: PSNR {expected:.4f} dB, error {error:.1e}")
    assert error < 1e-10


@pytest.mark.parametrize("kind", ["noise", "blurred", "flat"])
def test_ssim_is_that_of_torchmetrics_and_of_a_loop_over_windows(kind: str) -> None:
    ours, theirs = pictures(kind)
    tensors = [torch.from_numpy(each.astype(np.float64)).permute(2, 0, 1)[None] for each in (ours, theirs)]
    # torchmetrics reflects the picture at its border: those windows are cut off.
    _, peer = structural_similarity_index_measure(*tensors, data_range=255.0, sigma=1.5, return_full_image=True)
    window = np.array([math.exp(-((i - 5) ** 2) / (2 * 1.5**2)) for i in range(11)])
    weights = np.outer(window, window) / window.sum() ** 2
    shares = []
    for channel in range(3):
        for row in range(ours.shape[0] - 10):
            for column in range(ours.shape[1] - 10):
                place = slice(row, row + 11), slice(column, column + 11), channel
                a, b = ours[place].astype(np.float64), theirs[place].astype(np.float64)
                ma, mb = (weights * a).sum(), (weights * b).sum()
                va, vb = (weights * (a - ma) ** 2).sum(), (weights * (b - mb) ** 2).sum()
                cov = (weights * (a - ma) * (b - mb)).sum()
                c1, c2 = 2.55**2, 7.65**2
                shares.append((2 * ma * mb + c1) * (2 * cov + c2) / ((ma**2 + mb**2 + c1) * (va + vb + c2)))
    found = ssim(ours, theirs)
    errors = abs(found - math.fsum(shares) / len(shares)), abs(found - float(peer[..., 5:-5, 5:-5].mean()))
    print(f"{kind}: SSIM {found:.6f}, error to the loop {errors[0]:.1e}, to torchmetrics {errors[1]:.1e}")
    assert errors[0] < 1e-10
    assert errors[1] < 1e-10


def test_equal_pictures_and_latents() -> None:
    picture, latent = pictures("noise")[0], torch.randn(4, 8, 8)
    assert (psnr(picture, picture), ssim(picture, picture)) == (math.inf, 1.0)
    assert latent_error(latent, latent) == 0
    assert latent_error(latent, latent + 3) == pytest.approx(9, rel=1e-5)


def frechet_by_sqrtm(x: NDArray[np.float64], y: NDArray[np.float64]) -> float:
    first, second = np.cov(x.T), np.cov(y.T)
    root = sqrtm(first @ second)
    return float(np.square(x.mean(0) - y.mean(0)).sum() + np.trace(first + second - 2 * root.real))


@pytest.mark.parametrize(("n", "m", "scale"), [(300, 200, 1.0), (300, 200, 1e-4), (40, 500, 10.0)])
def test_frechet_distance_is_that_of_scipys_matrix_root(n: int, m: int, scale: float) -> None:
    rng = np.random.default_rng(7)
    x = scale * rng.standard_normal((n, 12)) @ rng.standard_normal((12, 12))
    y = scale * (rng.standard_normal((m, 12)) @ rng.standard_normal((12, 12)) + 0.3)
    expected = frechet_by_sqrtm(x, y)
    found = frechet_distance(torch.from_numpy(x), torch.from_numpy(y))
    print(f"{n} and {m} samples, scale {scale}: {expected:.6g}, relative error {abs(found / expected - 1):.1e}")
    assert found == pytest.approx(expected, rel=1e-9)


def test_frechet_distance_of_moved_and_scaled_samples_also_without_full_rank() -> None:
    x = torch.randn(5, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert abs(frechet_distance(x, x)) < 1e-12
    assert frechet_distance(x, x + 2) == pytest.approx(20 * 4, rel=1e-12)
    variance = x.var(dim=0).sum().item()
    moved = (x.mean(dim=0) * 2).square().sum().item()
    assert frechet_distance(x, 3 * x) == pytest.approx(moved + 4 * variance, rel=1e-9)  # (3 - 1)^2


def test_features_tell_drawn_pictures_from_worse_ones(shapes: SDXL) -> None:
    rng = random.Random("features")
    drawn = [draw(random_scene(rng), 64) for _ in range(240)]
    blurred = [np.asarray(Image.fromarray(picture).filter(ImageFilter.GaussianBlur(3))) for picture in drawn]
    empty = [np.full_like(picture, picture[0, 0]) for picture in drawn]
    features = [vae_features(shapes.vae, each) for each in (drawn[:120], drawn[120:], blurred[:120], empty[:120])]
    same, blur, nothing = (frechet_distance(other, features[1]) for other in (features[0], *features[2:]))
    print(
        f"Frechet distance to drawn pictures: of others {same:.4f}, blurred {blur:.4f}, without objects {nothing:.4f}"
    )
    assert same < blur < nothing


def test_features_are_means_and_deviations_of_each_level(shapes: SDXL) -> None:
    seen: list[torch.Tensor] = []
    picture = draw(random_scene(random.Random(4)), 64)
    with ExitStack() as hooks, torch.no_grad():
        for level in shapes.vae.encoder.down.children():
            block = level.get_submodule("block")
            hooks.enter_context(block.register_forward_hook(lambda *call: seen.append(call[-1])))
        [found] = vae_features(shapes.vae, [picture])
        ours = seen.copy()
        seen.clear()
        shapes.vae.encode(torch.from_numpy(picture).permute(2, 0, 1)[None].float() / 127.5 - 1)
    expected = []
    for own, output in zip(ours, seen, strict=True):
        assert torch.equal(own, output)
        channels = output[0].double().numpy()
        expected += [channel.mean() for channel in channels] + [channel.std() for channel in channels]
    error = (found - torch.tensor(expected)).abs().max().item()
    print(f"{len(found)} features: largest error {error:.1e}")
    assert error < 1e-12


def test_misfits_are_refused() -> None:
    picture = pictures("noise")[0]
    with pytest.raises(ValueError, match="40, 56"):
        psnr(picture, picture[:, :40])
    with pytest.raises(ValueError, match="float64"):
        psnr(picture.astype(np.float64), picture)
    with pytest.raises(ValueError, match="8x40"):
        ssim(picture[:, :8], picture[:, :8])
    with pytest.raises(ValueError, match="equal shapes"):
        latent_error(torch.zeros(4, 8, 8), torch.zeros(4, 8, 9))
    with pytest.raises(ValueError, match=r"\(1, 3\)"):
        frechet_distance(torch.zeros(1, 3), torch.zeros(4, 3))
