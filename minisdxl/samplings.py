"""Named samplers: a solver with its noise levels and its default steps, guidance and size."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from minisdxl.config import ModelConfig, NoiseConfig
from minisdxl.sampler import Solver, Spacing, check_steps, euler, sigmas, timesteps
from minisdxl.solvers import dpmpp_2m, euler_ancestral, heun, lcm

LCM_STEPS = 50  # steps of the teacher that LCM was distilled with; diffusers: LCMScheduler.original_inference_steps


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
        raise ValueError(f"model was trained with {noise.steps} noise levels, LCM needs a multiple of {LCM_STEPS}")
    return noise.steps - 1 - torch.arange(n) * LCM_STEPS // n * (noise.steps // LCM_STEPS)


@dataclass(frozen=True)
class Sampling:
    """A solver and its defaults. Raises ``ValueError`` for ``steps`` or ``calls_per_step`` below 1."""

    name: str
    about: str
    solver: Solver
    spacing: Spacing
    steps: int
    cfg: float | None = None  # classifier-free guidance scale; 1 is none, None the model's own
    size: int | None = None  # side of a picture in pixels; None is the model's own
    calls_per_step: int = 1  # of the denoiser; the last step, to sigma 0, has one

    def __post_init__(self) -> None:
        for name in ("steps", "calls_per_step"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} of sampling {self.name} is {getattr(self, name)}, expected 1 or more")

    def sigmas(self, steps: int, noise: NoiseConfig) -> Tensor:
        """Noise levels of ``steps`` steps and a final 0: (steps + 1,) float64. Raises as its spacing does."""
        return sigmas(steps, noise, self.spacing)

    def calls(self, steps: int) -> list[int]:
        """Number of denoiser calls in each of ``steps`` steps."""
        return [self.calls_per_step] * (steps - 1) + [1]

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
    Sampling("euler", "Euler's method, the official default", euler, timesteps, steps=50),
    Sampling("euler-ancestral", "Euler with fresh noise at every step", euler_ancestral, timesteps, steps=50),
    Sampling("dpm++-2m", "DPM-Solver++(2M), second order at one call a step", dpmpp_2m, timesteps, steps=25),
    Sampling("heun", "Heun's method, second order at two calls a step", heun, timesteps, steps=25, calls_per_step=2),
    # stabilityai/sdxl-turbo: scheduler_config.json; diffusers' page on it (no guidance, 1 to 4 steps, 512 px). NOTE:
    # Stability AI's demo (scripts/demo/turbo.py) has timesteps 999, 899, 799, 699; one step is the same in both.
    Sampling(
        "turbo",
        "for SDXL-Turbo: 1 to 4 steps, no guidance, 512 px",
        euler_ancestral,
        trailing_timesteps,
        steps=1,
        cfg=1.0,
        size=512,
    ),
    # ByteDance/SDXL-Lightning: model card. Its 1-step file predicts the latent, not its noise: this is not for it.
    Sampling(
        "lightning",
        "for SDXL-Lightning: 2, 4 or 8 steps, as the file's name says, no guidance",
        euler,
        trailing_timesteps,
        steps=4,
        cfg=1.0,
    ),
    # latent-consistency/lcm-sdxl: model card (2 to 8 steps, guidance off or 1 to 2) and LCMScheduler.
    Sampling("lcm", "for LCM and LCM-LoRA: 2 to 8 steps, guidance 1 to 2", lcm, lcm_timesteps, steps=4, cfg=1.0),
)


def find_sampling(name: str | Sampling) -> Sampling:
    """The sampling of that name, or the one given. Raises ``ValueError`` for an unknown name."""
    if isinstance(name, Sampling):
        return name
    if name not in SAMPLINGS:
        raise ValueError(f"unknown sampling {name!r}, expected one of {', '.join(SAMPLINGS)}")
    return SAMPLINGS[name]
