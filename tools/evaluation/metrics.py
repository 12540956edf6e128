"""Distances between pictures: PSNR, SSIM and latent error of pairs, the Fréchet distance of sets.

Pictures are 8-bit RGB, (H, W, 3). Everything is computed in float64.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from numpy.typing import NDArray
from torch import Tensor

from minisdxl.vae import VAE
from tools.evaluation.statistics import Statistics, distance

Picture = NDArray[np.uint8]

RANGE = 255.0  # of 8-bit pixels
# SSIM's window and constants: Wang et al. 2004, "Image quality assessment", section III B and C.
WINDOW, SIGMA, K1, K2 = 11, 1.5, 0.01, 0.03


def psnr(picture: Picture, reference: Picture) -> float:
    """Peak signal-to-noise ratio in dB, infinite for equal pictures. Raises ``ValueError`` for unequal shapes."""
    _check(picture, reference)
    error = np.square(picture.astype(np.float64) - reference.astype(np.float64)).mean()
    return 10 * math.log10(RANGE**2 / error) if error else math.inf


def ssim(picture: Picture, reference: Picture) -> float:
    """Structural similarity, 1 for equal pictures: Wang et al. 2004, equation 13, mean over windows and channels.

    Windows lie within the picture. Raises ``ValueError`` for unequal shapes and sides below ``WINDOW``.
    """
    _check(picture, reference)
    if min(picture.shape[:2]) < WINDOW:
        raise ValueError(f"picture is {picture.shape[1]}x{picture.shape[0]}, expected {WINDOW} or more pixels a side")
    x, y = (torch.from_numpy(p.astype(np.float64)).permute(2, 0, 1).unsqueeze(1) for p in (picture, reference))
    offsets = torch.arange(WINDOW, dtype=torch.float64) - WINDOW // 2
    weights = torch.exp(-offsets.square() / (2 * SIGMA**2))
    weights /= weights.sum()

    def blur(values: Tensor) -> Tensor:
        rows = F.conv2d(values, weights.view(1, 1, -1, 1))
        return F.conv2d(rows, weights.view(1, 1, 1, -1))

    mean_x, mean_y = blur(x), blur(y)
    variance_x, variance_y = blur(x * x) - mean_x**2, blur(y * y) - mean_y**2
    covariance = blur(x * y) - mean_x * mean_y
    c1, c2 = (K1 * RANGE) ** 2, (K2 * RANGE) ** 2
    luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    structure = (2 * covariance + c2) / (variance_x + variance_y + c2)
    return float((luminance * structure).mean())


def latent_error(latent: Tensor, reference: Tensor) -> float:
    """Mean squared difference of two latents of any one shape. Raises ``ValueError`` for unequal shapes."""
    if latent.shape != reference.shape:
        raise ValueError(f"latents are {tuple(latent.shape)} and {tuple(reference.shape)}, expected equal shapes")
    return float((latent.double() - reference.double()).square().mean())


def frechet_distance(features: Tensor, reference: Tensor) -> float:
    """Squared Fréchet distance of features (n, D) and (m, D), as :func:`tools.evaluation.statistics.distance`."""
    return distance(Statistics.of(features), Statistics.of(reference))


@torch.no_grad()
def vae_features(vae: VAE, pictures: Iterable[Picture]) -> Tensor:
    """Features (n, D) float64 of pictures for :func:`frechet_distance`, from the encoder of the model's VAE.

    Every checkpoint has a VAE, so no other network is needed. The features are the mean and the standard deviation of
    every channel over the picture, at each level of the encoder. They show colors, edges and surfaces at several
    scales, but not where they are, which the detector judges. Distances under different VAEs cannot be compared.
    """
    device = next(vae.parameters()).device
    rows = []
    for picture in pictures:
        pixels = torch.tensor(picture, device=device).to(vae.dtype) / 127.5 - 1
        x = vae.encoder.conv_in(rearrange(pixels, "h w c -> 1 c h w"))
        parts = []
        for level in vae.encoder.down.children():
            x = level.get_submodule("block")(x)
            channels = rearrange(x, "1 c h w -> c (h w)").double().cpu()
            parts += [channels.mean(dim=1), channels.std(dim=1, correction=0)]
            x = level.get_submodule("downsample")(x)
        rows.append(torch.cat(parts))
    return torch.stack(rows)


def _check(picture: Picture, reference: Picture) -> None:
    for each in (picture, reference):
        if each.dtype != np.uint8 or each.ndim != 3 or each.shape != reference.shape:
            raise ValueError(
                f"pictures are {picture.dtype} {picture.shape} and {reference.dtype} {reference.shape}, "
                "expected 8-bit RGB of one size: uint8 (H, W, 3)"
            )
