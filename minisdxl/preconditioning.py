"""What a U-Net F predicts, and the noise levels that it was trained at, in the symbols of the EDM paper.

EDM is Karras et al. 2022, arXiv:2206.00364. Its equation 7 holds for every prediction; only four numbers differ:

    D(x; sigma) = c_skip x + c_out F(c_in x; c_noise)

``x`` is a clean latent plus noise of standard deviation ``sigma``. Below, s is sigma_data and t is sigma / (1 + sigma):

    prediction   c_skip                  c_out                          c_in                      c_noise
    noise        1                       -sigma                         1 / sqrt(sigma^2 + 1)     timestep
    v            1 / (sigma^2 + 1)       -sigma / sqrt(sigma^2 + 1)     1 / sqrt(sigma^2 + 1)     timestep
    edm          s^2 / (sigma^2 + s^2)   sigma s / sqrt(sigma^2 + s^2)  1 / sqrt(sigma^2 + s^2)   ln(sigma) / 4
    edm-v        the same, with the sign of c_out turned
    flow         1 - t                   -t                             1 - t                     t steps

v is that of arXiv:2202.00512. A flow (arXiv:2210.02747) is noise minus latent, at (1 - t) latent + t noise.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from minisdxl.config import NoiseConfig

TERMINAL_ALPHA_BAR = 2.0**-24  # where it should be 0, so that sigma is finite, 4096; as in diffusers' schedulers
LARGEST_T = 1 - 2.0**-12  # of a flow, for the same reason: sigma is 4095
# sigma_data of Playground 2.5 (its scheduler_config.json), and of v, which is v only at 1.
SIGMA_DATA = {"edm": 0.5, "edm-v": 1.0}


class Preconditioning(NamedTuple):
    """The numbers of EDM equation 7 at one noise level. ``c_noise`` is an ``int`` where levels are discrete."""

    c_skip: float
    c_out: float
    c_in: float
    c_noise: float


Preconditioner = Callable[[float], Preconditioning]  # of a sigma above 0


def preconditioner(noise: NoiseConfig) -> Preconditioner:
    """The preconditioning of a model at any noise level."""
    match noise.prediction:
        case "noise" | "v":
            return _discrete(discrete_sigmas(noise), noise.prediction)
        case "flow":
            return lambda sigma: _flow(sigma, noise.steps)
        case prediction:
            return lambda sigma: _edm(sigma, SIGMA_DATA[prediction], -1 if prediction == "edm-v" else 1)


def _discrete(levels: Tensor, prediction: str) -> Preconditioner:
    # NOTE: the official code rounds sigma itself to the nearest level, so in c_in and c_out too. This differs where
    # sigma lies between levels or above the last, with churn or Karras levels: c_in must fit the noise that x has.
    def preconditioning(sigma: float) -> Preconditioning:
        c_in = 1 / math.sqrt(sigma**2 + 1)
        c_noise = int((levels / sigma).log().abs().argmin())
        if prediction == "noise":
            return Preconditioning(1.0, -sigma, c_in, c_noise)
        return Preconditioning(1 / (sigma**2 + 1), -sigma * c_in, c_in, c_noise)

    return preconditioning


def _edm(sigma: float, sigma_data: float, sign: int) -> Preconditioning:
    c_in = 1 / math.sqrt(sigma**2 + sigma_data**2)
    c_skip = sigma_data**2 / (sigma**2 + sigma_data**2)
    return Preconditioning(c_skip, sign * sigma * sigma_data * c_in, c_in, math.log(sigma) / 4)


def _flow(sigma: float, steps: int) -> Preconditioning:
    t = sigma / (1 + sigma)
    return Preconditioning(1 / (1 + sigma), -t, 1 / (1 + sigma), t * steps)


def discrete_sigmas(noise: NoiseConfig) -> Tensor:
    """Noise levels of training by timestep, ascending: (steps,) float64. Official: ``LegacyDDPMDiscretization``.

    With zero terminal SNR, sqrt(alpha_bar) is shifted and scaled (arXiv:2305.08891, algorithm 1), but for
    ``TERMINAL_ALPHA_BAR``. Raises ``ValueError`` for a model that was trained at continuous levels.
    """
    if noise.prediction not in ("noise", "v"):
        raise ValueError(f"a model of prediction {noise.prediction!r} has no timesteps, expected 'noise' or 'v'")
    betas = torch.linspace(noise.beta_start**0.5, noise.beta_end**0.5, noise.steps, dtype=torch.float64) ** 2
    alphas_bar = torch.cumprod(1 - betas, dim=0)
    if noise.zero_terminal_snr:
        roots = alphas_bar.sqrt()
        alphas_bar = ((roots - roots[-1]) * roots[0] / (roots[0] - roots[-1])) ** 2
        alphas_bar[-1] = TERMINAL_ALPHA_BAR
    return ((1 - alphas_bar) / alphas_bar).sqrt()


def lowest_and_highest(noise: NoiseConfig) -> Tensor:
    """The ends of the noise levels of training, (2,) float64: sigmas, or t of a flow."""
    match noise.prediction:
        case "noise" | "v":
            return discrete_sigmas(noise)[[0, -1]]
        case "flow":
            return shifted(torch.tensor([1 / noise.steps, 1.0], dtype=torch.float64), noise.shift)
        case _:
            return torch.tensor([noise.sigma_min, noise.sigma_max], dtype=torch.float64)


def shifted(t: Tensor, shift: float) -> Tensor:
    """t of a flow, moved towards noise by a ``shift`` above 1: arXiv:2403.03206, equation 23."""
    return shift * t / (1 + (shift - 1) * t)


def flow_sigmas(t: Tensor) -> Tensor:
    """The sigma of each t of a flow, at most ``LARGEST_T``."""
    t = t.clamp(max=LARGEST_T)
    return t / (1 - t)
