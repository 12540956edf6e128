"""Trains the bundled model's VAE, the first part of ``tools.train_shapes``."""

from __future__ import annotations

import argparse
import copy
import math
import random
import time

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import convert_conv2d_weight_memory_format

from minisdxl.checkpoint.modules import load
from minisdxl.config import SHAPES
from minisdxl.vae import VAE
from tools.drawn.world import parse_caption
from tools.training.batches import BatchSize, DrawnBatches, draw_ahead, draw_batch, to_images
from tools.training.steps import log, save_state, warm_then_decay


def train_vae(options: argparse.Namespace) -> VAE:
    """Trains the autoencoder, or returns the one of a finished run.

    The loss is L1 + L2, with noise on the latent, because the decoder must tolerate errors of the U-Net. Three latent
    channels are pulled towards the picture at latent size. Otherwise so small a VAE puts all colors on one curve, where
    a blur between two colors is a third color. The Kullback-Leibler term only bounds the variances.

    With ``options.init`` only the decoder of that model is trained, because its U-Net depends on the latents. With
    ``options.teach``, a color or "open", the encoder is trained too, and pulled towards its old latents on
    pictures that show neither.
    """
    state_file = options.run / "vae.pt"
    vae = VAE(SHAPES.vae)
    trained: nn.Module = vae
    noise, known = 0.1, None
    if options.init is not None:
        vae.load_state_dict(load(options.init)[1].vae.state_dict())
        known = copy.deepcopy(vae).requires_grad_(False).to(options.device)
        noise = 0.3  # a trained decoder can learn to tolerate more noise
        if options.teach is None:
            trained = nn.ModuleList([vae.requires_grad_(False).post_quant_conv, vae.decoder]).requires_grad_(True)
    vae.to(options.device)
    convert_conv2d_weight_memory_format(vae, torch.channels_last)
    optimizer = torch.optim.AdamW(trained.parameters(), lr=2e-3, betas=(0.9, 0.99), weight_decay=0.0)
    step = 0
    if state_file.exists():
        state = torch.load(state_file, weights_only=True, map_location=options.device)
        vae.load_state_dict(state["vae"])
        step = state["step"]
        if step < options.vae_steps:  # a finished one may have trained other parts than this run would
            optimizer.load_state_dict(state["optimizer"])
    began = time.time()
    sizes = [_batch_size(step, options.batch) for step in range(options.vae_steps)]
    for pictures, captions in draw_ahead(DrawnBatches("vae", options.seed, sizes), step, options.workers):
        torch.manual_seed(step)
        images = to_images(pictures, options.device)
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * warm_then_decay(step, options.vae_steps, warm=50, decay=0.5)
        mean, log_variance = vae.moments(images)
        noisy = mean + noise * torch.rand(len(mean), 1, 1, 1, device=mean.device) * torch.randn_like(mean)
        output = vae.decode(noisy * vae.config.scale_factor)
        divergence = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
        if known is None:
            held = F.mse_loss(mean[:, :3], 1.5 * F.avg_pool2d(images, SHAPES.vae.downscale))
        else:
            with torch.no_grad():
                was = known.moments(images)[0]
            old = torch.tensor([not _shows(options.teach, caption) for caption in captions], device=mean.device)
            held = 10 * (old * (mean - was).square().mean(dim=(1, 2, 3))).mean()
        error = F.mse_loss(output, images)
        loss = F.l1_loss(output, images) + error + held + 1e-5 * divergence
        optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(trained.parameters(), 1.0)
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
    if options.init is None:
        pictures, _ = draw_batch(random.Random("latent scale"), BatchSize(64, SHAPES.size, SHAPES.size))
        balance_latents(vae, to_images(pictures, options.device))
    return vae


def _batch_size(step: int, batch: int) -> BatchSize:
    """The batch size of a step: mostly small crops, to save time, and some larger ones for the middle attention.

    They are crops of full-size pictures, because patterns of smaller pictures are too fine for a latent.
    """
    if step % 16 == 15:
        return BatchSize(max(1, batch // 8), SHAPES.size, SHAPES.size)
    side, share = (SHAPES.size // 2, 4) if step % 4 == 3 else (SHAPES.size // 4, 2)
    return BatchSize(max(1, batch // share), side, SHAPES.size)


def _shows(taught: str | None, caption: str) -> bool:
    """Whether a picture can show ``taught``: its caption names that color, or is open."""
    return taught is not None and (taught in caption.split() or parse_caption(caption).open)


@torch.no_grad()
def balance_latents(vae: VAE, images: Tensor) -> None:
    """Scales every latent channel to mean 0 and variance 1 on ``images``, in the 1x1 convolutions before and after it.

    Decoded pictures do not change. Diffusion adds the same noise to all channels, so a channel of small variance would
    appear late in sampling and have little weight.
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
