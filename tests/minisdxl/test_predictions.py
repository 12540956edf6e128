"""Samplings of models that predict something else than noise: whole trajectories against diffusers' schedulers."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EDMDPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
    LCMScheduler,
    TCDScheduler,
    UniPCMultistepScheduler,
)
from torch import Tensor

from minisdxl.config import NoiseConfig
from minisdxl.preconditioning import preconditioner
from minisdxl.sampler import euler, image_generators, initial_noise
from minisdxl.samplings import SAMPLINGS, find_sampling
from minisdxl.settings import Settings, check_settings, first_step
from tests.minisdxl.denoisers import SHAPE, epsilon_network, network_denoiser, relative_error
from tests.minisdxl.tiny import TINY

V, ZERO_SNR = (NoiseConfig(prediction="v", zero_terminal_snr=zero) for zero in (False, True))
EDM = NoiseConfig(prediction="edm", sigma_min=0.002, sigma_max=80.0)
EDM_V = NoiseConfig(prediction="edm-v", sigma_min=0.002, sigma_max=120.0)
FLOW = NoiseConfig(prediction="flow")
SHIFTED = replace(FLOW, shift=3.0)
NOISES = {"v": V, "v, zero terminal SNR": ZERO_SNR, "edm": EDM, "edm-v": EDM_V, "flow": FLOW, "flow, shifted": SHIFTED}

BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
PLAYGROUND = {"sigma_data": 0.5, "sigma_max": 80.0}
COSXL = {"sigma_data": 1.0, "sigma_max": 120.0, "prediction_type": "v_prediction"}
FLOWING = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
ZERO = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
VELOCITY = {"prediction_type": "v_prediction"}

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # inside diffusers

Peer = Callable[..., Any]  # diffusers carries no types
# A sampling, the model, and the scheduler that does the same.
RUNS: dict[str, tuple[str, str, Peer]] = {
    "v": ("euler", "v", partial(EulerDiscreteScheduler, **BETAS, **VELOCITY)),
    "zero SNR": ("euler", "v, zero terminal SNR", partial(EulerDiscreteScheduler, **BETAS, **ZERO)),
    "zero SNR, 2M": ("dpm++-2m", "v, zero terminal SNR", partial(DPMSolverMultistepScheduler, **BETAS, **ZERO)),
    "zero SNR, 2M SDE": (
        "dpm++-2m-sde",
        "v, zero terminal SNR",
        partial(DPMSolverMultistepScheduler, algorithm_type="sde-dpmsolver++", **BETAS, **ZERO),
    ),
    "zero SNR, UniPC": ("unipc", "v, zero terminal SNR", partial(UniPCMultistepScheduler, **BETAS, **ZERO)),
    "zero SNR, a": (
        "euler-ancestral",
        "v, zero terminal SNR",
        partial(EulerAncestralDiscreteScheduler, **BETAS, **ZERO),
    ),
    "zero SNR, turbo": ("turbo", "v, zero terminal SNR", partial(EulerAncestralDiscreteScheduler, **BETAS, **ZERO)),
    "zero SNR, lightning": ("lightning", "v, zero terminal SNR", partial(EulerDiscreteScheduler, **BETAS, **ZERO)),
    "zero SNR, DDIM": ("ddim", "v, zero terminal SNR", partial(DDIMScheduler, clip_sample=False, **BETAS, **ZERO)),
    "zero SNR, LCM": ("lcm", "v, zero terminal SNR", partial(LCMScheduler, **BETAS, **ZERO)),
    "zero SNR, Karras": (
        "euler-karras",
        "v, zero terminal SNR",
        partial(EulerDiscreteScheduler, use_karras_sigmas=True, **BETAS, **ZERO),
    ),
    "v, DDIM": ("ddim", "v", partial(DDIMScheduler, clip_sample=False, steps_offset=1, **BETAS, **VELOCITY)),
    "v, LCM": ("lcm", "v", partial(LCMScheduler, **BETAS, **VELOCITY)),
    "v, TCD": ("tcd", "v", partial(TCDScheduler, **BETAS, **VELOCITY)),
    "v, Heun": ("heun", "v", partial(HeunDiscreteScheduler, **BETAS, **VELOCITY)),
    "Playground": ("euler", "edm", partial(EDMEulerScheduler, **PLAYGROUND)),
    "Playground, 2M": ("dpm++-2m", "edm", partial(EDMDPMSolverMultistepScheduler, **PLAYGROUND)),
    "Playground, exponential": (
        "dpm++-2m-exponential",
        "edm",
        partial(EDMDPMSolverMultistepScheduler, sigma_schedule="exponential", **PLAYGROUND),
    ),
    "CosXL": ("euler", "edm-v", partial(EDMEulerScheduler, sigma_schedule="exponential", **COSXL)),
    "CosXL, Karras": ("euler-karras", "edm-v", partial(EDMEulerScheduler, **COSXL)),
    "CosXL, 2M": ("dpm++-2m", "edm-v", partial(EDMDPMSolverMultistepScheduler, sigma_schedule="exponential", **COSXL)),
    "flow": ("euler", "flow", FlowMatchEulerDiscreteScheduler),
    "flow, shifted": ("euler", "flow, shifted", partial(FlowMatchEulerDiscreteScheduler, shift=3.0)),
    "flow, Karras": ("euler-karras", "flow", partial(FlowMatchEulerDiscreteScheduler, use_karras_sigmas=True)),
    "flow, exponential": (
        "euler-exponential",
        "flow",
        partial(FlowMatchEulerDiscreteScheduler, use_exponential_sigmas=True),
    ),
    "flow, 2M": ("dpm++-2m", "flow", partial(DPMSolverMultistepScheduler, **FLOWING)),
    "flow, UniPC": ("unipc", "flow", partial(UniPCMultistepScheduler, **FLOWING)),
}
STOCHASTIC = ("a", "turbo", "LCM", "TCD", "2M SDE")


def scheduler(run: str, n: int) -> Any:
    """The peer of a run with its own steps."""
    peer = RUNS[run][2]()
    if "timestep_spacing" in peer.config and "DDIM" not in run:
        # Karras levels go from the highest to the lowest, also where diffusers takes both from the steps.
        spacing = "linspace" if "Karras" in run else "trailing"
        peer = type(peer).from_config(peer.config, timestep_spacing=spacing)
    if run == "zero SNR, DDIM":
        peer = type(peer).from_config(peer.config, timestep_spacing="trailing")
    if run in ("zero SNR, DDIM", "zero SNR, LCM"):
        peer.alphas_cumprod[-1] = 2.0**-24  # as in the other schedulers; these have 0
    if run == "v, TCD":
        peer.alphas_cumprod[0] = 1.0  # it ends at this level; no step but the last comes near it
    if run in ("flow", "flow, shifted"):
        peer.set_timesteps(sigmas=np.linspace(1, 1 / n, n))  # the steps of diffusers' pipelines for flows
    else:
        peer.set_timesteps(n)
    return peer


def own_scale(peer: Any, noise: NoiseConfig, sigma: float) -> float:
    """What a peer has where we have x, data plus noise: the same, or a multiple."""
    if noise.prediction == "flow":
        return 1 / (1 + sigma)
    alone = isinstance(peer, EDMEulerScheduler | EDMDPMSolverMultistepScheduler) or peer.init_noise_sigma != 1
    return 1.0 if alone else 1 / math.sqrt(1 + sigma**2)


def put_levels(run: str, peer: Any, levels: Tensor) -> float:
    """Gives a peer our noise levels, so that only rounding is left, and returns how far its own were from them."""
    noise = NOISES[RUNS[run][1]]
    ours = (levels / (1 + levels) if noise.prediction == "flow" else levels).float()
    told = torch.tensor([preconditioner(noise)(sigma).c_noise for sigma in levels[:-1].tolist()])
    if not hasattr(peer, "sigmas"):  # of DDIM, LCM and TCD
        abar = peer.alphas_cumprod[peer.timesteps]
        assert torch.equal(told, peer.timesteps)
        return (ours[:-1] / ((1 - abar) / abar).sqrt() - 1).abs().max().item()
    repeated = torch.cat([torch.arange(len(ours))[:1], torch.arange(len(ours))[1:].repeat_interleave(2)[:-1]])
    places = repeated if peer.order == 2 else torch.arange(len(ours))
    spread = (ours[places][:-1] / peer.sigmas[:-1] - 1).abs().max().item()
    if "Karras" not in run and noise.prediction != "flow":  # Karras levels have fractions of timesteps in Euler's
        assert (told[places[:-1]] - peer.timesteps).abs().max() < 1e-5
    peer.sigmas = ours[places]
    peer.timesteps = told[places[:-1]].to(torch.float32 if "Euler" in type(peer).__name__ else told.dtype)
    return spread


def trajectories(
    run: str, n: int, first: int = 0, picture: Tensor | None = None
) -> tuple[list[Tensor], list[Tensor], float]:
    """x after each step, ours and the peer's, and how far apart their noise levels were."""
    name, model, _ = RUNS[run]
    noise, sampling, peer = NOISES[model], find_sampling(name), scheduler(run, n)
    levels, network = sampling.sigmas(n, noise), epsilon_network()
    spread = put_levels(run, peer, levels)
    generators, theirs = image_generators([5, 6]), image_generators([5, 6])
    levels = levels[first:]
    x = initial_noise(generators, SHAPE, float(levels[0]) if picture is None else 0.0)
    initial_noise(theirs, SHAPE, 0.0)
    if picture is not None:
        x = picture + float(levels[0]) * x
    ours = list(sampling.solver(network_denoiser(network, noise), x, levels, generators))
    y, latents = x * own_scale(peer, noise, float(levels[0])), []
    drawn = {"generator": theirs} if run.rpartition(", ")[2] in STOCHASTIC else {}
    if hasattr(peer, "set_begin_index"):
        peer.set_begin_index(first * peer.order)
    for t in peer.timesteps[first * peer.order :]:
        scaled = peer.scale_model_input(y, t) if hasattr(peer, "scale_model_input") else y
        y = peer.step(network(scaled, t.expand(len(y))), t, y, **drawn).prev_sample
        latents.append(y)
    if peer.order == 2:
        latents = [*latents[1::2], latents[-1]]
    return (
        ours,
        [y / own_scale(peer, noise, sigma) for y, sigma in zip(latents, levels[1:].tolist(), strict=True)],
        spread,
    )


@pytest.mark.parametrize("n", [2, 4, 20])
@pytest.mark.parametrize("run", RUNS)
def test_trajectory_equals_diffusers(run: str, n: int) -> None:
    ours, theirs, spread = trajectories(run, n)
    error = max(relative_error(a, b) for a, b in zip(ours, theirs, strict=True))
    print(f"{run}, n = {n}: max relative error of sigma {spread:.1e}, of x / max {error:.1e}")
    assert len(ours) == n
    name, model, _ = RUNS[run]
    if run not in ("flow, 2M", "flow, UniPC"):  # which have other steps
        assert spread < (2.5e-4 if model.startswith("flow") else 3e-5)  # the largest t is 1 - 1 / 4096, not 1
    # In fp32, Euler's step from a latent with noise of 4096 is off by 2.4e-4. These peers have no such large numbers.
    alone = run == "zero SNR, DDIM" or (model.startswith("flow") and find_sampling(name).solver is euler)
    assert error < (5e-4 if alone else 1e-5)


@pytest.mark.parametrize("run", ["zero SNR", "zero SNR, 2M", "v, Heun", "Playground, 2M", "CosXL", "flow, shifted"])
def test_trajectory_from_a_picture_equals_diffusers(run: str) -> None:
    n = 10
    latent = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(0))
    first = first_step(n, 0.6)
    ours, theirs, _ = trajectories(run, n, first, latent)
    error = max(relative_error(a, b) for a, b in zip(ours, theirs, strict=True))
    print(f"{run}, last {n - first} of {n} steps from a picture: max error / max {error:.1e}")
    assert len(ours) == n - first == 6
    assert error < 1e-5


def test_the_mixture_of_a_picture_and_noise_is_that_of_diffusers() -> None:
    """What a U-Net sees first of a picture, with the noise that schedulers add to it."""
    latent, unit = (torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    for run in ("zero SNR", "Playground", "CosXL", "flow, shifted"):
        noise, peer = NOISES[RUNS[run][1]], scheduler(run, 10)
        sigma = float(find_sampling(RUNS[run][0]).sigmas(10, noise)[4])
        time = peer.timesteps[4].repeat(2)
        if hasattr(peer, "scale_noise"):
            theirs = peer.scale_noise(latent, time, unit)
        else:
            peer.set_begin_index(4)
            theirs = peer.scale_model_input(peer.add_noise(latent, unit, time), peer.timesteps[4])
        error = relative_error(preconditioner(noise)(sigma).c_in * (latent + sigma * unit), theirs)
        print(f"{run}: max error / max {error:.1e}")
        assert error < 1e-5


SDXL_ONLY = ("ddim", "turbo", "lightning", "lcm", "tcd")


@pytest.mark.parametrize("name", [*SAMPLINGS, "euler-karras", "unipc-exponential"])
def test_each_sampling_fits_a_model_or_is_refused_in_one_line(name: str) -> None:
    for model, noise in NOISES.items():
        config = replace(TINY, noise=noise)
        refused = (name in SDXL_ONLY and noise.prediction not in ("noise", "v")) or (
            name == "tcd" and noise == ZERO_SNR
        )
        if refused:
            with pytest.raises(
                ValueError, match=rf"^sampling '{name}' .*; expected .*euler, euler-ancestral, "
            ) as caught:
                check_settings(Settings(sampling=name, steps=4), config)
            print(f"{model}: {caught.value}")
            continue
        levels = check_settings(Settings(sampling=name, steps=4), config).sigmas
        assert levels.shape == (5,)
        assert levels.diff().max() < 0
        assert levels[-1] == 0
        assert levels.isfinite().all()
        if noise == ZERO_SNR:
            assert levels[0] > 4095  # it starts from noise alone


@pytest.mark.parametrize("n", [0, 1001])
@pytest.mark.parametrize("noise", [EDM, EDM_V, FLOW], ids=lambda noise: noise.prediction)
def test_numbers_of_steps_out_of_range_are_refused(noise: NoiseConfig, n: int) -> None:
    with pytest.raises(ValueError, match=f"steps is {n}, expected 1 to 1000"):
        SAMPLINGS["euler"].sigmas(n, noise)
