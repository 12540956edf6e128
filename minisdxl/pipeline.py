"""Prompt to picture, in one readable function: :meth:`SDXL.generate`.

Shapes: B prompts; latents (B, 4, h, w) with h and w the picture's sides over ``VAEConfig.downscale``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from einops import rearrange
from PIL import Image
from torch import Tensor
from torch.nn.utils import convert_conv2d_weight_memory_format

from atedm.plan import DENSE, TokenPlan
from atedm.presets import parse_preset
from atedm.schedule import Schedule
from minisdxl import checkpoint
from minisdxl.config import ModelConfig
from minisdxl.sampler import Condition, guided_denoiser, image_generators, initial_noise, sample, sigmas
from minisdxl.text import Conditioning, TextEncoders
from minisdxl.tokenizer import Tokenizer, find_vocabulary
from minisdxl.unet import UNet
from minisdxl.vae import VAE

BUNDLED = {"shapes": Path(__file__).parents[1] / "weights" / "shapes" / "shapes.safetensors"}
StepCallback = Callable[[int, Tensor], None]  # (step, latent after it)


@dataclass(frozen=True)
class SDXL:
    """A whole model: what :func:`load` returns."""

    config: ModelConfig
    unet: UNet
    vae: VAE
    text: TextEncoders
    tokenizer: Tokenizer

    @property
    def device(self) -> torch.device:
        """Where the model runs."""
        return next(self.unet.parameters()).device

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[str],
        *,
        negative: str = "",
        steps: int = 50,
        cfg: float = 7.0,
        seed: int = 0,
        prune: str | Schedule | None = None,
        size: tuple[int, int] | None = None,
        on_step: StepCallback | None = None,
    ) -> list[Image.Image]:
        """Pictures of ``prompts``, all in one batch; picture i starts from the noise of ``seed + i``.

        Args:
            prompts: what to draw, one picture each.
            negative: what to guide away from; empty means the zeros that SDXL was trained with.
            steps: denoising steps, 1 to 1000.
            cfg: classifier-free guidance scale; 1 means none, at half the cost.
            seed: of the first picture, 0 to 2**32 - 1.
            prune: a token-pruning preset such as ``"at-edm"`` or ``"at-edm:rho=0.5,tau=10"``, or ``None`` for dense.
            size: (width, height) in pixels, multiples of 8; ``None`` for the model's own.
            on_step: called after each step with its number, from 0, and the latent (B, 4, h, w).

        Raises:
            ValueError: for arguments out of range.
            ArithmeticError: if a part of the model overflows; names the part.
        """
        if not prompts or isinstance(prompts, str):
            raise ValueError(f"prompts is {prompts!r}, there are no prompts in it; expected a list of strings")
        if not math.isfinite(cfg):
            raise ValueError(f"guidance scale cfg is {cfg}, expected a finite number, such as 7.0")
        plans = self.plans(prune, steps)
        width, height = self.config.picture_size(size)
        device, dtype = self.device, self.unet.dtype
        sizes = torch.tensor([[height, width, 0, 0, height, width]], device=device).expand(len(prompts), -1)

        def condition(words: Conditioning) -> Condition:
            vector = words.vector(sizes, self.config.size_channels)
            return Condition(finite("the text encoders", words.context).to(dtype), vector.to(dtype))

        positive = condition(self.text.encode(prompts, self.tokenizer))
        unconditional = condition(self.text.encode_negative([negative] * len(prompts), self.tokenizer))
        denoiser = guided_denoiser(self.unet, positive, unconditional, cfg, lambda step: plans[step], self.config.noise)

        levels = sigmas(steps, self.config.noise)
        generators = image_generators(range(seed, seed + len(prompts)))
        f = self.config.vae.downscale
        shape = (self.config.vae.latent_channels, height // f, width // f)
        noise = initial_noise(generators, shape, float(levels[0])).to(device)
        for step, x in enumerate(sample(denoiser, noise, levels, generators)):
            if on_step is not None:
                on_step(step, x)

        pictures = finite("the VAE decoder", self.vae.decode(finite("the U-Net", x)))
        return [to_image(picture) for picture in pictures]

    def plans(self, prune: str | Schedule | None, steps: int) -> list[TokenPlan]:
        """The token plan of each of ``steps`` steps. Raises ``ValueError`` for a preset that does not exist or fit."""
        if prune is None:
            return [DENSE] * steps
        schedule = parse_preset(prune) if isinstance(prune, str) else prune
        sites = list(self.config.unet.attention_sites())
        return [schedule.plan(step, steps, sites) for step in range(steps)]


def load(
    weights: str | Path = "shapes",
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    tokenizer: str | Path | None = None,
) -> SDXL:
    """Reads a model.

    Args:
        weights: ``"shapes"``, the bundled model, or a single-file checkpoint in the official layout.
        device: where it runs.
        dtype: of U-Net and text encoders, and of the VAE unless it is fp16: the official VAE overflows in fp16.
        tokenizer: folder with CLIP's ``vocab.json`` and ``merges.txt``; ``None`` looks for it as
            :func:`minisdxl.tokenizer.find_vocabulary` says.

    Raises:
        CheckpointError: if the file is damaged or holds no SDXL model; says what it is.
        FileNotFoundError: if there is no vocabulary.
    """
    path = weights_path(weights)
    vocabulary = find_vocabulary(path, tokenizer)
    config, modules = checkpoint.load(path, device, dtype)
    # Convolutions run faster on pixels with their channels side by side, and a token set is then a view.
    for module in (modules.unet, modules.vae):
        convert_conv2d_weight_memory_format(module, torch.channels_last)
    return SDXL(config, *modules, Tokenizer.from_directory(vocabulary, config.text))


def weights_path(weights: str | Path) -> Path:
    """The file of a bundled model's name, or of a path."""
    return BUNDLED.get(str(weights), Path(weights))


def finite(part: str, values: Tensor) -> Tensor:
    """``values``, unless one is infinite or no number: then ``ArithmeticError`` names the part that gave them."""
    bad = values.numel() - int(values.isfinite().sum())
    if bad:
        raise ArithmeticError(
            f"{part} gave {bad} of {values.numel()} values that are not finite numbers in {values.dtype}; "
            "try fp32 or bf16, and weights that are known to be good"
        )
    return values


def to_image(picture: Tensor) -> Image.Image:
    """A picture (3, H, W) in [-1, 1], beyond which it is clipped."""
    pixels = rearrange(picture.float().add(1).mul(127.5).clamp(0, 255).round().byte(), "c h w -> h w c")
    return Image.fromarray(pixels.cpu().numpy())
