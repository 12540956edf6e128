"""Named samplings: whole trajectories against diffusers' schedulers, and how often they call the denoiser."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    LCMScheduler,
)
from torch import Tensor

from minisdxl.config import SDXL_BASE, SHAPES
from minisdxl.sampler import image_generators, initial_noise
from minisdxl.samplings import SAMPLINGS, Sampling, find_sampling
from minisdxl.settings import first_step
from tests.minisdxl.denoisers import NOISE, SHAPE, epsilon_network, network_denoiser, relative_error, start

PEERS: dict[str, Any] = {  # diffusers carries no types
    "euler": EulerDiscreteScheduler,
    "euler-ancestral": EulerAncestralDiscreteScheduler,
    "dpm++-2m": DPMSolverMultistepScheduler,
    "heun": HeunDiscreteScheduler,
    "turbo": EulerAncestralDiscreteScheduler,
    "lightning": EulerDiscreteScheduler,
    "lcm": LCMScheduler,
}
RUNS = [(name, n) for name in ("euler", "euler-ancestral", "dpm++-2m", "heun") for n in (1, 4, 10, 20, 25, 50)]
RUNS += [("turbo", n) for n in (1, 2, 3, 4)] + [("lightning", n) for n in (2, 4, 8)]
RUNS += [("lcm", n) for n in (1, 2, 4, 6, 8, 50)]

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # inside diffusers


def scheduler(name: str, n: int) -> Any:
    """The independent peer; LCM has a spacing of its own, and "trailing" equals the official spacing at these n."""
    settings = {} if name == "lcm" else {"timestep_spacing": "trailing"}
    peer = PEERS[name](beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, **settings)
    peer.set_timesteps(n)
    return peer


def peer_levels(peer: Any) -> Tensor:
    """Sigmas of a peer's steps and a final 0, in its own rounding."""
    if hasattr(peer, "sigmas"):
        levels: Tensor = torch.unique_consecutive(peer.sigmas)  # Heun's stand there twice
        return levels
    abar = peer.alphas_cumprod[peer.timesteps]
    return torch.cat([((1 - abar) / abar).sqrt(), torch.zeros(1)])


def own_scale(peer: Any, sigma: float) -> float:
    """What a peer has where we have x, data plus noise: the same, or x / sqrt(1 + sigma^2)."""
    return 1 / math.sqrt(1 + sigma**2) if peer.init_noise_sigma == 1 else 1.0


def peer_trajectory(
    peer: Any, network: Callable[[Tensor, Tensor], Tensor], y: Tensor, generators: list[torch.Generator], first: int = 0
) -> list[Tensor]:
    """x after each step of a peer, from number ``first`` on, that starts with ``y`` in its own scale."""
    drawn = {"generator": generators} if isinstance(peer, EulerAncestralDiscreteScheduler | LCMScheduler) else {}
    latents = []
    for t in peer.timesteps[first * peer.order :]:
        noise = network(peer.scale_model_input(y, t), t.expand(len(y)))
        y = peer.step(noise, t, y, **drawn).prev_sample
        latents.append(y)
    if peer.order == 2:  # two calls a step, but one in the last
        latents = [*latents[1::2], latents[-1]]
    sigmas = peer_levels(peer)[first + 1 :].tolist()
    return [latent / own_scale(peer, sigma) for latent, sigma in zip(latents, sigmas, strict=True)]


@pytest.mark.parametrize("scale", [1.0, 1e-2])
@pytest.mark.parametrize(("name", "n"), RUNS)
def test_trajectory_equals_diffusers(name: str, n: int, scale: float) -> None:
    sampling, peer, network = SAMPLINGS[name], scheduler(name, n), epsilon_network(scale)
    levels = sampling.sigmas(n, NOISE)
    spread = (levels[:-1] / peer_levels(peer)[:-1].double() - 1).abs().max().item()
    generators, theirs = image_generators([5, 6]), image_generators([5, 6])
    x = initial_noise(generators, SHAPE, float(levels[0]))
    initial_noise(theirs, SHAPE, float(levels[0]))
    ours = list(sampling.solver(network_denoiser(network), x, levels, generators))
    expected = peer_trajectory(peer, network, x * own_scale(peer, float(levels[0])), theirs)
    error = max(relative_error(a, b) for a, b in zip(ours, expected, strict=True))
    print(f"{name}, n = {n}, network x {scale:g}: max relative error of sigma {spread:.1e}, of x / max {error:.1e}")
    assert levels.shape == (n + 1,)
    assert levels[-1] == 0
    assert spread < 1e-5  # diffusers computes sigmas in fp32
    assert error < 1e-5


@pytest.mark.parametrize("n", [10, 25, 50])
def test_heun_equals_diffusers_in_float64(n: int) -> None:
    # Of the peers this one computes in the dtype it is given; with our sigmas only rounding is left.
    sampling, peer, network = SAMPLINGS["heun"], scheduler("heun", n), epsilon_network()
    levels = sampling.sigmas(n, NOISE)
    peer.sigmas = torch.cat([levels[:1], levels[1:-1].repeat_interleave(2), levels[-1:]])
    x = start([5, 6], n).double()
    ours = list(sampling.solver(network_denoiser(network), x, levels, []))
    error = max(relative_error(a, b) for a, b in zip(ours, peer_trajectory(peer, network, x, []), strict=True))
    print(f"heun, n = {n}, float64: max error / max {error:.1e}")
    assert error < 1e-13


@pytest.mark.parametrize(("name", "n"), [(name, 10) for name in PEERS] + [("turbo", 4), ("lcm", 4), ("heun", 4)])
def test_trajectory_from_a_picture_equals_diffusers(name: str, n: int) -> None:
    # The way of diffusers' image-to-image pipelines: get_timesteps, set_begin_index, add_noise, then the steps left.
    sampling, peer, network = SAMPLINGS[name], scheduler(name, n), epsilon_network()
    first = first_step(n, 0.6)
    generators, theirs = image_generators([5, 6]), image_generators([5, 6])
    latent = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(0))
    noise = initial_noise(generators, SHAPE, 0.0)
    initial_noise(theirs, SHAPE, 0.0)
    levels = sampling.sigmas(n, NOISE)[first:]
    x = latent + float(levels[0]) * noise
    ours = list(sampling.solver(network_denoiser(network), x, levels, generators))

    peer.set_begin_index(first * peer.order)
    y = peer.add_noise(latent, noise, peer.timesteps[first * peer.order].repeat(2))
    expected = peer_trajectory(peer, network, y, theirs, first)
    error = max(relative_error(a, b) for a, b in zip(ours, expected, strict=True))
    print(f"{name}, last {n - first} of {n} steps from a picture: max error / max {error:.1e}")
    assert len(ours) == n - first == int(n * 0.6)
    assert error < 1e-5


@pytest.mark.parametrize("name", SAMPLINGS)
@pytest.mark.parametrize("n", [1, 2, 7])
def test_calls_are_those_that_are_made(name: str, n: int) -> None:
    made = [0] * n

    def denoiser(x: Tensor, sigma: float, step: int) -> Tensor:
        made[step] += 1
        return 0.5 * x

    sampling = SAMPLINGS[name]
    list(sampling.solver(denoiser, start([0], 10), sampling.sigmas(n, NOISE), image_generators([0])))
    print(f"{name}: {sum(made)} calls in {n} steps")
    assert sampling.calls(n) == made


def test_few_step_samplings_ask_for_what_their_model_cards_say() -> None:
    asked = {name: (s.steps, s.cfg, s.size) for name, s in SAMPLINGS.items()}
    assert asked["turbo"] == (1, 1.0, 512)
    assert asked["lightning"] == (4, 1.0, None)
    assert asked["lcm"] == (4, 1.0, None)
    assert asked["euler"] == (50, None, None)
    assert SAMPLINGS["turbo"].picture_size(SDXL_BASE, None) == (512, 512)
    assert SAMPLINGS["turbo"].picture_size(SDXL_BASE, (768, 640)) == (768, 640)
    assert SAMPLINGS["lcm"].picture_size(SDXL_BASE, None) == (1024, 1024)
    assert SAMPLINGS["euler"].picture_size(SHAPES, None) == (256, 256)


def test_names() -> None:
    assert list(SAMPLINGS) == list(PEERS)
    assert all(find_sampling(name).name == name for name in SAMPLINGS)
    with pytest.raises(ValueError, match=r"unknown sampling 'ddim', expected one of euler, .*, lcm"):
        find_sampling("ddim")


def test_numbers_out_of_range_are_refused() -> None:
    euler = SAMPLINGS["euler"]
    with pytest.raises(ValueError, match="steps of sampling none is 0, expected 1 or more"):
        Sampling("none", "", euler.solver, euler.spacing, steps=0, cfg=1.0)
    with pytest.raises(ValueError, match="calls_per_step of sampling none is 0, expected 1 or more"):
        Sampling("none", "", euler.solver, euler.spacing, steps=1, cfg=1.0, calls_per_step=0)
