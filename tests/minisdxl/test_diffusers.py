"""Our U-Net in diffusers' pipelines: dense against theirs, pruned against our own pipeline, with the same weights."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    ControlNetModel,
    DDIMScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    StableDiffusionXLControlNetPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLInpaintPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from PIL import Image
from torch import Tensor, nn

from atedm import DENSE, PRESETS, parse_preset
from minisdxl.config import SDXL_BASE, Level, NoiseConfig
from minisdxl.diffusers import TokenUNet
from minisdxl.pipeline import SDXL
from minisdxl.sampler import image_generators, timesteps
from minisdxl.text import TextEmbeddings
from tests.minisdxl.peers import diffusers_unet
from tests.minisdxl.test_pipeline import PROMPT, diffusers_picture, diffusers_pipeline, pixels
from tests.minisdxl.test_samplings import scheduler
from tests.minisdxl.tiny import SMALL_UNET, random_unet

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # inside diffusers

SIZE_CHANNELS, POOLED = 8, 16
SMALL_XL = replace(SMALL_UNET, vector_channels=POOLED + 6 * SIZE_CHANNELS)
SITES = list(SMALL_XL.attention_sites())


def small_peer(dtype: torch.dtype = torch.float64, **changes: Any) -> UNet2DConditionModel:
    config = replace(SMALL_XL, **changes)
    return diffusers_unet(random_unet(config, dtype), SIZE_CHANNELS).requires_grad_(False)


@pytest.fixture(scope="module")
def peer() -> UNet2DConditionModel:
    """For tests that leave it as it is."""
    return small_peer()


def draw(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def inputs(dtype: torch.dtype = torch.float64, channels: int = 4, grid: tuple[int, int] = (16, 24)) -> dict[str, Any]:
    sizes = torch.tensor([[96, 128, 8, 0, 128, 192]] * 2).to(dtype)
    return {
        "sample": draw(2, channels, *grid, dtype=dtype),
        "timestep": torch.tensor(681),
        "encoder_hidden_states": draw(2, 77, SMALL_XL.context_channels, dtype=dtype, seed=1),
        "added_cond_kwargs": {"text_embeds": draw(2, POOLED, dtype=dtype, seed=2), "time_ids": sizes},
    }


def difference(ours: nn.Module, theirs: nn.Module, **given: Any) -> float:
    here, there = ours(**given).sample, theirs(**given).sample
    error = float((here - there).abs().max())
    print(f"largest of {float(there.abs().max()):.2f}: max error {error:.2e}")
    return error


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
@pytest.mark.parametrize(
    "changes", [{}, {"in_channels": 9}, {"levels": (Level(1, 0), Level(2, 2), Level(4, 0)), "middle_depth": 1}]
)
def test_dense_equals_diffusers(dtype: torch.dtype, tolerance: float, changes: dict[str, Any]) -> None:
    peer = small_peer(dtype, **changes)
    given = inputs(dtype, changes.get("in_channels", 4))
    assert difference(TokenUNet(peer, prune=None), peer, **given) < tolerance


def test_odd_sizes_equal_diffusers(peer: UNet2DConditionModel) -> None:
    assert difference(TokenUNet(peer, prune=None), peer, **inputs(grid=(13, 18))) < 1e-12


@pytest.mark.parametrize("timestep", [681, 681.5, torch.tensor([681, 681])])
def test_any_form_of_timestep_and_of_result(peer: UNet2DConditionModel, timestep: Any) -> None:
    ours = TokenUNet(peer, prune=None)
    given = inputs() | {"timestep": timestep}
    assert difference(ours, peer, **given) < 1e-12
    (alone,) = ours(**given, return_dict=False)
    assert torch.equal(alone, ours(**given).sample)


def residuals(peer: UNet2DConditionModel) -> tuple[list[Tensor], Tensor]:
    """Such as a ControlNet gives: one for each skip, and the middle's."""
    controlnet = ControlNetModel.from_unet(peer).double().requires_grad_(False)
    for parameter in controlnet.parameters():  # its last layers are zero before it is trained
        parameter.copy_(draw(*parameter.shape, seed=parameter.numel()) * 0.05)
    given = inputs()
    skips, middle = controlnet(**given, controlnet_cond=draw(2, 3, 128, 192), return_dict=False)
    return skips, middle


def test_controlnet_equals_diffusers(peer: UNet2DConditionModel) -> None:
    skips, middle = residuals(peer)
    given = inputs() | {"down_block_additional_residuals": skips, "mid_block_additional_residual": middle}
    ours = TokenUNet(peer, prune=None)
    assert difference(ours, peer, **given) < 1e-12
    assert not torch.allclose(ours(**given).sample, ours(**inputs()).sample, atol=1e-2)  # they matter


@pytest.mark.parametrize("with_middle", [True, False])
def test_t2i_adapter_equals_diffusers(peer: UNet2DConditionModel, with_middle: bool) -> None:
    # Shapes of diffusers' FullAdapterXL: before the downsampling of a level with attention, after that of one without.
    shapes = [(32, 8, 12), (64, 8, 12), (128, 4, 6), (128, 4, 6)][: 4 if with_middle else 3]
    features = [draw(2, *shape, seed=number) for number, shape in enumerate(shapes)]
    ours = TokenUNet(peer, prune=None)
    here = ours(**inputs(), down_intrablock_additional_residuals=features).sample
    # diffusers empties the list that it is given
    there = peer(**inputs(), down_intrablock_additional_residuals=[each.clone() for each in features]).sample
    print(f"max error {float((here - there).abs().max()):.2e}")
    assert float((here - there).abs().max()) < 1e-12
    assert len(features) == len(shapes)


def ip_adapter(peer: UNet2DConditionModel, image_channels: int = 24) -> dict[str, dict[str, Tensor]]:
    """Random weights under the published names of an IP-Adapter."""
    weights, context = dict[str, Tensor](), SMALL_XL.context_channels
    for number, name in enumerate(peer.attn_processors):
        if name.endswith("attn2.processor"):
            width = peer.get_submodule(name.removesuffix(".processor")).to_q.out_features
            for kind in ("k", "v"):
                weights[f"{number}.to_{kind}_ip.weight"] = draw(width, context, seed=number) / context**0.5
    projection = {"proj.weight": draw(4 * context, image_channels), "proj.bias": draw(4 * context)}
    return {
        "image_proj": {**projection, "norm.weight": draw(context), "norm.bias": draw(context)},
        "ip_adapter": weights,
    }


def test_ip_adapters_equal_diffusers() -> None:
    peer = small_peer()
    plain = peer(**inputs()).sample
    peer._load_ip_adapter_weights([ip_adapter(peer), ip_adapter(peer)])
    ours = TokenUNet(peer, prune=None)
    given = inputs()
    given["added_cond_kwargs"]["image_embeds"] = [draw(2, 1, 24, seed=7), draw(2, 3, 24, seed=8)]  # 1 and 3 images
    for scales in ([1.0, 0.3], [0.5, 0.0]):
        for processor in peer.attn_processors.values():
            if hasattr(processor, "scale"):
                processor.scale[:] = scales  # as pipe.set_ip_adapter_scale does
        assert difference(ours, peer, **given) < 1e-12
        assert not torch.allclose(ours(**given).sample, plain, atol=1e-2)
    pruned = TokenUNet(peer)(**given).sample
    assert torch.isfinite(pruned).all()
    assert not torch.allclose(pruned, ours(**given).sample, atol=1e-3)


def test_the_guidance_scale_of_lcm_equals_diffusers() -> None:
    plain = small_peer()
    peer = UNet2DConditionModel(**{**plain.config, "time_cond_proj_dim": 12}).double().eval().requires_grad_(False)
    projection = {"time_embedding.cond_proj.weight": draw(32, 12)}
    peer.load_state_dict({**plain.state_dict(), **projection})
    ours = TokenUNet(peer, prune=None)
    guidance = draw(2, 12, seed=5)
    assert difference(ours, peer, **inputs(), timestep_cond=guidance) < 1e-12
    assert not torch.allclose(ours(**inputs(), timestep_cond=guidance).sample, ours(**inputs()).sample, atol=1e-3)


def test_nothing_is_copied() -> None:
    peer = small_peer(torch.float32)
    names = {id(parameter) for parameter in peer.parameters()}
    there = sorted(parameter.data_ptr() for parameter in peer.parameters())
    ours = TokenUNet(peer)
    assert sorted(parameter.data_ptr() for parameter in ours.parameters()) == there
    assert {id(parameter) for parameter in ours.parameters()} == names
    assert not any(parameter.requires_grad for parameter in peer.parameters())  # as it was
    ours.to(torch.bfloat16)  # both are cast, and still one
    assert peer.dtype == ours.dtype == torch.bfloat16
    assert [p.data_ptr() for p in sorted(ours.parameters(), key=id)] == [
        p.data_ptr() for p in sorted(peer.parameters(), key=id)
    ]
    assert ours.original is peer


def test_what_pipelines_read() -> None:
    peer = small_peer(torch.float32)
    ours = TokenUNet(peer)
    assert ours.config.in_channels == 4
    assert ours.config.addition_time_embed_dim == SIZE_CHANNELS
    assert ours.add_embedding.linear_1.in_features == SMALL_XL.vector_channels  # type: ignore[union-attr]
    assert (ours.dtype, ours.device) == (torch.float32, torch.device("cpu"))
    assert ours.encoder_hid_proj is None
    assert ours.attn_processors.keys() == peer.attn_processors.keys()
    assert ours.training is peer.training


def test_keeping_all_tokens_is_dense(peer: UNet2DConditionModel) -> None:
    dense, kept = TokenUNet(peer, prune=None), TokenUNet(peer, prune="at-edm:rho=0")
    assert torch.equal(dense(**inputs()).sample, kept(**inputs()).sample)


def test_pruned_equals_our_own_unet() -> None:
    own = random_unet(SMALL_XL, torch.float64)
    theirs, given = diffusers_unet(own, SIZE_CHANNELS), inputs(grid=(8, 12))
    context, added = given["encoder_hidden_states"], given["added_cond_kwargs"]
    sizes = added["time_ids"].float()  # embedded in fp32 there
    vector = TextEmbeddings(context, added["text_embeds"]).vector(sizes, SIZE_CHANNELS)
    for preset, step in itertools.product(PRESETS, (0, 49)):
        given["timestep"] = timesteps(50, NoiseConfig())[step]
        plan = PRESETS[preset].schedule.plan(step, 50, SITES)
        expected = own(given["sample"], given["timestep"].expand(2), context, vector, plan)
        error = float((TokenUNet(theirs, prune=preset)(**given).sample - expected).abs().max())
        print(f"{preset}, step {step}: max error {error:.2e}")
        assert error < 1e-12


OFFICIAL = ["at-edm", "at-edm-dagger", "tome", "tome-dsap", "bicubic", "dissimilarity"]


@pytest.mark.parametrize("steps", [10, 20, 25, 50])
def test_plans_without_a_scheduler_are_ours_at_official_timesteps(peer: UNet2DConditionModel, steps: int) -> None:
    for preset in OFFICIAL:
        ours, schedule = TokenUNet(peer, prune=preset), PRESETS[preset].schedule
        for step, time in enumerate(timesteps(steps, NoiseConfig()).tolist()):
            assert ours.plan(time) == schedule.plan(step, steps, SITES), (preset, step, time)


def test_early_steps_without_a_scheduler_differ_by_one_at_most(peer: UNet2DConditionModel) -> None:
    ours, schedule = TokenUNet(peer), PRESETS["at-edm"].schedule
    early = schedule.plan(0, 50, SITES)
    differing = []
    for steps in range(1, 31):
        times = timesteps(steps, NoiseConfig()).tolist()
        are_early = [ours.plan(time) == early for time in times]
        assert are_early == sorted(are_early, reverse=True)
        differing.append(sum(are_early) - schedule.early_steps(steps))
    print(f"of 1 to 30 steps, {sum(map(bool, differing))} have one early step more")
    assert set(differing) == {0, 1}


@pytest.mark.parametrize("preset", ["at-edm", "moving-grid", "random"])
def test_plans_with_a_scheduler_are_ours_at_any_timesteps(peer: UNet2DConditionModel, preset: str) -> None:
    schedule = PRESETS[preset].schedule
    for kind, spacing in itertools.product(
        (EulerDiscreteScheduler, DDIMScheduler, HeunDiscreteScheduler), ("leading", "linspace", "trailing")
    ):
        times = kind(timestep_spacing=spacing, steps_offset=1 if spacing == "leading" else 0)
        ours = TokenUNet(peer, prune=preset, scheduler=times)
        for steps in (1, 8, 25):
            times.set_timesteps(steps)  # as the pipeline does for each run
            expected = [schedule.plan(step, steps, SITES) for step in range(steps)]
            calls = [expected[0], *(plan for plan in expected[1:] for _ in range(times.order))]
            assert [ours.plan(time) for time in times.timesteps] == calls, (times, steps)


@pytest.fixture(scope="module")
def sdxl(shapes: SDXL) -> SDXL:
    """The bundled model with SDXL's own default settings, which diffusers' pipeline has too."""
    return replace(shapes, config=replace(shapes.config, defaults=SDXL_BASE.defaults))


@pytest.fixture(scope="module")
def whole_pipe(sdxl: SDXL) -> StableDiffusionXLPipeline:
    return diffusers_pipeline(sdxl)


@pytest.fixture
def pipe(whole_pipe: Any) -> Any:
    """With its own U-Net, whatever the last test put there."""
    pipe = StableDiffusionXLPipeline(**whole_pipe.components)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize(
    ("name", "prune"),
    [("euler", None), ("euler", "at-edm"), ("euler", "moving-grid")],
)
def test_picture_equals_our_own_pipeline(sdxl: SDXL, pipe: Any, name: str, prune: str | None) -> None:
    original, steps = pipe.unet, 10
    ours = sdxl.generate([PROMPT], sampling=name, steps=steps, cfg=5.0, seed=3, size=(128, 128), prune=prune)[0]
    pipe.unet = TokenUNet(original, prune=prune, scheduler=scheduler(name, steps))
    theirs = diffusers_picture(sdxl, pipe, name, steps=steps, side=128, seed=3, guidance_scale=5.0)
    error = np.abs(pixels(ours) - pixels(theirs))
    print(f"{name}, {prune}, in [0, 1]: max error {error.max():.2e}, mean {error.mean():.2e}")
    assert error.max() <= 1.01 / 255  # rounding to 8 bits may fall either way
    pipe.unet = original
    dense = diffusers_picture(sdxl, pipe, name, steps=steps, side=128, seed=3, guidance_scale=5.0)
    change = np.abs(pixels(dense) - pixels(theirs)).max()
    assert (change > 0.02) == (prune is not None)  # the plan was followed


def run(pipe: Any, seed: int = 0, **settings: Any) -> np.ndarray:
    pipe.set_progress_bar_config(disable=True)
    given: dict[str, Any] = {"num_inference_steps": 6, "guidance_scale": 5.0, "output_type": "latent"}
    return pipe(PROMPT, generator=image_generators([seed])[0], **{**given, **settings}).images.numpy()


def drawing(side: int = 64) -> Image.Image:
    row, column = np.mgrid[:side, :side]
    return Image.fromarray(np.stack([row * 3, column * 3, row + column], axis=-1).astype(np.uint8))


def half_mask(side: int = 64) -> Image.Image:
    return Image.fromarray((np.mgrid[:side, :side][1] < side // 2).astype(np.uint8) * 255)


def text_to_image(pipe: Any) -> np.ndarray:
    return run(pipe, height=64, width=64)


def image_to_image(pipe: Any) -> np.ndarray:
    return run(StableDiffusionXLImg2ImgPipeline(**pipe.components), image=drawing(), strength=0.7)


def inpainting(pipe: Any) -> np.ndarray:
    pipe = StableDiffusionXLInpaintPipeline(**pipe.components)
    return run(pipe, image=drawing(), mask_image=half_mask(), strength=0.9, height=64, width=64)


def controlnet(pipe: Any) -> np.ndarray:
    original = getattr(pipe.unet, "original", pipe.unet)
    torch.manual_seed(0)
    control = ControlNetModel.from_unet(original, conditioning_embedding_out_channels=(16, 32, 96)).eval()
    for layer in [*control.controlnet_down_blocks, control.controlnet_mid_block]:
        nn.init.normal_(layer.weight, std=0.02)
    pipe = StableDiffusionXLControlNetPipeline(**pipe.components, controlnet=control)
    return run(pipe, image=drawing(), height=64, width=64)


PIPELINES = [text_to_image, image_to_image, inpainting, controlnet]


@pytest.mark.parametrize("pipeline", PIPELINES)
def test_every_pipeline_is_the_same_dense_and_runs_pruned(pipe: Any, pipeline: Callable[[Any], np.ndarray]) -> None:
    theirs, original = pipeline(pipe), pipe.unet
    pipe.unet = TokenUNet(original, prune=None)
    error = np.abs(pipeline(pipe) - theirs).max()
    print(f"{pipeline.__name__}, latents: largest {np.abs(theirs).max():.2f}, max error {error:.2e}")
    assert error < 1e-4
    for prune in ("at-edm", "moving-grid"):
        pipe.unet = TokenUNet(original, prune=prune, scheduler=pipe.scheduler)
        pruned = pipeline(pipe)
        assert np.isfinite(pruned).all()
        assert np.abs(pruned - theirs).max() > 0.05, prune
        assert np.array_equal(pipeline(pipe), pruned)  # nothing is left behind
    pipe.unet = pipe.unet.original
    assert np.array_equal(pipeline(pipe), theirs)


@pytest.mark.slow
@pytest.mark.parametrize("prune", [None, "at-edm:iterations=2"])
def test_compiled(prune: str | None) -> None:
    peer = small_peer(torch.float32, levels=(Level(1, 0), Level(2, 2)), middle_depth=2, res_blocks=1)
    ours = TokenUNet(peer, prune=prune)
    torch._dynamo.reset()
    graphs = []

    def backend(graph: torch.fx.GraphModule, _: list[Tensor]) -> Any:
        graphs.append(graph)
        return graph.forward

    compiled: Any = torch.compile(ours, backend=backend)
    for time in (999, 979, 19, 1, 999):
        given = inputs(torch.float32, grid=(8, 8)) | {"timestep": torch.tensor(time)}
        assert difference(compiled, ours, **given) < 1e-5
    print(f"{prune}: {len(graphs)} graphs")
    assert graphs  # it was compiled
    assert compiled.config.in_channels == 4 and compiled.dtype == torch.float32
    assert compiled.add_embedding.linear_1.in_features == SMALL_XL.vector_channels
    torch._dynamo.reset()


def test_a_lora_that_was_fused_counts() -> None:
    peer = small_peer()
    torch.manual_seed(0)
    layer = peer.down_blocks[1].attentions[0].transformer_blocks[0].attn1.to_q
    before = TokenUNet(peer, prune=None)(**inputs()).sample
    with torch.no_grad():
        layer.weight += 0.1 * torch.randn_like(layer.weight)
    assert difference(TokenUNet(peer, prune=None), peer, **inputs()) < 1e-12
    assert not torch.allclose(TokenUNet(peer, prune=None)(**inputs()).sample, before, atol=1e-4)


def refused(call: Callable[[], Any]) -> str:
    with pytest.raises(ValueError) as error:  # its line is checked where this is called
        call()
    line = str(error.value)
    assert "\n" not in line and "expected" in line
    return line


def test_unet_that_is_not_sdxls_is_refused() -> None:
    peer = small_peer(torch.float32)
    assert "act_fn" in refused(lambda: TokenUNet(UNet2DConditionModel(**{**peer.config, "act_fn": "gelu"})))
    assert "Linear" in refused(lambda: TokenUNet(nn.Linear(1, 1)))
    assert "TokenUNet" in refused(lambda: TokenUNet(TokenUNet(peer)))
    assert "compiled" in refused(lambda: TokenUNet(torch.compile(peer)))


def test_changes_that_would_be_lost_are_refused() -> None:
    peft = pytest.importorskip("peft")
    peer = small_peer(torch.float32)
    peer.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q"]))
    assert "fuse_lora" in refused(lambda: TokenUNet(peer))

    peer = small_peer(torch.float32)
    peer.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)
    assert "FreeU" in refused(lambda: TokenUNet(peer))
    peer.disable_freeu()
    assert isinstance(TokenUNet(peer), TokenUNet)

    peer.fuse_qkv_projections()
    assert "Fused" in refused(lambda: TokenUNet(peer))

    peer = small_peer(torch.float32)
    peer.conv_in.half()
    assert "float16" in refused(lambda: TokenUNet(peer))


def test_arguments_without_meaning_are_refused(peer: UNet2DConditionModel) -> None:
    ours = TokenUNet(peer)
    for name in ("attention_mask", "encoder_attention_mask", "class_labels"):
        assert name in refused(lambda name=name: ours(**inputs(), **{name: torch.ones(2, 77)}))  # type: ignore[misc]
    assert "cross_attention_kwargs" in refused(lambda: ours(**inputs(), cross_attention_kwargs={"scale": 0.5}))
    assert torch.isfinite(ours(**inputs(), cross_attention_kwargs={}).sample).all()
    skips, _ = residuals(peer)
    assert "mid_block" in refused(lambda: ours(**inputs(), down_block_additional_residuals=skips))
    assert "time_ids" in refused(lambda: ours(**inputs() | {"added_cond_kwargs": {"text_embeds": draw(2, POOLED)}}))


def test_timesteps_that_are_no_step_are_refused(peer: UNet2DConditionModel) -> None:
    times = EulerDiscreteScheduler()
    times.set_timesteps(10)
    assert "5.0" in refused(lambda: TokenUNet(peer, scheduler=times)(**inputs() | {"timestep": 5.0}))
    ours = TokenUNet(peer)
    assert "1000" in refused(lambda: ours.plan(1000))
    assert "-1" in refused(lambda: ours.plan(torch.tensor(-1)))
    assert "[681, 1]" in refused(lambda: ours.plan(torch.tensor([681, 1])))
    assert TokenUNet(peer, prune=None).plan(torch.tensor([681, 1])) == DENSE


def test_presets_that_do_not_fit_are_refused(peer: UNet2DConditionModel) -> None:
    assert "no-such" in refused(lambda: TokenUNet(peer, prune="no-such"))
    assert "up.9.9" in refused(lambda: TokenUNet(peer, prune=parse_preset("at-edm:spare=up.9.9")))


def test_methods_that_would_change_the_original_say_where_they_are(peer: UNet2DConditionModel) -> None:
    ours = TokenUNet(peer)
    for name in ("load_lora_adapter", "set_attn_processor", "enable_freeu", "fuse_qkv_projections"):
        with pytest.raises(AttributeError, match=rf"{name}.*pipe\.unet\.original"):
            getattr(ours, name)
    assert not hasattr(ours, "no_such_thing")
