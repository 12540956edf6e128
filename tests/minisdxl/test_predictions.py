"""Samplings of models that predict something else than noise: whole trajectories against diffusers' schedulers."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
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
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLPipeline,
    TCDScheduler,
    UniPCMultistepScheduler,
)
from PIL import Image
from torch import Tensor

import minisdxl
from atedm import parse_preset
from minisdxl.checkpoint.modules import save
from minisdxl.config import ModelConfig, NoiseConfig
from minisdxl.convert import main as convert
from minisdxl.diffusers import TokenUNet
from minisdxl.flops import main as flops
from minisdxl.pipeline import SDXL
from minisdxl.preconditioning import preconditioner
from minisdxl.sample import main as sample
from minisdxl.sampler import euler, image_generators, initial_noise
from minisdxl.samplings import SAMPLINGS, find_sampling
from minisdxl.settings import Settings, check_settings, first_step
from tests.minisdxl.denoisers import SHAPE, epsilon_network, network_denoiser, relative_error
from tests.minisdxl.peers import diffusers_unet
from tests.minisdxl.tiny import SMALL_UNET, TINY, VOCABULARY, random_unet, tiny_modules, unet_inputs

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


PROMPT = "a small red circle above a big blue square on a white background"
MEAN, STD = (-0.3, 0.2, 0.1, -0.5), (1.5, 0.7, 1.2, 0.9)  # of the tiny VAE's latents, in place of Playground's
WHOLE: dict[str, tuple[ModelConfig, str, Any]] = {
    "v, zero terminal SNR": (replace(TINY, noise=ZERO_SNR), "euler", None),
    "Playground": (
        replace(TINY, noise=EDM, vae=replace(TINY.vae, latents_mean=MEAN, latents_std=STD)),
        "dpm++-2m",
        EDMDPMSolverMultistepScheduler,
    ),
    "CosXL": (replace(TINY, noise=EDM_V), "euler", None),
}


class FlowScheduler(FlowMatchEulerDiscreteScheduler):  # type: ignore[misc]
    """The peer with what SDXL's pipelines ask of a scheduler and this one has not."""

    init_noise_sigma = 1.0

    def scale_model_input(self, sample: Tensor, *_: Any) -> Tensor:
        """The sample: a flow's network sees the mixture itself."""
        return sample


@torch.no_grad()
def our_picture(weights: Path, sampling: str, **settings: Any) -> tuple[np.ndarray, SDXL]:
    """In [0, 1], (H, W, 3), not rounded."""
    sdxl = minisdxl.load(weights, tokenizer=VOCABULARY)
    latents: list[Tensor] = []
    asked = {"sampling": sampling, "steps": 5, "cfg": 3.0, "seed": 3, **settings}
    sdxl.generate([PROMPT], on_step=lambda _, x: latents.append(x), **asked)
    picture = sdxl.vae.decode(latents[-1])[0].add(1).div(2).clamp(0, 1)
    return picture.permute(1, 2, 0).double().numpy(), sdxl


def assert_same_pictures(name: str, ours: np.ndarray, theirs: np.ndarray, tolerance: float) -> None:
    """Both show something, and the same."""
    error = np.abs(ours - theirs)
    print(f"{name}: picture, in [0, 1]: max error {error.max():.1e}, mean {error.mean():.1e}, std {theirs.std():.2f}")
    assert error.max() < tolerance
    assert theirs.std() > 0.05, "the picture shows nothing that could differ"


@pytest.mark.parametrize("name", [*WHOLE, "flow"])
def test_diffusers_makes_the_same_picture_of_the_folder(tmp_path: Path, name: str) -> None:
    config, sampling, kind = WHOLE.get(name, (replace(TINY, noise=SHIFTED), "euler", FlowScheduler))
    single, folder = tmp_path / "model.safetensors", tmp_path / "tiny"
    save(single, config, tiny_modules(), torch.float32)
    convert([str(single), str(folder), "--tokenizer", str(VOCABULARY)])
    pipeline: Any = StableDiffusionXLPipeline.from_pretrained(folder, add_watermarker=False)
    pipeline.set_progress_bar_config(disable=True)
    if kind is not None:
        pipeline.scheduler = kind.from_config(pipeline.scheduler.config)
    steps, flow = 5, config.noise == SHIFTED
    asked = {"sigmas": np.linspace(1, 1 / steps, steps)} if flow else {"num_inference_steps": steps}
    pipeline.scheduler.set_timesteps(**asked)
    noise = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(3))
    sigma = float(pipeline.scheduler.sigmas[0])
    latents = noise if flow else noise * math.sqrt(1 + sigma**2) / pipeline.scheduler.init_noise_sigma
    theirs = pipeline(PROMPT, guidance_scale=3.0, latents=latents, output_type="np", **asked).images[0]
    ours, _ = our_picture(single, sampling)
    # From noise alone fp32 rounds by 2.4e-4, both here and there or, in a flow, here only.
    tolerance = {"flow": 2e-3, "v, zero terminal SNR": 5e-4}.get(name, 1e-4)
    assert_same_pictures(name, ours, np.asarray(theirs, dtype=np.float64), tolerance)


def test_diffusers_makes_the_same_picture_from_a_picture(tmp_path: Path) -> None:
    """Playground's latents on the way in and out."""
    config, _, _ = WHOLE["Playground"]
    single, folder = tmp_path / "model.safetensors", tmp_path / "tiny"
    save(single, config, tiny_modules(), torch.float32)
    convert([str(single), str(folder), "--tokenizer", str(VOCABULARY)])
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8))
    ours, sdxl = our_picture(single, "euler", image=image, strength=0.4)
    pipeline: Any = StableDiffusionXLImg2ImgPipeline.from_pretrained(folder, add_watermarker=False)
    pipeline.set_progress_bar_config(disable=True)
    pixels = torch.tensor(np.asarray(image)).permute(2, 0, 1)[None].float() / 127.5 - 1
    moments = pipeline.vae.encode(pixels).latent_dist
    mean, std = (torch.tensor(values).view(1, 4, 1, 1) for values in (MEAN, STD))
    clean = (moments.mean - mean) * pipeline.vae.config.scaling_factor / std
    print(f"encoded: max error {(sdxl.vae.encode(pixels) - clean).abs().max():.1e}")
    assert relative_error(sdxl.vae.encode(pixels), clean) < 1e-5
    pipeline.scheduler.set_timesteps(5)
    pipeline.scheduler.set_begin_index(3)
    noise = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(3))
    latents = pipeline.scheduler.add_noise(clean, noise, pipeline.scheduler.timesteps[3:4])
    pipeline.scheduler = EDMEulerScheduler.from_config(pipeline.scheduler.config)
    theirs = pipeline(
        PROMPT,
        image=pixels,
        strength=0.4,
        num_inference_steps=5,
        guidance_scale=3.0,
        latents=latents,
        output_type="np",
        original_size=(64, 64),
        target_size=(64, 64),
    ).images[0]
    assert_same_pictures("Playground from a picture", ours, np.asarray(theirs, dtype=np.float64), 1e-4)


def test_token_plans_in_diffusers_do_not_depend_on_the_prediction(tmp_path: Path) -> None:
    """``TokenUNet`` with schedulers whose timesteps are no whole numbers."""
    unet: Any = diffusers_unet(random_unet(SMALL_UNET, torch.float32), size_channels=4)
    x, _, context, vector = unet_inputs(SMALL_UNET, (16, 16), torch.float32)
    added = {"text_embeds": vector[:, :16], "time_ids": torch.full((2, 6), 64.0)}
    for peer in (
        EDMEulerScheduler(**COSXL),
        FlowMatchEulerDiscreteScheduler(),
        EulerDiscreteScheduler(**BETAS, **ZERO),
    ):
        peer.set_timesteps(10)
        schedule = parse_preset("at-edm:rho=0.5")
        pruned = TokenUNet(unet, schedule, scheduler=peer)
        plans = [schedule.plan(step, 10, pruned.sites) for step in range(10)]
        assert [pruned.plan(t) for t in peer.timesteps] == plans
        dense = TokenUNet(unet, None, scheduler=peer)
        with torch.no_grad():
            ours, theirs = (
                each(x, peer.timesteps[4], context, added_cond_kwargs=added).sample for each in (dense, unet)
            )
        error = relative_error(ours, theirs)
        print(f"{type(peer).__name__}: max error / max {error:.1e}")
        assert error < 1e-5


def test_a_prediction_is_recorded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    single, report, picture = tmp_path / "model.safetensors", tmp_path / "report.json", tmp_path / "a.png"
    save(single, replace(TINY, noise=ZERO_SNR), tiny_modules(), torch.float32)
    options = ["--weights", str(single), "--tokenizer", str(VOCABULARY), "--steps", "1", "--out", str(picture)]
    for more, text in (
        ([], "v"),
        (["--prediction", "flow:shift=3"], "flow:shift=3.0"),
        (["--prediction", "noise"], None),
    ):
        sample([PROMPT, *options, "--json", str(report), *more])
        with Image.open(picture) as image:
            record = json.loads(image.text["minisdxl"])  # type: ignore[attr-defined]
        assert record.get("prediction") == text
        assert json.loads(report.read_text())["settings"].get("prediction") == text
    capsys.readouterr()
    flops(["--model", str(single)])
    assert "FLOPs of one U-Net call: tiny, predicts v, 64x64 pixels" in capsys.readouterr().out
    flops(["--model", str(single), "--json"])
    assert json.loads(capsys.readouterr().out)["prediction"] == "v"
    for more, expected in (
        (["--prediction", "x"], "prediction is 'x', expected one of"),
        (["--prediction", "edm", "--sampling", "lcm"], "sampling 'lcm' has the timesteps of SDXL"),
    ):
        with pytest.raises(SystemExit) as stop:
            sample([PROMPT, *options, *more])
        assert stop.value.code == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert expected in error
