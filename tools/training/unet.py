"""Trains the bundled model's U-Net and its text encoders together: the last part of ``tools.train_shapes``."""

from __future__ import annotations

import argparse
import copy
import time

import numpy as np
import torch
from einops import rearrange
from PIL import Image
from torch import Tensor
from torch.nn.utils import convert_conv2d_weight_memory_format

from minisdxl.checkpoint.atomic import atomic_path
from minisdxl.checkpoint.modules import Modules, load, save
from minisdxl.config import SHAPES
from minisdxl.pipeline import SDXL
from minisdxl.prompting.encoders import PromptEncoders
from minisdxl.tokenizer import Tokenizer
from minisdxl.vae import VAE
from tools.drawn.detector import check
from tools.drawn.world import mixed_captions
from tools.training.batches import BatchSize, DrawnBatches, draw_ahead
from tools.training.learning import Learner, RecordedLearner
from tools.training.lessons import Lesson, NoisyPictures, OwnSampling
from tools.training.likeness import similarity_kernel, watch
from tools.training.model import Model
from tools.training.steps import Balance, Optimizer, log, save_state, warm_then_decay
from tools.training.teacher import Teacher
from tools.training.text import SeeingText


def train_unet(options: argparse.Namespace, vae: VAE, seeing: SeeingText, tokenizer: Tokenizer) -> None:
    """Trains U-Net and text encoders on latents of new pictures, first small ones, then full-size ones.

    What is learned, and from what, is in ``lessons``. The loss is the squared error, balanced over noise levels, plus
    the loss of the text encoders' thumbnails. The saved weights are an exponential moving average over few steps,
    because weights from before a change of picture size do harm.
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
    sizes = [
        BatchSize(options.batch if side < SHAPES.size else options.batch // 2, side, side)
        for side, count in options.stages
        for _ in range(count)
    ]
    steps = len(sizes)
    optimizer, balance = Optimizer(model, options.attention_rate), Balance(options.device)
    state = None
    if state_file.exists():
        state = torch.load(state_file, weights_only=True, map_location=options.device)
        model.load_state_dict(state["model"])
        average.load_state_dict(state["average"])
        optimizer.load_state(state["optimizer"])
        balance.typical.copy_(state["typical"])
    step = 0 if state is None else state["step"]
    lesson: Lesson
    if options.own_sampling and teacher is not None:
        lesson = OwnSampling(model, teacher, tokenizer, options)
    else:
        drawn = draw_ahead(DrawnBatches("unet", options.seed, sizes, options.world), step, options.workers)
        lesson = NoisyPictures(model, teacher, vae, tokenizer, drawn)
    if state is not None:
        lesson.load_state(state["lesson"])
    config, device = SHAPES, torch.device(options.device)
    kind = RecordedLearner if device.type == "cuda" else Learner
    learn = kind(lesson, model, average, teacher, optimizer, balance, options.bf16)
    sdxl = SDXL(config, average.unet, vae, PromptEncoders(average.text), tokenizer)
    began, first, losses = time.time(), step, list[Tensor]()
    while step < steps:
        rate = options.rate * warm_then_decay(step, steps, warm=50, decay=1.0)
        weight = 1 - min(0.99, (2 + step) / (11 + step))
        inputs = lesson.inputs(step, sizes[step])  # made while a GPU still does the step before
        losses.append(learn(*torch.tensor([rate, weight], device=device), *inputs))
        side = sizes[step].side
        step += 1
        if step % 20 == 0:
            mean = torch.stack(losses).mean().item()
            seconds = (time.time() - began) / (step - first)
            log(options.run / "unet.csv", step=step, side=side, loss=mean, seconds_per_step=seconds)
            losses = []
        if _due(step, options.save_every, steps):
            state = {"model": model.state_dict(), "average": average.state_dict(), "optimizer": optimizer.state()}
            state |= {"typical": balance.typical, "lesson": lesson.state(), "step": step}
            save_state(state_file, state)
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
    captions = mixed_captions(options.grid_pictures)
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
