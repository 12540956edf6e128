"""How far pruning changes one U-Net call, and which tokens it keeps."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from atedm import DENSE, TokenPlan, parse_preset
from minisdxl.cost import count
from minisdxl.pipeline import SDXL
from minisdxl.preconditioning import discrete_sigmas
from minisdxl.settings import micro_conditioning
from minisdxl.transformer import AttentionBlock
from tools.drawn.painting import draw, object_mask
from tools.drawn.world import Scene, random_scene

STEPS = 50


@dataclass(frozen=True)
class Outcome:
    """The effect of a preset on a U-Net call at one timestep.

    ``flops`` is the share of the dense call's FLOPs. ``change`` is the squared difference to the dense prediction over
    the squared error of that. The others are shares of tokens kept where objects are drawn and elsewhere: the minimum
    and the mean over attention blocks.
    """

    preset: str
    timestep: int
    flops: float
    change: float
    objects_least: float
    objects_mean: float
    rest_mean: float


@dataclass(frozen=True)
class Pictures:
    """Drawn pictures: latents (B, 4, h, w), masks of their objects (B, 1, H, W), and encoded captions."""

    latents: Tensor
    objects: Tensor
    text: Any
    vector: Tensor


def drawn_pictures(
    sdxl: SDXL, number: int, draw_scene: Callable[[random.Random, str | None], Scene] = random_scene
) -> Pictures:
    """The first ``number`` pictures of the test split, in the model's own size and on its device."""
    rng, side = random.Random(0), sdxl.config.picture_size(None)[0]
    scenes = [draw_scene(rng, "test") for _ in range(number)]
    pixels = torch.from_numpy(np.stack([draw(scene, side) for scene in scenes])).to(sdxl.device)
    objects = (
        torch.from_numpy(np.stack([object_mask(scene, side) for scene in scenes])).to(sdxl.device).float()[:, None]
    )
    latents = sdxl.vae.encode(pixels.permute(0, 3, 1, 2).float().div(127.5).sub(1))
    words = sdxl.text.encode([scene.caption for scene in scenes], sdxl.tokenizer)
    sizes = torch.tensor([micro_conditioning((side, side), None, (0, 0), None)], device=sdxl.device).expand(number, -1)
    return Pictures(
        latents, objects, sdxl.unet.project_context(words.context), words.vector(sizes, sdxl.config.size_channels)
    )


def outcomes(sdxl: SDXL, pictures: Pictures, presets: Sequence[str], timesteps: Sequence[int]) -> Iterator[Outcome]:
    """Runs all presets at all timesteps.

    Raises ``ValueError`` for an unknown preset or one that does not fit, and for a model that does not predict noise.
    """
    if sdxl.config.noise.prediction != "noise":
        raise ValueError(f"the model predicts {sdxl.config.noise.prediction!r}, expected one that predicts 'noise'")
    sites = list(sdxl.config.unet.attention_sites())
    plans = {preset: parse_preset(preset).plan(STEPS - 1, STEPS, sites) for preset in presets}
    levels, size = discrete_sigmas(sdxl.config.noise), tuple(pictures.latents.shape[2:])

    def flops(plan: TokenPlan) -> int:
        return count(sdxl.config, size[0], size[1], plan, sdxl.config.text[0].context_length).total

    for timestep in timesteps:
        generator = torch.Generator().manual_seed(timestep)
        noise = torch.randn(pictures.latents.shape, generator=generator).to(pictures.latents.device)
        sigma = float(levels[timestep])
        noisy = (pictures.latents + sigma * noise) / (1 + sigma**2) ** 0.5
        c_noise = torch.full((len(noise),), timestep, device=noise.device)
        dense = sdxl.unet(noisy, c_noise, pictures.text, pictures.vector, DENSE)
        error = (dense - noise).square().mean().item()
        for preset, plan in plans.items():
            with Watch(sdxl, pictures.objects) as watch:
                pruned = sdxl.unet(noisy, c_noise, pictures.text, pictures.vector, plan)
            change = (pruned - dense).square().mean().item() / error
            objects, rest = watch.shares()
            share = flops(plan) / flops(DENSE)
            yield Outcome(preset, timestep, share, change, min(objects), float(np.mean(objects)), float(np.mean(rest)))


class Watch:
    """A context that records which tokens the first layer of each attention block keeps, on objects and elsewhere."""

    def __init__(self, sdxl: SDXL, objects: Tensor) -> None:
        self.blocks = [block for block in sdxl.unet.modules() if isinstance(block, AttentionBlock)]
        self.objects = objects
        self.seen: list[tuple[float, float]] = []

    def __enter__(self) -> Watch:
        self.handles = [block.transformer_blocks[0].register_forward_hook(self._see) for block in self.blocks]
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self.handles:
            handle.remove()

    def _see(self, _: object, __: object, output: Any) -> None:
        tokens = output[0]
        kept = torch.ones(tokens.values.shape[0], tokens.size, dtype=torch.bool, device=tokens.values.device)
        if tokens.positions is not None:
            kept = torch.zeros_like(kept).scatter(1, tokens.positions, True)
        object_here = F.adaptive_avg_pool2d(self.objects, tokens.grid).flatten(1) > 0.5
        self.seen.append((kept[object_here].float().mean().item(), kept[~object_here].float().mean().item()))

    def shares(self) -> tuple[list[float], list[float]]:
        """The share of object tokens kept in each block, and the share of the other tokens."""
        objects, rest = zip(*self.seen, strict=True)
        return list(objects), list(rest)
