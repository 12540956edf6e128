"""Noise levels, preconditioning and guidance against diffusers' scheduler, numpy, and the exact denoiser."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import EulerDiscreteScheduler, LCMScheduler
from torch import Tensor

from atedm import BlockPlan, Pruning, TokenPlan
from minisdxl.config import NoiseConfig
from minisdxl.preconditioning import discrete_sigmas, preconditioner
from minisdxl.sampler import (
    Solver,
    Spacing,
    UNetInputs,
    denoise,
    euler,
    guided_denoiser,
    image_generators,
    sigmas,
    timesteps,
)
from minisdxl.samplings import lcm_timesteps, trailing_timesteps
from minisdxl.solvers import heun
from tests.minisdxl.denoisers import NOISE, SHAPE, gaussian_denoiser, relative_error, start

STEPS = (10, 20, 25, 50)

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # inside diffusers


def scheduler(n: int, spacing: str = "trailing") -> Any:  # diffusers carries no types
    """The independent peer; "trailing" equals the official spacing at STEPS."""
    kind: Any = EulerDiscreteScheduler
    peer = kind(timestep_spacing=spacing, beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    peer.set_timesteps(n)
    return peer


def test_discrete_sigmas_equal_a_product_written_out() -> None:
    abar, expected = 1.0, []
    for i in range(1000):
        root = 0.00085**0.5 + (0.0120**0.5 - 0.00085**0.5) * i / 999
        abar *= 1 - root * root
        expected.append(math.sqrt((1 - abar) / abar))
    levels = discrete_sigmas(NOISE)
    error = np.abs(levels.numpy() / np.array(expected) - 1).max()
    print(f"discrete sigmas {levels[0]:.6f} .. {levels[-1]:.6f}, max relative error {error:.1e}")
    assert levels.dtype == torch.float64
    assert error < 1e-12


@pytest.mark.parametrize("n", STEPS)
def test_timesteps_and_sigmas_equal_diffusers(n: int) -> None:
    peer = scheduler(n)
    assert timesteps(n, NOISE).tolist() == peer.timesteps.tolist()
    ours = sigmas(n, NOISE)
    error = (ours[:-1] / peer.sigmas[:-1].double() - 1).abs().max().item()
    print(f"n = {n}: timesteps equal, max relative error of sigma {error:.1e} (diffusers computes it in fp32)")
    assert ours.shape == peer.sigmas.shape == (n + 1,)
    assert ours[-1] == peer.sigmas[-1] == 0
    assert error < 1e-5


def test_timesteps_equal_the_official_expression_at_every_n() -> None:
    for n in range(1, 1001):
        official = np.linspace(999, 0, n, endpoint=False).astype(int)
        assert timesteps(n, NOISE).tolist() == official.tolist()
        assert torch.all(sigmas(n, NOISE).diff() < 0)
    different = [n for n in range(1, 1001) if timesteps(n, NOISE).tolist() != scheduler(n).timesteps.tolist()]
    print(f"diffusers' trailing spacing has other timesteps at {len(different)} of 1000 n, 30 and 99 among them")
    assert not any(1000 % n == 0 for n in different)
    assert {30, 99} <= set(different)


def test_timesteps_follow_the_number_of_training_steps() -> None:
    noise = NoiseConfig(steps=8)
    assert timesteps(8, noise).tolist() == [7, 6, 5, 4, 3, 2, 1, 0]
    assert timesteps(2, noise).tolist() == [7, 3]


def test_trailing_timesteps_equal_diffusers() -> None:
    for n in (*range(1, 41), 50, 100, 125, 200, 250, 500, 1000):  # of n = 48, half a step is rounded otherwise
        assert trailing_timesteps(n, NOISE).tolist() == scheduler(n).timesteps.tolist()
    few = [n for n in range(1, 9) if not torch.equal(trailing_timesteps(n, NOISE), timesteps(n, NOISE))]
    print(f"trailing timesteps equal diffusers'; of 1 to 8 steps those of {few} differ from the official ones")
    assert few == [3, 6]
    assert all((trailing_timesteps(n, NOISE) - timesteps(n, NOISE)).abs().max() == 1 for n in few)


def test_lcm_timesteps_equal_diffusers_at_every_n() -> None:
    kind: Any = LCMScheduler
    peer = kind()
    for n in range(1, 51):
        peer.set_timesteps(n)
        assert lcm_timesteps(n, NOISE).tolist() == peer.timesteps.tolist()
    assert lcm_timesteps(4, NOISE).tolist() == [999, 759, 499, 259]


@pytest.mark.parametrize("n", [0, -1, 1001])
@pytest.mark.parametrize("spacing", [timesteps, trailing_timesteps])
def test_steps_outside_the_range_are_refused(n: int, spacing: Spacing) -> None:
    with pytest.raises(ValueError, match=rf"{n}.*1 to 1000"):
        sigmas(n, NOISE, spacing)


def test_lcm_has_at_most_the_steps_it_was_distilled_at() -> None:
    for n in (0, 51):
        with pytest.raises(ValueError, match=rf"steps is {n}, expected 1 to 50"):
            lcm_timesteps(n, NOISE)
    with pytest.raises(ValueError, match="8 noise levels, LCM and TCD need a multiple of 50"):
        lcm_timesteps(4, NoiseConfig(steps=8))


def test_initial_scale_equals_diffusers_with_leading_spacing() -> None:
    # For "trailing" diffusers starts from sigma_max; for "leading", from the official sqrt(sigma_max^2 + 1).
    peer = scheduler(1000, "leading")  # at 1000 steps both spacings have the same sigma_max
    x = start([3], 50)
    unit = torch.randn(SHAPE, generator=torch.Generator().manual_seed(3))
    error = relative_error(x[0], unit * peer.init_noise_sigma)
    ratio = float(peer.init_noise_sigma) / float(scheduler(50).init_noise_sigma)
    print(f"initial noise: max error / max {error:.1e}; diffusers' trailing scale is smaller by a factor {ratio:.5f}")
    assert error < 2e-6
    assert ratio == pytest.approx(math.sqrt(1 + 1 / 14.6146**2), abs=1e-6)


def test_preconditioning_gives_back_the_exact_denoiser() -> None:
    # A network that knows the noise of Gaussian data exactly, from (scaled x, index) alone.
    levels = discrete_sigmas(NOISE)
    mean, deviation = 0.3, 0.7
    exact = gaussian_denoiser(mean, deviation)

    def network(scaled: Tensor, c_noise: Tensor) -> Tensor:
        assert c_noise.dtype == torch.int64
        assert c_noise.shape == scaled.shape[:1]
        sigma = float(levels[c_noise[0]])
        x = scaled.double() * (sigma**2 + 1) ** 0.5
        noise: Tensor = (x - exact(x, sigma, 0)) / sigma
        return noise.float()

    x = torch.randn(3, *SHAPE, generator=torch.Generator().manual_seed(0))
    scales = preconditioner(NOISE)
    errors = [
        (denoise(network, x * sigma, sigma, scales) - exact(x * sigma, sigma, 0)).abs().max().item() / max(sigma, 1)
        for sigma in levels.tolist()
    ]
    print(f"preconditioning: max error of D over all 1000 sigmas {max(errors):.1e}")
    assert max(errors) < 2e-6


def test_c_noise_is_the_nearest_index() -> None:
    levels = discrete_sigmas(NOISE)
    seen: list[int] = []

    def network(scaled: Tensor, c_noise: Tensor) -> Tensor:
        seen.append(int(c_noise[0]))
        return scaled

    x = torch.zeros(1, *SHAPE)
    between = 0.51 * levels[500] + 0.49 * levels[501]
    for sigma in (0.0, float(levels[500]), float(between), 100.0):
        denoise(network, x, sigma, preconditioner(NOISE))
    assert seen == [0, 500, 500, 999]


@dataclass
class RecordingUNet:
    """Predicts one number an image, mean of the context + vector[0] + timestep / 1000; remembers how it was called."""

    calls: list[tuple[Tensor, Tensor, TokenPlan]] = field(default_factory=list)
    readings: int = 0

    def project_context(self, context: Tensor) -> Tensor:
        """The mean of each context (B, T, C)."""
        self.readings += 1
        return context.mean(dim=(1, 2))

    def __call__(self, x: Tensor, c_noise: Tensor, text: Tensor, vector: Tensor, plan: TokenPlan) -> Tensor:
        """The predicted noise (B, C, H, W)."""
        self.calls.append((x, c_noise, plan))
        level = text + vector[:, 0] + c_noise / 1000
        return level.to(x.dtype)[:, None, None, None].expand_as(x)


def step_plan(step: int) -> TokenPlan:
    """Another plan for each step: the sampler only hands plans on."""
    return TokenPlan({"mid": BlockPlan.pruning(Pruning(ratio=step / 20))})


def condition(value: float, dtype: torch.dtype = torch.float32) -> UNetInputs:
    """The context and vector of two images, all ``value`` and ``value`` / 2."""
    return UNetInputs(torch.full((2, 77, 6), value, dtype=dtype), torch.full((2, 5), value / 2, dtype=dtype))


@pytest.mark.parametrize("scale", [0.0, 1.0, 2.5, 7.0])
def test_guidance(scale: float) -> None:
    unet = RecordingUNet()
    denoiser = guided_denoiser(unet, condition(0.2), condition(-0.4), scale, step_plan, NOISE)
    sigma = float(discrete_sigmas(NOISE)[700])
    x = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(0))
    denoised = denoiser(x, sigma, 3)
    u = x.double() - sigma * (-0.4 - 0.2 + 0.7)
    c = x.double() - sigma * (0.2 + 0.1 + 0.7)
    error = (denoised - (u + scale * (c - u))).abs().max().item()
    ((seen, c_noise, plan),) = unet.calls
    print(f"guidance at scale {scale:g}: max error {error:.1e}, U-Net batch {len(seen)}")
    assert error < 2e-5
    assert plan == step_plan(3)
    assert c_noise.tolist() == [700] * (2 if scale == 1 else 4)
    assert all(torch.allclose(part, x / math.sqrt(sigma**2 + 1), atol=1e-7) for part in seen.chunk(len(seen) // 2))


@pytest.mark.parametrize("scale", [1.0, 7.0])
@pytest.mark.parametrize(("solver", "calls"), [(euler, 1), (heun, 2)])
def test_sampling_hands_each_step_its_plan(scale: float, solver: Solver, calls: int) -> None:
    unet = RecordingUNet()
    denoiser = guided_denoiser(unet, condition(0.2), condition(-0.4), scale, step_plan, NOISE)
    assert len(list(solver(denoiser, start([0, 1], 10), sigmas(10, NOISE), ()))) == 10
    steps = [step for step in range(10) for _ in range(calls if step < 9 else 1)]
    assert [plan for _, _, plan in unet.calls] == [step_plan(step) for step in steps]
    assert unet.readings == 1  # the text is the same at every step
    levels = timesteps(10, NOISE).tolist()
    seen = [int(c_noise[0]) for _, c_noise, _ in unet.calls]
    assert seen == [level for pair in pairwise(levels) for level in pair[:calls]] + levels[-1:]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_only_the_unet_runs_in_half_precision(dtype: torch.dtype) -> None:
    unet = RecordingUNet()
    known = condition(0.2, dtype)
    x, sigma = start([0, 1], 10), 5.1
    denoised = guided_denoiser(unet, known, condition(-0.4, dtype), 1.0, step_plan, NOISE)(x, sigma, 0)
    ((seen, c_noise, plan),) = unet.calls
    assert seen.dtype == dtype
    assert denoised.dtype == torch.float32
    prediction = unet(seen, c_noise, unet.project_context(known.context), known.vector, plan).double()
    error = relative_error(denoised, x.double() - sigma * prediction)
    print(f"around a {dtype} U-Net: max error / max {error:.1e}")
    assert error < 1e-6


def test_bad_seeds_are_refused() -> None:
    for seed in (-1, 2**64):
        with pytest.raises(ValueError, match=rf"seed is {seed}, expected 0 to 18446744073709551615"):
            image_generators([0, seed])
