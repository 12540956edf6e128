"""Inpainting: what a mask shows in white is drawn anew, and the rest of a picture stays.

With a U-Net of 4 input channels, the latent outside of the mask is set back to the picture's after each step, with the
noise of that level (Blended Latent Diffusion, arXiv:2206.02779). The U-Net of an inpainting model sees the mask and the
masked picture instead, as 5 further channels, and nothing is set back. Both as in diffusers'
``StableDiffusionXLInpaintPipeline``. In the end the pixels outside of the mask are the picture's own, as in web UIs.
Shapes: latents (B, 4, h, w); masks of latents (1, 1, h, w), 1 where they are drawn anew.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image
from torch import Tensor

from atedm.plan import TokenPlan
from minisdxl.config import ModelConfig
from minisdxl.images import encode_pixels, to_pixels, to_rgb
from minisdxl.sampler import Denoiser, NoisePredictor, Solver
from minisdxl.settings import CheckedSettings, Settings, check_pictures
from minisdxl.steps.evaluate import Tensors, evaluator
from minisdxl.steps.plan import StepPlan
from minisdxl.unet import PromptKV
from minisdxl.vae import VAE

WHITE = 128  # shades of 0 to 255 from here on are drawn anew, as in diffusers


@dataclass(frozen=True)
class MaskedPicture:
    """A picture and the mask of what is drawn anew in it, on the device of the model."""

    picture: Image.Image  # RGB, of the size that is drawn
    mask: Image.Image  # "L", of the same size
    latent: Tensor  # of the picture: (1, 4, h, w)
    region: Tensor  # (1, 1, h, w)
    pure_noise: bool  # at strength 1: the old picture does not show in what is drawn anew
    channels: Tensor | None  # what an inpainting model's U-Net sees beside the latent: (1, 5, h, w); else None

    @property
    def start(self) -> Tensor | None:
        """The latent that the first x is made of, with noise; ``None`` for noise alone."""
        return None if self.pure_noise else self.latent

    def blend(self, x: Tensor, sigma: float, noise: Tensor) -> Tensor:
        """``x`` where it is drawn anew, and the picture's latent with noise of level ``sigma`` elsewhere."""
        return torch.where(self.region > 0, x, self.latent + sigma * noise)


def find_masked(vae: VAE, asked: Settings, run: CheckedSettings, config: ModelConfig) -> MaskedPicture | None:
    """The picture and the mask of checked settings; ``None`` without a mask.

    Both are stretched to the size that is drawn. A latent with any white pixel is drawn anew.

    Raises:
        ValueError: for a mask without an image or without white, and for an inpainting model without a mask.
        ArithmeticError: if the VAE encoder overflows.
    """
    check_pictures(config, asked.image is not None, asked.mask is not None)
    if asked.image is None or asked.mask is None:
        return None
    picture = to_rgb(asked.image).resize(run.size, Image.Resampling.LANCZOS)
    mask = to_rgb(asked.mask).convert("L").resize(run.size, Image.Resampling.BILINEAR)
    white = check_white(mask)
    pixels = to_pixels(picture, run.size)
    anew = rearrange(torch.from_numpy(np.array(white)), "h w -> 1 1 h w") / 255
    # NOTE: diffusers takes one pixel of each latent's, so thin lines of a mask may be lost there.
    region = F.max_pool2d(anew, vae.config.downscale).to(vae.quant_conv.weight.device)
    channels = torch.cat([region, encode_pixels(vae, pixels * (1 - anew))], dim=1) if config.inpaints else None
    return MaskedPicture(picture, mask, encode_pixels(vae, pixels), region, run.first == 0, channels)


def check_white(mask: Image.Image) -> Image.Image:
    """The mask in white where the picture is drawn anew, else black ("L"). Raises ``ValueError`` if nothing is."""
    white = mask.convert("L").point([255 * (shade >= WHITE) for shade in range(256)])
    if white.getbbox() is None:
        raise ValueError("the mask has no white, expected white where the picture is to be drawn anew")
    return white


class InpaintingUNet:
    """The U-Net of an inpainting model, called like one of 4 channels."""

    def __init__(self, unet: NoisePredictor[PromptKV], channels: Tensor) -> None:
        """``channels`` (1, 5, h, w) are the mask and the latent of the picture, gray where it is drawn anew."""
        self.unet, self.channels = unet, channels

    def project_context(self, context: Tensor) -> PromptKV:
        """As :meth:`UNet.project_context`."""
        return self.unet.project_context(context)

    def __call__(self, x: Tensor, c_noise: Tensor, text: PromptKV, vector: Tensor, plan: TokenPlan) -> Tensor:
        """As :meth:`UNet.forward`."""
        return self.unet(self._with_channels(x), c_noise, text, vector, plan)

    def evaluate(self, plan: StepPlan, x: Tensor, *inputs: Any) -> tuple[Tensor, Tensors]:
        """As :func:`minisdxl.steps.evaluate.evaluate`."""
        return evaluator(self.unet)(plan, self._with_channels(x), *inputs)

    def _with_channels(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.channels.to(x).expand(len(x), -1, -1, -1)], dim=1)


def masked_unet(unet: NoisePredictor[PromptKV], masked: MaskedPicture | None) -> NoisePredictor[PromptKV]:
    """The U-Net as the sampler calls it."""
    return unet if masked is None or masked.channels is None else InpaintingUNet(unet, masked.channels)


def masked_solver(solver: Solver, masked: MaskedPicture | None) -> Solver:
    """A solver that keeps the latent outside of the mask; the same one without a mask, or for an inpainting model.

    What the denoiser sees is set back as well as what is yielded, so it does not matter what a solver carries over from
    step to step, nor at which noise levels it calls the denoiser.
    """
    if masked is None or masked.channels is not None:
        return solver

    def keeping(
        denoiser: Denoiser, x: Tensor, sigmas: Tensor, generators: Sequence[torch.Generator]
    ) -> Iterator[Tensor]:
        first = float(sigmas[0])
        noise = x / math.sqrt(1 + first**2) if masked.pure_noise else (x - masked.latent) / first

        def denoise_kept(x: Tensor, sigma: float, step: int) -> Tensor:
            if sigma != first:  # there x is what the run starts from
                x = masked.blend(x, sigma, noise)
            return masked.blend(denoiser(x, sigma, step), 0.0, noise)

        for sigma, each in zip(sigmas[1:].tolist(), solver(denoise_kept, x, sigmas, generators), strict=True):
            yield masked.blend(each, sigma, noise)

    return keeping


def with_picture(images: list[Image.Image], masked: MaskedPicture | None) -> list[Image.Image]:
    """Generated pictures with the pixels of the masked one where the mask is black; shades of gray blend both."""
    if masked is None:
        return images
    return [Image.composite(image, masked.picture, masked.mask) for image in images]
