"""The refiner: base and refiner in turn against diffusers' two pipelines with the same weights, its files and plans."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLImg2ImgPipeline, UNet2DConditionModel
from diffusers.loaders.single_file_utils import convert_open_clip_checkpoint
from safetensors import safe_open
from torch import Tensor
from transformers import CLIPTextModelWithProjection, CLIPTokenizer

import minisdxl
from minisdxl.checkpoint.errors import CheckpointError
from minisdxl.checkpoint.layouts import unet_layout
from minisdxl.checkpoint.modules import (
    Modules,
    load,
    official_shapes,
    official_state_dict,
    open_source,
    read_config,
)
from minisdxl.config import SDXL_BASE, SDXL_REFINER, ModelConfig
from minisdxl.convert import write_folder, write_single
from minisdxl.images import encode_image
from minisdxl.pipeline import SDXL
from minisdxl.preconditioning import discrete_sigmas
from minisdxl.sampler import image_generators, initial_noise
from minisdxl.samplings import SAMPLINGS
from minisdxl.settings import split_step
from minisdxl.text import TextEncoders
from minisdxl.tokenizer import load_vocabulary, read_vocabulary
from tests.minisdxl.peers import diffusers_unet, diffusers_vae
from tests.minisdxl.test_images import drawing
from tests.minisdxl.test_pipeline import diffusers_pipeline, diffusers_text_config
from tests.minisdxl.test_samplings import own_scale, scheduler
from tests.minisdxl.tiny import TINY, TINY_REFINER, VOCABULARY, sparse_file, tiny_file, tiny_sdxl

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # inside diffusers

PROMPT = "a small red circle above a big blue square"
SIZE = (48, 64)
PREFIX = "model.diffusion_model."


@cache
def base() -> SDXL:
    return tiny_sdxl(TINY)


@cache
def refined() -> SDXL:
    return replace(base(), refiner=replace(tiny_sdxl(TINY_REFINER, seed=1), vae=base().vae))


@cache
def peers() -> tuple[Any, Any]:
    """diffusers' pipelines of the base and of the refiner, as the published refiner's folder describes it."""
    refiner = refined().refiner
    assert refiner is not None
    assert isinstance(refiner.text, TextEncoders)
    official = official_state_dict(Modules(refiner.unet, refiner.vae, refiner.text))
    openclip = CLIPTextModelWithProjection(diffusers_text_config(refiner.config.text[0])).eval()
    converted = convert_open_clip_checkpoint(openclip, official, prefix="conditioner.embedders.1.model.")
    openclip.load_state_dict(converted)
    tokenizer = CLIPTokenizer.from_pretrained(VOCABULARY, model_max_length=77)
    tokenizer.pad_token_id = 0
    second: Any = StableDiffusionXLImg2ImgPipeline(
        vae=diffusers_vae(refiner.vae),
        text_encoder=None,
        text_encoder_2=openclip,
        tokenizer=None,
        tokenizer_2=tokenizer,
        unet=diffusers_unet(refiner.unet, size_channels=refiner.config.size_channels),
        scheduler=scheduler("euler", 1),
        requires_aesthetics_score=True,
        force_zeros_for_empty_prompt=False,
    )
    first = diffusers_pipeline(base())
    for pipeline in (first, second):
        pipeline.set_progress_bar_config(disable=True)
    return first, second


def their_latents(name: str, steps: int, start: float, negative: str | None) -> list[Tensor]:
    """Latents after each call of both pipelines, in their own scale."""
    latents: list[Tensor] = []

    def collect(_pipeline: Any, _step: int, _t: Any, kept: dict[str, Tensor]) -> dict[str, Tensor]:
        latents.append(kept["latents"].clone())
        return kept

    generators = image_generators([3, 4])
    first, second = peers()
    sigma = float(SAMPLINGS[name].sigmas(steps, TINY.noise)[0])
    x = initial_noise(generators, TINY.latent_shape(SIZE), sigma)
    first.scheduler, second.scheduler = scheduler(name, steps), scheduler(name, steps)
    shared: dict[str, Any] = {
        "num_inference_steps": steps,
        "guidance_scale": 5.0,
        "negative_prompt": None if negative is None else [negative] * 2,
        "generator": generators,
        "output_type": "latent",
        "callback_on_step_end": collect,
        "original_size": (300, 200),
        "crops_coords_top_left": (40, 16),
        "negative_original_size": (300, 200),
        "negative_crops_coords_top_left": (40, 16),
        "negative_target_size": SIZE[::-1],
    }
    scaled = x * own_scale(first.scheduler, sigma) / first.scheduler.init_noise_sigma
    size = {"width": SIZE[0], "height": SIZE[1]}
    with torch.no_grad():
        there = first([PROMPT] * 2, latents=scaled, denoising_end=start, **size, **shared).images
        second([PROMPT] * 2, image=there, denoising_start=start, **shared)
    return latents


# Not Heun: diffusers changes the pipeline between the two calls of a step, and makes the second one again.
@pytest.mark.parametrize(
    ("name", "steps", "start", "negative"),
    [
        ("euler", 10, 0.8, None),
        ("euler", 8, 0.5, "a green triangle"),
        ("euler-ancestral", 5, 0.8, None),
        ("dpm++-2m", 8, 0.6, None),
        ("unipc", 8, 0.7, None),
        ("ddim", 10, 0.8, None),
    ],
)
def test_latents_of_both_models_equal_diffusers(name: str, steps: int, start: float, negative: str | None) -> None:
    ours: list[Tensor] = []
    refined().generate(
        [PROMPT] * 2,
        sampling=name,
        steps=steps,
        cfg=5.0,
        seed=3,
        size=SIZE,
        negative=negative or "",
        original_size=(200, 300),
        crop=(16, 40),
        refiner_start=start,
        on_step=lambda _, x: ours.append(x),
    )
    theirs = their_latents(name, steps, start, negative)
    sigmas = SAMPLINGS[name].sigmas(steps, TINY.noise)
    split = split_step(start, sigmas, TINY.noise)
    scales = [own_scale(peers()[0].scheduler, sigma) for sigma in sigmas[1:].tolist()]
    errors = [(x * a - y).abs().max() / y.abs().max() for x, a, y in zip(ours, scales, theirs, strict=True)]
    print(
        f"{name}, base to step {split} of {steps}, then the refiner: latents, max error / max "
        f"{max(errors[:split]):.1e} and {max(errors[split:]):.1e}"
    )
    assert max(errors) < 2e-5


@pytest.mark.parametrize("name", SAMPLINGS)
def test_every_sampling_goes_on_with_the_refiner(name: str) -> None:
    """The base is called for the steps down to the start of the refiner, and the refiner for the others."""
    calls: list[str] = []
    sdxl = refined()
    assert sdxl.refiner is not None
    with (
        sdxl.unet.register_forward_pre_hook(lambda *_: calls.append("base")),
        sdxl.refiner.unet.register_forward_pre_hook(lambda *_: calls.append("refiner")),
    ):
        sdxl.generate([PROMPT], sampling=name, steps=5, size=SIZE, refiner_start=0.6)
    counts = SAMPLINGS[name].calls(5)
    assert calls == ["base"] * sum(counts[:3]) + ["refiner"] * sum(counts[3:])


def test_the_refiners_steps_are_the_last_ten_of_fifty() -> None:
    sigmas = SAMPLINGS["euler"].sigmas(50, SDXL_BASE.noise)
    assert split_step(None, sigmas, SDXL_BASE.noise) == 40
    at_split = discrete_sigmas(SDXL_BASE.noise)[199]
    assert abs(float(sigmas[40]) / float(at_split) - 1) < 1e-12
    for start, message in ((0.0, "refiner_start is 0.0"), (1.0, "refiner_start is 1.0"), (0.99, "leaves the refiner")):
        with pytest.raises(ValueError, match=message):
            split_step(start, sigmas, SDXL_BASE.noise)
    with pytest.raises(ValueError, match="leaves the base model none of the steps 45 to 49 of 50"):
        split_step(0.8, sigmas, SDXL_BASE.noise, first=45)


def test_token_plans_count_the_steps_of_both_models() -> None:
    """Of 10 steps, the first 3 are prune-less; the refiner's are numbers 8 and 9, so it prunes in all of them."""
    found: list[tuple[str, int]] = []
    sdxl, settings = refined(), {"steps": 10, "size": SIZE, "sampling": "euler"}
    assert sdxl.refiner is not None
    with (
        sdxl.unet.register_forward_pre_hook(lambda _, inputs: found.append(("base", len(inputs[4])))),
        sdxl.refiner.unet.register_forward_pre_hook(lambda _, inputs: found.append(("refiner", len(inputs[4])))),
    ):
        pruned = sdxl.generate([PROMPT], prune="moving-grid:tau=15", **settings)  # type: ignore[arg-type]
    assert found == [("base", 4)] * 3 + [("base", 6)] * 5 + [("refiner", 11)] * 2
    dense, nothing = (
        sdxl.generate([PROMPT], prune=prune, **settings)[0]  # type: ignore[arg-type]
        for prune in (None, "moving-grid:tau=15,rho=0")
    )
    assert np.array_equal(np.asarray(dense), np.asarray(nothing))
    assert not np.array_equal(np.asarray(dense), np.asarray(pruned[0]))


def test_prompts_encoded_ahead_and_compiled_unets_draw_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    settings: dict[str, Any] = {"steps": 5, "size": SIZE, "cfg": 2.0, "sampling": "euler"}
    plain = np.asarray(refined().generate([PROMPT], **settings)[0])
    monkeypatch.setattr(torch, "compile", lambda call, **_: call)
    for other in (refined().encode_ahead([PROMPT]), refined().compile(backend="eager")):
        assert np.array_equal(plain, np.asarray(other.generate([PROMPT], **settings)[0]))


def test_a_refiner_alone_goes_on_from_a_picture() -> None:
    """As diffusers' image-to-image pipeline, from the mean of the picture's latent."""
    refiner, pipeline = refined().refiner, peers()[1]
    assert refiner is not None
    pipeline.scheduler = scheduler("euler", 5)
    latents: list[Tensor] = []
    settings: dict[str, Any] = {"steps": 5, "cfg": 5.0, "seed": 3, "size": SIZE, "sampling": "euler"}
    refiner.generate([PROMPT], image=drawing(), strength=0.6, on_step=lambda _, x: latents.append(x), **settings)
    with torch.no_grad():
        there = pipeline(
            [PROMPT],
            image=encode_image(refiner.vae, drawing(), SIZE),
            strength=0.6,
            num_inference_steps=5,
            guidance_scale=5.0,
            generator=image_generators([3]),
            output_type="latent",
        ).images
    error = (latents[-1] - there).abs().max() / there.abs().max()
    print(f"refiner alone: max error / max {error:.1e}")
    assert error < 2e-5
    with pytest.raises(ValueError, match="tiny-refiner finishes pictures, expected an image, or a base model"):
        refiner.generate([PROMPT], size=SIZE)


@torch.no_grad()
def test_files_of_a_refiner_come_back(tmp_path: Path) -> None:
    """From a file with the official names and from a diffusers folder, beside a base and alone."""
    base_file = tiny_file(tmp_path / "base.safetensors")
    file = tiny_file(tmp_path / "refiner.safetensors", seed=1, config=TINY_REFINER)
    with safe_open(file, "pt") as opened:
        names = list(opened.keys())
    assert {name.split(".")[2] for name in names if name.startswith("conditioner.")} == {"0"}
    assert "conditioner.embedders.0.model.ln_final.weight" in names
    write_folder(open_source(file), tmp_path / "refiner", read_vocabulary(VOCABULARY))
    index = json.loads((tmp_path / "refiner" / "model_index.json").read_text())
    assert index["_class_name"] == "StableDiffusionXLImg2ImgPipeline"
    assert (index["text_encoder"], index["tokenizer"]) == ([None, None], [None, None])
    assert load_vocabulary(tmp_path / "refiner", None) == read_vocabulary(VOCABULARY)  # its folder is tokenizer_2
    write_single(open_source(tmp_path / "refiner"), tmp_path / "again.safetensors")
    modules = load(file)[1]
    saved = official_state_dict(modules)
    settings: dict[str, Any] = {"steps": 5, "size": SIZE, "cfg": 2.0, "sampling": "euler"}
    expected = np.asarray(refined().generate([PROMPT], **settings)[0])
    for place in (file, tmp_path / "refiner", tmp_path / "again.safetensors"):
        config, found = load(place)
        assert config == TINY_REFINER
        read = official_state_dict(found)
        assert read.keys() == saved.keys()
        assert all(torch.equal(read[name], tensor) for name, tensor in saved.items())
        sdxl = minisdxl.load(base_file, refiner=place, tokenizer=VOCABULARY)
        error = np.abs(np.asarray(sdxl.generate([PROMPT], **settings)[0]).astype(int) - expected).max()
        print(f"{place.name}: max error {error} of 255")  # convolutions are channels-last in a loaded model
        assert error <= 1


def test_the_official_refiner_is_recognized(tmp_path: Path) -> None:
    """By its names, at full size: its only text encoder has the place of SDXL's first."""
    text = "conditioner.embedders.1.model."
    shapes = {
        name.replace(text, "conditioner.embedders.0.model."): shape
        for name, shape in official_shapes(SDXL_REFINER).items()
    }
    file = sparse_file(tmp_path / "refiner.safetensors", shapes)
    assert read_config(file) == SDXL_REFINER
    with torch.device("meta"):
        peer: Any = UNet2DConditionModel(
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            block_out_channels=(384, 768, 1536, 1536),
            attention_head_dim=(6, 12, 24, 24),
            transformer_layers_per_block=4,
            cross_attention_dim=1280,
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=2560,
        )
    names = unet_layout(SDXL_REFINER.unet)
    unet = {
        names.mapping(name.removeprefix(PREFIX)).names[0]: shape
        for name, shape in shapes.items()
        if name.startswith(PREFIX)
    }
    assert unet == {name: tuple(tensor.shape) for name, tensor in peer.state_dict().items()}
    size = sum(2 * torch.Size(shape).numel() for shape in shapes.values())
    print(f"{size:,} bytes in fp16")
    assert round(size / 1e9, 2) == 6.08  # as published
    sparse_file(file, {name: shape for name, shape in shapes.items() if "middle_block.1.norm" not in name})
    with pytest.raises(CheckpointError, match="does not fit sdxl-refiner: 2 missing tensors"):
        read_config(file)


@pytest.mark.parametrize("config", [TINY, replace(TINY_REFINER, vae=replace(TINY.vae, scale_factor=0.25))])
def test_what_is_no_refiner_of_a_model_is_refused(tmp_path: Path, config: ModelConfig) -> None:
    first, second = tiny_file(tmp_path / "base.safetensors"), tiny_file(tmp_path / "second.safetensors", config=config)
    expected = "is tiny, expected a refiner" if config == TINY else r"second\.safetensors has .*0\.25.* expected .*0\.5"
    with pytest.raises(ValueError, match=expected):
        minisdxl.load(first, refiner=second, tokenizer=VOCABULARY)
    if config != TINY:
        with pytest.raises(
            ValueError, match=r"tiny-refiner is refined by .*second\.safetensors, expected a base model"
        ):
            minisdxl.load(second, refiner=second, tokenizer=VOCABULARY)
