"""Kinds of changes, merged: against LyCORIS and PEFT, a float64 reference, invariants, and what is refused."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from lycoris.modules.base import LycorisBaseModule
from lycoris.modules.full import FullModule
from lycoris.modules.ia3 import IA3Module
from lycoris.modules.locon import LoConModule
from lycoris.modules.loha import LohaModule
from lycoris.modules.lokr import LokrModule
from lycoris.modules.norms import NormModule
from peft import LoHaConfig, LoKrConfig, LoraConfig, get_peft_model
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor, nn

from minisdxl.checkpoint.errors import CheckpointError
from minisdxl.checkpoint.layouts import PARTS
from minisdxl.checkpoint.lora import LoRA, merge, open_loras
from minisdxl.checkpoint.modules import official_state_dict
from tests.minisdxl.tiny import TINY, tiny_modules

Tensors = dict[str, Tensor]
UNET, CLIP, OPENCLIP = (PARTS[part].prefix for part in ("unet", "text_encoder", "text_encoder_2"))


@dataclass(frozen=True)
class Place:
    """A module of the tiny model: how files name it, and its weight and bias."""

    name: str
    weight: Callable[[Mapping[str, Tensor]], Tensor]
    bias: Callable[[Mapping[str, Tensor]], Tensor] | None = None

    def module(self, state: Mapping[str, Tensor]) -> nn.Module:
        """A module of its own in float64."""
        weight = self.weight(state).double()
        out, inner = (*weight.shape, 1)[:2]
        bias = self.bias is not None
        module: nn.Module
        if weight.ndim == 4:
            size = weight.shape[-1]
            module = nn.Conv2d(inner, out, size, padding=size // 2, bias=bias)
        else:
            module = nn.Linear(inner, out, bias=bias) if weight.ndim == 2 else nn.LayerNorm(out)
        state_dict = {"weight": weight.clone()}
        if self.bias is not None:
            state_dict["bias"] = self.bias(state).double().clone()
        module.double().load_state_dict(state_dict)
        return module


def third(tensor: Tensor, number: int) -> Tensor:
    return tensor.chunk(3)[number]


PLACES = {
    "linear": Place(
        "lora_unet_input_blocks_4_1_transformer_blocks_0_ff_net_0_proj",
        lambda state: state[f"{UNET}input_blocks.4.1.transformer_blocks.0.ff.net.0.proj.weight"],
        lambda state: state[f"{UNET}input_blocks.4.1.transformer_blocks.0.ff.net.0.proj.bias"],
    ),
    "square": Place(
        "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q",
        lambda state: state[f"{UNET}middle_block.1.transformer_blocks.0.attn1.to_q.weight"],
    ),
    "convolution": Place(
        "lora_unet_input_blocks_4_0_in_layers_2",
        lambda state: state[f"{UNET}input_blocks.4.0.in_layers.2.weight"],
        lambda state: state[f"{UNET}input_blocks.4.0.in_layers.2.bias"],
    ),
    "1x1 convolution": Place(
        "lora_unet_down_blocks_1_resnets_0_conv_shortcut",
        lambda state: state[f"{UNET}input_blocks.4.0.skip_connection.weight"],
        lambda state: state[f"{UNET}input_blocks.4.0.skip_connection.bias"],
    ),
    "stacked": Place(
        "lora_te2_text_model_encoder_layers_1_self_attn_k_proj",
        lambda state: third(state[f"{OPENCLIP}transformer.resblocks.1.attn.in_proj_weight"], 1),
        lambda state: third(state[f"{OPENCLIP}transformer.resblocks.1.attn.in_proj_bias"], 1),
    ),
    "transposed": Place("lora_te2_text_projection", lambda state: state[f"{OPENCLIP}text_projection"].T),
    "norm": Place(
        "lora_te1_text_model_encoder_layers_0_layer_norm1",
        lambda state: state[f"{CLIP}text_model.encoder.layers.0.layer_norm1.weight"],
        lambda state: state[f"{CLIP}text_model.encoder.layers.0.layer_norm1.bias"],
    ),
}
MATRICES = ("linear", "square", "convolution", "1x1 convolution", "stacked", "transposed")


@dataclass(frozen=True)
class Algorithm:
    """A class of LyCORIS with its arguments."""

    of: type[LycorisBaseModule]
    arguments: Mapping[str, Any] = field(default_factory=dict)
    places: tuple[str, ...] = MATRICES


DORA, TUCKER = {"weight_decompose": True}, {"use_tucker": True}
ON_INPUT = {"weight_decompose": True, "wd_on_out": False}
ALGORITHMS = {
    "LoCon": Algorithm(LoConModule),
    "LoCon, Tucker": Algorithm(LoConModule, TUCKER),
    "LoCon, rank-stabilized": Algorithm(LoConModule, {"rs_lora": True}),
    "LoCon, DoRA by output": Algorithm(LoConModule, DORA),
    "LoCon, DoRA by input": Algorithm(LoConModule, ON_INPUT),
    "LoCon, Tucker, DoRA by input": Algorithm(LoConModule, TUCKER | ON_INPUT),
    "LoHa": Algorithm(LohaModule),
    "LoHa, Tucker": Algorithm(LohaModule, TUCKER),
    "LoHa, rank-stabilized": Algorithm(LohaModule, {"rs_lora": True}),
    "LoHa, DoRA by output": Algorithm(LohaModule, DORA),
    "LoHa, Tucker, DoRA by input": Algorithm(LohaModule, TUCKER | ON_INPUT),
    "LoKr": Algorithm(LokrModule, {"factor": 4}),
    "LoKr, unbalanced": Algorithm(LokrModule, {"factor": 2, "unbalanced_factorization": True}),
    "LoKr, both as pairs": Algorithm(LokrModule, {"decompose_both": True, "lora_dim": 1, "factor": 4}),
    "LoKr, both whole": Algorithm(LokrModule, {"full_matrix": True}),
    "LoKr, Tucker": Algorithm(LokrModule, TUCKER | {"factor": 2}),
    "LoKr, rank-stabilized": Algorithm(LokrModule, {"factor": 2, "rs_lora": True}),
    "LoKr, DoRA by output": Algorithm(LokrModule, DORA),
    "LoKr, Tucker, DoRA by input": Algorithm(LokrModule, TUCKER | ON_INPUT | {"factor": 2}),
    "full": Algorithm(FullModule),
    "norm": Algorithm(NormModule, places=("norm",)),
    "IA3 on outputs": Algorithm(IA3Module),
    "IA3 on inputs": Algorithm(IA3Module, {"train_on_input": True}),
}


@pytest.fixture(scope="module")
def state() -> Tensors:
    """The weights of the tiny model in fp32, by official names."""
    return {name: tensor.detach() for name, tensor in official_state_dict(tiny_modules()).items()}


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def written(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> Path:
    save_file({name: each.detach().clone().contiguous() for name, each in tensors.items()}, path, dict(metadata or {}))
    return path


def merged(state: Mapping[str, Tensor], *loras: LoRA, dtype: torch.dtype = torch.float32) -> Tensors:
    """All weights with LoRAs merged into them."""
    weights = {name: tensor.to(dtype, copy=True) for name, tensor in state.items()}
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    merge(open_loras(loras, TINY, shapes), weights)
    return weights


def drawn(algorithm: Algorithm, module: nn.Module) -> LycorisBaseModule:
    """LyCORIS' module for another, with random numbers in all its parameters."""
    arguments = {"lora_dim": 2, "alpha": 1.5, **algorithm.arguments}
    made = algorithm.of("x", module, **arguments).double()
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if name != "dora_scale":
                parameter.copy_(0.5 * torch.randn_like(parameter))
        if hasattr(made, "dora_scale"):
            made.dora_scale.data = made.dora_scale * (1 + 0.5 * torch.rand_like(made.dora_scale))
    return made


@torch.no_grad()
def weight_and_bias(module: nn.Module, forward: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor | None]:
    """The weight and bias of a linear map, a convolution or a norm, from what comes out of it."""
    bias = getattr(module, "bias", None)
    if isinstance(module, nn.LayerNorm):
        x = torch.randn(8, len(module.weight), dtype=torch.float64)
        normal = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, unbiased=False) + module.eps).sqrt()
        lines = [torch.stack([each, torch.ones_like(each)], dim=1) for each in normal.T]
        solved = [torch.linalg.lstsq(line, y[:, None]).solution for line, y in zip(lines, forward(x).T, strict=True)]
        return torch.stack([each[0, 0] for each in solved]), torch.stack([each[1, 0] for each in solved])
    assert isinstance(module, nn.Linear | nn.Conv2d)
    inner = module.weight.shape[1]
    x = torch.eye(inner, dtype=torch.float64)
    if isinstance(module, nn.Conv2d):
        size = module.kernel_size[0]
        ones = torch.zeros(inner, inner, size, size, dtype=torch.float64)
        ones[:, :, size // 2, size // 2] = x
        zero = forward(torch.zeros_like(ones))
        answer = (forward(ones) - zero).transpose(0, 1).flip(-1, -2)
        return answer, None if bias is None else zero[0, :, 0, 0]
    zero = forward(torch.zeros_like(x))
    return (forward(x) - zero).T, None if bias is None else zero[0]


@pytest.mark.parametrize("name", ALGORITHMS)
def test_merged_weights_equal_lycoris(tmp_path: Path, state: Tensors, name: str) -> None:
    """What LyCORIS' forward has, in training and after: its own merge counts alpha / rank of LoHa and LoKr twice."""
    algorithm, expected, tensors = ALGORITHMS[name], dict[str, tuple[Tensor, Tensor | None]](), Tensors()
    for where in algorithm.places:
        module = PLACES[where].module(state)
        made = drawn(algorithm, module)
        stored = made.state_dict()
        tensors |= {f"{PLACES[where].name}.{role}": tensor.float() for role, tensor in stored.items()}
        if "on_input" in stored:
            tensors[f"{PLACES[where].name}.on_input"] = stored["on_input"]  # a whole number, as LyCORIS writes it
        # The numbers of the file, which are fp32.
        plain = {role: tensor.float().double() for role, tensor in stored.items()}
        if isinstance(made, FullModule):
            made.weight.data, made.bias = plain["diff"], nn.Parameter(plain["diff_b"]) if "diff_b" in plain else None
            weight, bias = made.make_weight()
            expected[where] = weight, bias
            continue
        made.load_state_dict(plain, strict=False)
        if hasattr(made, "dora_scale"):
            made.dora_scale.data = plain["dora_scale"]
        expected[where] = weight_and_bias(module, made)
    after = merged(state, LoRA(written(tmp_path / "x.safetensors", tensors)))
    for where, (weight, bias) in expected.items():
        place = PLACES[where]
        pairs = [(place.weight, weight)] + ([] if bias is None or place.bias is None else [(place.bias, bias)])
        for find, right in pairs:
            error, change = ((find(each).double() - right).abs().max() for each in (after, state))
            print(f"{name}, {where}: max error {error:.1e} of a change of {change:.2f}")
            assert error <= 1e-6
        assert (place.weight(state).double() - weight).abs().max() > 0.05
    changed = [each for each in state if not torch.equal(state[each], after[each])]
    assert len(changed) == sum(
        1 + (name in ("full", "norm") and place.bias is not None)
        for place in (PLACES[where] for where in algorithm.places)
    )


@pytest.mark.parametrize("of", [LoConModule, LohaModule, LokrModule])
def test_a_tensor_called_scalar_multiplies(tmp_path: Path, state: Tensors, of: type[LycorisBaseModule]) -> None:
    """Older versions of LyCORIS wrote it where newer ones multiply it into a matrix."""
    place = PLACES["convolution"]
    module = place.module(state)
    made = drawn(Algorithm(of, {"use_scalar": True}), module)
    made.scalar.data.fill_(1.0)
    stored = {role: tensor.float() for role, tensor in made.state_dict().items()}
    made.load_state_dict({role: tensor.double() for role, tensor in stored.items()}, strict=False)
    made.scalar.data.fill_(-0.75)
    tensors = {f"{place.name}.{role}": tensor for role, tensor in stored.items()}
    after = merged(state, LoRA(written(tmp_path / "x.safetensors", tensors | {f"{place.name}.scalar": -0.75 * ONE})))
    weight, _ = weight_and_bias(module, made)
    error, change = ((place.weight(each).double() - weight).abs().max() for each in (after, state))
    print(f"max error {error:.1e} of a change of {change:.2f}")
    assert error <= 1e-6 < 0.05 < change


ONE = torch.ones(())
PEFT = {
    "LoHa": lambda names: LoHaConfig(r=2, alpha=3, target_modules=names, init_weights=False),
    "LoHa, Tucker": lambda names: LoHaConfig(
        r=2, alpha=3, target_modules=names, init_weights=False, use_effective_conv2d=True
    ),
    "LoKr": lambda names: LoKrConfig(r=1, alpha=3, target_modules=names, init_weights=False, decompose_factor=4),
    "LoKr, both as pairs": lambda names: LoKrConfig(
        r=1, alpha=3, target_modules=names, init_weights=False, decompose_both=True, decompose_factor=4
    ),
    "LoKr, Tucker": lambda names: LoKrConfig(
        r=2, alpha=3, target_modules=names, init_weights=False, use_effective_conv2d=True, decompose_factor=2
    ),
    "DoRA": lambda names: LoraConfig(r=2, lora_alpha=3, target_modules=names, use_dora=True, init_lora_weights=False),
    "DoRA, rank-stabilized": lambda names: LoraConfig(
        r=2, lora_alpha=3, target_modules=names, use_dora=True, init_lora_weights=False, use_rslora=True
    ),
}
# Their names as diffusers writes them.
DIFFUSERS = {
    "linear": "unet.down_blocks.1.attentions.0.transformer_blocks.0.ff.net.0.proj",
    "square": "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q",
    "convolution": "unet.down_blocks.1.resnets.0.conv1",
    "1x1 convolution": "unet.down_blocks.1.resnets.0.conv_shortcut",
}


@pytest.mark.parametrize("name", PEFT)
def test_merged_weights_equal_peft(tmp_path: Path, state: Tensors, name: str) -> None:
    modules = nn.ModuleDict({where.replace(" ", "_"): PLACES[where].module(state).float() for where in DIFFUSERS})
    config = PEFT[name](list(modules))
    model = get_peft_model(modules, config)
    with torch.no_grad():
        for each, parameter in model.named_parameters():
            if "magnitude" in each:
                parameter.mul_(1 + 0.5 * torch.rand_like(parameter))
            elif "lora_" in each or "hada_" in each or "lokr_" in each:
                parameter.copy_(0.5 * torch.randn_like(parameter))
    tensors: Tensors = {}
    for each, tensor in get_peft_model_state_dict(model).items():
        where, _, role = each.removeprefix("base_model.model.").partition(".")
        tensors[f"{DIFFUSERS[where.replace('_', ' ')]}.{role}"] = tensor
        if "DoRA" not in name:
            tensors[f"{DIFFUSERS[where.replace('_', ' ')]}.alpha"] = torch.tensor(3.0)
    settings = {f"unet.{key}": value for key, value in config.to_dict().items() if "DoRA" in name}
    metadata = {"lora_adapter_metadata": json.dumps(settings, default=str)}
    after = merged(state, LoRA(written(tmp_path / "x.safetensors", tensors, metadata)))
    right = model.merge_and_unload()
    for where in DIFFUSERS:
        weight = right[where.replace(" ", "_")].weight.detach()
        error, change = ((PLACES[where].weight(each) - weight).abs().max() for each in (after, state))
        print(f"{name}, {where}: max error {error:.1e} of a change of {change:.2f}")
        assert error <= 1e-6 < 0.05 < change


def every_kind(state: Tensors, kinds: Mapping[str, str]) -> Tensors:
    """A file with a kind for each of some places."""
    tensors: Tensors = {}
    for where, name in kinds.items():
        stored = drawn(ALGORITHMS[name], PLACES[where].module(state)).state_dict()
        tensors |= {f"{PLACES[where].name}.{role}": tensor.float() for role, tensor in stored.items()}
    return tensors


MIXED = {
    "linear": "LoCon, DoRA by input",
    "square": "LoHa, DoRA by output",
    "convolution": "LoKr, Tucker, DoRA by input",
    "1x1 convolution": "IA3 on inputs",
    "stacked": "LoKr, both as pairs",
    "transposed": "full",
    "norm": "norm",
}


def largest(one: Tensors, other: Tensors) -> float:
    return max(float((one[name] - other[name]).abs().max()) for name in one)


@pytest.mark.parametrize("scale", [-0.5, 0.25, 2.0])
def test_any_scale_lies_on_the_line_through_both(tmp_path: Path, state: Tensors, scale: float) -> None:
    """W + scale * (merged at 1 - W), for DoRA too."""
    path = written(tmp_path / "x.safetensors", every_kind(state, MIXED))
    whole, part = (merged(state, LoRA(path, each), dtype=torch.float64) for each in (1.0, scale))
    right = {name: tensor + scale * (whole[name] - tensor) for name, tensor in state.items()}
    error = largest(part, right)
    print(f"scale {scale}: max error {error:.1e}")
    assert error <= 1e-14 < 0.1 < largest(part, state)


def test_scale_0_changes_no_bit(tmp_path: Path, state: Tensors) -> None:
    path = written(tmp_path / "x.safetensors", every_kind(state, MIXED))
    for dtype in (torch.float32, torch.bfloat16):
        after = merged(state, LoRA(path, 0.0), dtype=dtype)
        assert all(torch.equal(after[name], tensor.to(dtype)) for name, tensor in state.items())


def test_order_does_not_matter(tmp_path: Path, state: Tensors) -> None:
    """Each is the change of the model's own weight, also a DoRA and an IA3, which depend on it."""
    others = {
        "linear": "IA3 on outputs",
        "square": "LoCon, DoRA by input",
        "convolution": "LoHa, Tucker, DoRA by input",
    }
    files = [
        written(tmp_path / f"{n}.safetensors", every_kind(state, kinds)) for n, kinds in enumerate((MIXED, others))
    ]
    loras = [LoRA(file, scale) for file, scale in zip(files, (0.75, -1.5), strict=True)]
    both, turned = (merged(state, *each, dtype=torch.float64) for each in (loras, reversed(loras)))
    alone = [merged(state, lora, dtype=torch.float64) for lora in loras]
    right = {name: alone[0][name] + alone[1][name] - tensor for name, tensor in state.items()}
    errors = largest(both, turned), largest(both, right)
    print(f"in the other order: max difference {errors[0]:.1e}; from the sum of both changes: {errors[1]:.1e}")
    assert max(errors) <= 1e-14


def test_other_dtypes_are_rounded_once(tmp_path: Path, state: Tensors) -> None:
    path = written(tmp_path / "x.safetensors", every_kind(state, MIXED))
    rounded = {name: tensor.bfloat16().double() for name, tensor in state.items()}
    exact, after = merged(rounded, LoRA(path), dtype=torch.float64), merged(state, LoRA(path), dtype=torch.bfloat16)
    step = torch.finfo(torch.bfloat16).eps / 2
    excess = max(float(((after[name] - each).abs() - step * each.abs()).max()) for name, each in exact.items())
    print(f"beyond half a step: {excess:.1e}")
    assert excess <= 1e-6


def test_a_row_of_length_0_stays(tmp_path: Path, state: Tensors) -> None:
    """Where the weight and its change are 0 there is no direction to give a length."""
    place = PLACES["square"]
    weights = {name: tensor.clone() for name, tensor in state.items()}
    place.weight(weights)[3] = 0
    tensors = {
        f"{place.name}.lora_down.weight": torch.randn(2, 24),
        f"{place.name}.lora_up.weight": torch.zeros(24, 2),
        f"{place.name}.dora_scale": torch.full((24, 1), 2.0),
    }
    after = place.weight(merged(weights, LoRA(written(tmp_path / "x.safetensors", tensors))))
    lengths = after.norm(dim=1)
    print(lengths)
    assert lengths[3] == 0 and (lengths[[0, 1, 2, 4]] - 2).abs().max() < 1e-6


Q = PLACES["square"].name  # (24, 24), no bias
CONV = PLACES["convolution"].name  # (16, 8, 3, 3)


def loha(rank: int = 2) -> Tensors:
    shapes = {"w1_a": (24, rank), "w1_b": (rank, 24), "w2_a": (24, rank), "w2_b": (rank, 24)}
    return {f"{Q}.hada_{role}": torch.ones(shape) for role, shape in shapes.items()} | {f"{Q}.alpha": ONE}


def lokr() -> Tensors:
    """Of the convolution: (4, 2) and a Tucker form of (4, 4, 3, 3)."""
    shapes = {"w1": (4, 2), "t2": (2, 2, 3, 3), "w2_a": (2, 4), "w2_b": (2, 4)}
    return {f"{CONV}.lokr_{role}": torch.ones(shape) for role, shape in shapes.items()} | {f"{CONV}.alpha": ONE}


def ia3(on_input: int, length: int) -> Tensors:
    return {f"{CONV}.weight": torch.ones(length), f"{CONV}.on_input": torch.tensor(on_input)}


REFUSED: dict[str, tuple[Tensors, Mapping[str, Tensor | None], str]] = {
    "half of a LoHa": (loha(), {f"{Q}.hada_w2_b": None}, f"1 missing tensor ({Q}.hada_w2_b)"),
    "two ranks": (loha(), {f"{Q}.hada_w2_a": torch.ones(24, 3)}, "hada_w2_a is [24, 3], expected [24, 2]"),
    "rank 0": (loha(0), {}, "4 mis-shaped tensors"),
    "a core alone": (loha(), {f"{Q}.hada_t2": torch.ones(2, 2)}, "1 missing tensor"),
    "sides": (lokr(), {f"{CONV}.lokr_w1": torch.ones(5, 2)}, "lokr_w1 is [5, 2], expected [1, 2]"),
    "no second": (
        lokr(),
        {f"{CONV}.lokr_w2_a": None, f"{CONV}.lokr_w2_b": None, f"{CONV}.lokr_t2": None},
        f"2 missing tensors ({CONV}.lokr_w2_a, {CONV}.lokr_w2_b)",
    ),
    "window": (lokr(), {f"{CONV}.lokr_t2": torch.ones(2, 2, 1, 1)}, "is [2, 2, 1, 1], expected [2, 2, 3, 3]"),
    "t1": (lokr(), {f"{CONV}.lokr_t1": torch.ones(2, 2, 3, 3)}, f"1 unexpected tensor ({CONV}.lokr_t1)"),
    "two kinds": (lokr(), {f"{CONV}.diff": torch.ones(16, 8, 3, 3)}, f"1 unexpected tensor ({CONV}.diff)"),
    "scalar": (loha(), {f"{Q}.scalar": torch.ones(2)}, "scalar is [2], expected []"),
    "no number": (loha(), {f"{Q}.scalar": torch.tensor(math.nan)}, f"has nan as {Q}.scalar, expected a finite number"),
    "lengths": (loha(), {f"{Q}.dora_scale": torch.ones(12, 1)}, "dora_scale is [12, 1], expected [24, 1]"),
    "lengths alone": ({}, {f"{Q}.dora_scale": torch.ones(24, 1)}, f"1 unexpected tensor ({Q}.dora_scale)"),
    "lengths of whole": (
        {f"{Q}.diff": torch.ones(24, 24)},
        {f"{Q}.dora_scale": torch.ones(24, 1)},
        f"1 unexpected tensor ({Q}.dora_scale)",
    ),
    "diff": ({f"{Q}.diff": torch.ones(24, 24)}, {f"{Q}.diff": torch.ones(24)}, "is [24], expected [24, 24]"),
    "no bias": (loha(), {f"{Q}.diff_b": torch.ones(24)}, f"1 unexpected tensor ({Q}.diff_b)"),
    "two differences": (
        {"lora_unet_out_0.w_norm": torch.ones(8)},
        {"lora_unet_out_0.diff": torch.ones(8)},
        "has two for one module: ",
    ),
    "norm": ({}, {"lora_unet_out_0.dora_scale": torch.ones(8)}, "1 unexpected tensor"),
    "IA3 of outputs": (ia3(0, 8), {}, f"has 8 numbers in {CONV}.weight, expected 16 for the outputs"),
    "IA3 of inputs": (ia3(1, 16), {}, f"has 16 numbers in {CONV}.weight, expected 8 for the inputs"),
    "IA3 of another size": (ia3(1, 9), {}, f"{CONV}.weight is [9], expected [16]"),
    "half of an IA3": (ia3(1, 8), {f"{CONV}.weight": None}, f"1 missing tensor ({CONV}.weight)"),
    "dtype": (loha(), {f"{Q}.hada_w1_a": torch.ones(24, 2).int()}, "hada_w1_a as I32; expected F64"),
    "OFT": ({}, {f"{Q}.oft_blocks": torch.ones(2, 12, 12)}, "is an OFT or BOFT (oft), which rotates the weights"),
    "BOFT": ({}, {f"{Q}.boft_R": torch.ones(2, 12, 12)}, "is a BOFT (boft), which rotates the weights"),
    "GLoRA": (loha(), {f"{Q}.a1.weight": torch.ones(2, 2)}, "is a GLoRA"),
    "T-LoRA": (loha(), {f"{Q}.lambda_layer": torch.ones(1, 2)}, "is a T-LoRA"),
    "LyCORIS for SD 1.x": (
        {},
        {"lora_te_text_model_encoder_layers_0_mlp_fc1.hada_w1_a": torch.ones(2, 2)},
        "is a LoRA for a Stable Diffusion 1.x or 2.x model",
    ),
    "LoKr for Flux": (
        {},
        {"lora_unet_double_blocks_0_img_attn_qkv.lokr_w1": torch.ones(2, 2)},
        "is a LoRA for a Flux model",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fit_is_named(tmp_path: Path, state: Tensors, name: str) -> None:
    good, change, expected = REFUSED[name]
    tensors = {each: tensor for each, tensor in {**good, **change}.items() if tensor is not None}
    path = written(tmp_path / "x.safetensors", tensors)
    with pytest.raises(CheckpointError) as caught:
        merged(state, LoRA(path))
    print(caught.value)
    assert str(caught.value).startswith(f"{path} ") and expected in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("good", [loha(), lokr(), ia3(0, 16), ia3(1, 8)], ids=["LoHa", "LoKr", "IA3", "IA3 on inputs"])
def test_the_files_that_are_then_spoilt_are_good(tmp_path: Path, state: Tensors, good: Tensors) -> None:
    assert largest(merged(state, LoRA(written(tmp_path / "x.safetensors", good))), state) > 0.1


def test_settings_of_other_peft_adapters_are_refused(tmp_path: Path, state: Tensors) -> None:
    """Their alpha has another name, and would be lost."""
    metadata = {"lora_adapter_metadata": json.dumps({"unet.peft_type": "LOHA", "unet.alpha": 8})}
    path = written(tmp_path / "x.safetensors", {name: each for name, each in loha().items() if "alpha" not in name})
    merged(state, LoRA(path))
    with pytest.raises(CheckpointError, match="is a PEFT adapter of type 'LOHA' for unet; expected LORA"):
        merged(state, LoRA(written(path, loha(), metadata)))


def test_matrices_may_be_1x1_convolutions(tmp_path: Path, state: Tensors) -> None:
    """And numbers lists of one, as some programs write them."""
    plain = every_kind(state, {where: kind for where, kind in MIXED.items() if where != "norm"})
    turned = {
        name: tensor[..., None, None] if tensor.ndim == 2 else tensor[None] if tensor.ndim == 0 else tensor
        for name, tensor in plain.items()
    }
    files = [written(tmp_path / f"{n}.safetensors", tensors) for n, tensors in enumerate((plain, turned))]
    assert largest(*(merged(state, LoRA(file)) for file in files)) == 0 < largest(merged(state, LoRA(files[0])), state)
