"""Makes the bundled model ``shapes`` from nothing: draws data, trains the VAE, then text encoders and U-Net together.

    python -m tools.train_shapes                 # everything, resuming whatever a killed run left in runs/shapes

Pictures are drawn as they are needed, so there is no data set and no epoch. The U-Net sees 32x32 latents first (128
px), then 64x64 (256 px), told apart by SDXL's own size conditioning: words are learned where steps cost little, a
picture at 64x64 costs four times one at 32x32.
"""

from __future__ import annotations

import argparse
import copy
import csv
import math
import os
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image
from torch import Tensor, nn
from torch.nn.utils import convert_conv2d_weight_memory_format
from torch.overrides import TorchFunctionMode

from atedm.plan import DENSE
from minisdxl.checkpoint import Modules, load, save
from minisdxl.config import SHAPES, ModelConfig
from minisdxl.files import atomic_path
from minisdxl.sampler import (
    Condition,
    discrete_sigmas,
    guided_denoiser,
    image_generators,
    initial_noise,
    sigmas,
)
from minisdxl.solvers import euler
from minisdxl.text import Conditioning, TextEncoders
from minisdxl.tokenizer import Tokenizer
from minisdxl.transformer import AttentionBlock
from minisdxl.unet import ResBlock, UNet
from minisdxl.vae import VAE
from tools.check_shapes import check
from tools.shapes import draw, random_scene

TOKENIZER = Path(__file__).parents[1] / "weights" / "shapes" / "tokenizer"


def batch_of_pictures(rng: random.Random, count: int, side: int, split: str = "train") -> tuple[Tensor, list[str]]:
    """``count`` fresh pictures (count, 3, side, side) in [-1, 1], and their captions."""
    scenes = [random_scene(rng, split) for _ in range(count)]
    pictures = np.stack([draw(scene, side) for scene in scenes])
    images = torch.from_numpy(pictures).permute(0, 3, 1, 2).float().div(127.5).sub(1)
    return images.contiguous(memory_format=torch.channels_last), [scene.caption for scene in scenes]


def warm_then_decay(step: int, steps: int, warm: int, decay: float) -> float:
    """Learning-rate factor: a linear warm-up, a plateau, and a linear way down to 0 over the last share ``decay``."""
    return min((step + 1) / warm, 1.0, (steps - step) / (steps * decay))


def save_state(path: Path, state: dict[str, Any]) -> None:
    """Writes a training state whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(".part")
    torch.save(state, beside)
    os.replace(beside, path)


def log(path: Path, **values: float) -> None:
    """One line on the terminal, one row in a CSV file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    print(path.stem, " ".join(f"{name} {value:.4g}" for name, value in values.items()), flush=True)
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.writer(file)
        if new:
            writer.writerow(values)
        writer.writerow(f"{value:.6g}" for value in values.values())


def train_vae(options: argparse.Namespace) -> VAE:
    """Trains the autoencoder, or returns the one that a finished run left.

    The loss is L1 + L2, with a little noise on the latent so that the decoder forgives some. Three latent channels are
    held to the picture at its size: a free latent of so small a VAE puts all colors on one curve, where what
    blurs between two colors is a third. The Kullback-Leibler term only keeps variances in bounds.
    """
    state_file = options.run / "vae.pt"
    vae = VAE(SHAPES.vae).to(options.device)
    convert_conv2d_weight_memory_format(vae, torch.channels_last)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=2e-3, betas=(0.9, 0.99), weight_decay=0.0)
    step = 0
    if state_file.exists():
        state = torch.load(state_file, weights_only=True, map_location=options.device)
        vae.load_state_dict(state["vae"])
        optimizer.load_state_dict(state["optimizer"])
        step = state["step"]
    began = time.time()
    while step < options.vae_steps:
        rng = random.Random(f"vae {options.seed} {step}")
        torch.manual_seed(step)
        # Mostly small pictures, for time (edges are one pixel wide at any size); the middle attention sees more
        # positions in larger ones.
        side, count = (256, 4) if step % 16 == 15 else (128, 8) if step % 4 == 3 else (64, 16)
        images, _ = batch_of_pictures(rng, count, side)
        images = images.to(options.device)
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * warm_then_decay(step, options.vae_steps, warm=50, decay=0.5)
        mean, log_variance = vae.moments(images)
        noisy = mean + 0.05 * torch.randn_like(mean)
        output = vae.decode(noisy * vae.config.scale_factor)
        divergence = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
        small = F.avg_pool2d(images, SHAPES.vae.downscale)
        held = F.mse_loss(mean[:, :3], 1.5 * small)
        error = F.mse_loss(output, images)
        loss = F.l1_loss(output, images) + error + held + 1e-5 * divergence
        optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        step += 1
        if step % 25 == 0 or step == options.vae_steps:
            psnr = 10 * math.log10(4 / error.item())
            log(
                options.run / "vae.csv",
                step=step,
                loss=loss.item(),
                psnr=psnr,
                held=held.item(),
                seconds=time.time() - began,
            )
        if step % 100 == 0 or step == options.vae_steps:
            save_state(state_file, {"vae": vae.state_dict(), "optimizer": optimizer.state_dict(), "step": step})
    vae.requires_grad_(False).eval()
    images, _ = batch_of_pictures(random.Random("latent scale"), 64, SHAPES.size)
    balance_latents(vae, images.to(options.device))
    return vae


@torch.no_grad()
def balance_latents(vae: VAE, images: Tensor) -> None:
    """Gives every latent channel of ``images`` mean 0 and variance 1, by the 1x1 convolutions on either side of it.

    What the VAE makes of a picture stays the same. Diffusion adds the same noise to all channels: one of small variance
    would be settled late and count for little.
    """
    latents = vae.moments(images)[0]
    mean, deviation = latents.mean(dim=(0, 2, 3)), latents.std(dim=(0, 2, 3))
    both = torch.cat([1 / deviation, torch.ones_like(deviation)])
    vae.quant_conv.weight.mul_(both[:, None, None, None])
    bias = vae.quant_conv.bias
    into = vae.post_quant_conv.bias
    assert bias is not None
    assert into is not None
    bias.copy_(torch.cat([(bias[: len(mean)] - mean) / deviation, bias[len(mean) :] - 2 * deviation.log()]))
    into.add_(vae.post_quant_conv.weight.flatten(1) @ mean)
    vae.post_quant_conv.weight.mul_(deviation[None, :, None, None])


def zero(module: nn.Module) -> None:
    """Sets all weights of a module to 0."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)


class Model(nn.Module):
    """What the second part trains: the U-Net and the text encoders, together."""

    def __init__(self) -> None:
        super().__init__()
        self.unet = UNet(SHAPES.unet)
        self.text = TextEncoders(SHAPES.text)
        for module in self.unet.modules():  # the official start: every residual branch adds nothing at first
            if isinstance(module, ResBlock):
                zero(module.out_layers[3])
            elif isinstance(module, AttentionBlock):
                zero(module.proj_out)
        zero(self.unet.out[2])

    def forward(self, latents: Tensor, timestep: Tensor, ids: tuple[Tensor, Tensor], drop: Tensor, side: int) -> Tensor:
        """Predicted noise; rows where ``drop`` is true see no prompt."""
        conditioning = self.text(*ids).zeroed(drop)
        sizes = torch.tensor([[side, side, 0, 0, side, side]], device=latents.device).expand(len(latents), -1)
        vector = conditioning.vector(sizes, SHAPES.size_channels)
        predicted: Tensor = self.unet(latents, timestep, conditioning.context, vector)
        return predicted


class ProductAttention(TorchFunctionMode):
    """While active, attention without a mask is two matrix products and a softmax, where the map is small.

    For training on a CPU: the fused kernel's bfloat16 backward pass is up to five times slower there.
    """

    LARGEST_MAP = 512 * 512  # queries x keys; beyond it the map no longer fits the caches, and the fused kernel wins

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if function is F.scaled_dot_product_attention and kwargs.keys() == {"scale"}:
            q, k, v = args
            if q.shape[-2] * k.shape[-2] <= self.LARGEST_MAP:
                return (q @ k.transpose(-1, -2) * kwargs["scale"]).softmax(dim=-1) @ v
        return function(*args, **kwargs)


def optimizers_of(model: Model) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of transformer layers, where it needs fewer steps than AdamW, and AdamW for the rest."""
    matrices = [
        p
        for name, p in model.named_parameters()
        if p.ndim == 2 and ("transformer_blocks" in name or ".layers." in name)
    ]
    chosen = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in chosen]
    muon = torch.optim.Muon(matrices, lr=2e-3, weight_decay=0.01, adjust_lr_fn="match_rms_adamw")
    return [muon, torch.optim.AdamW(others, lr=1e-3, betas=(0.9, 0.99), weight_decay=0.01)]


def shifted(share: Tensor, side: int) -> Tensor:
    """Shares of the noise levels in [0, 1) moved up for larger pictures, whose layout is plain to see in more noise.

    The resolution-dependent shift of Stable Diffusion 3 (Esser et al. 2024, section 5.3.2), 1 at 128 px.
    """
    shift = side / 128
    return shift * share / (1 + (shift - 1) * share)


def train_unet(options: argparse.Namespace, vae: VAE) -> None:
    """Trains U-Net and text encoders on latents of fresh pictures, small pictures first, then full-size ones.

    The loss is the weighted squared error of the predicted noise (epsilon prediction), noise levels drawn as
    :func:`shifted` says and spread evenly over each batch. An exponential moving average of the weights is kept,
    a short one, because weights from before a change of picture size do harm.
    """
    state_file = options.run / "unet.pt"
    torch.manual_seed(options.seed)
    model = Model().to(options.device)
    convert_conv2d_weight_memory_format(model.unet, torch.channels_last)
    if options.init is not None:
        start = load(options.init)[1]
        model.unet.load_state_dict(start.unet.state_dict())
        model.text.load_state_dict(start.text.state_dict())
    average = copy.deepcopy(model).requires_grad_(False)
    optimizers = optimizers_of(model)
    rates = [optimizer.param_groups[0]["lr"] for optimizer in optimizers]
    step = 0
    if state_file.exists():
        state = torch.load(state_file, weights_only=True, map_location=options.device)
        model.load_state_dict(state["model"])
        average.load_state_dict(state["average"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        step = state["step"]
    config = SHAPES  # its scale factor is 1: the latents are balanced already
    tokenizer = Tokenizer.from_directory(TOKENIZER, config.text)
    alphas_bar = 1 / (1 + discrete_sigmas(config.noise).float().square()).to(options.device)
    sides = [side for side, count in options.stages for _ in range(count)]
    steps = len(sides)
    began, first, losses = time.time(), step, []
    while step < steps:
        rng = random.Random(f"unet {options.seed} {step}")
        torch.manual_seed(step)
        side = sides[step]
        count = options.batch if side < SHAPES.size else options.batch // 2
        images, captions = batch_of_pictures(rng, count, side)
        with torch.no_grad():
            latents = vae.encode(images.to(options.device))
        share = (torch.randperm(count) + torch.rand(count)) / count
        timestep = (shifted(share, side) * config.noise.steps).long().to(options.device)
        # Offset noise (as in SDXL's own training, stronger): without it even the noisiest latent shows its mean, the
        # model reads the background off that, and at sampling, where the mean is always 0, no caption makes it white.
        noise = (torch.randn(latents.shape) + 0.3 * torch.randn(count, latents.shape[1], 1, 1)).to(options.device)
        signal = alphas_bar[timestep][:, None, None, None]
        noisy = signal.sqrt() * latents + (1 - signal).sqrt() * noise
        ids, ids_2 = (each.to(options.device) for each in tokenizer(captions))
        drop = (torch.rand(count) < 0.1).to(options.device)
        for optimizer, rate in zip(optimizers, rates, strict=True):
            optimizer.param_groups[0]["lr"] = rate * warm_then_decay(step, steps, warm=50, decay=0.3)
        with ProductAttention(), torch.autocast(options.device, torch.bfloat16, enabled=options.bf16):
            predicted = model(noisy, timestep, (ids, ids_2), drop, side)
        # What a noisy latent is to become is settled at high noise, where an error in the noise weighs little: by
        # 1 + sigma^2 it weighs as an error of velocity does, up to where the caption leaves the picture open anyway.
        errors = (predicted.float() - noise).square().mean(dim=(1, 2, 3))
        loss = (errors * (1 / signal.flatten()).clamp(max=10.0)).mean()
        losses.append(errors.mean().item())
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        step += 1
        weight = 1 - min(0.99, (1 + step) / (10 + step))
        with torch.no_grad():
            for kept, fresh in zip(average.parameters(), model.parameters(), strict=True):
                kept.lerp_(fresh, weight)
        if step % 20 == 0:
            mean = sum(losses) / len(losses)
            seconds = (time.time() - began) / (step - first)
            log(options.run / "unet.csv", step=step, side=side, loss=mean, seconds_per_step=seconds)
            losses = []
        if step % 100 == 0 or step == steps:
            state = {"model": model.state_dict(), "average": average.state_dict(), "step": step}
            state |= {"optimizers": [optimizer.state_dict() for optimizer in optimizers]}
            save_state(state_file, state)
            save(options.run / "shapes.safetensors", config, Modules(average.unet, vae, average.text))
        if step % options.grid_every == 0 or step == steps:
            obeyed = sample_grid(options, step, config, Modules(average.unet, vae, average.text), side)
            log(options.run / "grid.csv", step=step, side=side, obeyed=obeyed)
    if options.out is not None:
        save(options.out, config, Modules(average.unet, vae, average.text))


@torch.no_grad()
def sample_grid(options: argparse.Namespace, step: int, config: ModelConfig, modules: Modules, side: int) -> float:
    """Draws 16 unseen captions with 20 steps, writes them as one picture, and returns the share that obey."""
    rng = random.Random("grid")
    captions = [random_scene(rng, "test").caption for _ in range(16)]
    tokenizer = Tokenizer.from_directory(TOKENIZER, config.text)
    sizes = torch.tensor([[side, side, 0, 0, side, side]]).expand(len(captions), -1).to(options.device)

    def condition(words: Conditioning) -> Condition:
        return Condition(words.context, words.vector(sizes, config.size_channels))

    positive = condition(modules.text.encode(captions, tokenizer))
    unconditional = condition(modules.text.encode_negative([""] * len(captions), tokenizer))
    levels = sigmas(20, config.noise)
    generators = image_generators(range(len(captions)))
    latent_side = side // config.vae.downscale
    x = initial_noise(generators, (4, latent_side, latent_side), float(levels[0])).to(options.device)
    denoiser = guided_denoiser(modules.unet, positive, unconditional, options.cfg, lambda _: DENSE, config.noise)
    with torch.autocast(options.device, torch.bfloat16, enabled=options.bf16):
        *_, x = euler(denoiser, x, levels)
        images = modules.vae.decode(x).float()
    pictures = images.add(1).mul(127.5).clamp(0, 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    verdicts = [check(picture, caption) for picture, caption in zip(pictures, captions, strict=True)]
    for caption, verdict in zip(captions, verdicts, strict=True):
        print(f"  {'obeyed' if verdict.obeyed else 'failed'}: {caption}; {'; '.join(verdict.reasons[:2])}", flush=True)
    grid = rearrange(pictures, "(row column) h w c -> (row h) (column w) c", column=4)
    with atomic_path(options.run / f"grid-{step:05d}.png") as path:
        Image.fromarray(grid).save(path)
    return sum(verdict.obeyed for verdict in verdicts) / len(verdicts)


def parse_stages(text: str) -> list[tuple[int, int]]:
    """(side, steps) of each stage. Raises ``ValueError``."""
    stages = [(int(side), int(steps)) for side, _, steps in (stage.partition(":") for stage in text.split(","))]
    for side, steps in stages:
        SHAPES.picture_size((side, side))
        if steps < 0:
            raise ValueError(f"stage of {side} px has {steps} steps, expected 0 or more")
    return stages


def main() -> None:
    """Parses the command line and trains."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--run", type=Path, default=Path("runs/shapes"), help="folder of training state, logs and grids"
    )
    parser.add_argument(
        "--out", type=Path, help="checkpoint to write at the end, such as weights/shapes/shapes.safetensors"
    )
    parser.add_argument("--init", type=Path, help="checkpoint to go on from, where the run has no state: keeps its VAE")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--bf16", action=argparse.BooleanOptionalAction, default=True, help="bfloat16 autocast (U-Net)")
    parser.add_argument("--vae-steps", type=int, default=1600)
    parser.add_argument(
        "--stages",
        type=parse_stages,
        default="128:1800,256:1000",
        metavar="SIDE:STEPS,...",
        help="U-Net steps at each picture side in pixels (default: %(default)s)",
    )
    parser.add_argument("--batch", type=int, default=32, help="pictures a step; half of it at full size")
    parser.add_argument("--cfg", type=float, default=3.0, help="guidance scale of the sample grids")
    parser.add_argument("--grid-every", type=int, default=200, help="U-Net steps between two sample grids")
    options = parser.parse_args()
    train_unet(options, train_vae(options) if options.init is None else load(options.init)[1].vae)


if __name__ == "__main__":
    main()
