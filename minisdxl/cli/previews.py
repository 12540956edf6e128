"""Previews of a run: small pictures of its latents, by a linear map instead of the VAE decoder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import einsum, rearrange
from torch import Tensor

from minisdxl.checkpoint.atomic import atomic_path
from minisdxl.images import check_finite, to_image
from minisdxl.sampler import Denoiser
from minisdxl.samplings import Sampling
from minisdxl.vae import VAE

PICTURES, SIDE, RECTANGLES = 2, 256, 64  # of the pictures that the map is fitted to


@dataclass(frozen=True)
class RGBMap:
    """A linear map from latents (B, z, h, w) to colors (B, 3, h, w) of about [-1, 1], the same at every position."""

    weight: Tensor  # (3, z)
    bias: Tensor  # (3,)

    def __call__(self, latents: Tensor) -> Tensor:
        """Applies the map on the CPU in fp32."""
        colors = einsum(self.weight, latents.float().cpu(), "rgb z, b z h w -> b rgb h w")
        return colors + rearrange(self.bias, "rgb -> rgb 1 1")


@torch.no_grad()
def fit_rgb(vae: VAE) -> RGBMap:
    """The least-squares map for the latents of two drawn pictures of 256 px.

    Decoded random latents would fit much worse, because they are not latents of pictures. Raises ``ArithmeticError`` if
    the encoder overflows.
    """
    pictures = drawn_pictures()
    latents = check_finite("the VAE encoder", vae.encode(pictures.to(vae.quant_conv.weight.device)))
    colors = F.avg_pool2d(pictures, vae.config.downscale)
    known = F.pad(rearrange(latents.cpu().double(), "b z h w -> (b h w) z"), (0, 1), value=1.0)
    solution = torch.linalg.lstsq(known, rearrange(colors.double(), "b rgb h w -> (b h w) rgb")).solution.float()
    return RGBMap(solution[:-1].T.contiguous(), solution[-1])


def drawn_pictures() -> Tensor:
    """Rectangles of many sizes and colors, one over another: (2, 3, 256, 256) in [-1, 1], always the same.

    The dead leaves model, which has the edges and flat regions of photographs (Lee, Mumford & Huang 2001).
    """
    generator = torch.Generator().manual_seed(0)
    pictures = torch.zeros(PICTURES, 3, SIDE, SIDE)
    for picture in pictures:
        for _ in range(RECTANGLES):
            height, width = torch.randint(SIDE // 16, SIDE // 2, (2,), generator=generator).tolist()
            top, left = torch.randint(-SIDE // 4, SIDE, (2,), generator=generator).clamp(min=0).tolist()
            color = torch.rand(3, 1, 1, generator=generator) * 2 - 1
            picture[:, top : top + height, left : left + width] = color
    return pictures


def preview_path(target: Path, steps: int) -> Path:
    """The path of a picture's preview after so many steps."""
    return target.with_name(f"{target.stem}-step-{steps:03d}.png")


class Preview:
    """Writes the denoised latents D(x; sigma) of every ``every``-th step, as PNG files beside ``targets``.

    One pixel for each position of the latent. ``a/b.png`` has ``a/b-step-010.png`` beside it, counted from 1.
    """

    def __init__(self, rgb: RGBMap, every: int, targets: Sequence[Path]) -> None:
        self.rgb, self.every, self.targets = rgb, every, targets
        self.denoised: Tensor | None = None  # (B, z, h, w)

    def watch(self, sampling: Sampling) -> Sampling:
        """The same sampling, which also stores each denoised latent here."""

        def watched(denoiser: Denoiser) -> Denoiser:
            def seen(x: Tensor, sigma: float, step: int) -> Tensor:
                self.denoised = denoiser(x, sigma, step)
                return self.denoised

            return seen

        return sampling.with_denoiser(watched)

    def write(self, step: int) -> None:
        """Writes the previews of ``step``, counted from 0, if they are due. Raises ``OSError``."""
        if self.denoised is None or (step + 1) % self.every:
            return
        for target, picture in zip(self.targets, self.rgb(self.denoised), strict=True):
            with atomic_path(preview_path(target, step + 1)) as path:
                to_image(picture).save(path)
