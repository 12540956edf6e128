"""The whole way from prompt to picture: against diffusers' pipeline with the same weights, and its invariants."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline
from diffusers.loaders.single_file_utils import convert_open_clip_checkpoint
from PIL import Image
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

import minisdxl
from minisdxl.checkpoint import Modules, official_state_dict
from minisdxl.config import TextConfig
from minisdxl.pipeline import BUNDLED, SDXL, finite
from minisdxl.sampler import image_generators, initial_noise, sigmas
from tests.minisdxl.peers import diffusers_unet, diffusers_vae

PROMPT = "a small red circle above a big blue square on a white background"


@pytest.fixture(scope="module")
def sdxl() -> SDXL:
    return minisdxl.load("shapes")


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(np.float64) / 255


def diffusers_text_config(config: TextConfig) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=config.vocabulary,
        hidden_size=config.width,
        intermediate_size=4 * config.width,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        hidden_act=config.activation,
        projection_dim=config.projection or config.width,
        bos_token_id=config.start_token,
        eos_token_id=config.end_token,
        pad_token_id=config.pad_token,
    )


def diffusers_pipeline(sdxl: SDXL) -> StableDiffusionXLPipeline:
    """diffusers' pipeline with our weights, taken from their official names by diffusers' own conversions."""
    official = official_state_dict(Modules(sdxl.unet, sdxl.vae, sdxl.text))
    clip = CLIPTextModel(diffusers_text_config(sdxl.config.text[0])).eval()
    prefix = "conditioner.embedders.0.transformer."
    names = {name.removeprefix(prefix): value for name, value in official.items() if name.startswith(prefix)}
    if not any(name.startswith("text_model.") for name in clip.state_dict()):
        names = {name.removeprefix("text_model."): value for name, value in names.items()}
    clip.load_state_dict(names)
    openclip = CLIPTextModelWithProjection(diffusers_text_config(sdxl.config.text[1])).eval()
    prefix = "conditioner.embedders.1.model."
    converted = convert_open_clip_checkpoint(openclip, official, prefix=prefix)
    openclip.load_state_dict(converted)
    vocabulary = BUNDLED["shapes"].parent / "tokenizer"
    tokenizers = []
    for config in sdxl.config.text:
        tokenizer = CLIPTokenizer.from_pretrained(vocabulary, model_max_length=config.context_length)
        tokenizer.pad_token_id = config.pad_token
        tokenizers.append(tokenizer)
    noise = sdxl.config.noise
    scheduler = EulerDiscreteScheduler(
        beta_start=noise.beta_start, beta_end=noise.beta_end, beta_schedule="scaled_linear", timestep_spacing="trailing"
    )
    unet = diffusers_unet(sdxl.unet, size_channels=sdxl.config.size_channels)
    vae = diffusers_vae(sdxl.vae)
    return StableDiffusionXLPipeline(vae, clip, openclip, *tokenizers, unet, scheduler)


def test_picture_equals_diffusers(sdxl: SDXL) -> None:
    steps, side = 10, 128
    ours = sdxl.generate([PROMPT], steps=steps, cfg=5.0, seed=3, size=(side, side))[0]
    pipeline = diffusers_pipeline(sdxl)
    pipeline.set_progress_bar_config(disable=True)
    levels = sigmas(steps, sdxl.config.noise)
    latents = initial_noise(image_generators([3]), (4, side // 4, side // 4), float(levels[0]))
    pipeline.scheduler.set_timesteps(steps)
    theirs = pipeline(
        PROMPT,
        num_inference_steps=steps,
        guidance_scale=5.0,
        latents=latents / pipeline.scheduler.init_noise_sigma,  # diffusers scales by another constant
        height=side,
        width=side,
    ).images[0]
    error = np.abs(pixels(ours) - pixels(theirs))
    print(f"picture, in [0, 1]: max error {error.max():.2e}, mean {error.mean():.2e}")
    assert error.max() <= 1.01 / 255  # rounding to 8 bits may fall either way


def test_pruning_nothing_gives_the_dense_picture(sdxl: SDXL) -> None:
    dense, nothing = (
        sdxl.generate([PROMPT], steps=3, size=(128, 128), prune=prune)[0] for prune in (None, "at-edm:rho=0")
    )
    assert pixels(dense).tobytes() == pixels(nothing).tobytes()


def test_pruning_changes_the_picture_and_nothing_else(sdxl: SDXL) -> None:
    dense, pruned, again = (
        sdxl.generate([PROMPT], steps=4, size=(128, 128), prune=prune)[0] for prune in (None, "at-edm", None)
    )
    assert pixels(dense).tobytes() == pixels(again).tobytes()
    assert np.abs(pixels(dense) - pixels(pruned)).max() > 1 / 255


@pytest.mark.parametrize("prune", [None, "at-edm"])
def test_image_of_a_batch_is_the_same_alone(sdxl: SDXL, prune: str | None) -> None:
    prompts = [PROMPT, "a big green triangle on a black background", "a small blue circle on a gray background"]
    together = sdxl.generate(prompts, steps=4, seed=7, size=(128, 128), prune=prune)
    for index, prompt in enumerate(prompts):
        alone = sdxl.generate([prompt], steps=4, seed=7 + index, size=(128, 128), prune=prune)[0]
        error = np.abs(pixels(alone) - pixels(together[index])).mean()
        print(f"image {index} alone and in a batch, pruning {prune}: mean error {error:.2e}")
        assert error <= 1e-3  # rounding differs by batch size, and may tip a tie in top-k


def test_plan_of_each_step_reaches_the_unet(sdxl: SDXL) -> None:
    plans = sdxl.plans("at-edm:rho=0.5,tau=10", 10)
    assert [len(plan) for plan in plans] == [3] * 2 + [7] * 8  # prune-less: mid, up.2.0 and up.1.0 alone
    assert set(sdxl.plans(None, 5)) == {sdxl.plans(None, 5)[0]}
    assert not sdxl.plans(None, 1)[0]


def test_odd_and_oblong_sizes(sdxl: SDXL) -> None:
    image = sdxl.generate([PROMPT], steps=1, size=(136, 104), prune="at-edm")[0]
    assert image.size == (136, 104)


def test_every_latent_is_shown(sdxl: SDXL) -> None:
    seen: list[tuple[int, tuple[int, ...]]] = []
    sdxl.generate([PROMPT], steps=3, size=(64, 64), on_step=lambda step, x: seen.append((step, tuple(x.shape))))
    assert seen == [(step, (1, 4, 16, 16)) for step in range(3)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"size": (100, 128)}, "width is 100 pixels"),
        ({"size": (128, 8192)}, "height is 8192 pixels"),
        ({"size": (8, 128)}, "width is 8 pixels"),
        ({"steps": 0}, "steps is 0"),
        ({"steps": 1001}, "steps is 1001"),
        ({"prune": "nonesuch"}, "nonesuch"),
        ({"prune": "at-edm:rho=1"}, "rho is 1.0"),
        ({"seed": -1}, "seed is -1"),
        ({"prompts": []}, "no prompts"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_bad_arguments_are_named(sdxl: SDXL, change: dict[str, object], message: str) -> None:
    arguments: dict[str, object] = {"prompts": [PROMPT], "steps": 1, "size": (64, 64)} | change
    with pytest.raises(ValueError, match=message):
        sdxl.generate(**arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("part", "weight"), [("the U-Net", "unet.out.2.bias"), ("the VAE decoder", "vae.decoder.conv_out.bias")]
)
def test_overflow_names_the_part(part: str, weight: str) -> None:
    broken = minisdxl.load("shapes")
    owner, name = weight.split(".", 1)
    getattr(broken, owner).get_parameter(name).data.fill_(float("nan"))
    with pytest.raises(ArithmeticError, match=part):
        broken.generate([PROMPT], steps=1, size=(64, 64))


def test_half_precision_runs_with_the_vae_in_fp32() -> None:
    half = minisdxl.load("shapes", dtype=torch.float16)
    assert (half.unet.dtype, half.vae.dtype) == (torch.float16, torch.float32)
    full = minisdxl.load("shapes").generate([PROMPT], steps=2, size=(64, 64))[0]
    error = np.abs(pixels(half.generate([PROMPT], steps=2, size=(64, 64))[0]) - pixels(full))
    print(f"fp16 and fp32: max error {error.max():.2e}, mean {error.mean():.2e}")
    assert error.mean() <= 2e-2


def test_finite_counts_what_is_not() -> None:
    with pytest.raises(ArithmeticError, match=r"the part gave 2 of 3 values"):
        finite("the part", torch.tensor([1.0, float("nan"), float("inf")]))


def test_missing_weights_are_named(tmp_path: Path) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=r"nowhere\.safetensors"):
        minisdxl.load(tmp_path / "nowhere.safetensors")
