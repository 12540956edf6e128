"""Solvers against diffusers' churn, float64 loops written out, and exact solutions for Gaussian data."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import EulerDiscreteScheduler
from torch import Tensor

from minisdxl.preconditioning import discrete_sigmas
from minisdxl.sampler import Denoiser, Solver, euler, image_generators, initial_noise, sigmas
from minisdxl.samplings import lcm_timesteps
from minisdxl.solvers import churned_euler, dpmpp_2m, dpmpp_2m_sde, euler_ancestral, heun, lcm, tcd, unipc
from tests.minisdxl.denoisers import (
    NOISE,
    SHAPE,
    epsilon_network,
    gaussian_denoiser,
    network_denoiser,
    relative_error,
    start,
)

SOLVERS = (euler, heun, dpmpp_2m, dpmpp_2m_sde, unipc, euler_ancestral, lcm, tcd)
STOCHASTIC = (dpmpp_2m_sde, euler_ancestral, lcm, tcd)

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # inside diffusers


def test_churned_steps_equal_diffusers() -> None:
    # diffusers evaluates the network before it adds the fresh noise, EDM and the official code after: so the test makes
    # the noisy input itself, and compares noise, schedule and step.
    n, s_churn, s_tmin, s_tmax, s_noise = 20, 6.0, 0.1, 10.0, 1.007
    network = epsilon_network()
    levels = discrete_sigmas(NOISE)
    seeds = [5, 6]
    generators = image_generators(seeds)
    x = initial_noise(generators, SHAPE, 14.6)
    churn = (s_churn, s_tmin, s_tmax, s_noise)
    ours = list(churned_euler(network_denoiser(network), x, sigmas(n, NOISE), generators, *churn))

    kind: Any = EulerDiscreteScheduler  # diffusers carries no types
    peer = kind(timestep_spacing="trailing", beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    peer.set_timesteps(n)
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
        x = peer.step(noise, t, x, *churn, generator=theirs).prev_sample
        error = max(error, relative_error(latent, x))
    print(f"churn: {churned} of {n} steps with fresh noise, max error / max {error:.1e}")
    assert 0 < churned < n
    assert error < 5e-6


def test_churn_equals_edm_algorithm_2_in_float64() -> None:
    n, s_churn = 12, 100.0  # so much that gamma is at its bound
    levels = sigmas(n, NOISE)
    generators = image_generators([9])
    x = initial_noise(generators, SHAPE, float(levels[0]))
    ours = list(churned_euler(gaussian_denoiser(0.3, 0.5), x, levels, generators, s_churn))

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
        *_, last = euler(gaussian_denoiser(mean, deviation), x, grid(n))
        errors.append(((last - exact).abs().max() / deviation).item())
    shown = ", ".join(f"{error:.1e}" for error in errors)
    print(f"Gaussian data of deviation {deviation:g}: error / deviation at n = 40, 200, 1000: {shown}")
    assert errors[-1] < 0.02
    for coarse, fine in pairwise(errors):
        assert 4 < coarse / fine < 6  # Euler is of first order: 5 times the steps, a fifth of the error


@pytest.mark.parametrize(("solver", "order"), [(euler, 1), (heun, 2), (dpmpp_2m, 2), (unipc, 3)])
def test_solver_has_its_order(solver: Solver, order: int) -> None:
    mean, deviation = 0.4, 0.5
    x = start([1], 50).double()
    exact = mean + (x - mean) * deviation / math.sqrt(deviation**2 + 14.6**2)
    errors = []
    for n in (100, 200, 400):
        *_, last = solver(gaussian_denoiser(mean, deviation), x, geometric_sigmas(n), ())
        errors.append((last - exact).abs().max().item())
    shown = ", ".join(f"{error:.1e}" for error in errors)
    print(f"{solver.__name__}: error at n = 100, 200, 400: {shown}")
    for coarse, fine in pairwise(errors):
        assert 0.85 < math.log2(coarse / fine) / order < 1.15  # twice the steps, 2**order as near


def test_heun_equals_edm_algorithm_2_in_float64() -> None:
    n = 12
    levels = sigmas(n, NOISE)
    x = start([9], n).double()
    ours = list(heun(gaussian_denoiser(0.3, 0.5), x, levels))
    y, error = x[0].numpy(), 0.0

    def slope(y: np.ndarray, t: float) -> np.ndarray:
        d: np.ndarray = (y - (0.25 * y + t**2 * 0.3) / (0.25 + t**2)) / t
        return d

    for i in range(n):
        t, t_next = float(levels[i]), float(levels[i + 1])
        d = slope(y, t)
        y_euler = y + (t_next - t) * d
        y = y_euler if i == n - 1 else y + (t_next - t) * (0.5 * d + 0.5 * slope(y_euler, t_next))
        error = max(error, float(np.abs(ours[i][0].numpy() - y).max()))
    print(f"heun against float64: max error {error:.1e}")
    assert error < 1e-13


def test_ancestral_steps_equal_k_diffusion_in_float64() -> None:
    # sigma_up and sigma_down as they stand there, which is not how they stand here.
    n = 12
    levels = sigmas(n, NOISE)
    generators = image_generators([9])
    x = initial_noise(generators, SHAPE, float(levels[0])).double()
    ours = list(euler_ancestral(gaussian_denoiser(0.3, 0.5), x, levels, generators))
    generator = torch.Generator().manual_seed(9)
    torch.randn(SHAPE, generator=generator)
    y, error = x[0].numpy(), 0.0
    for i in range(n):
        t, t_next = float(levels[i]), float(levels[i + 1])
        up = min(t_next, (t_next**2 * (t**2 - t_next**2) / t**2) ** 0.5)
        down = (t_next**2 - up**2) ** 0.5
        y = y + (down - t) * (y - (0.25 * y + t**2 * 0.3) / (0.25 + t**2)) / t
        y = y + up * torch.randn(SHAPE, generator=generator).double().numpy()
        error = max(error, float(np.abs(ours[i][0].numpy() - y).max()))
    print(f"ancestral Euler against float64: max error {error:.1e}")
    assert error < 1e-12


@pytest.mark.parametrize("solver", [euler_ancestral, dpmpp_2m_sde])
@pytest.mark.parametrize("deviation", [1.0, 1e-2])
def test_stochastic_sampling_ends_in_the_distribution_of_the_data(solver: Solver, deviation: float) -> None:
    generators = image_generators(range(64))
    levels = geometric_sigmas(2000)
    x = initial_noise(generators, SHAPE, float(levels[0])).double()
    *_, last = solver(gaussian_denoiser(0.4, deviation), x, levels, generators)
    count = last.numel()
    mean, spread = last.mean().item(), last.std().item()
    print(f"{count} numbers of N(0.4, {deviation:g}^2): mean {mean:.4f}, deviation {spread:.4g}")
    assert abs(mean - 0.4) < 4 * deviation / math.sqrt(count)
    assert abs(spread / deviation - 1) < 4 / math.sqrt(2 * count) + 0.005  # chance, and finite steps


@pytest.mark.parametrize("n", [1, 2, 4, 8, 50])
def test_lcm_leaves_out_no_more_than_it_says(n: int) -> None:
    # Algorithm 3 in the paper's own variable, x / sqrt(1 + sigma^2), with its boundary condition, in float64.
    levels, t = sigmas(n, NOISE, lcm_timesteps), lcm_timesteps(n, NOISE).tolist()
    generators = image_generators([9])
    x = initial_noise(generators, SHAPE, float(levels[0])).double()
    network = epsilon_network()
    ours = list(lcm(network_denoiser(network), x, levels, generators))
    abar = 1 / (1 + discrete_sigmas(NOISE) ** 2)
    generator = torch.Generator().manual_seed(9)
    torch.randn(SHAPE, generator=generator)
    z, error = x * abar[t[0]].sqrt(), 0.0
    for i in range(n):
        a = abar[t[i]]
        x_0 = (z - (1 - a).sqrt() * network(z, torch.tensor([t[i]]))) / a.sqrt()
        c_skip = 0.25 / ((10 * t[i]) ** 2 + 0.25)
        c_out = 10 * t[i] / math.sqrt((10 * t[i]) ** 2 + 0.25)
        z, scale = c_skip * z + c_out * x_0, torch.tensor(1.0)
        if i < n - 1:
            a = abar[t[i + 1]]
            fresh = torch.randn(SHAPE, generator=generator).double()
            z, scale = a.sqrt() * z + (1 - a).sqrt() * fresh, a.sqrt()
        error = max(error, relative_error(ours[i] * scale, z))
    print(f"lcm at n = {n}, against the paper's formula in float64: max error / max {error:.1e}")
    assert error < (3e-7 if n <= 8 else 2e-5)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("n", [1, 1000])
def test_fewest_and_most_steps(solver: Solver, n: int) -> None:
    denoiser = network_denoiser(epsilon_network())
    latents = list(solver(denoiser, start([0], n), sigmas(n, NOISE), image_generators([1])))
    assert len(latents) == n
    assert torch.isfinite(latents[-1]).all()


@pytest.mark.parametrize("solver", SOLVERS)
def test_one_step_lands_on_the_denoised_latent(solver: Solver) -> None:
    x = start([0], 1)
    (last,) = solver(gaussian_denoiser(0.4, 1.0), x, sigmas(1, NOISE), image_generators([1]))
    error = (last - gaussian_denoiser(0.4, 1.0)(x, float(sigmas(1, NOISE)[0]), 0)).abs().max().item()
    print(f"{solver.__name__}: one step against D(x; sigma_0): max error {error:.1e}")
    assert error < 1e-5


def churned(denoiser: Denoiser, x: Tensor, sigmas: Tensor, generators: Sequence[torch.Generator]) -> Iterator[Tensor]:
    return churned_euler(denoiser, x, sigmas, generators, s_churn=3.0)


@pytest.mark.parametrize("solver", [*SOLVERS, churned])
def test_image_of_a_batch_equals_the_image_alone_bit_for_bit(solver: Solver) -> None:
    def run(seeds: list[int]) -> list[Tensor]:
        generators = image_generators(seeds)
        x = initial_noise(generators, SHAPE, 14.6)
        return [x, *solver(gaussian_denoiser(0.1, 0.5), x, sigmas(10, NOISE), generators)]

    together = run([11, 12, 13])
    for i in range(3):
        alone = run([11 + i])
        assert all(torch.equal(many[i], one[0]) for many, one in zip(together, alone, strict=True))


@pytest.mark.parametrize("solver", SOLVERS)
def test_only_stochastic_solvers_draw_noise_and_none_after_the_last_step(solver: Solver) -> None:
    def left(generator: torch.Generator) -> int:
        return int(torch.randint(2**31, (1,), generator=generator))

    (used,), (fresh,) = image_generators([3]), image_generators([3])
    for _ in solver(gaussian_denoiser(0.1, 0.5), start([0], 10), sigmas(10, NOISE), [used]):
        pass
    for _ in range(9 if solver in STOCHASTIC else 0):
        torch.randn(SHAPE, generator=fresh)
    assert left(used) == left(fresh)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_latents_keep_their_dtype_and_carry_no_gradient(solver: Solver, dtype: torch.dtype) -> None:
    weight = torch.ones((), requires_grad=True, dtype=dtype)
    x = start([0], 10).to(dtype)
    before = x.clone()
    latents = list(solver(lambda x, sigma, step: 0.5 * x * weight, x, sigmas(10, NOISE), image_generators([1])))
    assert torch.equal(x, before)
    assert all(latent.dtype == dtype and not latent.requires_grad for latent in latents)
    assert len({latent.data_ptr() for latent in latents}) == 10


@pytest.mark.parametrize("solver", [*STOCHASTIC, churned])
def test_a_generator_for_each_image_is_required(solver: Solver) -> None:
    with pytest.raises(ValueError, match=r"1 generators for 2 images"):
        next(solver(gaussian_denoiser(0.0, 1.0), start([0, 1], 10), sigmas(10, NOISE), image_generators([0])))


def test_bad_churn_is_refused() -> None:
    x, levels, denoiser = start([0, 1], 10), sigmas(10, NOISE), gaussian_denoiser(0.0, 1.0)
    for s_churn in (-1.0, math.nan):
        with pytest.raises(ValueError, match=rf"s_churn is {s_churn}, expected 0 or more"):
            next(churned_euler(denoiser, x, levels, image_generators([0, 1]), s_churn=s_churn))
