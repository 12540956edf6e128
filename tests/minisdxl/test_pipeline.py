"""The whole way from prompt to picture: against diffusers' pipeline with the same weights, and its invariants."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLImg2ImgPipeline, StableDiffusionXLPipeline
from diffusers.image_processor import VaeImageProcessor
from diffusers.loaders.single_file_utils import convert_open_clip_checkpoint
from PIL import Image
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

import minisdxl
from atedm import TokenPlan
from minisdxl.bundled import BUNDLED
from minisdxl.checkpoint.modules import Modules, official_state_dict
from minisdxl.config import SDXL_BASE, TextConfig
from minisdxl.images import to_image
from minisdxl.pipeline import SDXL
from minisdxl.runtime.compiled import CompiledUNet
from minisdxl.sampler import image_generators, initial_noise
from minisdxl.samplings import SAMPLINGS
from minisdxl.solvers import TCD_GAMMA
from minisdxl.text import TextEncoders
from tests.minisdxl.peers import diffusers_unet, diffusers_vae
from tests.minisdxl.test_images import drawing
from tests.minisdxl.test_samplings import own_scale, scheduler
from tools.drawn.painting import draw
from tools.drawn.world import Place, parse_caption

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # inside diffusers

PROMPT = "a small red circle above a big blue square on a white background"


@pytest.fixture(scope="module")
def sdxl(shapes: SDXL) -> SDXL:
    """The bundled model with SDXL's own default settings, which diffusers' pipeline has too."""
    return replace(shapes, config=replace(shapes.config, defaults=SDXL_BASE.defaults))


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
    assert isinstance(sdxl.text, TextEncoders)
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
    unet = diffusers_unet(sdxl.unet, size_channels=sdxl.config.size_channels)
    vae = diffusers_vae(sdxl.vae)
    pipeline = StableDiffusionXLPipeline(vae, clip, openclip, *tokenizers, unet, scheduler("euler", 1))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def peer(sdxl: SDXL) -> StableDiffusionXLPipeline:
    return diffusers_pipeline(sdxl)


def diffusers_picture(sdxl: SDXL, peer: Any, name: str, steps: int, side: int, seed: int, **settings: Any) -> Any:
    """diffusers' picture under the sampling ``name``, from our first noise."""
    generators = image_generators([seed])
    sigma = float(SAMPLINGS[name].sigmas(steps, sdxl.config.noise)[0])
    x = initial_noise(generators, (4, side // 4, side // 4), sigma)
    peer.scheduler = scheduler(name, steps)
    latents = x * own_scale(peer.scheduler, sigma) / peer.scheduler.init_noise_sigma  # which diffusers scales by
    run = {"num_inference_steps": steps, "generator": generators, "height": side, "width": side, "latents": latents}
    run |= {"eta": TCD_GAMMA} if name == "tcd" else {}  # the pipeline would say 0 and not leave it to the scheduler
    return peer(PROMPT, **run, **settings).images[0]


def test_picture_equals_diffusers(sdxl: SDXL, peer: StableDiffusionXLPipeline) -> None:
    ours = sdxl.generate([PROMPT], sampling="euler", steps=10, cfg=5.0, seed=3, size=(128, 128))[0]
    theirs = diffusers_picture(sdxl, peer, "euler", steps=10, side=128, seed=3, guidance_scale=5.0)
    error = np.abs(pixels(ours) - pixels(theirs))
    print(f"picture, in [0, 1]: max error {error.max():.2e}, mean {error.mean():.2e}")
    assert error.max() <= 1.01 / 255  # rounding to 8 bits may fall either way


@pytest.mark.parametrize("name", SAMPLINGS)
def test_picture_of_each_sampling_equals_diffusers(sdxl: SDXL, peer: StableDiffusionXLPipeline, name: str) -> None:
    cfg = SAMPLINGS[name].own_cfg(sdxl.config)
    ours = sdxl.generate([PROMPT], sampling=name, steps=4, seed=3, size=(64, 64))[0]
    theirs = diffusers_picture(sdxl, peer, name, steps=4, side=64, seed=3, guidance_scale=cfg)
    error = np.abs(pixels(ours) - pixels(theirs))
    print(f"{name}, 4 steps, cfg {cfg:g}, in [0, 1]: max error {error.max():.2e}, mean {error.mean():.2e}")
    assert error.max() <= 1.01 / 255


def test_micro_conditioning_equals_diffusers(sdxl: SDXL, peer: StableDiffusionXLPipeline) -> None:
    settings: dict[str, Any] = {"sampling": "euler", "steps": 4, "cfg": 5.0, "seed": 3, "size": (64, 64)}
    sizes: dict[str, Any] = {"original_size": (300, 200), "crop": (16, 40), "target_size": (96, 128)}
    ours = sdxl.generate([PROMPT], **settings, **sizes)[0]
    as_there: dict[str, Any] = {  # height, width; top, left
        "original_size": (200, 300),
        "crops_coords_top_left": (40, 16),
        "target_size": (128, 96),
        # what is left out is zero or the picture's there, for the unconditional half
        "negative_original_size": (200, 300),
        "negative_crops_coords_top_left": (40, 16),
        "negative_target_size": (128, 96),
    }
    theirs = diffusers_picture(sdxl, peer, "euler", steps=4, side=64, seed=3, guidance_scale=5.0, **as_there)
    error = np.abs(pixels(ours) - pixels(theirs))
    print(f"with sizes told, in [0, 1]: max error {error.max():.2e}, mean {error.mean():.2e}")
    assert error.max() <= 1.01 / 255
    default = pixels(sdxl.generate([PROMPT], **settings)[0])
    told: dict[str, Any] = {"original_size": (64, 64), "crop": (0, 0), "target_size": (64, 64)}
    assert np.array_equal(default, pixels(sdxl.generate([PROMPT], **settings, **told)[0]))
    for name, value in sizes.items():
        assert np.abs(default - pixels(sdxl.generate([PROMPT], **settings, **{name: value})[0])).any()


@pytest.mark.parametrize(("name", "steps", "strength"), [("euler", 10, 0.6), ("heun", 5, 0.8), ("lcm", 4, 0.5)])
def test_picture_from_a_picture_equals_diffusers(
    sdxl: SDXL, peer: StableDiffusionXLPipeline, name: str, steps: int, strength: float
) -> None:
    parts = {key: part for key, part in peer.components.items() if key != "scheduler"}
    pipeline: Any = StableDiffusionXLImg2ImgPipeline(**parts, scheduler=scheduler(name, steps))
    pipeline.set_progress_bar_config(disable=True)
    resized = VaeImageProcessor(vae_scale_factor=4).preprocess(drawing(), height=96, width=64)
    # Encoded here, because the pipeline would take a random latent out of the encoder's distribution and not the mean.
    latent = pipeline.vae.encode(resized).latent_dist.mode() * pipeline.vae.config.scaling_factor
    ours, theirs = dict[int, Tensor](), list[Tensor]()

    def collect(_pipeline: Any, _step: int, _t: Any, kept: dict[str, Tensor]) -> dict[str, Tensor]:
        theirs.append(kept["latents"].clone())
        return kept

    first = steps - int(steps * strength)
    there = pipeline(
        PROMPT,
        image=latent,
        strength=strength,
        num_inference_steps=steps,
        guidance_scale=5.0,
        generator=image_generators([3]),
        callback_on_step_end=collect,
    ).images[0]
    here = sdxl.generate(
        [PROMPT],
        sampling=name,
        steps=steps,
        cfg=5.0,
        seed=3,
        size=(64, 96),
        image=drawing(),
        strength=strength,
        on_step=lambda step, x: ours.update({step: x}),
    )[0]
    assert list(ours) == list(range(first, steps))
    if name == "heun":  # two calls a step, but one in the last
        theirs = [*theirs[1::2], theirs[-1]]
    sigmas = SAMPLINGS[name].sigmas(steps, sdxl.config.noise)[first + 1 :].tolist()
    scales = [own_scale(pipeline.scheduler, sigma) for sigma in sigmas]
    errors = [(x * a - y).abs().max() / y.abs().max() for x, a, y in zip(ours.values(), scales, theirs, strict=True)]
    error = np.abs(pixels(here) - pixels(there))
    print(
        f"{name}, {len(ours)} of {steps} steps: latents, max error / max {max(errors):.1e}; picture {error.max():.1e}"
    )
    assert max(errors) < 5e-5
    assert error.max() <= 1.01 / 255


def test_less_strength_stays_nearer_to_the_picture(sdxl: SDXL) -> None:
    drawn = replace(parse_caption(PROMPT), places=(Place(0.5, 0.2, 0.12), Place(0.5, 0.7, 0.2)))
    image = Image.fromarray(draw(drawn, 128))
    settings: dict[str, Any] = {"steps": 20, "cfg": 1.0, "size": (128, 128), "image": image}
    away = [
        np.abs(pixels(sdxl.generate([PROMPT], **settings, strength=strength)[0]) - pixels(image)).mean()
        for strength in (0.05, 0.5, 1.0)
    ]
    print(f"mean change by strength 0.05, 0.5 and 1: {', '.join(f'{change:.3f}' for change in away)}")
    assert 2 * away[0] < away[1] < away[2] / 1.5


def test_several_pictures_of_a_prompt(sdxl: SDXL) -> None:
    prompts = [PROMPT, "a big green triangle on a black background"]
    settings: dict[str, Any] = {"sampling": "euler-ancestral", "steps": 3, "size": (64, 64)}
    together = sdxl.generate(prompts, images_per_prompt=2, seed=7, **settings)
    assert len(together) == 4
    for index, picture in enumerate(together):
        alone = sdxl.generate([prompts[index // 2]], seed=7 + index, **settings)[0]
        error = np.abs(pixels(alone) - pixels(picture)).max()
        print(f"picture {index}: max error {error:.1e}")
        assert error <= 1.01 / 255


def test_pruning_nothing_gives_the_dense_picture(sdxl: SDXL) -> None:
    dense, nothing = (
        sdxl.generate([PROMPT], steps=2, size=(64, 64), prune=prune)[0] for prune in (None, "at-edm:rho=0")
    )
    assert pixels(dense).tobytes() == pixels(nothing).tobytes()


def test_pruning_changes_the_picture_and_nothing_else(sdxl: SDXL) -> None:
    dense, pruned, again = (
        sdxl.generate([PROMPT], steps=2, size=(64, 64), prune=prune)[0] for prune in (None, "at-edm", None)
    )
    assert pixels(dense).tobytes() == pixels(again).tobytes()
    assert np.abs(pixels(dense) - pixels(pruned)).max() > 1 / 255


@pytest.mark.parametrize("prune", [None, "at-edm"])
def test_image_of_a_batch_is_the_same_alone(prune: str | None) -> None:
    """In float64: rounding differs by batch size, and in float32 it may tip a tie in top-k."""
    sdxl = minisdxl.load("shapes", dtype=torch.float64)
    prompts = [PROMPT, "a big green triangle on a black background", "a small blue circle on a gray background"]
    settings: dict[str, Any] = {"steps": 2, "size": (64, 64), "prune": prune}
    together = sdxl.generate(prompts, seed=7, **settings)
    for index, prompt in enumerate(prompts):
        alone = sdxl.generate([prompt], seed=7 + index, **settings)[0]
        error = np.abs(pixels(alone) - pixels(together[index])).mean()
        print(f"image {index} alone and in a batch, pruning {prune}: mean error {error:.2e}")
        assert error <= 1e-6


def test_odd_and_oblong_sizes(sdxl: SDXL) -> None:
    image = sdxl.generate([PROMPT], steps=1, size=(136, 104), prune="at-edm")[0]
    assert image.size == (136, 104)


def test_every_latent_is_shown(sdxl: SDXL) -> None:
    seen: list[tuple[int, tuple[int, ...]]] = []
    sdxl.generate([PROMPT], steps=3, size=(64, 64), on_step=lambda step, x: seen.append((step, tuple(x.shape))))
    assert seen == [(step, (1, 4, 16, 16)) for step in range(3)]


def test_a_step_can_stop_the_run(sdxl: SDXL) -> None:
    latents: list[Tensor] = []
    calls: list[TokenPlan] = []

    def on_step(step: int, x: Tensor) -> bool:
        latents.append(x)
        return step == 1

    with sdxl.unet.register_forward_pre_hook(lambda _, inputs: calls.append(inputs[4])):
        stopped = sdxl.generate([PROMPT], steps=5, size=(64, 64), on_step=on_step)[0]
    whole: list[Tensor] = []
    sdxl.generate([PROMPT], steps=5, size=(64, 64), on_step=lambda _, x: whole.append(x))
    assert len(latents) == len(calls) == 2
    assert torch.equal(latents[1], whole[1])
    assert np.array_equal(pixels(stopped), pixels(to_image(sdxl.vae.decode(latents[1]).detach()[0])))


@pytest.mark.parametrize(("name", "steps"), [("turbo", 1), ("lightning", 2), ("lcm", 4), ("heun", 5)])
def test_pruning_goes_with_every_sampling(sdxl: SDXL, name: str, steps: int) -> None:
    # DSAP's share of the steps, 15 of 50, is prune-less: 3 of the 7 attention blocks; both calls of a step are alike.
    prune_less = {1: 0, 2: 1, 4: 1, 5: 2}[steps]
    settings: dict[str, Any] = {"sampling": name, "steps": steps, "size": (128, 128), "seed": 2}
    calls: list[int] = []
    with sdxl.unet.register_forward_pre_hook(lambda _, inputs: calls.append(len(inputs[4]))):
        pruned = sdxl.generate([PROMPT], prune="at-edm", **settings)[0]
    counts = SAMPLINGS[name].calls(steps)
    assert calls == [n for step, n in enumerate(counts) for n in [3 if step < prune_less else 7] * n]
    dense, nothing = (sdxl.generate([PROMPT], prune=prune, **settings)[0] for prune in (None, "at-edm:rho=0"))
    assert np.array_equal(pixels(dense), pixels(nothing))
    change = np.abs(pixels(dense) - pixels(pruned))
    print(f"{name}, {steps} steps, at-edm: change of the picture max {change.max():.2f}, mean {change.mean():.3f}")
    assert change.max() > 1 / 255


def test_plans_follow_the_noise_level_when_a_run_begins_in_the_middle(sdxl: SDXL) -> None:
    calls: list[int] = []
    settings: dict[str, Any] = {"steps": 10, "size": (64, 64), "image": drawing(), "strength": 0.8, "prune": "at-edm"}
    with sdxl.unet.register_forward_pre_hook(lambda _, inputs: calls.append(len(inputs[4]))):
        sdxl.generate([PROMPT], **settings)
    assert calls == [3] + [7] * 7  # steps 2 to 9: of the 3 prune-less ones the last


def test_a_picture_decoded_in_strips_is_the_same(sdxl: SDXL) -> None:
    prompts = [PROMPT, "a big green triangle on a black background"]
    settings: dict[str, Any] = {"steps": 4, "size": (136, 104)}
    whole, strips = sdxl.generate(prompts, **settings), sdxl.generate(prompts, **settings, strip_rows=4)
    error = max(np.abs(pixels(a) - pixels(b)).max() for a, b in zip(whole, strips, strict=True))
    print(f"in strips of 4 of 26 rows: max error {error:.1e}")
    assert error <= 1.01 / 255  # rounding to 8 bits may fall either way


def test_defaults_are_those_of_the_sampling(sdxl: SDXL) -> None:
    batches: list[int] = []
    with sdxl.unet.register_forward_pre_hook(lambda _, inputs: batches.append(len(inputs[0]))):
        sdxl.generate([PROMPT], sampling="lcm", size=(64, 64))
        sdxl.generate([PROMPT], sampling=replace(SAMPLINGS["dpm++-2m"], steps=2), size=(64, 64))
    assert batches == [1] * 4 + [2] * 2  # no guidance; guidance


def test_sizes_outside_the_buckets_are_warned_of(sdxl: SDXL) -> None:
    buckets = ((128, 64), (64, 128), (72, 72))
    model = replace(sdxl, config=replace(sdxl.config, size=72, buckets=buckets))
    with pytest.warns(UserWarning, match=r"not trained on pictures of 96x64; the nearest .* is 128x64") as caught:
        model.generate([PROMPT], steps=1, size=(96, 64))
    assert len(caught) == 1
    assert caught[0].filename == __file__
    turbo = replace(SAMPLINGS["turbo"], size=96)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.generate([PROMPT], steps=1, size=(64, 128))
        model.generate([PROMPT], steps=1)
        model.generate([PROMPT], sampling=turbo)
        model.generate([PROMPT], sampling=turbo, size=(96, 96))
        sdxl.generate([PROMPT], steps=1, size=(96, 64))  # nothing is known of sizes


def test_a_negative_prompt_without_guidance_is_warned_of(sdxl: SDXL) -> None:
    with pytest.warns(UserWarning, match="negative prompt 'blue' has no effect without guidance, at cfg 1"):
        sdxl.generate([PROMPT], negative="blue", sampling="turbo", size=(64, 64))


def test_bad_arguments_are_named(sdxl: SDXL) -> None:
    """``minisdxl.settings`` has most checks; these are of the call itself."""
    with pytest.raises(ValueError, match=r"prompts is \[\], there are no prompts in it"):
        sdxl.generate([])
    with pytest.raises(ValueError, match="seed is -1"):
        sdxl.generate([PROMPT], seed=-1)
    with pytest.raises(ValueError, match=f"seed is {2**64}"):
        sdxl.generate([PROMPT], seed=2**64 - 1, images_per_prompt=2)
    with pytest.raises(ValueError, match="width is 100 pixels"):
        sdxl.generate([PROMPT], size=(100, 128))
    with pytest.raises(TypeError, match="unexpected keyword argument 'stesp'"):
        sdxl.generate([PROMPT], stesp=20)


@pytest.mark.parametrize(
    ("part", "weight"), [("the U-Net", "unet.out.2.bias"), ("the VAE decoder", "vae.decoder.conv_out.bias")]
)
def test_overflow_names_the_part(part: str, weight: str) -> None:
    broken = minisdxl.load("shapes")
    owner, name = weight.split(".", 1)
    getattr(broken, owner).get_parameter(name).data.fill_(float("nan"))
    with pytest.raises(ArithmeticError, match=part):
        broken.generate([PROMPT], steps=1, size=(64, 64))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_runs_with_the_vae_in_fp32(shapes: SDXL, dtype: torch.dtype) -> None:
    half = minisdxl.load("shapes", dtype=dtype)
    assert (half.unet.dtype, half.vae.dtype) == (dtype, torch.float32)
    settings: dict[str, Any] = {"steps": 2, "size": (64, 64), "cfg": 1.0}  # guidance would multiply what rounding does
    full = shapes.generate([PROMPT], **settings)[0]
    error = np.abs(pixels(half.generate([PROMPT], **settings)[0]) - pixels(full))
    print(f"{dtype} and fp32: max error {error.max():.2e}, mean {error.mean():.2e}")
    assert error.mean() <= 1e-2  # the VAE's scale factor of 0.25 makes an error of the latent four times as large


def test_a_compiled_unet_runs_instead_of_the_plain_one(sdxl: SDXL, monkeypatch: pytest.MonkeyPatch) -> None:
    """``minisdxl.runtime.compiled`` is tested with the compiler; here it leaves the call as it is."""
    monkeypatch.setattr(torch, "compile", lambda call, **_: call)
    compiled = sdxl.compile(backend="eager")
    settings: dict[str, Any] = {"steps": 1, "cfg": 3.0, "size": (64, 64)}
    plain, ours = (pixels(each.generate([PROMPT], **settings)[0]) for each in (sdxl, compiled))
    assert np.array_equal(ours, plain)
    assert isinstance(compiled.compiled, CompiledUNet)
    assert len(compiled.compiled.graphs) == 1
