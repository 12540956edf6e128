"""Makes the bundled model ``shapes`` from nothing: draws data, trains the VAE, then text encoders and U-Net.

    python -m tools.train_shapes                 # everything, resuming whatever a killed run left in runs/shapes

Pictures are drawn as they are needed, so there is no data set and no epoch. The text encoders learn by themselves
first (``tools.train_text``), then together with the U-Net. That sees small latents first, 64x64 ones (256 px) last,
told apart by SDXL's own size conditioning: words are learned where steps cost little.
"""

from __future__ import annotations

import argparse
import copy
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image
from torch import Tensor, nn
from torch.nn.utils import convert_conv2d_weight_memory_format
from torch.overrides import TorchFunctionMode

from atedm.plan import DENSE
from minisdxl.checkpoint.atomic import atomic_path
from minisdxl.checkpoint.modules import Modules, load, save
from minisdxl.config import SHAPES, ModelConfig
from minisdxl.pipeline import SDXL
from minisdxl.sampler import (
    UNetInputs,
    discrete_sigmas,
    euler,
    guided_denoiser,
    image_generators,
    initial_noise,
    sigmas,
)
from minisdxl.text import TextEmbeddings
from minisdxl.tokenizer import Tokenizer
from minisdxl.transformer import AttentionBlock
from minisdxl.unet import ResBlock, UNet
from minisdxl.vae import VAE
from tools.check_shapes import check
from tools.likeness import NOISE, similarity_kernel, watch
from tools.shapes import COLORS, random_scene
from tools.train_text import SeeingText, train_text
from tools.train_vae import train_vae
from tools.training import Balance, Optimizer, batch_of_pictures, log, noise_levels, save_state, warm_then_decay

TOKENIZER = Path(__file__).parents[1] / "weights" / "shapes" / "tokenizer"


def zero(module: nn.Module) -> None:
    """Sets all weights of a module to 0."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)


class Model(nn.Module):
    """What the last part trains: the U-Net and the text encoders, together."""

    def __init__(self, seeing: SeeingText) -> None:
        super().__init__()
        self.unet = UNet(SHAPES.unet)
        self.text, self.thumbnails = seeing.text, seeing.thumbnails
        for module in self.unet.modules():  # the official start: every residual branch adds nothing at first
            if isinstance(module, ResBlock):
                zero(module.out_layers[3])
            elif isinstance(module, AttentionBlock):
                zero(module.proj_out)
        zero(self.unet.out[2])

    def forward(self, latents: Tensor, timestep: Tensor, words: TextEmbeddings, side: int) -> Tensor:
        """Predicted noise of latents (B, 4, h, w) of pictures of ``side`` pixels."""
        sizes = torch.tensor([[side, side, 0, 0, side, side]], device=latents.device).expand(len(latents), -1)
        predicted: Tensor = self.unet(latents, timestep, words.context, words.vector(sizes, SHAPES.size_channels))
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


def train_unet(options: argparse.Namespace, vae: VAE, seeing: SeeingText, tokenizer: Tokenizer) -> None:
    """Trains U-Net and text encoders on latents of fresh pictures, small pictures first, then full-size ones.

    The loss is the squared error of the predicted noise (epsilon prediction), balanced over noise levels, and that of
    the text encoders' thumbnails. An exponential moving average of the weights is kept, a short
    one, because weights from before a change of picture size do harm.
    """
    state_file = options.run / "unet.pt"
    torch.manual_seed(options.seed)
    model = Model(seeing).to(options.device)
    convert_conv2d_weight_memory_format(model.unet, torch.channels_last)
    if options.init is not None:
        model.unet.load_state_dict(load(options.init)[1].unet.state_dict())
    if options.sharpness is not None:
        generator = torch.Generator().manual_seed(options.seed)
        similarity_kernel(model.unet, generator, options.sharpness, options.kernel_noise)
    average = copy.deepcopy(model).requires_grad_(False)
    optimizer, balance = Optimizer(model, options.attention_rate), Balance()
    step = 0
    if state_file.exists():
        state = torch.load(state_file, weights_only=True, map_location=options.device)
        model.load_state_dict(state["model"])
        average.load_state_dict(state["average"])
        optimizer.load_state(state["optimizer"])
        balance.typical = state["typical"].cpu()
        step = state["step"]
    config = SHAPES
    levels = discrete_sigmas(config.noise).float().to(options.device)
    sides = [side for side, count in options.stages for _ in range(count)]
    steps = len(sides)
    began, first, losses = time.time(), step, []
    while step < steps:
        rng = random.Random(f"unet {options.seed} {step}")
        torch.manual_seed(step)
        side = sides[step]
        count = options.batch if side < SHAPES.size else options.batch // 2
        images, captions = batch_of_pictures(rng, count, side)
        with torch.no_grad(), torch.autocast(options.device, torch.bfloat16, enabled=options.bf16):
            latents = vae.encode(images.to(options.device)).float()
        share = noise_levels(count)
        timestep = (share * config.noise.steps).long().to(options.device)
        # Offset noise (as in SDXL's own training, twice as strong): without it even the noisiest latent shows its mean,
        # the model reads the background off that, and at sampling, where the mean is 0, no caption makes it white.
        noise = (torch.randn(latents.shape) + 0.1 * torch.randn(count, latents.shape[1], 1, 1)).to(options.device)
        sigma = levels[timestep]
        noisy = (latents + sigma[:, None, None, None] * noise) / (1 + sigma.square()).sqrt()[:, None, None, None]
        ids, ids_2 = (each.to(options.device) for each in tokenizer(captions))
        drop = (torch.rand(count) < 0.1).to(options.device)
        with ProductAttention(), torch.autocast(options.device, torch.bfloat16, enabled=options.bf16):
            words = model.text(ids, ids_2)
            predicted = model(noisy, timestep, words.zeroed(drop), side)
            seen = model.thumbnails.loss(words, images.to(options.device))
        errors = (predicted.float() - noise).square().mean(dim=(1, 2, 3))
        loss = balance(errors, share).mean() + seen
        losses.append(errors.mean().item())
        optimizer.step(loss, options.rate * warm_then_decay(step, steps, warm=50, decay=1.0))
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
            state = {"model": model.state_dict(), "average": average.state_dict(), "optimizer": optimizer.state()}
            save_state(state_file, state | {"typical": balance.typical, "step": step})
            save(options.run / "shapes.safetensors", config, Modules(average.unet, vae, average.text))
        if step % options.watch_every == 0 or step == steps:
            sdxl = SDXL(config, average.unet, vae, average.text, tokenizer)
            log(options.run / "watch.csv", step=step, **watch(sdxl))
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

    def condition(words: TextEmbeddings) -> UNetInputs:
        return UNetInputs(words.context, words.vector(sizes, config.size_channels))

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
    parser.add_argument(
        "--init",
        type=Path,
        help="checkpoint to go on from, where the run has no state: keeps its VAE's encoder, but for --teach",
    )
    parser.add_argument(
        "--teach", choices=COLORS, metavar="COLOR", help="with --init: train the VAE's encoder, too, on this new color"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--bf16", action=argparse.BooleanOptionalAction, default=True, help="bfloat16 autocast (U-Net)")
    parser.add_argument("--vae-steps", type=int, default=1600, help="(default: %(default)s)")
    parser.add_argument("--text-steps", type=int, default=800, help="of the text encoders alone")
    parser.add_argument(
        "--stages",
        type=parse_stages,
        default="64:400,128:300,256:3000",
        metavar="SIDE:STEPS,...",
        help="U-Net steps at each picture side in pixels (default: %(default)s)",
    )
    parser.add_argument("--batch", type=int, default=32, help="pictures a step; half of it at full size")
    parser.add_argument(
        "--rate", type=float, default=1.0, help="share of the full learning rates to begin with, less after --init"
    )
    parser.add_argument("--cfg", type=float, default=4.0, help="guidance scale of the sample grids")
    parser.add_argument(
        "--sharpness",
        type=float,
        metavar="S2",
        help="start all self-attention from a similarity kernel of this s^2, such as 10 (tools/likeness.py)",
    )
    parser.add_argument(
        "--kernel-noise", type=float, default=NOISE, metavar="A", help="with --sharpness: a (default: %(default)s)"
    )
    parser.add_argument(
        "--attention-rate",
        type=float,
        default=1.0,
        metavar="SHARE",
        help="share of the learning rate that query and key maps of self-attention have (default: %(default)s)",
    )
    parser.add_argument("--watch-every", type=int, default=200, help="U-Net steps between two looks at self-attention")
    parser.add_argument("--grid-every", type=int, default=200, help="U-Net steps between two sample grids")
    options = parser.parse_args()
    if options.teach is not None and options.init is None:
        parser.error(f"--teach is {options.teach} without --init, expected both: from nothing, all colors are learned")
    tokenizer = Tokenizer.from_directory(TOKENIZER, SHAPES.text)
    train_unet(options, train_vae(options), train_text(options, tokenizer), tokenizer)


if __name__ == "__main__":
    main()
