"""Named samplings: whole trajectories against diffusers' schedulers, and how often they call the denoiser."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    LCMScheduler,
    TCDScheduler,
    UniPCMultistepScheduler,
)
from torch import Tensor

from minisdxl.config import SDXL_BASE, SHAPES
from minisdxl.preconditioning import discrete_sigmas
from minisdxl.sampler import image_generators, initial_noise
from minisdxl.samplings import LEVELS, SAMPLINGS, Sampling, find_sampling
from minisdxl.settings import first_step
from tests.minisdxl.denoisers import NOISE, SHAPE, epsilon_network, network_denoiser, relative_error, start

PEERS: dict[str, Any] = {  # diffusers carries no types
    "euler": EulerDiscreteScheduler,
    "euler-ancestral": EulerAncestralDiscreteScheduler,
    "dpm++-2m": DPMSolverMultistepScheduler,
    "dpm++-2m-sde": partial(DPMSolverMultistepScheduler, algorithm_type="sde-dpmsolver++"),
    "unipc": UniPCMultistepScheduler,
    "heun": HeunDiscreteScheduler,
    "ddim": partial(DDIMScheduler, clip_sample=False, steps_offset=1),
    "turbo": EulerAncestralDiscreteScheduler,
    "lightning": EulerDiscreteScheduler,
    "lcm": LCMScheduler,
    "tcd": TCDScheduler,
}
GENERAL = ("euler", "euler-ancestral", "dpm++-2m", "dpm++-2m-sde", "unipc", "heun")
RUNS = [(name, n) for name in GENERAL for n in (1, 4, 10, 20, 25, 50)]
RUNS += [(f"{name}-{levels}", n) for name in GENERAL for levels in LEVELS for n in (1, 5, 10, 25)]
RUNS += [("ddim", n) for n in (1, 4, 10, 20, 25, 50)]
RUNS += [("turbo", n) for n in (1, 2, 3, 4)] + [("lightning", n) for n in (2, 4, 8)]
RUNS += [(name, n) for name in ("lcm", "tcd") for n in (1, 2, 4, 6, 8, 50)]

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # inside diffusers


def scheduler(name: str, n: int) -> Any:
    """The independent peer; "trailing" equals the official spacing at these n, and some have a spacing of their own."""
    base = next((name.removesuffix(f"-{levels}") for levels in LEVELS if name.endswith(levels)), name)
    settings: dict[str, Any] = {} if name in ("lcm", "tcd", "ddim") else {"timestep_spacing": "trailing"}
    if base != name:
        # From the highest noise level to the lowest also where diffusers takes both from the steps.
        settings = {
            "timestep_spacing": "linspace" if n > 1 else "trailing",
            f"use_{name.removeprefix(base + '-')}_sigmas": True,
        }
    kind, noise = PEERS[base], {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
    if base != name and base == "euler-ancestral":  # which has no such setting: with the noise levels of Euler's
        peer, levels = kind(**noise), scheduler(name.replace("-ancestral", ""), n)
        peer.set_timesteps(n)
        peer.sigmas, peer.timesteps = levels.sigmas, levels.timesteps
        return peer
    peer = kind(**noise, **settings)
    if name == "tcd":
        peer.alphas_cumprod[0] = 1.0  # it ends at this level; no step but the last comes near it
    peer.set_timesteps(n)
    if base != name:
        # Of noise levels between timesteps, Euler's and Heun's take fractions of a timestep, the others the nearest at
        # Karras levels and the next lower at exponential ones. Ours are the nearest always.
        log_sigmas = ((1 - peer.alphas_cumprod) / peer.alphas_cumprod).sqrt().log().numpy()
        nearest = torch.tensor(
            [float(peer._sigma_to_t(sigma, log_sigmas).round()) for sigma in peer.sigmas[:-1].numpy()]
        )
        if "karras" in name and base not in ("euler", "heun"):
            assert torch.equal(nearest, peer.timesteps.float())
        peer.timesteps = nearest.to(peer.timesteps.dtype)
    return peer


def peer_levels(peer: Any) -> Tensor:
    """Sigmas of a peer's steps and a final 0, in its own rounding."""
    if hasattr(peer, "sigmas"):
        levels: Tensor = torch.unique_consecutive(peer.sigmas)  # Heun's stand there twice
        return levels
    abar = peer.alphas_cumprod[peer.timesteps]  # of DDIM, LCM and TCD
    return torch.cat([((1 - abar) / abar).sqrt(), torch.zeros(1)])


def own_scale(peer: Any, sigma: float) -> float:
    """What a peer has where we have x, data plus noise: the same, or x / sqrt(1 + sigma^2)."""
    return 1 / math.sqrt(1 + sigma**2) if peer.init_noise_sigma == 1 else 1.0


def peer_trajectory(
    peer: Any, network: Callable[[Tensor, Tensor], Tensor], y: Tensor, generators: list[torch.Generator], first: int = 0
) -> list[Tensor]:
    """x after each step of a peer, from number ``first`` on, that starts with ``y`` in its own scale."""
    stochastic = isinstance(peer, EulerAncestralDiscreteScheduler | LCMScheduler | TCDScheduler)
    stochastic |= peer.config.get("algorithm_type") == "sde-dpmsolver++"
    drawn = {"generator": generators} if stochastic else {}
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
    sampling, peer, network = find_sampling(name), scheduler(name, n), epsilon_network(scale)
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
    assert spread < 2e-5  # diffusers computes sigmas in fp32: the lowest, of 1 - alpha = 0.00085, is 1.3e-5 off
    assert error < (1e-5 if name in SAMPLINGS else 2e-5)


@pytest.mark.parametrize("name", ["heun", "heun-karras", "heun-exponential"])
@pytest.mark.parametrize("n", [10, 25, 50])
def test_heun_equals_diffusers_in_float64(name: str, n: int) -> None:
    # Of the peers this one computes in the dtype it is given; with our sigmas only rounding is left.
    sampling, peer, network = find_sampling(name), scheduler(name, n), epsilon_network()
    levels = sampling.sigmas(n, NOISE)
    peer.sigmas = torch.cat([levels[:1], levels[1:-1].repeat_interleave(2), levels[-1:]])
    x = start([5, 6], n).double()
    ours = list(sampling.solver(network_denoiser(network), x, levels, []))
    error = max(relative_error(a, b) for a, b in zip(ours, peer_trajectory(peer, network, x, []), strict=True))
    print(f"{name}, n = {n}, float64: max error / max {error:.1e}")
    assert error < 1e-13


@pytest.mark.parametrize("name", ["unipc", "unipc-karras", "ddim", "tcd"])
@pytest.mark.parametrize("n", [2, 10, 50])
def test_other_solvers_equal_diffusers_in_float64(monkeypatch: pytest.MonkeyPatch, name: str, n: int) -> None:
    # These compute in the dtype of their noise levels too. TCD's would draw its noise in float64, which is other noise.
    def drawn(shape: torch.Size, generator: list[torch.Generator], dtype: torch.dtype, **_: Any) -> Tensor:
        return torch.stack([torch.randn(shape[1:], generator=each) for each in generator]).to(dtype)

    monkeypatch.setattr("diffusers.schedulers.scheduling_tcd.randn_tensor", drawn)
    sampling, peer, network = find_sampling(name), scheduler(name, n), epsilon_network()
    levels = sampling.sigmas(n, NOISE)
    if hasattr(peer, "sigmas"):
        peer.sigmas = levels
    else:
        peer.alphas_cumprod = torch.where(peer.alphas_cumprod == 1, 1.0, 1 / (1 + discrete_sigmas(NOISE) ** 2))
    generators, theirs = image_generators([5, 6]), image_generators([5, 6])
    x = initial_noise(generators, SHAPE, float(levels[0])).double()
    initial_noise(theirs, SHAPE, float(levels[0]))
    ours = list(sampling.solver(network_denoiser(network), x, levels, generators))
    expected = peer_trajectory(peer, network, x * own_scale(peer, float(levels[0])), theirs)
    error = max(relative_error(a, b) for a, b in zip(ours, expected, strict=True))
    print(f"{name}, n = {n}, float64: max error / max {error:.1e}")
    assert error < 1e-12


@pytest.mark.parametrize(("name", "n"), [(name, 10) for name in PEERS] + [("turbo", 4), ("lcm", 4), ("heun", 4)])
def test_trajectory_from_a_picture_equals_diffusers(name: str, n: int) -> None:
    # The way of diffusers' image-to-image pipelines: get_timesteps, set_begin_index, add_noise, then the steps left.
    sampling, peer, network = find_sampling(name), scheduler(name, n), epsilon_network()
    first = first_step(n, 0.6)
    generators, theirs = image_generators([5, 6]), image_generators([5, 6])
    latent = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(0))
    noise = initial_noise(generators, SHAPE, 0.0)
    initial_noise(theirs, SHAPE, 0.0)
    levels = sampling.sigmas(n, NOISE)[first:]
    x = latent + float(levels[0]) * noise
    ours = list(sampling.solver(network_denoiser(network), x, levels, generators))

    if hasattr(peer, "set_begin_index"):  # DDIM's steps know where they are by the timestep
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
    assert all(find_sampling(name) is sampling for name, sampling in SAMPLINGS.items())
    for name in ("ddpm", "", "karras", "dpm++", "euler karras exponential"):
        with pytest.raises(ValueError, match=rf"unknown sampling '{re.escape(name)}', expected one of euler, .*, tcd"):
            find_sampling(name)


@pytest.mark.parametrize(
    ("written", "name"),
    [
        ("DPM++ 2M Karras", "dpm++-2m-karras"),
        ("DPM++ 2M SDE Karras", "dpm++-2m-sde-karras"),
        ("DPM++ 2M SDE Exponential", "dpm++-2m-sde-exponential"),
        ("dpmpp_2m", "dpm++-2m"),
        ("dpmpp_2m_sde", "dpm++-2m-sde"),
        ("Euler a", "euler-ancestral"),
        ("euler_ancestral", "euler-ancestral"),
        ("k_euler_a", "euler-ancestral"),
        ("Euler A Karras", "euler-ancestral-karras"),
        ("EULER", "euler"),
        ("Heun", "heun"),
        ("UniPC", "unipc"),
        ("uni_pc", "unipc"),
        ("DDIM", "ddim"),
        ("LCM", "lcm"),
    ],
)
def test_names_as_people_write_them(written: str, name: str) -> None:
    found = find_sampling(written)
    assert found.name == name
    assert find_sampling(found.name) == found


def test_noise_levels_of_distilled_models_stay() -> None:
    for name in ("turbo", "lightning", "lcm", "tcd"):
        with pytest.raises(
            ValueError, match=rf"'{name} Karras' has other noise levels .* distilled at, expected {name}"
        ):
            find_sampling(f"{name} Karras")
    with pytest.raises(ValueError, match="noise level 14 is none of SDXL's, which TCD was distilled at"):
        list(
            SAMPLINGS["tcd"].solver(
                lambda x, *_: x, start([0], 1), torch.tensor([14.6, 14.0, 0]), image_generators([0])
            )
        )


@pytest.mark.parametrize("n", [0, 1001])
@pytest.mark.parametrize("name", ["ddim", "euler-karras", "euler-exponential"])
def test_numbers_of_steps_out_of_range_are_refused(name: str, n: int) -> None:
    with pytest.raises(ValueError, match=f"steps is {n}, expected 1 to 1000"):
        find_sampling(name).sigmas(n, NOISE)


@pytest.mark.parametrize("name", ["euler", "ddim", "euler-karras", "euler-exponential"])
def test_noise_levels_descend_at_every_number_of_steps(name: str) -> None:
    for n in (1, 2, 3, 500, 501, 998, 999, 1000):
        levels = find_sampling(name).sigmas(n, NOISE)
        assert levels.dtype == torch.float64
        assert levels.shape == (n + 1,)
        assert levels.diff().max() < 0
        assert levels[-1] == 0


def test_numbers_out_of_range_are_refused() -> None:
    euler = SAMPLINGS["euler"]
    with pytest.raises(ValueError, match="steps of sampling none is 0, expected 1 or more"):
        Sampling("none", "", euler.solver, euler.sigmas, steps=0, cfg=1.0)
    with pytest.raises(ValueError, match="calls_per_step of sampling none is 0, expected 1 or more"):
        Sampling("none", "", euler.solver, euler.sigmas, steps=1, cfg=1.0, calls_per_step=0)
