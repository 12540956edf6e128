"""Inpainting: both kinds of models against diffusers' pipeline on the same weights and noise, and what must stay."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLInpaintPipeline
from PIL import Image
from torch import Tensor

from minisdxl.config import ModelConfig
from minisdxl.images import to_pixels
from minisdxl.pipeline import SDXL
from minisdxl.sampler import image_generators
from minisdxl.samplings import SAMPLINGS
from tests.minisdxl.test_images import drawing
from tests.minisdxl.test_pipeline import diffusers_pipeline
from tests.minisdxl.test_samplings import own_scale, scheduler
from tests.minisdxl.tiny import TINY, TINY_INPAINTING, tiny_sdxl

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # inside diffusers

PROMPT = "a small red circle above a big blue square"
SIZE = (48, 64)
HOLE = (12, 20, 36, 48)  # left, top, right, bottom; multiples of the VAE's 4


def mask(hole: tuple[int, int, int, int] = HOLE, size: tuple[int, int] = SIZE, shade: int = 255) -> Image.Image:
    """White, or another shade, in a rectangle."""
    image = Image.new("L", size)
    image.paste(shade, hole)
    return image


@cache
def model(config: ModelConfig) -> SDXL:
    return tiny_sdxl(config)


@cache
def peer(config: ModelConfig) -> Any:
    parts = diffusers_pipeline(model(config)).components
    pipeline: Any = StableDiffusionXLInpaintPipeline(**parts)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def theirs(config: ModelConfig, name: str, steps: int, strength: float, seeds: list[int]) -> list[Tensor]:
    """diffusers' latents after each call, ours divided by their own scale."""
    pipeline = peer(config)
    pipeline.scheduler = scheduler(name, steps)
    if pipeline.scheduler.init_noise_sigma != 1:  # there the data's variance is left out of the first x
        sigma = float(SAMPLINGS[name].sigmas(steps, config.noise)[0])
        kind = type(pipeline.scheduler)
        pipeline.scheduler.__class__ = type(kind.__name__, (kind,), {"init_noise_sigma": math.sqrt(1 + sigma**2)})
    pixels = to_pixels(drawing(), SIZE)
    hole = torch.from_numpy(np.array(mask()))[None, None].float() / 255

    def encoded(pixels: Tensor) -> Tensor:  # the pipeline would take a random latent, and not the mean
        return pipeline.vae.encode(pixels).latent_dist.mode() * pipeline.vae.config.scaling_factor

    latents: list[Tensor] = []

    def collect(_pipeline: Any, _step: int, _t: Any, kept: dict[str, Tensor]) -> dict[str, Tensor]:
        latents.append(kept["latents"].clone())
        return kept

    with torch.no_grad():
        pipeline(
            [PROMPT] * len(seeds),
            image=encoded(pixels),
            mask_image=hole,
            masked_image_latents=encoded(pixels * (1 - hole)) if config.inpaints else None,
            strength=strength,
            num_inference_steps=steps,
            guidance_scale=5.0,
            width=SIZE[0],
            height=SIZE[1],
            generator=image_generators(seeds),
            output_type="latent",
            callback_on_step_end=collect,
        )
    return latents


RUNS = [
    (config, name, steps, strength)
    for config in (TINY, TINY_INPAINTING)
    for name, steps, strength in (
        ("euler", 8, 1.0),
        ("euler", 8, 0.9999),
        ("euler", 8, 0.5),
        ("euler-ancestral", 5, 1.0),
        ("heun", 4, 0.75),
        ("dpm++-2m", 5, 0.8),
        ("dpm++-2m-sde", 5, 1.0),
        ("unipc", 5, 1.0),
        ("lcm", 4, 1.0),
    )
]


@pytest.mark.parametrize(("config", "name", "steps", "strength"), RUNS, ids=lambda each: getattr(each, "name", each))
def test_latents_equal_diffusers(config: ModelConfig, name: str, steps: int, strength: float) -> None:
    seeds = [3, 4]
    ours: dict[int, Tensor] = {}
    model(config).generate(
        [PROMPT] * 2,
        sampling=name,
        steps=steps,
        cfg=5.0,
        seed=seeds[0],
        size=SIZE,
        image=drawing(),
        mask=mask(),
        strength=strength,
        on_step=lambda step, x: ours.update({step: x}),
    )
    there = theirs(config, name, steps, strength, seeds)
    if name == "heun":  # two calls a step, but one in the last
        there = [*there[1::2], there[-1]]
    sigmas = SAMPLINGS[name].sigmas(steps, config.noise)[-len(ours) :].tolist()
    scales = [own_scale(peer(config).scheduler, sigma) for sigma in sigmas]
    errors = [(x * a - y).abs().max() / y.abs().max() for x, a, y in zip(ours.values(), scales, there, strict=True)]
    print(f"{config.name}, {name}, {len(ours)} of {steps} steps: latents, max error / max {max(errors):.1e}")
    assert max(errors) < 2e-5


def inpainted(config: ModelConfig, **settings: Any) -> np.ndarray:
    run: dict[str, Any] = {"steps": 2, "cfg": 2.0, "size": SIZE, "image": drawing(), "mask": mask()} | settings
    return np.asarray(model(config).generate([PROMPT], **run)[0])


BOTH = pytest.mark.parametrize("config", [TINY, TINY_INPAINTING], ids=lambda config: config.name)


@BOTH
@pytest.mark.parametrize("name", SAMPLINGS)
def test_what_is_black_stays_pixel_for_pixel(config: ModelConfig, name: str) -> None:
    drawn, hole = inpainted(config, sampling=name), np.asarray(mask()) > 0
    kept = np.asarray(drawing().resize(SIZE, Image.Resampling.LANCZOS))
    changed = (drawn[hole] != kept[hole]).any(axis=-1).mean()
    print(f"{config.name}, {name}: {changed:.1%} of the pixels in the mask changed")
    assert np.array_equal(drawn[~hole], kept[~hole])
    assert changed > 0.9


@BOTH
def test_gray_blends_both_pictures_and_is_drawn_anew_from_half_on(config: ModelConfig) -> None:
    kept = np.asarray(drawing().resize(SIZE, Image.Resampling.LANCZOS)).astype(float)
    left, top, right, bottom = HOLE
    white, gray = (inpainted(config, mask=mask(shade=shade)).astype(float) for shade in (255, 128))
    expected = kept + (white - kept) * 128 / 255
    error = np.abs(gray - expected)[top:bottom, left:right].max()
    print(f"{config.name}: half of each, max error {error:.2f} of 255")
    assert error <= 1
    with pytest.raises(ValueError, match="the mask has no white"):
        inpainted(config, mask=mask(shade=127))


@BOTH
def test_thin_lines_of_a_mask_are_drawn(config: ModelConfig) -> None:
    """One column of pixels between those that diffusers would look at."""
    hole = (13, 0, 14, SIZE[1])
    drawn, kept = inpainted(config, mask=mask(hole)), np.asarray(drawing().resize(SIZE, Image.Resampling.LANCZOS))
    assert list(np.nonzero((drawn != kept).any(axis=(0, 2)))[0]) == [13]


@BOTH
def test_token_plans_go_with_a_mask(config: ModelConfig) -> None:
    plans: list[int] = []
    with model(config).unet.register_forward_pre_hook(lambda _, inputs: plans.append(len(inputs[4]))):
        pruned = inpainted(config, steps=10, prune="moving-grid:tau=25")
    assert plans == [4] * 5 + [6] * 5
    dense, nothing = (inpainted(config, steps=10, prune=prune) for prune in (None, "moving-grid:tau=25,rho=0"))
    assert np.array_equal(dense, nothing)
    assert not np.array_equal(dense, pruned)


@BOTH
def test_a_batch_and_a_compiled_unet_draw_the_same(config: ModelConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    settings: dict[str, Any] = {"steps": 2, "cfg": 2.0, "size": SIZE, "image": drawing(), "mask": mask(), "seed": 5}
    together = model(config).generate([PROMPT, "a cat"], **settings)
    alone = model(config).generate(["a cat"], **settings | {"seed": 6})
    error = np.abs(np.asarray(together[1]).astype(int) - np.asarray(alone[0])).max()
    print(f"{config.name}, in a batch and alone: max error {error} of 255")
    assert error <= 1
    monkeypatch.setattr(torch, "compile", lambda call, **_: call)
    assert model(config).compile(backend="eager").generate([PROMPT, "a cat"], **settings) == together


def test_what_is_missing_is_named() -> None:
    with pytest.raises(ValueError, match="tiny-inpainting is an inpainting model, expected an image and a mask"):
        model(TINY_INPAINTING).generate([PROMPT], size=SIZE)
    with pytest.raises(ValueError, match="tiny-inpainting is an inpainting model, expected an image and a mask"):
        model(TINY_INPAINTING).generate([PROMPT], size=SIZE, image=drawing(), strength=0.5)
    with pytest.raises(ValueError, match="there is a mask without an image, expected both"):
        model(TINY).generate([PROMPT], size=SIZE, mask=mask())
