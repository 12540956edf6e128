"""What pruning does to one U-Net call, and to which tokens: ``python -m tools.single_step``. A minute, not hours.

Drawn pictures are noised to some timesteps, and the U-Net predicts the noise, dense and under each preset. ``change``
is the squared difference of the two predictions over the squared error of the dense one: 1 means that pruning costs as
much as all that the model does not know. ``objects`` and ``rest`` are the shares of tokens that stay, where objects are
drawn and elsewhere: the least of all attention blocks, and the mean. No guidance; presets as at the last step.
"""

from __future__ import annotations

import argparse
import csv
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from atedm import DENSE, TokenPlan, parse_preset
from minisdxl.checkpoint.atomic import atomic_path
from minisdxl.cli.options import Parser
from minisdxl.cost import count
from minisdxl.loading import load
from minisdxl.pipeline import SDXL
from minisdxl.sampler import discrete_sigmas
from minisdxl.settings import micro_conditioning
from minisdxl.transformer import AttentionBlock
from tools.drawn.painting import draw, object_mask
from tools.drawn.world import Scene, random_scene
from tools.memory import machine

PRESETS = (
    *("at-edm", "at-edm:ranking=lowest", "at-edm:ranking=covered", "random"),
    *("at-edm:ranking=grid", "at-edm:ranking=dissimilarity"),
    *("direct", "at-edm:recovery=similarity-change", "at-edm:recovery=nearest", "at-edm:recovery=nearest-change"),
    *("at-edm:ranking=covered,recovery=nearest-change", "dissimilarity:recovery=direct"),
    *("dissimilarity:recovery=similarity-change", "dissimilarity:recovery=nearest", "dissimilarity"),
    *("dissimilarity:recovery=nearest-two-change", "dissimilarity:ranking=lowest", "dissimilarity:ranking=random"),
    *("dissimilarity:ranking=grid", "dissimilarity:ranking=grid,recovery=nearest-two-change", "tome:r=0.38"),
)
STEPS = 50


@dataclass(frozen=True)
class Outcome:
    """A preset at a timestep. ``flops`` is its share of the dense call's; of ``objects`` and ``rest`` see above."""

    preset: str
    timestep: int
    flops: float
    change: float
    objects_least: float
    objects_mean: float
    rest_mean: float


@dataclass(frozen=True)
class Pictures:
    """Drawn pictures: latents (B, 4, h, w), where objects are (B, 1, H, W) as 0 or 1, and what the captions say."""

    latents: Tensor
    objects: Tensor
    text: Any
    vector: Tensor


def drawn_pictures(
    sdxl: SDXL, number: int, draw_scene: Callable[[random.Random, str | None], Scene] = random_scene
) -> Pictures:
    """The first ``number`` pictures of the test split, of the size that the model was made for, on its device."""
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
    """All presets at all timesteps. Raises ``ValueError`` for a preset that does not exist or fit."""
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
    """Sees which tokens the first layer of each attention block hands on, and whether they are of objects."""

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
        """Of the object tokens, and of the rest, the share that stays, in each block."""
        objects, rest = zip(*self.seen, strict=True)
        return list(objects), list(rest)


def table(results: Sequence[Outcome]) -> str:
    """Markdown: a line for each preset, a column for each timestep; which tokens stay at the middle one."""
    timesteps = list(dict.fromkeys(each.timestep for each in results))
    middle = timesteps[len(timesteps) // 2]
    head = ["preset", "FLOPs", *(f"change at t = {t}" for t in timesteps)]
    head += [f"objects kept at t = {middle}, least", "mean", "rest kept, mean"]
    lines = [head, ["---"] * len(head)]
    for preset in dict.fromkeys(each.preset for each in results):
        mine = {each.timestep: each for each in results if each.preset == preset}
        changes = [f"{mine[t].change:.3f}" for t in timesteps]
        it = mine[middle]
        kept = [f"{it.objects_least:.2f}", f"{it.objects_mean:.2f}", f"{it.rest_mean:.2f}"]
        lines.append([f"`{preset}`", f"{it.flops:.0%}", *changes, *kept])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _single_step(options: argparse.Namespace) -> None:
    """Raises ``ValueError`` or ``OSError``."""
    if options.pictures < 1:
        raise ValueError(f"--pictures is {options.pictures}, expected 1 or more")
    sdxl = load(options.weights, tokenizer=options.tokenizer)
    most = sdxl.config.noise.steps - 1
    if not all(0 <= t <= most for t in options.timesteps):
        raise ValueError(f"--timesteps are {options.timesteps}, expected 0 to {most}")
    with torch.no_grad():
        pictures = drawn_pictures(sdxl, options.pictures)
        results = list(outcomes(sdxl, pictures, options.presets, options.timesteps))
    print(f"{options.pictures} pictures; {machine()}\n\n{table(results)}")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(options.out) as temporary, temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Outcome)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(each) for each in results)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures; exit code 0 on success, 2 with one line on bad input, 130 after Ctrl-C."""
    parser = Parser(
        prog="python -m tools.single_step", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--weights", default="shapes", help="'shapes' (default), or a model that draws such scenes")
    add("--tokenizer", metavar="DIR", help="with the vocabulary (default: 'tokenizer' beside the weights, else CLIP's)")
    add("--presets", nargs="+", default=list(PRESETS), metavar="PRESET", help="(default: rankings by recoveries)")
    add("--timesteps", nargs="+", type=int, default=[800, 500, 200], metavar="T", help="(default: 800 500 200)")
    add("--pictures", type=int, default=16, metavar="N", help="in one batch (default: %(default)s)")
    add(
        "--out",
        type=Path,
        default=Path("docs/results/single-step.csv"),
        metavar="FILE.csv",
        help="(default: %(default)s)",
    )
    options = parser.parse_args(arguments)
    with parser.one_line("nothing was written"):
        _single_step(options)


if __name__ == "__main__":
    main()
