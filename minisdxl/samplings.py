"""Named samplers: a solver with its noise levels and its default steps, guidance and size."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from minisdxl.config import ModelConfig, NoiseConfig
from minisdxl.preconditioning import flow_sigmas, lowest_and_highest, shifted
from minisdxl.sampler import Denoiser, Solver, check_steps, euler, sigmas
from minisdxl.solvers import dpmpp_2m, dpmpp_2m_sde, euler_ancestral, heun, lcm, tcd, unipc

LCM_STEPS = 50  # steps of the teacher that LCM was distilled with; diffusers: LCMScheduler.original_inference_steps
RHO = 7.0  # of Karras noise levels: EDM, table 1

Sigmas = Callable[[int, NoiseConfig], Tensor]  # n steps to their noise levels, descending, and 0: (n + 1,) float64


def trailing_timesteps(n: int, noise: NoiseConfig) -> Tensor:
    """diffusers' "trailing" spacing, which few-step models ask for: :func:`timesteps`, rounded instead of truncated.

    Both are equal where n divides the steps of training. Of 1 to 8 steps only 3 and 6 differ, by one.
    Raises ``ValueError`` for n outside 1..steps.
    """
    check_steps(n, noise.steps)
    return (torch.arange(n, dtype=torch.float64) * (-noise.steps / n) + noise.steps).round().long() - 1


def lcm_timesteps(n: int, noise: NoiseConfig) -> Tensor:
    """LCM's spacing (arXiv:2310.04378): n of the ``LCM_STEPS`` timesteps it was distilled at, as in ``LCMScheduler``.

    Raises ``ValueError`` for n outside 1..LCM_STEPS, and for training steps that do not divide into ``LCM_STEPS``.
    """
    check_steps(n, LCM_STEPS)
    if noise.steps % LCM_STEPS:
        raise ValueError(
            f"model was trained with {noise.steps} noise levels, LCM and TCD need a multiple of {LCM_STEPS}"
        )
    return noise.steps - 1 - torch.arange(n) * LCM_STEPS // n * (noise.steps // LCM_STEPS)


def leading_timesteps(n: int, noise: NoiseConfig) -> Tensor:
    """DDIM's spacing, every (steps // n)-th timestep from 1 up: diffusers' "leading" with SDXL's ``steps_offset`` 1.

    All timesteps, from 0 up, where n is ``noise.steps``. A model with zero terminal SNR must start at the last timestep
    and has the trailing ones (arXiv:2305.08891, section 3.3). Raises ``ValueError`` for n outside 1..steps.
    """
    if noise.zero_terminal_snr:
        return trailing_timesteps(n, noise)
    check_steps(n, noise.steps)
    return torch.arange(n - 1, -1, -1) * (noise.steps // n) + (1 if n < noise.steps else 0)


def own_sigmas(n: int, noise: NoiseConfig) -> Tensor:
    """The noise levels that go with a model's prediction, and 0: (n + 1,) float64.

    The official :func:`~minisdxl.sampler.sigmas` where levels are discrete; Karras levels for "edm" and exponential
    ones for "edm-v", as for Playground 2.5 and CosXL in diffusers; equal steps in t for "flow". Raises ``ValueError``
    for n outside 1..steps.
    """
    match noise.prediction:
        case "edm":
            return karras_sigmas(n, noise)
        case "edm-v":
            return exponential_sigmas(n, noise)
        case "flow":
            check_steps(n, noise.steps)
            return _ending(shifted(1 - torch.arange(n, dtype=torch.float64) / n, noise.shift), noise)
        case _:
            return sigmas(n, noise)


def karras_sigmas(n: int, noise: NoiseConfig) -> Tensor:
    """Noise levels of EDM equation 5, from the highest to the lowest of training, and 0: (n + 1,) float64.

    They lie between the levels of training. As ``use_karras_sigmas`` in diffusers and "Karras" in web UIs, so of a flow
    it is t that is spaced like this. Raises ``ValueError`` for n outside 1..steps.
    """
    check_steps(n, noise.steps)
    lowest, highest = lowest_and_highest(noise).tolist()
    ramp = torch.linspace(highest ** (1 / RHO), lowest ** (1 / RHO), n, dtype=torch.float64)
    return _ending(ramp**RHO, noise)


def exponential_sigmas(n: int, noise: NoiseConfig) -> Tensor:
    """Noise levels in equal ratios, from the highest to the lowest of training, and 0: (n + 1,) float64.

    As ``use_exponential_sigmas`` in diffusers and "Exponential" in web UIs; of a flow, t. Raises ``ValueError`` for n
    outside 1..steps.
    """
    check_steps(n, noise.steps)
    lowest, highest = lowest_and_highest(noise).log().tolist()
    ramp = torch.linspace(highest, lowest, n, dtype=torch.float64)
    return _ending(ramp.exp(), noise)


def _ending(levels: Tensor, noise: NoiseConfig) -> Tensor:
    """Sigmas, of the t of a flow or of themselves, and a final 0."""
    levels = flow_sigmas(levels) if noise.prediction == "flow" else levels
    return torch.cat([levels, torch.zeros(1, dtype=torch.float64)])


@dataclass(frozen=True)
class Sampling:
    """A solver and its defaults. Raises ``ValueError`` for ``steps`` or ``calls_per_step`` below 1."""

    name: str
    about: str
    solver: Solver
    sigmas: Sigmas  # raises ``ValueError`` for a number of steps out of range
    steps: int
    cfg: float | None = None  # classifier-free guidance scale; 1 is none, None the model's own
    size: int | None = None  # side of a picture in pixels; None is the model's own
    calls_per_step: int = 1  # of the denoiser; the last step, to sigma 0, has one
    fresh_noise: bool = False  # whether the solver adds noise: it then solves an SDE, not the ODE
    # The models that it can sample: of all noise levels, of discrete ones (timesteps), or of SDXL's own alone.
    levels: Literal["any", "discrete", "sdxl"] = "any"

    def __post_init__(self) -> None:
        for name in ("steps", "calls_per_step"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} of sampling {self.name} is {getattr(self, name)}, expected 1 or more")

    def check(self, noise: NoiseConfig) -> None:
        """Raises ``ValueError`` for a model whose noise levels this sampling does not have."""
        others = ", ".join(name for name, each in SAMPLINGS.items() if each.levels == "any")
        if self.levels != "any" and noise.prediction not in ("noise", "v"):
            raise ValueError(
                f"sampling {self.name!r} has the timesteps of SDXL, a model of prediction {noise.prediction!r} has "
                f"none; expected one of {others}"
            )
        if self.levels == "sdxl" and noise.zero_terminal_snr:
            raise ValueError(
                f"sampling {self.name!r} was distilled at SDXL's own noise levels, a model with zero terminal SNR has "
                f"others; expected lcm, or one of {others}"
            )

    def calls(self, steps: int) -> list[int]:
        """Number of denoiser calls in each of ``steps`` steps."""
        return [self.calls_per_step] * (steps - 1) + [1]

    def with_denoiser(self, wrap: Callable[[Denoiser], Denoiser]) -> Sampling:
        """The same sampling of the denoiser that ``wrap`` makes of the one it is given, for example to watch it."""

        def solver(
            denoiser: Denoiser, x: Tensor, sigmas: Tensor, generators: Sequence[torch.Generator]
        ) -> Iterator[Tensor]:
            return self.solver(wrap(denoiser), x, sigmas, generators)

        return replace(self, solver=solver)

    def own_steps(self, config: ModelConfig) -> int:
        """Default number of steps: the model's if this is its default sampling, else this sampling's."""
        return config.defaults.steps if config.defaults.sampling == self.name else self.steps

    def own_cfg(self, config: ModelConfig) -> float:
        """Default guidance scale."""
        return config.defaults.cfg if self.cfg is None else self.cfg

    def picture_size(self, config: ModelConfig, size: tuple[int, int] | None) -> tuple[int, int]:
        """The (width, height) of a picture, ``None`` for the default. Raises as :meth:`ModelConfig.picture_size`."""
        if size is None and self.size is not None:
            size = (self.size, self.size)
        return config.picture_size(size)


def _named(*samplings: Sampling) -> dict[str, Sampling]:
    return {sampling.name: sampling for sampling in samplings}


SAMPLINGS: dict[str, Sampling] = _named(
    # For SDXL base and its fine-tunes: solvers and spacing of Stability AI's generative-models (sgm/inference/api.py),
    # 50 steps as in the AT-EDM paper, and half as many where a solver is of second order.
    Sampling("euler", "Euler's method, the official default", euler, own_sigmas, steps=50),
    Sampling(
        "euler-ancestral",
        "Euler with fresh noise at every step",
        euler_ancestral,
        own_sigmas,
        steps=50,
        fresh_noise=True,
    ),
    Sampling("dpm++-2m", "DPM-Solver++(2M), second order at one call a step", dpmpp_2m, own_sigmas, steps=25),
    Sampling(
        "dpm++-2m-sde", "DPM++ 2M with fresh noise at every step", dpmpp_2m_sde, own_sigmas, steps=25, fresh_noise=True
    ),
    Sampling("unipc", "UniPC, second order with a corrector, at one call a step", unipc, own_sigmas, steps=25),
    Sampling("heun", "Heun's method, second order at two calls a step", heun, own_sigmas, steps=25, calls_per_step=2),
    # In the variable x / alpha a step of DDIM (arXiv:2010.02502, equation 13) is one of Euler's method.
    Sampling(
        "ddim",
        "DDIM: Euler's method at DDIM's own noise levels",
        euler,
        partial(sigmas, spacing=leading_timesteps),
        steps=50,
        levels="discrete",
    ),
    # stabilityai/sdxl-turbo: scheduler_config.json; diffusers' page on it (no guidance, 1 to 4 steps, 512 px). NOTE:
    # Stability AI's demo (scripts/demo/turbo.py) has timesteps 999, 899, 799, 699; one step is the same in both.
    Sampling(
        "turbo",
        "for SDXL-Turbo: 1 to 4 steps, no guidance, 512 px",
        euler_ancestral,
        partial(sigmas, spacing=trailing_timesteps),
        steps=1,
        cfg=1.0,
        size=512,
        fresh_noise=True,
        levels="discrete",
    ),
    # ByteDance/SDXL-Lightning: model card. Its 1-step file predicts the latent, not its noise: this is not for it.
    Sampling(
        "lightning",
        "for SDXL-Lightning: 2, 4 or 8 steps, as the file's name says, no guidance",
        euler,
        partial(sigmas, spacing=trailing_timesteps),
        steps=4,
        cfg=1.0,
        levels="discrete",
    ),
    # latent-consistency/lcm-sdxl: model card (2 to 8 steps, guidance off or 1 to 2) and LCMScheduler.
    Sampling(
        "lcm",
        "for LCM and LCM-LoRA: 2 to 8 steps, guidance 1 to 2",
        lcm,
        partial(sigmas, spacing=lcm_timesteps),
        steps=4,
        cfg=1.0,
        fresh_noise=True,
        levels="discrete",
    ),
    # h1t/TCD-SDXL-LoRA: model card (4 steps, no guidance, gamma 0.3). TCDScheduler has LCM's timesteps.
    Sampling(
        "tcd",
        "for TCD-LoRA: 2 to 50 steps, no guidance",
        tcd,
        partial(sigmas, spacing=lcm_timesteps),
        steps=4,
        cfg=1.0,
        fresh_noise=True,
        levels="sdxl",
    ),
)
# Noise levels that a name may end with. Distilled models, which ask for a guidance scale, have levels of their own.
LEVELS: dict[str, Sigmas] = {"karras": karras_sigmas, "exponential": exponential_sigmas}
ALIASES = {"eulera": "euler-ancestral", "keulera": "euler-ancestral", "keuler": "euler", "kheun": "heun"}


def _key(name: str) -> str:
    """A name without case, spaces, underscores and hyphens, and with ++ for pp."""
    return re.sub(r"[\s_-]", "", name.lower()).replace("dpmpp", "dpm++")


def find_sampling(name: str | Sampling) -> Sampling:
    """The sampling of that name, or the one given.

    Names are read as people write them: "DPM++ 2M Karras" and "dpmpp_2m_karras" are ``dpm++-2m-karras``, "Euler a" is
    ``euler-ancestral``. Raises ``ValueError`` for an unknown name, and for noise levels that a distilled model cannot
    be sampled at.
    """
    if isinstance(name, Sampling):
        return name
    key = _key(name)
    levels = next((levels for levels in LEVELS if key.endswith(levels)), None)
    key = key.removesuffix(levels or "")
    known = {_key(each): each for each in SAMPLINGS} | ALIASES
    if key not in known:
        raise ValueError(
            f"unknown sampling {name!r}, expected one of {', '.join(SAMPLINGS)}, "
            f"if wanted with {' or '.join(f'-{levels}' for levels in LEVELS)} at the end"
        )
    sampling = SAMPLINGS[known[key]]
    if levels is None:
        return sampling
    if sampling.cfg is not None:
        raise ValueError(
            f"sampling {name!r} has other noise levels than the model was distilled at, expected {known[key]}"
        )
    return replace(
        sampling,
        name=f"{sampling.name}-{levels}",
        about=f"{sampling.about}; {levels} noise levels",
        sigmas=LEVELS[levels],
        levels="any",
    )
