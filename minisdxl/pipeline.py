"""Prompt to picture: ``SDXL.generate``, the whole method in one function.

Legend: B pictures of a batch, (h, w) a latent's height and width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor

from minisdxl.config import ModelConfig
from minisdxl.images import check_finite, to_image, to_pixels
from minisdxl.runtime.allocator import freed_memory_kept
from minisdxl.runtime.encoded import EncodedPrompts, encode_each
from minisdxl.runtime.strips import decode_in_strips
from minisdxl.sampler import UNetInputs, draw_noise, guided_denoiser, image_generators, initial_noise
from minisdxl.settings import Settings, check_prompts, check_settings
from minisdxl.text import TextEmbeddings, TextEncoders
from minisdxl.tokenizer import Tokenizer
from minisdxl.unet import UNet
from minisdxl.vae import VAE

if TYPE_CHECKING:
    from minisdxl.runtime.compiled import CompiledUNet

StepCallback = Callable[[int, Tensor], bool | None]


@dataclass(frozen=True)
class SDXL:
    """A whole model: what ``minisdxl.load`` returns."""

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
        settings: Settings | None = None,
        *,
        on_step: StepCallback | None = None,
        **changes: Any,
    ) -> list[Image.Image]:
        """Pictures of ``prompts``, all in one batch; picture i starts from the noise of seed ``seed + i``.

        Args:
            prompts: what to draw.
            settings: how; ``None`` for the model's best. :class:`Settings` lists all of them.
            on_step: called after each step with its number, from 0 (with an image, from the first step that is run),
                and the latent (B, 4, h, w). If it returns true, sampling stops: the pictures show that noisy latent.
            changes: single settings by name, such as ``steps=20, prune="at-edm"``.

        Raises:
            ValueError: for settings out of range.
            ArithmeticError: if a part of the model overflows; names the part.
        """
        check_prompts(prompts)
        asked = replace(settings or Settings(), **changes)
        run = check_settings(asked, self.config)
        generators = image_generators(range(asked.seed, asked.seed + len(prompts) * asked.images_per_prompt))

        words = self.text.encode(prompts, self.tokenizer)
        no_words = self.text.encode_negative([asked.negative] * len(prompts), self.tokenizer)
        conditional, unconditional = (
            self._unet_inputs(each, run.micro_conditioning, asked.images_per_prompt) for each in (words, no_words)
        )
        denoiser = guided_denoiser(
            self.compiled or self.unet,
            conditional,
            unconditional,
            run.cfg,
            lambda step: run.plans[run.first + step],
            self.config.noise,
        )
        levels = run.levels[run.first :]
        start = self._start(asked.image, run.size, float(levels[0]), generators)
        with freed_memory_kept():
            for step, x in enumerate(run.sampling.solver(denoiser, start, levels, generators), start=run.first):
                if on_step is not None and on_step(step, x):
                    break
        return [to_image(picture) for picture in self._decode(check_finite("the U-Net", x), asked.strip_rows)]

    def _unet_inputs(self, words: TextEmbeddings, sizes: list[int], copies: int) -> UNetInputs:
        """What the U-Net is told of each prompt, ``copies`` times, in its dtype and on its device."""
        check_finite("the text encoders", words.context)
        numbers = torch.tensor([sizes], device=self.device).expand(len(words.context), -1)
        parts = words.context, words.vector(numbers, self.config.size_channels)
        return UNetInputs(*(part.repeat_interleave(copies, dim=0).to(self.unet.dtype) for part in parts))

    def _start(
        self, image: Image.Image | None, size: tuple[int, int], sigma: float, generators: Sequence[torch.Generator]
    ) -> Tensor:
        """The first x (B, 4, h, w), at noise level ``sigma``: of noise alone, or of an image's latent and noise."""
        f = self.config.vae.downscale
        shape = (self.config.vae.latent_channels, size[1] // f, size[0] // f)
        if image is None:
            return initial_noise(generators, shape, sigma).to(self.device)
        latent = check_finite("the VAE encoder", self.vae.encode(to_pixels(image, size).to(self.device)))
        return latent.float() + sigma * draw_noise(generators, shape).to(self.device)

    def _decode(self, x: Tensor, strip_rows: int | None) -> Tensor:
        """Latents (B, 4, h, w) to pictures (B, 3, H, W)."""
        pictures = self.vae.decode(x) if strip_rows is None else decode_in_strips(self.vae, x, strip_rows)
        return check_finite("the VAE decoder", pictures)

    def encode_ahead(self, prompts: Sequence[str], negatives: Sequence[str] = ("",)) -> SDXL:
        """This model for pictures of ``prompts``, guided away from ``negatives``, without its text encoders.

        They leave memory with the last reference to ``self``::

            sdxl = minisdxl.load("sd_xl_base_1.0.safetensors", dtype=torch.bfloat16)
            sdxl = sdxl.encode_ahead(["a fox", "an owl"])
            image = sdxl.generate(["a fox"], strip_rows=8)[0]

        The pictures are the same up to rounding, because here each prompt is encoded by itself. For other prompts
        :meth:`generate` raises ``ValueError``. So does this for no prompts, or one string.
        """
        for texts in (prompts, negatives):
            check_prompts(texts)
        return replace(self, text=encode_each(self.text, self.tokenizer, prompts, negatives))

    def compile(self, backend: str = "inductor") -> SDXL:
        """This model with the same U-Net, compiled: its first steps take minutes, all others less time.

        ``backend`` is torch.compile's. Results differ by rounding.
        """
        from minisdxl.runtime.compiled import CompiledUNet  # torch's compiler takes a second to import

        return replace(self, compiled=CompiledUNet(self.unet, backend))
