"""Text to image: ``SDXL.generate`` encodes the prompts, denoises latents with the U-Net, and decodes them to pictures.

Shapes: B pictures of a batch; a latent is (B, 4, h, w), pictures are (B, 3, H, W).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from minisdxl.config import ModelConfig
from minisdxl.images import check_finite, encode_image, to_image
from minisdxl.inspector.session import inspect_picture
from minisdxl.prompting.encoders import PromptEncoders, same_length
from minisdxl.runtime.allocator import freed_memory_kept
from minisdxl.runtime.compiled import CompiledUNet
from minisdxl.runtime.encoded import EncodedPrompts, encode_each
from minisdxl.runtime.inpainting import MaskedPicture, find_masked, masked_solver, masked_unet, with_picture
from minisdxl.runtime.strips import decode_in_strips
from minisdxl.sampler import (
    Denoiser,
    NoisePredictor,
    UNetInputs,
    draw_noise,
    guided_denoiser,
    image_generators,
    initial_noise,
)
from minisdxl.settings import CheckedSettings, Settings, check_prompts, check_settings, size_numbers
from minisdxl.solvers import by_stage
from minisdxl.steps.denoiser import Realized, planned_denoiser
from minisdxl.text import TextEmbeddings
from minisdxl.tokenizer import Tokenizer
from minisdxl.unet import PromptKV, UNet
from minisdxl.vae import VAE

StepCallback = Callable[[int, Tensor], bool | None]


@dataclass(frozen=True)
class SDXL:
    """A complete model, as ``minisdxl.load`` returns it."""

    config: ModelConfig
    unet: UNet
    vae: VAE
    text: PromptEncoders | EncodedPrompts
    tokenizer: Tokenizer
    compiled: NoisePredictor[PromptKV] | None = None  # runs instead of ``unet``, with the same weights
    refiner: SDXL | None = None  # does the last steps
    inspect = inspect_picture

    @property
    def device(self) -> torch.device:
        """The device that the model runs on."""
        return next(self.unet.parameters()).device

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[str],
        settings: Settings | None = None,
        *,
        on_step: StepCallback | None = None,
        realized: Realized = None,
        **changes: Any,
    ) -> list[Image.Image]:
        """Generates pictures of ``prompts``, all in one batch. Picture i starts from the noise of seed ``seed + i``.

        Args:
            prompts: what to draw, of any length, in the syntax of :mod:`minisdxl.prompting.syntax`: ``(word:1.3)``.
            settings: how to draw it; ``None`` for the model's own. :class:`Settings` lists all of them.
            on_step: called after each step with its number and the latent (B, 4, h, w). Steps count from 0; with an
                image, from the first step that is run. If it returns true, sampling stops and this latent is decoded.
            realized: gets the step plans of each picture as they were carried out, with settings ``skip`` or ``guide``.
            changes: single settings by name, such as ``steps=20, prune="at-edm"``.

        Raises:
            ValueError: for a setting out of range.
            ArithmeticError: if a part of the model overflows. The message names the part.
        """
        check_prompts(prompts)
        asked = replace(settings or Settings(), **changes)
        run = check_settings(asked, self.config, None if self.refiner is None else self.refiner.config)
        masked = find_masked(self.vae, asked, run, self.config)
        generators = image_generators(range(asked.seed, asked.seed + len(prompts) * asked.images_per_prompt))

        denoiser = self._denoiser(prompts, asked, run, masked, realized)
        if self.refiner is not None:  # the same prompts, by its own text encoder
            refining = self.refiner._denoiser(prompts, asked, run, None, None)
            denoiser = by_stage(denoiser, refining, run.split - run.first)
        # From noise to a clean latent, from one noise level to the next.
        sigmas, shape = run.sigmas[run.first :], self.config.latent_shape(run.size)
        latent = encode_image(self.vae, asked.image, run.size) if masked is None else masked.start
        if latent is None:
            start = initial_noise(generators, shape, float(sigmas[0])).to(self.device)
        else:
            start = latent + float(sigmas[0]) * draw_noise(generators, shape).to(self.device)
        solver = masked_solver(run.sampling.solver, masked)
        with freed_memory_kept():
            for step, x in enumerate(solver(denoiser, start, sigmas, generators), start=run.first):
                if on_step is not None and on_step(step, x):
                    break
        # VAE decoder: latents to pictures.
        check_finite("the U-Net", x)
        pictures = self.vae.decode(x) if asked.strip_rows is None else decode_in_strips(self.vae, x, asked.strip_rows)
        return with_picture([to_image(picture) for picture in check_finite("the VAE decoder", pictures)], masked)

    def _denoiser(
        self, prompts: Sequence[str], asked: Settings, run: CheckedSettings, masked: MaskedPicture | None, log: Realized
    ) -> Denoiser:
        """D(x; sigma) of this model for some prompts; its steps count from the first one that is run."""
        # Text encoders: prompts and negative prompts to what the U-Net is conditioned on.
        positive = self.text.encode(prompts, self.tokenizer)
        negative = self.text.encode_negative([asked.negative] * len(prompts), self.tokenizer)
        if run.cfg != 1:  # both go through the U-Net in one batch
            positive, negative = same_length([positive, negative], lambda: self.text.encode([""], self.tokenizer))
        conditional, unconditional = (
            self._unet_inputs(text, sizes, asked.images_per_prompt)
            for text, sizes in zip((positive, negative), size_numbers(self.config, run.micro_conditioning), strict=True)
        )
        inputs = masked_unet(self.compiled or self.unet, masked), conditional, unconditional, run.cfg
        if run.planner is None:
            return guided_denoiser(*inputs, lambda step: run.plans[run.first + step], self.config.noise)
        return planned_denoiser(*inputs, run.planner, self.config.noise, run.sigmas[run.first :].tolist(), log)

    def _unet_inputs(self, text: TextEmbeddings, sizes: list[float], copies: int) -> UNetInputs:
        """The U-Net's inputs, in its dtype and on its device, with each prompt repeated ``copies`` times."""
        check_finite("the text encoders", text.context)
        numbers = torch.tensor([sizes], device=self.device).expand(len(text.context), -1)
        inputs = text.context, text.vector(numbers, self.config.size_channels)
        return UNetInputs(*(each.repeat_interleave(copies, dim=0).to(self.unet.dtype) for each in inputs))

    def encode_ahead(self, prompts: Sequence[str], negatives: Sequence[str] = ("",)) -> SDXL:
        """This model without its text encoders, for these prompts alone: :func:`~minisdxl.runtime.encoded.encode_each`.

        ``sdxl = sdxl.encode_ahead(["a fox"])`` drops the last reference to the text encoders, which frees their memory.
        """
        refiner = None if self.refiner is None else self.refiner.encode_ahead(prompts, negatives)
        return replace(self, text=encode_each(self.text, self.tokenizer, prompts, negatives), refiner=refiner)

    def compile(self, backend: str = "inductor") -> SDXL:
        """This model with its U-Net compiled by ``torch.compile``: :class:`~minisdxl.runtime.compiled.CompiledUNet`."""
        refiner = None if self.refiner is None else self.refiner.compile(backend)
        return replace(self, compiled=CompiledUNet(self.unet, backend), refiner=refiner)
