"""Solvers beside Euler's method: Heun, DPM++ 2M and its SDE form, UniPC, Euler ancestral, Euler with churn, LCM, TCD.

All take ``x`` (B, C, H, W) at noise level ``sigmas[0]`` and descending ``sigmas`` (n + 1,), the last of them 0 for a
clean latent. They yield n latents in the dtype of x: x after each step, number i at noise level ``sigmas[i + 1]``.
Fresh noise for image i comes from ``generators[i]``; the ODE solvers need none. Symbols are those of ``sampler``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from minisdxl.config import SDXL_BASE
from minisdxl.preconditioning import discrete_sigmas
from minisdxl.sampler import Denoiser, Solver, draw_noise

TCD_GAMMA = 0.3  # the stochasticity that TCD's authors recommend; diffusers: eta of TCDScheduler.step


@torch.no_grad()
def heun(denoiser: Denoiser, x: Tensor, sigmas: Tensor, generators: Sequence[torch.Generator] = ()) -> Iterator[Tensor]:
    """Heun's method on the probability-flow ODE, of second order: EDM algorithm 1.

    Calls the denoiser twice per step, with the same step number, but once in a step to sigma 0.
    """
    for step, (sigma, sigma_next) in enumerate(pairwise(sigmas.tolist())):
        d = (x - denoiser(x, sigma, step)) / sigma
        ahead = x + (sigma_next - sigma) * d
        if sigma_next > 0:
            d = (d + (ahead - denoiser(ahead, sigma_next, step)) / sigma_next) / 2
        x = x + (sigma_next - sigma) * d
        yield x


@torch.no_grad()
def dpmpp_2m(
    denoiser: Denoiser, x: Tensor, sigmas: Tensor, generators: Sequence[torch.Generator] = ()
) -> Iterator[Tensor]:
    """DPM-Solver++(2M), multistep and of second order: algorithm 2 of arXiv:2211.01095, in the variable x / alpha.

    lambda is -log(sigma), and h is its step. The first step, and a last one to sigma 0, are of first order.
    """
    previous, h_previous = x, math.inf  # before the first step there is no denoised latent: 1 / r is 0
    for step, (sigma, sigma_next) in enumerate(pairwise(sigmas.tolist())):
        denoised = denoiser(x, sigma, step)
        if sigma_next > 0:
            h = math.log(sigma / sigma_next)
            r = h_previous / h
            extrapolated = denoised + (denoised - previous) / (2 * r)
            x = math.exp(-h) * x - math.expm1(-h) * extrapolated
            previous, h_previous = denoised, h
        else:
            x = denoised
        yield x


@torch.no_grad()
def euler_ancestral(
    denoiser: Denoiser, x: Tensor, sigmas: Tensor, generators: Sequence[torch.Generator]
) -> Iterator[Tensor]:
    """Euler's method to a sigma below the next noise level, then fresh noise up to that level.

    The lower sigma follows from DDPM's posterior (official: ``EulerAncestralSampler`` with eta 1). Raises
    ``ValueError`` at the first latent unless there is a generator for each image.
    """
    _check_generators(generators, x)
    for step, (sigma, sigma_next) in enumerate(pairwise(sigmas.tolist())):
        sigma_down = sigma_next**2 / sigma
        sigma_up = math.sqrt(sigma_next**2 - sigma_down**2)
        d = (x - denoiser(x, sigma, step)) / sigma
        x = x + (sigma_down - sigma) * d
        if sigma_up > 0:
            x = x + sigma_up * _fresh_noise(generators, x)
        yield x


@torch.no_grad()
def churned_euler(
    denoiser: Denoiser,
    x: Tensor,
    sigmas: Tensor,
    generators: Sequence[torch.Generator],
    s_churn: float,
    s_tmin: float = 0.0,
    s_tmax: float = math.inf,
    s_noise: float = 1.0,
) -> Iterator[Tensor]:
    """Euler's method with fresh noise before each step: EDM algorithm 2 without its second-order correction.

    ``s_churn`` is the amount of noise, added where s_tmin <= sigma <= s_tmax. Raises ``ValueError`` at the first latent
    if it is negative, or unless there is a generator for each image.
    """
    if not s_churn >= 0:
        raise ValueError(f"s_churn is {s_churn}, expected 0 or more")
    _check_generators(generators, x)
    for step, (sigma, sigma_next) in enumerate(pairwise(sigmas.tolist())):
        gamma = min(s_churn / (len(sigmas) - 1), math.sqrt(2) - 1) if s_tmin <= sigma <= s_tmax else 0.0
        sigma_hat = sigma * (1 + gamma)
        if gamma > 0:
            x = x + math.sqrt(sigma_hat**2 - sigma**2) * s_noise * _fresh_noise(generators, x)
        d = (x - denoiser(x, sigma_hat, step)) / sigma_hat
        x = x + (sigma_next - sigma_hat) * d
        yield x


@torch.no_grad()
def lcm(denoiser: Denoiser, x: Tensor, sigmas: Tensor, generators: Sequence[torch.Generator]) -> Iterator[Tensor]:
    """Multistep consistency sampling: to the denoised latent at once, then fresh noise up to the next noise level.

    Algorithm 3 of arXiv:2310.04378. Raises ``ValueError`` at the first latent unless there is a generator for each
    image.
    """
    # NOTE: LCM's boundary condition, c_skip x / sqrt(1 + sigma^2) + c_out D, is left out. At the timesteps of up to 8
    # steps both c_skip and 1 - c_out are below 1.3e-7, about the rounding of fp32.
    _check_generators(generators, x)
    for step, (sigma, sigma_next) in enumerate(pairwise(sigmas.tolist())):
        x = denoiser(x, sigma, step)
        if sigma_next > 0:
            x = x + sigma_next * _fresh_noise(generators, x)
        yield x


@torch.no_grad()
def dpmpp_2m_sde(
    denoiser: Denoiser, x: Tensor, sigmas: Tensor, generators: Sequence[torch.Generator]
) -> Iterator[Tensor]:
    """SDE-DPM-Solver++(2M), the midpoint form: :func:`dpmpp_2m` on the reverse SDE, with fresh noise at every step.

    From arXiv:2211.01095, in the variable x / alpha. Raises ``ValueError`` at the first latent unless there is a
    generator for each image.
    """
    # NOTE: k-diffusion draws the noise of all steps from one Brownian path; diffusers, and this, anew at each step.
    _check_generators(generators, x)
    previous, h_previous = x, math.inf  # before the first step there is no denoised latent: 1 / r is 0
    for step, (sigma, sigma_next) in enumerate(pairwise(sigmas.tolist())):
        denoised = denoiser(x, sigma, step)
        if sigma_next > 0:
            h = math.log(sigma / sigma_next)
            r = h_previous / h
            extrapolated = denoised + (denoised - previous) / (2 * r)
            x = math.exp(-2 * h) * x - math.expm1(-2 * h) * extrapolated
            x = x + sigma_next * math.sqrt(-math.expm1(-2 * h)) * _fresh_noise(generators, x)
            previous, h_previous = denoised, h
        else:
            x = denoised
        yield x


@torch.no_grad()
def tcd(denoiser: Denoiser, x: Tensor, sigmas: Tensor, generators: Sequence[torch.Generator]) -> Iterator[Tensor]:
    """Trajectory consistency sampling: Euler's method to below the next noise level, then fresh noise up to it.

    Strategic stochastic sampling of arXiv:2402.19159: of the next timestep t, the step goes down to
    (1 - gamma) t, in whole timesteps of SDXL. Raises ``ValueError`` at the first latent unless there is a generator for
    each image, and for noise levels that SDXL was not trained at.
    """
    # NOTE: diffusers and the authors end at the lowest noise level, 0.029, and leave that noise in; here it is 0.
    _check_generators(generators, x)
    levels = discrete_sigmas(SDXL_BASE.noise)
    for step, (sigma, sigma_next) in enumerate(pairwise(sigmas.tolist())):
        sigma_down = 0.0 if sigma_next == 0 else float(levels[int((1 - TCD_GAMMA) * _timestep(sigma_next, levels))])
        d = (x - denoiser(x, sigma, step)) / sigma
        x = x + (sigma_down - sigma) * d
        if sigma_next > 0:
            x = x + math.sqrt(sigma_next**2 - sigma_down**2) * _fresh_noise(generators, x)
        yield x


def _timestep(sigma: float, levels: Tensor) -> int:
    """The timestep of a noise level. Raises ``ValueError`` for one that is not in ``levels``."""
    timestep = int((levels - sigma).abs().argmin())
    if abs(float(levels[timestep]) / sigma - 1) > 1e-6:
        raise ValueError(
            f"noise level {sigma:.6g} is none of SDXL's, which TCD was distilled at; expected its own steps"
        )
    return timestep


class _Evaluation(NamedTuple):
    """A step's start: the latent, its denoised latent, and lambda = -log(sigma)."""

    x: Tensor
    denoised: Tensor
    lambda_: float


@torch.no_grad()
def unipc(
    denoiser: Denoiser, x: Tensor, sigmas: Tensor, generators: Sequence[torch.Generator] = ()
) -> Iterator[Tensor]:
    """UniPC of order 2, B(h) = e^h - 1: UniP-2 predicts x, and UniC-2 corrects it once its denoised latent is known.

    arXiv:2302.04867, in the variable x / alpha, where UniP-2 is DPM-Solver++(2M). The corrector costs no further call.
    The first step, and a last one to sigma 0, are of first order.
    """
    past: list[_Evaluation] = []  # of the last two steps
    for step, (sigma, sigma_next) in enumerate(pairwise(sigmas.tolist())):
        denoised = denoiser(x, sigma, step)
        lambda_ = -math.log(sigma)
        if past:
            x = _corrected(past, denoised, lambda_)
        past = [*past[-1:], _Evaluation(x, denoised, lambda_)]
        x = _predicted(past, -math.log(sigma_next)) if sigma_next > 0 else denoised
        yield x


def _predicted(past: Sequence[_Evaluation], lambda_: float) -> Tensor:
    """UniP: x at ``lambda_``."""
    last = past[-1]
    h = lambda_ - last.lambda_
    slope = torch.zeros_like(last.x)
    if len(past) == 2:
        slope = (last.denoised - past[0].denoised) * h / (last.lambda_ - past[0].lambda_)
    return math.exp(-h) * last.x - math.expm1(-h) * (last.denoised + slope / 2)


def _corrected(past: Sequence[_Evaluation], denoised: Tensor, lambda_: float) -> Tensor:
    """UniC: x at ``lambda_`` again, where the latent predicted there came out as ``denoised``."""
    last = past[-1]
    h = lambda_ - last.lambda_
    change = denoised - last.denoised
    if len(past) == 1:
        correction = change / 2
    else:
        # The paper's system R rho = b for order 2, solved: rows (1, 1) and (r, 1).
        r = (past[0].lambda_ - last.lambda_) / h
        b_1 = 1 / -math.expm1(-h) - 1 / h
        b_2 = 2 * (b_1 / -h - 1 / (2 * math.expm1(-h)))
        rho = (b_1 - b_2) / (1 - r)
        correction = rho * (past[0].denoised - last.denoised) / r + (b_1 - rho) * change
    return math.exp(-h) * last.x - math.expm1(-h) * (last.denoised + correction)


def by_stage(first: Denoiser, second: Denoiser, split: int) -> Denoiser:
    """The first denoiser before step ``split``, and the second from there on."""
    return lambda x, sigma, step: (first if step < split else second)(x, sigma, step)


def in_stages(solver: Solver, split: int) -> Solver:
    """A solver that starts anew at step ``split``, where another model takes over.

    What it has kept of the first model's steps is dropped, as in two runs of diffusers.
    """

    def staged(
        denoiser: Denoiser, x: Tensor, sigmas: Tensor, generators: Sequence[torch.Generator]
    ) -> Iterator[Tensor]:
        def second(x: Tensor, sigma: float, step: int) -> Tensor:
            return denoiser(x, sigma, split + step)

        between = x
        for between in solver(denoiser, x, sigmas[: split + 1], generators):
            yield between
        yield from solver(second, between, sigmas[split:], generators)

    return staged


def _check_generators(generators: Sequence[torch.Generator], x: Tensor) -> None:
    """Raises ``ValueError`` unless there is a generator for each image of ``x``."""
    if len(generators) != len(x):
        raise ValueError(f"fresh noise has {len(generators)} generators for {len(x)} images, expected one for each")


def _fresh_noise(generators: Sequence[torch.Generator], x: Tensor) -> Tensor:
    """Standard normal noise like ``x`` (B, C, H, W), image i from generator i."""
    return draw_noise(generators, x.shape[1:]).to(x)
