"""Small fixed denoisers that samplers are tried on, and the latents they start from."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from minisdxl.config import SDXL_BASE, NoiseConfig
from minisdxl.preconditioning import preconditioner
from minisdxl.sampler import Denoiser, denoise, image_generators, initial_noise, sigmas

NOISE = SDXL_BASE.noise
SHAPE = (4, 8, 8)


def epsilon_network(scale: float = 1.0) -> Callable[[Tensor, Tensor], Tensor]:
    """A small fixed nonlinear network: (scaled x, timestep) -> noise."""
    generator = torch.Generator().manual_seed(7)
    first = torch.randn(16, 4, 3, 3, generator=generator) * 0.2
    last = torch.randn(4, 16, 3, 3, generator=generator) * 0.1 * scale

    def network(x: Tensor, t: Tensor) -> Tensor:
        time = torch.sin(t.to(x) / 100)[:, None, None, None]
        hidden = torch.nn.functional.conv2d(x, first.to(x), padding=1) + time
        return 0.9 * x + torch.nn.functional.conv2d(torch.tanh(hidden), last.to(x), padding=1)

    return network


def network_denoiser(network: Callable[[Tensor, Tensor], Tensor], noise: NoiseConfig = NOISE) -> Denoiser:
    """``denoise`` without guidance and without a plan."""
    preconditioning = preconditioner(noise)
    return lambda x, sigma, step: denoise(network, x, sigma, preconditioning)


def gaussian_denoiser(mean: float, deviation: float) -> Denoiser:
    """The exact D(x; sigma) for data from N(mean, deviation^2)."""
    return lambda x, sigma, step: (deviation**2 * x + sigma**2 * mean) / (deviation**2 + sigma**2)


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    """Largest difference as a share of the largest value."""
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


def start(seeds: list[int], n: int) -> Tensor:
    """The first latent for n steps."""
    return initial_noise(image_generators(seeds), SHAPE, float(sigmas(n, NOISE)[0]))
