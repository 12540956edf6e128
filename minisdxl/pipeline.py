"""Prompt to picture, in one readable function: :meth:`SDXL.generate`.

Shapes: B prompts; latents (B, 4, h, w) with h and w the picture's sides over ``VAEConfig.downscale``.
"""

from __future__ import annotations

import gc
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from einops import rearrange
from PIL import Image
from torch import Tensor

from atedm.plan import DENSE, TokenPlan
from atedm.presets import parse_preset
from atedm.schedule import Schedule
from minisdxl import checkpoint, cpu
from minisdxl.config import ModelConfig
from minisdxl.lora import LoRA
from minisdxl.sampler import Condition, draw_noise, first_step, guided_denoiser, image_generators, initial_noise
from minisdxl.samplings import Sampling, find_sampling
from minisdxl.text import Conditioning, TextEncoders
from minisdxl.tokenizer import Tokenizer, load_vocabulary
from minisdxl.unet import UNet
from minisdxl.vae import VAE, check_tile

if TYPE_CHECKING:
    from minisdxl.compiled import CompiledUNet

BUNDLED = {"shapes": Path(__file__).parents[1] / "weights" / "shapes" / "shapes.safetensors"}
StepCallback = Callable[[int, Tensor], bool | None]  # (step, latent after it); True stops the run


@dataclass(frozen=True)
class EncodedPrompts:
    """What the text encoders said of some prompts: stands in their place when they have left memory."""

    positive: Mapping[str, Conditioning]  # one row each
    negative: Mapping[str, Conditioning]

    def encode(self, prompts: Sequence[str], tokenizer: Tokenizer) -> Conditioning:
        """As :meth:`TextEncoders.encode`. Raises ``ValueError`` for a prompt that was not encoded."""
        return _rows(self.positive, prompts, "prompt")

    def encode_negative(self, prompts: Sequence[str], tokenizer: Tokenizer) -> Conditioning:
        """As :meth:`TextEncoders.encode_negative`. Raises ``ValueError`` for a prompt that was not encoded."""
        return _rows(self.negative, prompts, "negative prompt")


@dataclass(frozen=True)
class SDXL:
    """A whole model: what :func:`load` returns."""

    config: ModelConfig
    unet: UNet
    vae: VAE
    text: TextEncoders | EncodedPrompts
    tokenizer: Tokenizer
    compiled: CompiledUNet | None = None

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
        sampling: str | Sampling = "euler",
        steps: int | None = None,
        cfg: float | None = None,
        seed: int = 0,
        images_per_prompt: int = 1,
        prune: str | Schedule | None = None,
        size: tuple[int, int] | None = None,
        original_size: tuple[int, int] | None = None,
        crop: tuple[int, int] = (0, 0),
        target_size: tuple[int, int] | None = None,
        image: Image.Image | None = None,
        strength: float | None = None,
        tile: int | None = None,
        on_step: StepCallback | None = None,
    ) -> list[Image.Image]:
        """Pictures of ``prompts``, all in one batch; picture i starts from the noise of ``seed + i``.

        Args:
            prompts: what to draw.
            negative: what to guide away from; empty means the zeros that SDXL was trained with.
            sampling: a name in :data:`minisdxl.samplings.SAMPLINGS`, such as ``"dpm++-2m"`` or ``"turbo"``.
            steps: denoising steps, 1 to 1000; ``None`` for the sampling's own.
            cfg: classifier-free guidance scale; 1 means none, at half the cost; ``None`` for the sampling's own.
            seed: of the first picture, 0 to 2**32 - 1.
            images_per_prompt: pictures of each prompt, which follow one another in what is returned.
            prune: a token-pruning preset such as ``"at-edm"`` or ``"at-edm:rho=0.5,tau=10"``, or ``None`` for dense.
            size: (width, height) in pixels, multiples of 8; ``None`` for the sampling's own, or else the model's.
            original_size: (width, height) of the picture before training resized it, as SDXL is told; ``None`` for the
                picture's. Small sizes give blurred pictures.
            crop: (left, top) in pixels, where training cropped the picture, as SDXL is told.
            target_size: (width, height) that training brought the picture to, as SDXL is told; ``None`` for the
                picture's.
            image: a picture to start from, stretched to the picture's size; ``None`` to start from noise.
            strength: with an image, and only then: the share of the steps to run, the last ones, above 0, up to 1.
            tile: decode each picture in strips of so many rows of its latent, which takes less memory and gives the
                same picture; ``None`` to decode all pictures at once.
            on_step: called after each step with its number, from 0 (with an image, from the first step that is run),
                and the latent (B, 4, h, w). When it returns true no more steps are run, and the pictures are what is
                in that latent, noise included.

        Raises:
            ValueError: for arguments out of range.
            ArithmeticError: if a part of the model overflows; names the part.
        """
        _check_prompts(prompts)
        if images_per_prompt < 1:
            raise ValueError(f"images_per_prompt is {images_per_prompt}, expected 1 or more")
        check_tile(tile)
        sampling = find_sampling(sampling) if isinstance(sampling, str) else sampling
        steps = sampling.steps if steps is None else steps
        cfg = sampling.cfg if cfg is None else cfg
        if not math.isfinite(cfg):
            raise ValueError(f"guidance scale cfg is {cfg}, expected a finite number, such as 7.0")
        if cfg == 1 and negative:
            warnings.warn(f"negative prompt {negative!r} has no effect without guidance, at cfg 1", stacklevel=3)
        levels = sampling.sigmas(steps, self.config.noise)
        plans = self.plans(prune, steps)
        if (image is None) != (strength is None):
            raise ValueError(f"strength is {strength} {'without' if image is None else 'with'} an image, expected both")
        first = 0 if strength is None else first_step(steps, strength)
        width, height = sampling.picture_size(self.config, size)
        if size not in (None, (sampling.size, sampling.size)):
            self._warn_outside_buckets(width, height)
        numbers = size_numbers((width, height), original_size, crop, target_size)
        sizes = torch.tensor([numbers], device=self.device).expand(len(prompts), -1)
        generators = image_generators(range(seed, seed + len(prompts) * images_per_prompt))

        def condition(words: Conditioning) -> Condition:
            parts = finite("the text encoders", words.context), words.vector(sizes, self.config.size_channels)
            return Condition(*(part.repeat_interleave(images_per_prompt, dim=0).to(self.unet.dtype) for part in parts))

        positive = condition(self.text.encode(prompts, self.tokenizer))
        unconditional = condition(self.text.encode_negative([negative] * len(prompts), self.tokenizer))
        denoiser = guided_denoiser(
            self.compiled or self.unet,
            positive,
            unconditional,
            cfg,
            lambda step: plans[first + step],
            self.config.noise,
        )
        start = self._start(image, (width, height), float(levels[first]), generators)
        with cpu.freed_memory_kept():
            for step, x in enumerate(sampling.solver(denoiser, start, levels[first:], generators), start=first):
                if on_step is not None and on_step(step, x):
                    break

        pictures = finite("the VAE decoder", self.vae.decode(finite("the U-Net", x), tile))
        return [to_image(picture) for picture in pictures]

    @torch.no_grad()
    def encode_ahead(self, prompts: Sequence[str], negatives: Sequence[str] = ("",)) -> SDXL:
        """This model for pictures of ``prompts``, guided away from ``negatives``, without its text encoders.

        They leave memory with the last reference to ``self``::

            sdxl = minisdxl.load("sd_xl_base_1.0.safetensors", dtype=torch.bfloat16)
            sdxl = sdxl.encode_ahead(["a fox", "an owl"])
            image = sdxl.generate(["a fox"], tile=8)[0]

        What :meth:`generate` then makes is the same but for rounding, because here each prompt is encoded by itself;
        for other prompts it raises ``ValueError``. So does this for no prompts, or one string.
        """
        for texts in (prompts, negatives):
            _check_prompts(texts)
        encoded = EncodedPrompts(
            {prompt: self.text.encode([prompt], self.tokenizer) for prompt in prompts},
            {prompt: self.text.encode_negative([prompt], self.tokenizer) for prompt in negatives},
        )
        return replace(self, text=encoded)

    def compile(self, backend: str = "inductor") -> SDXL:
        """This model with the same U-Net, compiled: slow in its first steps, fast in all others.

        ``backend`` is torch.compile's. It pays from some pictures of one size on; results differ by rounding.
        """
        from minisdxl.compiled import CompiledUNet  # torch's compiler takes a second to import

        return replace(self, compiled=CompiledUNet(self.unet, backend))

    def plans(self, prune: str | Schedule | None, steps: int) -> list[TokenPlan]:
        """The token plan of each of ``steps`` steps. Raises ``ValueError`` for a preset that does not exist or fit."""
        if prune is None:
            return [DENSE] * steps
        schedule = parse_preset(prune) if isinstance(prune, str) else prune
        sites = list(self.config.unet.attention_sites())
        return [schedule.plan(step, steps, sites) for step in range(steps)]

    def _start(
        self, image: Image.Image | None, size: tuple[int, int], sigma: float, generators: Sequence[torch.Generator]
    ) -> Tensor:
        """The first x (B, 4, h, w), at noise level ``sigma``: of noise alone, or of an image's latent and noise."""
        f = self.config.vae.downscale
        shape = (self.config.vae.latent_channels, size[1] // f, size[0] // f)
        if image is None:
            return initial_noise(generators, shape, sigma).to(self.device)
        latent = finite("the VAE encoder", self.vae.encode(to_pixels(image, size).to(self.device)))
        return latent.float() + sigma * draw_noise(generators, shape).to(self.device)

    def _warn_outside_buckets(self, width: int, height: int) -> None:
        nearest = self.config.nearest_bucket((width, height))
        if nearest is not None and (width, height) not in self.config.buckets:
            warnings.warn(
                f"{self.config.name} was not trained on pictures of {width}x{height}; "
                f"the nearest size that it was trained on is {nearest[0]}x{nearest[1]}",
                stacklevel=4,
            )


def load(
    weights: str | Path = "shapes",
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    vae: str | Path | None = None,
    unet: str | Path | None = None,
    loras: Sequence[str | Path | LoRA] = (),
    tokenizer: str | Path | None = None,
) -> SDXL:
    """Reads a model.

    On the CPU, large weights that a file holds in their dtype are mapped into memory and not copied. Such a file may be
    replaced or deleted while the model lives, but not written into, see :meth:`minisdxl.tensorfile.TensorFile.map`.

    Args:
        weights: ``"shapes"``, the bundled model, or a single-file checkpoint in the official layout, or a diffusers
            folder.
        device: where it runs.
        dtype: of U-Net and text encoders. The VAE computes in fp32 (the official one overflows in fp16), unless you
            convert it: ``sdxl.vae.to(dtype)``.
        vae: a file or folder with another VAE, in the official layout or that of diffusers.
        unet: the same for the U-Net, as LCM-SDXL and SDXL-Lightning are published.
        loras: files of LoRAs, as kohya's scripts or diffusers write them, that are merged into U-Net and text encoders
            one after the other: ``"FILE"``, ``"FILE:SCALE"``, or a :class:`minisdxl.lora.LoRA`.
        tokenizer: folder with CLIP's ``vocab.json`` and ``merges.txt``; ``None`` looks for it as
            :func:`minisdxl.tokenizer.load_vocabulary` says.

    Raises:
        CheckpointError: if a file is damaged or holds no SDXL model or LoRA for it; says what it is.
        ValueError: for a LoRA's scale that is no finite number.
        FileNotFoundError: if there is no vocabulary.
    """
    path = weights_path(weights)
    merged = [lora if isinstance(lora, LoRA) else LoRA.parse(str(lora)) for lora in loras]
    with _no_garbage_collection():
        vocabulary = load_vocabulary(path, tokenizer)
        config, modules = checkpoint.load(path, device, dtype, vae=vae, unet=unet, loras=merged)
        return SDXL(config, *modules, Tokenizer(*vocabulary, config.text))


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Puts the collector off, which would look through all objects of torch again and again.

    Loading makes objects by the hundred thousand and drops hardly any.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def weights_path(weights: str | Path) -> Path:
    """The file of a bundled model's name, or of a path."""
    return BUNDLED.get(str(weights), Path(weights))


def _check_prompts(prompts: Sequence[str]) -> None:
    if not prompts or isinstance(prompts, str):
        raise ValueError(f"prompts is {prompts!r}, there are no prompts in it; expected a list of strings")


def _rows(encoded: Mapping[str, Conditioning], prompts: Sequence[str], kind: str) -> Conditioning:
    """The rows of ``prompts``, stacked."""
    for prompt in prompts:
        if prompt not in encoded:
            raise ValueError(f"{kind} {prompt!r} was not encoded ahead, and the text encoders are gone")
    rows = [encoded[prompt] for prompt in prompts]
    return Conditioning(torch.cat([row.context for row in rows]), torch.cat([row.pooled for row in rows]))


def size_numbers(
    size: tuple[int, int], original: tuple[int, int] | None, crop: tuple[int, int], target: tuple[int, int] | None
) -> list[int]:
    """SDXL's micro-conditioning: original height and width, crop top and left, target height and width.

    Arguments are (width, height) and (left, top); ``None`` stands for ``size``. Raises ``ValueError`` for sizes below 1
    and crops below 0.
    """
    original, target = original or size, target or size
    for name, pair, least in (("original_size", original, 1), ("crop", crop, 0), ("target_size", target, 1)):
        if min(pair) < least:
            raise ValueError(f"{name} is {pair[0]} x {pair[1]}, expected {least} or more pixels on both sides")
    return [*reversed(original), *reversed(crop), *reversed(target)]


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


def to_pixels(image: Image.Image, size: tuple[int, int]) -> Tensor:
    """An image of any size and mode, stretched to ``size`` (width, height): (1, 3, H, W) in [-1, 1]."""
    pixels = np.array(image.convert("RGB").resize(size, Image.Resampling.LANCZOS))
    return rearrange(torch.from_numpy(pixels).float().div(127.5).sub(1), "h w c -> 1 c h w")
