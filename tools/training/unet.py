"""Trains the bundled model's U-Net and its text encoders together: the last part of ``tools.train_shapes``."""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
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

from minisdxl.checkpoint.atomic import atomic_path
from minisdxl.checkpoint.modules import Modules, load, save
from minisdxl.config import SHAPES
from minisdxl.pipeline import SDXL
from minisdxl.preconditioning import discrete_sigmas
from minisdxl.prompting.encoders import PromptEncoders
from minisdxl.text import TextEmbeddings
from minisdxl.tokenizer import Tokenizer
from minisdxl.transformer import AttentionBlock
from minisdxl.unet import ResBlock, UNet
from minisdxl.vae import VAE
from tools.drawn.detector import check
from tools.drawn.world import unseen_captions
from tools.training.batches import BatchSize, DrawnBatches, draw_ahead, to_images
from tools.training.likeness import similarity_kernel, watch
from tools.training.steps import Balance, Optimizer, log, noise_levels, save_state, warm_then_decay
from tools.training.text import SeeingText


def zero(module: nn.Module) -> None:
    """Sets all weights of a module to 0."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)


class Model(nn.Module):
    """The U-Net and the text encoders, which the last part trains together."""

    def __init__(self, seeing: SeeingText) -> None:
        super().__init__()
        self.unet = UNet(SHAPES.unet)
        self.text, self.thumbnails = seeing.text, seeing.thumbnails
        for module in self.unet.modules():  # official initialization: every residual branch starts at 0
            if isinstance(module, ResBlock):
                zero(module.out_layers[3])
            elif isinstance(module, AttentionBlock):
                zero(module.proj_out)
        zero(self.unet.out[2])

    def forward(self, latents: Tensor, timestep: Tensor, words: TextEmbeddings, side: int) -> Tensor:
        """Predicts the noise in latents (B, 4, h, w) of pictures with ``side`` pixels."""
        sizes = torch.tensor([[side, side, 0, 0, side, side]], device=latents.device).expand(len(latents), -1)
        predicted: Tensor = self.unet(latents, timestep, words.context, words.vector(sizes, SHAPES.size_channels))
        return predicted


class Teacher:
    """A trained model whose predictions are the student's target instead of the noise (Hinton et al. 2015).

    Unlike the noise, this target has no randomness. The student starts from the teacher's weights, with some replaced:
    here self-attention starts from a similarity kernel. :meth:`hint` also compares the outputs of the attention blocks
    (Romero et al. 2015, "FitNets").
    """

    HINT = 10.0  # weight of :meth:`hint` in the loss

    def __init__(self, path: Path, student: UNet, device: torch.device | str) -> None:
        taught = load(path, device)[1]
        convert_conv2d_weight_memory_format(taught.unet, torch.channels_last)
        self.unet, self.text = taught.unet.requires_grad_(False), taught.text.requires_grad_(False)
        self.features = {"student": list[Tensor](), "teacher": list[Tensor]()}
        for who, unet in (("student", student), ("teacher", self.unet)):
            for block in unet.modules():
                if isinstance(block, AttentionBlock):
                    block.register_forward_hook(partial(self._see, who))

    def _see(self, who: str, _block: nn.Module, _inputs: object, output: Tensor) -> None:
        self.features[who].append(output.float())

    def hint(self) -> Tensor:
        """How far the student's attention blocks are from the teacher's, since the last call.

        Squared error of each block's output over the variance of the teacher's, mean over blocks and pictures.
        """
        student, teacher = self.features["student"], self.features["teacher"]
        errors = [
            ((ours - theirs).square().mean(dim=(1, 2, 3)) / theirs.var(dim=(1, 2, 3))).mean()
            for ours, theirs in zip(student, teacher, strict=True)
        ]
        student.clear()
        teacher.clear()
        return torch.stack(errors).mean()

    @torch.no_grad()
    def __call__(self, x: Tensor, timestep: Tensor, ids: Tensor, ids_2: Tensor, drop: Tensor, side: int) -> Tensor:
        """The teacher's prediction (B, 4, h, w) for the same noisy latents and captions."""
        words = self.text(ids, ids_2).zeroed(drop)
        sizes = torch.tensor([[side, side, 0, 0, side, side]], device=x.device).expand(len(x), -1)
        predicted: Tensor = self.unet(x, timestep, words.context, words.vector(sizes, SHAPES.size_channels))
        return predicted.float()


class ProductAttention(TorchFunctionMode):
    """A context in which attention with a small map runs as two matrix products and a softmax.

    It is for training on a CPU, where the backward pass of the fused bfloat16 kernel is up to five times slower.
    """

    LARGEST_MAP = 512 * 512  # queries x keys; larger maps do not fit the caches, and the fused kernel is faster

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
    """Trains U-Net and text encoders on latents of new pictures, first small ones, then full-size ones.

    The target is the noise (epsilon prediction) or, with ``options.teacher``, the teacher's prediction. The loss is the
    squared error, balanced over noise levels, plus the loss of the text encoders' thumbnails. The saved weights are an
    exponential moving average over few steps, because weights from before a change of picture size do harm.
    """
    state_file = options.run / "unet.pt"
    torch.manual_seed(options.seed)
    model = Model(seeing).to(options.device)
    convert_conv2d_weight_memory_format(model.unet, torch.channels_last)
    if options.init is not None:
        model.unet.load_state_dict(load(options.init)[1].unet.state_dict())
    if options.sharpness:
        generator = torch.Generator().manual_seed(options.seed)
        similarity_kernel(model.unet, generator, options.sharpness, options.kernel_noise)
    average = copy.deepcopy(model).requires_grad_(False)
    teacher = None if options.teacher is None else Teacher(options.teacher, model.unet, options.device)
    optimizer, balance = Optimizer(model, options.attention_rate), Balance()
    step = 0
    if state_file.exists():
        state = torch.load(state_file, weights_only=True, map_location=options.device)
        model.load_state_dict(state["model"])
        average.load_state_dict(state["average"])
        optimizer.load_state(state["optimizer"])
        balance.typical = state["typical"]
        step = state["step"]
    config, device = SHAPES, torch.device(options.device)
    precision = torch.autocast(device.type, torch.bfloat16, enabled=options.bf16)
    levels = discrete_sigmas(config.noise).float().to(device)
    sizes = [
        BatchSize(options.batch if side < SHAPES.size else options.batch // 2, side, side)
        for side, count in options.stages
        for _ in range(count)
    ]
    steps = len(sizes)
    sdxl = SDXL(config, average.unet, vae, PromptEncoders(average.text), tokenizer)
    began, first, losses = time.time(), step, list[Tensor]()
    for pictures, captions in draw_ahead(
        DrawnBatches("unet", options.seed, sizes, options.world), step, options.workers
    ):
        torch.manual_seed(step)
        count, side = sizes[step].count, sizes[step].side
        images = to_images(pictures, device)
        with torch.no_grad(), precision:
            latents = vae.encode(images).float()
        share = noise_levels(count).to(device)
        timestep = (share * config.noise.steps).long()
        # Offset noise, as in SDXL's own training but twice as strong. Without it the noisiest latent still shows its
        # mean. The model then takes the background from it, and at sampling, where it is 0, no caption makes it white.
        noise = (torch.randn(latents.shape) + 0.1 * torch.randn(count, latents.shape[1], 1, 1)).to(device)
        sigma = levels[timestep]
        noisy = (latents + sigma[:, None, None, None] * noise) / (1 + sigma.square()).sqrt()[:, None, None, None]
        ids, ids_2 = (each.to(device) for each in tokenizer(captions))
        drop = (torch.rand(count) < 0.1).to(device)
        with ProductAttention() if device.type == "cpu" else nullcontext(), precision:
            words = model.text(ids, ids_2)
            predicted = model(noisy, timestep, words.zeroed(drop), side)
            seen = model.thumbnails.loss(words, images)
            target = noise if teacher is None else teacher(noisy, timestep, ids, ids_2, drop, side)
        errors = (predicted.float() - target).square().mean(dim=(1, 2, 3))
        loss = balance(errors, share).mean() + seen
        if teacher is not None:
            loss = loss + Teacher.HINT * teacher.hint()
        losses.append(errors.detach().mean())
        optimizer.step(loss, options.rate * warm_then_decay(step, steps, warm=50, decay=1.0))
        step += 1
        weight = 1 - min(0.99, (1 + step) / (10 + step))
        with torch.no_grad():
            for kept, fresh in zip(average.parameters(), model.parameters(), strict=True):
                kept.lerp_(fresh, weight)
        if step % 20 == 0:
            mean = torch.stack(losses).mean().item()
            seconds = (time.time() - began) / (step - first)
            log(options.run / "unet.csv", step=step, side=side, loss=mean, seconds_per_step=seconds)
            losses = []
        if _due(step, 100, steps):
            state = {"model": model.state_dict(), "average": average.state_dict(), "optimizer": optimizer.state()}
            save_state(state_file, state | {"typical": balance.typical, "step": step})
            save(options.run / "shapes.safetensors", config, Modules(average.unet, vae, average.text))
        if _due(step, options.watch_every, steps):
            log(options.run / "watch.csv", step=step, **watch(sdxl, options.watch_pictures))
        if _due(step, options.grid_every, steps):
            accuracy = sample_grid(options, step, sdxl, side)
            log(options.run / "grid.csv", step=step, side=side, accuracy=accuracy)
    if options.out is not None:
        save(options.out, config, Modules(average.unet, vae, average.text))


def _due(step: int, every: int, steps: int) -> bool:
    """Whether ``step`` of ``steps`` is a multiple of ``every``, or the last one; never for ``every`` 0."""
    return every > 0 and (step % every == 0 or step == steps)


@torch.no_grad()
def sample_grid(options: argparse.Namespace, step: int, sdxl: SDXL, side: int) -> float:
    """Samples unseen captions in 20 steps, writes them as one picture, and returns the caption accuracy."""
    captions = unseen_captions(options.grid_pictures)
    with torch.autocast(sdxl.device.type, torch.bfloat16, enabled=options.bf16):
        images = sdxl.generate(captions, sampling="euler", steps=20, cfg=options.cfg, seed=0, size=(side, side))
    pictures = np.stack([np.asarray(image) for image in images])
    checks = [check(picture, caption) for picture, caption in zip(pictures, captions, strict=True)]
    for caption, found in zip(captions, checks, strict=True):
        print(f"  {'right' if found.right else 'wrong'}: {caption}; {'; '.join(found.reasons[:2])}", flush=True)
    grid = rearrange(pictures, "(row column) h w c -> (row h) (column w) c", column=4)
    with atomic_path(options.run / f"grid-{step:05d}.png") as path:
        Image.fromarray(grid).save(path)
    return sum(found.right for found in checks) / len(checks)
