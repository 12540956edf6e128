"""The sampler against diffusers' scheduler, numpy, a float64 EDM loop, and the exact solution for Gaussian data."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import EulerDiscreteScheduler
from torch import Tensor

from atedm import BlockPlan, Pruning, TokenPlan
from minisdxl.config import SDXL_BASE, NoiseConfig
from minisdxl.sampler import (
    Condition,
    Denoiser,
    denoise,
    discrete_sigmas,
    guided_denoiser,
    image_generators,
    initial_noise,
    sample,
    sigmas,
    timesteps,
)

NOISE = SDXL_BASE.noise
SHAPE = (4, 8, 8)
STEPS = (10, 20, 25, 50)

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # inside diffusers


def scheduler(n: int, spacing: str = "trailing") -> Any:  # diffusers carries no types
    """The independent peer; "trailing" equals the official spacing at STEPS."""
    kind: Any = EulerDiscreteScheduler
    peer = kind(timestep_spacing=spacing, beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    peer.set_timesteps(n)
    return peer


def epsilon_network(scale: float = 1.0) -> Callable[[Tensor, Tensor], Tensor]:
    """A small fixed nonlinear network: (scaled x, timestep) -> noise."""
    generator = torch.Generator().manual_seed(7)
    first = torch.randn(16, 4, 3, 3, generator=generator) * 0.2
    last = torch.randn(4, 16, 3, 3, generator=generator) * 0.1 * scale

    def network(x: Tensor, t: Tensor) -> Tensor:
        time = torch.sin(t.float() / 100)[:, None, None, None]
        hidden = torch.nn.functional.conv2d(x, first, padding=1) + time
        return 0.9 * x + torch.nn.functional.conv2d(torch.tanh(hidden), last, padding=1)

    return network


def network_denoiser(network: Callable[[Tensor, Tensor], Tensor]) -> Denoiser:
    """``denoise`` without guidance and without a plan."""
    levels = discrete_sigmas(NOISE)
    return lambda x, sigma, step: denoise(network, x, sigma, levels)


def gaussian_denoiser(mean: float, deviation: float) -> Denoiser:
    """The exact D(x; sigma) for data from N(mean, deviation^2)."""
    return lambda x, sigma, step: (deviation**2 * x + sigma**2 * mean) / (deviation**2 + sigma**2)


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    """Largest difference as a share of the largest value."""
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


def start(seeds: list[int], n: int) -> Tensor:
    """The first latent for n steps."""
    return initial_noise(image_generators(seeds), SHAPE, float(sigmas(n, NOISE)[0]))


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


@pytest.mark.parametrize("n", [0, -1, 1001])
def test_steps_outside_the_range_are_refused(n: int) -> None:
    with pytest.raises(ValueError, match=rf"{n}.*1 to 1000"):
        sigmas(n, NOISE)


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


@pytest.mark.parametrize("scale", [1.0, 1e-2])
@pytest.mark.parametrize("n", STEPS)
def test_trajectory_equals_diffusers(n: int, scale: float) -> None:
    network = epsilon_network(scale)
    peer = scheduler(n)
    # From diffusers' own start: unit noise times its init_noise_sigma.
    x = initial_noise(image_generators([5, 6]), SHAPE, math.sqrt(float(peer.init_noise_sigma) ** 2 - 1))
    ours = list(sample(network_denoiser(network), x, sigmas(n, NOISE)))
    exact = list(sample(network_denoiser(network), x, peer.sigmas))  # same sigmas to the bit: what the steps alone add
    theirs = []
    for t in peer.timesteps:
        noise = network(peer.scale_model_input(x, t), t.expand(2))
        x = peer.step(noise, t, x).prev_sample
        theirs.append(x)
    assert len(ours) == len(theirs) == n
    error = max(relative_error(a, b) for a, b in zip(ours, theirs, strict=True))
    steps = max(relative_error(a, b) for a, b in zip(exact, theirs, strict=True))
    print(
        f"n = {n}, network x {scale:g}: worst latent, max error / max {error:.1e}, with diffusers' sigmas {steps:.1e}"
    )
    assert error < 5e-6
    assert steps < 2e-6


def test_churned_steps_equal_diffusers() -> None:
    # diffusers evaluates the network before it adds the fresh noise, EDM and the official code after: so the test makes
    # the noisy input itself, and compares noise, schedule and step.
    n, s_churn, s_tmin, s_tmax, s_noise = 20, 6.0, 0.1, 10.0, 1.007
    network = epsilon_network()
    levels = discrete_sigmas(NOISE)
    seeds = [5, 6]
    generators = image_generators(seeds)
    x = initial_noise(generators, SHAPE, 14.6)
    ours = list(sample(network_denoiser(network), x, sigmas(n, NOISE), generators, s_churn, s_tmin, s_tmax, s_noise))

    peer = scheduler(n)
    theirs = image_generators(seeds)
    initial_noise(theirs, SHAPE, 14.6)
    churned, error = 0, 0.0
    for i, (t, latent) in enumerate(zip(peer.timesteps, ours, strict=True)):
        sigma = sigma_hat = float(peer.sigmas[i])
        noisy = x
        if s_tmin <= sigma <= s_tmax:
            churned += 1
            sigma_hat = sigma * (1 + s_churn / n)
            copies = [torch.Generator().set_state(generator.get_state()) for generator in theirs]
            fresh = torch.stack([torch.randn(SHAPE, generator=copy) for copy in copies])
            noisy = x + fresh * s_noise * math.sqrt(sigma_hat**2 - sigma**2)
        index = min(range(1000), key=lambda i: abs(float(levels[i]) - sigma_hat))
        peer.scale_model_input(x, t)
        noise = network(noisy / math.sqrt(sigma_hat**2 + 1), torch.full((2,), index))
        x = peer.step(noise, t, x, s_churn, s_tmin, s_tmax, s_noise, generator=theirs).prev_sample
        error = max(error, relative_error(latent, x))
    print(f"churn: {churned} of {n} steps with fresh noise, max error / max {error:.1e}")
    assert 0 < churned < n
    assert error < 5e-6


def test_churn_equals_edm_algorithm_2_in_float64() -> None:
    n, s_churn = 12, 100.0  # so much that gamma is at its bound
    levels = sigmas(n, NOISE)
    generators = image_generators([9])
    x = initial_noise(generators, SHAPE, float(levels[0]))
    ours = list(sample(gaussian_denoiser(0.3, 0.5), x, levels, generators, s_churn))

    generator = torch.Generator().manual_seed(9)
    torch.randn(SHAPE, generator=generator)
    y = x[0].double().numpy()
    error = 0.0
    for i in range(n):
        t, t_next = float(levels[i]), float(levels[i + 1])
        t_hat = t + 0.41421356237309515 * t
        y_hat = y + (t_hat**2 - t**2) ** 0.5 * torch.randn(SHAPE, generator=generator).double().numpy()
        y = y_hat + (t_next - t_hat) * (y_hat - (0.25 * y_hat + t_hat**2 * 0.3) / (0.25 + t_hat**2)) / t_hat
        error = max(error, float(np.abs(ours[i][0].numpy() - y).max()))
    print(f"churn at its bound against float64: max error {error:.1e}")
    assert error < 1e-5


def geometric_sigmas(n: int) -> Tensor:
    """A grid that goes on well below the official smallest sigma of 0.029, for narrow data."""
    return torch.cat([torch.logspace(math.log10(14.6), -4, n, dtype=torch.float64), torch.zeros(1)])


@pytest.mark.parametrize(("deviation", "grid"), [(1.0, lambda n: sigmas(n, NOISE)), (0.01, geometric_sigmas)])
def test_gaussian_data_converges_to_the_exact_solution(deviation: float, grid: Callable[[int], Tensor]) -> None:
    # dx/dsigma = sigma (x - mean) / (deviation^2 + sigma^2), so x - mean shrinks as sqrt(deviation^2 + sigma^2).
    mean = 0.4
    x = start([1], 50)
    exact = mean + (x.double() - mean) * deviation / math.sqrt(deviation**2 + float(grid(50)[0]) ** 2)
    errors = []
    for n in (40, 200, 1000):
        *_, last = sample(gaussian_denoiser(mean, deviation), x, grid(n))
        errors.append(((last - exact).abs().max() / deviation).item())
    shown = ", ".join(f"{error:.1e}" for error in errors)
    print(f"Gaussian data of deviation {deviation:g}: error / deviation at n = 40, 200, 1000: {shown}")
    assert errors[-1] < 0.02
    for coarse, fine in pairwise(errors):
        assert 4 < coarse / fine < 6  # Euler is of first order: 5 times the steps, a fifth of the error


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
    errors = [
        (denoise(network, x * sigma, sigma, levels) - exact(x * sigma, sigma, 0)).abs().max().item() / max(sigma, 1)
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
        denoise(network, x, sigma, levels)
    assert seen == [0, 500, 500, 999]


@pytest.mark.parametrize("n", [1, 1000])
def test_fewest_and_most_steps(n: int) -> None:
    latents = list(sample(network_denoiser(epsilon_network()), start([0], n), sigmas(n, NOISE)))
    assert len(latents) == n
    assert torch.isfinite(latents[-1]).all()


def test_one_step_lands_on_the_denoised_latent() -> None:
    x = start([0], 1)
    (last,) = sample(gaussian_denoiser(0.4, 1.0), x, sigmas(1, NOISE))
    error = (last - gaussian_denoiser(0.4, 1.0)(x, float(sigmas(1, NOISE)[0]), 0)).abs().max().item()
    print(f"one step against D(x; sigma_0): max error {error:.1e}")
    assert error < 1e-5


def test_image_of_a_batch_equals_the_image_alone_bit_for_bit() -> None:
    def run(seeds: list[int]) -> list[Tensor]:
        generators = image_generators(seeds)
        x = initial_noise(generators, SHAPE, 14.6)
        return [x, *sample(gaussian_denoiser(0.1, 0.5), x, sigmas(10, NOISE), generators, s_churn=3.0)]

    together = run([11, 12, 13])
    for i in range(3):
        alone = run([11 + i])
        assert all(torch.equal(many[i], one[0]) for many, one in zip(together, alone, strict=True))


def test_latents_stay_fp32_and_carry_no_gradient() -> None:
    weight = torch.ones((), requires_grad=True)
    x = start([0], 10)
    before = x.clone()
    latents = list(sample(lambda x, sigma, step: 0.5 * x * weight, x, sigmas(10, NOISE)))
    latents += sample(lambda x, sigma, step: 0.5 * x * weight, x.half(), sigmas(10, NOISE))
    assert torch.equal(x, before)
    assert all(latent.dtype == torch.float32 and not latent.requires_grad for latent in latents)
    assert len({latent.data_ptr() for latent in latents}) == 20


@dataclass
class RecordingUNet:
    """Predicts one number an image, mean of the context + vector[0] + timestep / 1000; remembers how it was called."""

    calls: list[tuple[Tensor, Tensor, TokenPlan]] = field(default_factory=list)

    def __call__(self, x: Tensor, c_noise: Tensor, context: Tensor, vector: Tensor, plan: TokenPlan) -> Tensor:
        """The predicted noise (B, C, H, W)."""
        self.calls.append((x, c_noise, plan))
        level = context.mean(dim=(1, 2)) + vector[:, 0] + c_noise / 1000
        return level.to(x.dtype)[:, None, None, None].expand_as(x)


def step_plan(step: int) -> TokenPlan:
    """Another plan for each step: the sampler only hands plans on."""
    return TokenPlan({"mid": BlockPlan.pruning(Pruning(ratio=step / 20))})


def condition(value: float, dtype: torch.dtype = torch.float32) -> Condition:
    """The context and vector of two images, all ``value`` and ``value`` / 2."""
    return Condition(torch.full((2, 77, 6), value, dtype=dtype), torch.full((2, 5), value / 2, dtype=dtype))


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
def test_sampling_hands_each_step_its_plan(scale: float) -> None:
    unet = RecordingUNet()
    denoiser = guided_denoiser(unet, condition(0.2), condition(-0.4), scale, step_plan, NOISE)
    assert len(list(sample(denoiser, start([0, 1], 10), sigmas(10, NOISE)))) == 10
    assert [plan for _, _, plan in unet.calls] == [step_plan(step) for step in range(10)]
    assert [int(c_noise[0]) for _, c_noise, _ in unet.calls] == timesteps(10, NOISE).tolist()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_only_the_unet_runs_in_half_precision(dtype: torch.dtype) -> None:
    unet = RecordingUNet()
    known = condition(0.2, dtype)
    x, sigma = start([0, 1], 10), 5.1
    denoised = guided_denoiser(unet, known, condition(-0.4, dtype), 1.0, step_plan, NOISE)(x, sigma, 0)
    ((seen, c_noise, plan),) = unet.calls
    assert seen.dtype == dtype
    assert denoised.dtype == torch.float32
    prediction = unet(seen, c_noise, known.context, known.vector, plan).double()
    error = relative_error(denoised, x.double() - sigma * prediction)
    print(f"around a {dtype} U-Net: max error / max {error:.1e}")
    assert error < 1e-6


def test_bad_input_is_refused() -> None:
    x, levels, denoiser = start([0, 1], 10), sigmas(10, NOISE), gaussian_denoiser(0.0, 1.0)
    with pytest.raises(ValueError, match=r"1 generators for 2 images"):
        next(sample(denoiser, x, levels, image_generators([0]), s_churn=1.0))
    for s_churn in (-1.0, math.nan):
        with pytest.raises(ValueError, match=rf"s_churn is {s_churn}, expected 0 or more"):
            next(sample(denoiser, x, levels, image_generators([0, 1]), s_churn=s_churn))
    for seed in (-1, 2**32):
        with pytest.raises(ValueError, match=rf"seed is {seed}, expected 0 to 4294967295"):
            image_generators([0, seed])


def test_seeds_beyond_32_bits_would_repeat() -> None:
    # The reason for the limit on seeds; if torch changes this, the limit can go.
    draws = [torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed)) for seed in (0, 2**32)]
    assert torch.equal(*draws)
