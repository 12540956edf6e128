"""The U-Net against diffusers' with the same weights, also patched by tomesd, and against the official manifest."""

from __future__ import annotations

import copy

import pytest
import tomesd
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from atedm import DENSE, PRESETS, BlockPlan, Pruning, TokenPlan, parse_preset
from minisdxl.bundled import BUNDLED
from minisdxl.checkpoint import modules
from minisdxl.config import SDXL_BASE, SHAPES, UNetConfig
from minisdxl.unet import UNet
from tests.manifest import official_shapes
from tests.minisdxl.peers import diffusers_unet
from tests.minisdxl.tiny import SMALL_UNET, random_unet, unet_inputs


def peer_with_vector(unet: UNet, vector: Tensor) -> UNet2DConditionModel:
    """diffusers' U-Net. It builds the vector from sizes; handing it the finished one leaves that to the text tests."""
    peer = diffusers_unet(unet)
    peer.add_embedding, vector_embedding = nn.Identity(), unet.label_emb(vector)
    peer.get_aug_embed = lambda **_: vector_embedding
    return peer


@pytest.mark.parametrize("scale", [1.0, 1e-2], ids=["ordinary", "small"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("size", [(16, 24), (13, 19)], ids=["even", "odd"])
@torch.no_grad()
def test_parity_with_diffusers(scale: float, dtype: torch.dtype, size: tuple[int, int]) -> None:
    unet = random_unet(SMALL_UNET, dtype, scale)
    x, timestep, context, vector = unet_inputs(SMALL_UNET, size, dtype, scale)
    theirs = peer_with_vector(unet, vector)(x, timestep, context).sample
    ours = unet(x, timestep, context, vector)
    error = (ours - theirs).abs()
    bound = 1e-9 if dtype == torch.float64 else 1e-5 * theirs.abs().max().item()
    print(f"max error {error.max():.2e}, mean {error.mean():.2e}, bound {bound:.2e}, scale {theirs.abs().max():.2e}")
    assert error.max() <= bound


def test_names_and_shapes_are_official() -> None:
    with torch.device("meta"):
        ours = {name: tuple(value.shape) for name, value in UNet(SDXL_BASE.unet).state_dict().items()}
    official = official_shapes("model.diffusion_model.")
    assert len(official) == 1680
    assert ours == official
    assert sum(torch.Size(shape).numel() for shape in ours.values()) == 2_567_463_684


def test_attention_blocks_have_sayable_names() -> None:
    names = [site.name for site in SDXL_BASE.unet.attention_sites()]
    down, up = (
        ["down.1.0", "down.1.1", "down.2.0", "down.2.1"],
        ["up.2.0", "up.2.1", "up.2.2", "up.1.0", "up.1.1", "up.1.2"],
    )
    assert names == [*down, "mid", *up]
    with torch.device("meta"):
        unet = UNet(SDXL_BASE.unet)
    assert [module.name for module in unet.modules() if type(module).__name__ == "AttentionBlock"] == names


# Official eps, by the module's place: 1e-6 only where a spatial transformer begins.
EPS = {
    "norm": 1e-6,
    "norm1": 1e-5,
    "norm2": 1e-5,
    "norm3": 1e-5,
    "in_layers.0": 1e-5,
    "out_layers.0": 1e-5,
    "out.0": 1e-5,
}


def test_every_eps_is_official() -> None:
    with torch.device("meta"):
        unet = UNet(SDXL_BASE.unet)
    norms = {name: m.eps for name, m in unet.named_modules() if isinstance(m, nn.GroupNorm | nn.LayerNorm)}
    assert len(norms) == 2 * 17 + 1 + 11 + 3 * 70  # ResBlocks, output, attention blocks, transformer layers
    for name, eps in norms.items():
        place = next(place for place in EPS if name == place or name.endswith("." + place))
        assert eps == EPS[place], name


@pytest.mark.parametrize("scale", [1.0, 1e-2], ids=["ordinary", "small"])
@pytest.mark.parametrize("r", [0.1, 0.5, 0.75])
@torch.no_grad()
def test_token_merging_is_that_of_tomesd(r: float, scale: float) -> None:
    """tomesd on diffusers' U-Net, as the paper's section 4.1 sets it, and our plan: all layers and sub-layers."""
    unet = random_unet(SMALL_UNET, torch.float64, scale)
    x, timestep, context, vector = unet_inputs(SMALL_UNET, (16, 24), torch.float64, scale)
    peer = peer_with_vector(unet, vector)
    dense = peer(x, timestep, context).sample
    everywhere = {"merge_attn": True, "merge_crossattn": True, "merge_mlp": True}
    tomesd.apply_patch(peer, ratio=r, max_downsample=4, sx=2, sy=2, use_rand=False, **everywhere)
    theirs = peer(x, timestep, context).sample
    plan = parse_preset(f"tome:r={r}").plan(0, 50, SMALL_UNET.attention_sites())
    ours = unet(x, timestep, context, vector, plan)
    error, effect = (ours - theirs).abs().max(), (theirs - dense).abs().max()
    print(f"r {r}: max error {error:.2e}, merging changes {effect:.2e} of {theirs.abs().max():.2e}")
    assert error <= 1e-9
    assert effect > 1e6 * error


@torch.no_grad()
def test_tomesd_by_default_merges_nothing_on_sdxl() -> None:
    """Its ``max_downsample`` is 1, and SDXL has no attention at full resolution: why the test above says 4."""
    unet = random_unet(SMALL_UNET, torch.float64)
    x, timestep, context, vector = unet_inputs(SMALL_UNET, (16, 24), torch.float64)
    peer = peer_with_vector(unet, vector)
    dense = peer(x, timestep, context).sample
    tomesd.apply_patch(peer, ratio=0.5, use_rand=False)
    assert torch.equal(peer(x, timestep, context).sample, dense)


@torch.no_grad()
def test_reducing_nothing_is_the_dense_model_bit_for_bit() -> None:
    unet = random_unet(SMALL_UNET, torch.float32)
    inputs = unet_inputs(SMALL_UNET, (16, 16), torch.float32)
    sites = list(SMALL_UNET.attention_sites())
    dense = unet(*inputs)
    for preset in ("at-edm:rho=0", "at-edm:rho=0,layers=0+1,place=before-ff", "tome:r=0"):
        nothing = parse_preset(preset).plan(40, 50, sites)
        assert len(nothing) == len(sites)
        assert torch.equal(unet(*inputs, nothing), dense)
    # A ratio so small that it rounds to no token goes the same way.
    assert torch.equal(unet(*inputs, TokenPlan({"mid": BlockPlan.pruning(Pruning(0.001))})), dense)


@torch.no_grad()
def test_dense_and_pruned_calls_leave_no_trace_in_the_model() -> None:
    unet = random_unet(SMALL_UNET, torch.float32)
    inputs = unet_inputs(SMALL_UNET, (16, 16), torch.float32)
    dense = unet(*inputs, DENSE)
    for preset in ("at-edm", "tome"):
        plan = parse_preset(preset).plan(40, 50, SMALL_UNET.attention_sites())
        reduced = unet(*inputs, plan)
        assert not torch.allclose(dense, reduced)
        assert torch.equal(unet(*inputs, DENSE), dense)
        assert torch.equal(unet(*inputs, plan), reduced)


@pytest.mark.parametrize(
    ("name", "after", "message"), [("down.7.0", 0, "down.7.0"), ("mid", 2, "before the last")], ids=["name", "layer"]
)
def test_plan_that_fits_no_block_raises(name: str, after: int, message: str) -> None:
    unet = random_unet(SMALL_UNET, torch.float32)
    plan = TokenPlan({name: BlockPlan.pruning(Pruning(0.5), after=(after,))})
    with pytest.raises(ValueError, match=message):
        unet(*unet_inputs(SMALL_UNET, (8, 8), torch.float32), plan)


@pytest.fixture(scope="module")
def trained() -> UNet:
    """The bundled model's: attention that is not random, and tokens worth ranking."""
    return modules.load(BUNDLED["shapes"], torch.device("cpu"), torch.float32)[1].unet


# Every preset, and the settings that change how a layer runs.
METHODS = [
    *PRESETS,
    "at-edm:layers=0+1+2,rho=0.4",
    "at-edm:place=before-ff",
    "at-edm:ratios=0.3@mid+0.9@up.2.0",
    "at-edm:graph=streamed",
    "at-edm:graph=subsampled",
    "at-edm:iterations=3",
    "ca-wpr:graph=streamed",
]


@pytest.mark.parametrize("preset", METHODS)
@torch.no_grad()
def test_presets_on_the_bundled_model(trained: UNet, preset: str) -> None:
    inputs = unet_inputs(SHAPES.unet, (32, 40), torch.float32)
    sites = list(SHAPES.unet.attention_sites())
    dense = trained(*inputs)
    for step in (0, 49):
        reduced = trained(*inputs, parse_preset(preset).plan(step, 50, sites))
        change = (reduced - dense).square().mean().sqrt() / dense.square().mean().sqrt()
        print(f"{preset} at step {step}: changes the output by {change:.1%} (root mean square)")
        assert reduced.isfinite().all()
        assert 1e-5 < change < 1


@pytest.mark.parametrize("preset", ["at-edm", "tome", "ca-wpr"])
@torch.no_grad()
def test_text_that_was_read_once_is_the_text_bit_for_bit(trained: UNet, preset: str) -> None:
    """Also where text ranks tokens, and another plan is followed at each step."""
    x, timestep, context, vector = unet_inputs(SHAPES.unet, (32, 24), torch.float32)
    text = trained.project_context(context)
    sites = list(SHAPES.unet.attention_sites())
    assert list(text) == [site.name for site in sites]
    for plan in (DENSE, parse_preset(preset).plan(0, 50, sites), parse_preset(preset).plan(49, 50, sites)):
        assert torch.equal(trained(x, timestep, text, vector, plan), trained(x, timestep, context, vector, plan))
    other = trained(x, timestep, trained.project_context(context.flip(0)), vector)
    assert not torch.allclose(other, trained(x, timestep, text, vector))


@pytest.mark.parametrize("preset", METHODS)
@torch.no_grad()
def test_ratio_zero_on_the_bundled_model_is_dense_bit_for_bit(trained: UNet, preset: str) -> None:
    inputs = unet_inputs(SHAPES.unet, (24, 16), torch.float32)
    schedule = parse_preset(preset)
    off = parse_preset(f"{preset.partition(':')[0]}:{'rho' if isinstance(schedule.method, Pruning) else 'r'}=0")
    plan = off.plan(49, 50, SHAPES.unet.attention_sites())
    assert set(plan) == set(schedule.plan(49, 50, SHAPES.unet.attention_sites()))
    assert torch.equal(trained(*inputs, plan), trained(*inputs))


@pytest.mark.parametrize("preset", METHODS)
@torch.no_grad()
def test_batch_rows_are_independent(trained: UNet, preset: str) -> None:
    unet = copy.deepcopy(trained).double()
    x, timestep, context, vector = unet_inputs(SHAPES.unet, (32, 24), torch.float64)
    plan = parse_preset(preset).plan(49, 50, SHAPES.unet.attention_sites())
    both = unet(x, timestep, context, vector, plan)
    for row in range(2):
        alone = unet(*(part[row : row + 1] for part in (x, timestep, context, vector)), plan)
        error = (alone[0] - both[row]).abs().max()
        print(f"{preset}, row {row} alone and in a batch: max error {error:.2e} of {both.abs().max():.2e}")
        assert error <= 1e-10


def test_shapes_and_sdxl_differ_in_numbers_only() -> None:
    def structure(config: UNetConfig) -> set[str]:
        with torch.device("meta"):
            return {type(module).__name__ for module in UNet(config).modules()}

    assert structure(SHAPES.unet) == structure(SDXL_BASE.unet)


@pytest.mark.parametrize(
    "change",
    [{"head_channels": 48}, {"norm_groups": 24}, {"res_blocks": 0}, {"levels": ()}],
    ids=["heads", "groups", "res_blocks", "levels"],
)
def test_impossible_configs_are_refused(change: dict[str, object]) -> None:
    values = {field: getattr(SMALL_UNET, field) for field in SMALL_UNET.__dataclass_fields__} | change
    with pytest.raises(ValueError, match=r"."):
        UNetConfig(**values)
