"""Noise levels, preconditioning and guidance, in the symbols of the EDM paper (Karras et al. 2022, arXiv:2206.00364).

``x`` is a latent (B, C, H, W) with noise of standard deviation ``sigma`` on it, always fp32; ``D(x; sigma)`` is the
denoised latent. Every image of a batch is at the same sigma. Sigmas are computed in float64 and act as Python floats.
Euler's method is here, other solvers are in ``solvers``; ``samplings`` combines them under names.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Protocol, TypeVar

import torch
from torch import Tensor

from minisdxl.config import NoiseConfig
from minisdxl.seeds import generator

if TYPE_CHECKING:
    from atedm.plan import TokenPlan

Denoiser = Callable[[Tensor, float, int], Tensor]  # (x, sigma, step) -> D(x; sigma)
Solver = Callable[[Denoiser, Tensor, Tensor, Sequence[torch.Generator]], "Iterator[Tensor]"]
Spacing = Callable[[int, NoiseConfig], Tensor]  # n steps to n indices into the levels of training, descending, int64


def discrete_sigmas(noise: NoiseConfig) -> Tensor:
    """Noise levels of training, ascending: (steps,) float64. Official: ``LegacyDDPMDiscretization``."""
    betas = torch.linspace(noise.beta_start**0.5, noise.beta_end**0.5, noise.steps, dtype=torch.float64) ** 2
    alphas_bar = torch.cumprod(1 - betas, dim=0)
    return ((1 - alphas_bar) / alphas_bar).sqrt()


def timesteps(n: int, noise: NoiseConfig) -> Tensor:
    """Official spacing: linspace(steps - 1, 0, n, endpoint=False), truncated, as in ``LegacyDDPMDiscretization``.

    Raises ``ValueError`` for n outside 1..steps.
    """
    check_steps(n, noise.steps)
    last = noise.steps - 1
    # float64, not integers: of n = 99, number 77 is 221.99..., not 222, and the official code truncates that to 221.
    return (torch.arange(n, dtype=torch.float64) * (-last / n) + last).long()


def check_steps(n: int, most: int) -> None:
    """Raises ``ValueError`` unless 1 <= n <= most."""
    if not 1 <= n <= most:
        raise ValueError(f"number of sampling steps is {n}, expected 1 to {most}")


def sigmas(n: int, noise: NoiseConfig, spacing: Spacing = timesteps) -> Tensor:
    """Noise levels of ``n`` steps, descending, and a final 0: (n + 1,) float64. Raises as ``spacing`` does."""
    return torch.cat([discrete_sigmas(noise)[spacing(n, noise)], torch.zeros(1, dtype=torch.float64)])


def first_step(n: int, strength: float) -> int:
    """The first step of a run that starts from a picture: of steps 0 to n - 1 the last int(n * strength) are run.

    As diffusers' image-to-image pipelines do. Raises ``ValueError`` unless 0 < strength <= 1 and a step is left.
    """
    if not 0 < strength <= 1:
        raise ValueError(f"strength is {strength}, expected more than 0 and at most 1")
    run = int(n * strength)
    if run == 0:
        raise ValueError(f"strength {strength} leaves none of {n} steps to run, expected more of either")
    return n - run


def image_generators(seeds: Sequence[int]) -> list[torch.Generator]:
    """One CPU generator for each image. Raises ``ValueError`` as :func:`minisdxl.seeds.check_seed`."""
    return [generator(seed) for seed in seeds]


def draw_noise(generators: Sequence[torch.Generator], shape: Sequence[int]) -> Tensor:
    """Standard normal noise (B, *shape), fp32 on the CPU, image i from generator i, so the same in every batch."""
    return torch.stack([torch.randn(shape, generator=generator, dtype=torch.float32) for generator in generators])


def initial_noise(generators: Sequence[torch.Generator], shape: Sequence[int], sigma_0: float) -> Tensor:
    """The first x (B, C, H, W), at noise level ``sigma_0``, scaled to unit data variance plus noise, as is official."""
    return math.sqrt(1 + sigma_0**2) * draw_noise(generators, shape)


def denoise(network: Callable[[Tensor, Tensor], Tensor], x: Tensor, sigma: float, levels: Tensor) -> Tensor:
    """D(x; sigma) of a ``network(c_in x, c_noise (B,))`` that predicts noise, trained at ``levels``: EDM equation 7."""
    # NOTE: the official code rounds sigma itself to the nearest level, so in c_in and c_out too. That is the same
    # without churn; with it, sigma may lie between levels or above the last, and c_in must fit the noise that is there.
    c_skip = 1.0
    c_out = -sigma
    c_in = 1 / math.sqrt(sigma**2 + 1)
    c_noise = int((levels - sigma).abs().argmin())
    return c_skip * x + c_out * network(c_in * x, torch.full((len(x),), c_noise, device=x.device))


Text = TypeVar("Text")


class NoisePredictor(Protocol[Text]):
    """What the sampler asks of a U-Net."""

    def project_context(self, context: Tensor) -> Text:
        """Keys and values of a context (B, 77, channels), the same at every noise level."""

    def __call__(self, x: Tensor, c_noise: Tensor, text: Text, vector: Tensor, plan: TokenPlan) -> Tensor:
        """The noise in ``x``, which is c_in times the latent (B, C, H, W)."""


@dataclass(frozen=True)
class UNetInputs:
    """What the U-Net is told: context (B, 77, channels) and vector (B, channels), in the U-Net's dtype and device."""

    context: Tensor
    vector: Tensor


def guided_denoiser(
    unet: NoisePredictor[Text],
    conditional: UNetInputs,
    unconditional: UNetInputs,
    scale: float,
    plans: Callable[[int], TokenPlan],
    noise: NoiseConfig,
) -> Denoiser:
    """D(x; sigma) under classifier-free guidance, u + scale (c - u); ``plans(step)`` is the plan of step 0, 1, ...

    Calls the U-Net with a batch of 2B, the unconditional half first; at ``scale`` 1 with the conditional B alone. The
    U-Net projects the context once, here, and computes in its dtype, everything around it in fp32.
    """
    parts = [conditional] if scale == 1 else [unconditional, conditional]
    context = torch.cat([part.context for part in parts])
    vector = torch.cat([part.vector for part in parts])
    text = unet.project_context(context)
    levels = discrete_sigmas(noise)

    def denoiser(x: Tensor, sigma: float, step: int) -> Tensor:
        def network(scaled: Tensor, c_noise: Tensor) -> Tensor:
            return unet(scaled.to(context.dtype), c_noise, text, vector, plans(step)).float()

        denoised = denoise(network, torch.cat([x] * len(parts)), sigma, levels)
        if scale == 1:
            return denoised
        u, c = denoised.chunk(2)
        return u + scale * (c - u)

    return denoiser


@torch.no_grad()
def euler(
    denoiser: Denoiser,
    x: Tensor,
    sigmas: Tensor,
    generators: Sequence[torch.Generator] = (),
    s_churn: float = 0.0,
    s_tmin: float = 0.0,
    s_tmax: float = math.inf,
    s_noise: float = 1.0,
) -> Iterator[Tensor]:
    """Euler's method on the probability-flow ODE: EDM algorithm 2 without its second-order correction.

    ``s_churn`` above 0 adds fresh noise where s_tmin <= sigma <= s_tmax. Raises ``ValueError``, once the first latent
    is asked for, if churn is negative or lacks a generator for each image.
    """
    if not s_churn >= 0:
        raise ValueError(f"s_churn is {s_churn}, expected 0 or more")
    if s_churn > 0:
        check_generators(generators, x)
    for step, (sigma, sigma_next) in enumerate(pairwise(sigmas.tolist())):
        gamma = min(s_churn / (len(sigmas) - 1), math.sqrt(2) - 1) if s_tmin <= sigma <= s_tmax else 0.0
        sigma_hat = sigma * (1 + gamma)
        if gamma > 0:
            x = x + math.sqrt(sigma_hat**2 - sigma**2) * s_noise * fresh_noise(generators, x)
        d = (x - denoiser(x, sigma_hat, step)) / sigma_hat  # dx/dsigma
        x = x + (sigma_next - sigma_hat) * d
        yield x


def check_generators(generators: Sequence[torch.Generator], x: Tensor) -> None:
    """Raises ``ValueError`` unless there is a generator for each image of ``x``."""
    if len(generators) != len(x):
        raise ValueError(f"fresh noise has {len(generators)} generators for {len(x)} images, expected one for each")


def fresh_noise(generators: Sequence[torch.Generator], x: Tensor) -> Tensor:
    """Standard normal noise like ``x`` (B, C, H, W), image i from generator i."""
    return draw_noise(generators, x.shape[1:]).to(x)
