"""fp8 files, with scales and without: every number exactly, and other quantized files called so."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from minisdxl.checkpoint.errors import CheckpointError
from minisdxl.checkpoint.layouts import PARTS, layout
from minisdxl.checkpoint.modules import load, official_state_dict, open_source
from minisdxl.convert import write_folder, write_single
from minisdxl.tokenizer import read_vocabulary
from tests.minisdxl.tiny import TINY, VOCABULARY, tiny_file

Tensors = dict[str, Tensor]
UNET, TEXT = PARTS["unet"].prefix, "conditioner.embedders."
CONFIG = {"minisdxl.config": json.dumps(TINY.to_dict())}
FP8 = pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
DTYPES = pytest.mark.parametrize("wanted", [torch.float32, torch.bfloat16, torch.float16], ids=str)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Tensors:
    return load_file(tiny_file(tmp_path_factory.mktemp("base") / "base.safetensors"))


def value(bits: int, exponent: int, fraction: int) -> float:
    """The number of eight bits with so many bits of exponent and fraction (Micikevicius et al. 2022, table 1)."""
    sign, e, f = -1.0 if bits >> 7 else 1.0, bits >> fraction & 2**exponent - 1, bits & 2**fraction - 1
    bias = 2 ** (exponent - 1) - 1
    return sign * (f / 2**fraction * 2.0 ** (1 - bias) if e == 0 else (1 + f / 2**fraction) * 2.0 ** (e - bias))


@FP8
@DTYPES
def test_every_number_of_fp8_is_cast_exactly(
    tmp_path: Path, base: Tensors, dtype: torch.dtype, wanted: torch.dtype
) -> None:
    """All finite numbers there are, in a weight of the U-Net; the others rounded by torch."""
    name = next(name for name, tensor in base.items() if name.startswith(UNET) and tensor.numel() >= 256)
    exponent, fraction = (4, 3) if dtype == torch.float8_e4m3fn else (5, 2)
    finite = [bits for bits in range(256) if torch.tensor(bits, dtype=torch.uint8).view(dtype).float().isfinite()]
    stored = {each: tensor.to(dtype) for each, tensor in base.items()}
    flat = stored[name].flatten().view(torch.uint8)
    flat[: len(finite)] = torch.tensor(finite, dtype=torch.uint8)
    stored[name] = flat.view(dtype).view(base[name].shape)
    save_file(stored, tmp_path / "fp8.safetensors", CONFIG)
    found = official_state_dict(load(tmp_path / "fp8.safetensors", dtype=wanted)[1])
    for each, tensor in found.items():
        assert torch.equal(tensor.double(), stored[each].double()), each
    exact = torch.tensor([value(bits, exponent, fraction) for bits in finite], dtype=torch.float64)
    assert torch.equal(found[name].flatten()[: len(finite)].double(), exact)
    print(f"{dtype}: {len(finite)} finite numbers, the largest {float(exact.max())}, are the same in {wanted}")


def scaled(
    tensors: Tensors, dtype: torch.dtype, chosen: Callable[[str, Tensor], bool]
) -> tuple[Tensors, dict[str, float]]:
    """Weights as ``stored * scale``, by ComfyUI's recipe, and the scales."""
    stored, scales = dict(tensors), dict[str, float]()
    for name, tensor in tensors.items():
        if chosen(name, tensor):
            scale = tensor.abs().max() / torch.finfo(dtype).max
            stored[name] = (tensor / scale).to(dtype)
            scales[name.removesuffix(".weight")] = float(scale)
    return stored, scales


def linear(name: str, tensor: Tensor) -> bool:
    """What is quantized: linear maps of the U-Net and of the first text encoder."""
    return name.startswith((UNET, f"{TEXT}0")) and name.endswith(".weight") and tensor.ndim == 2


def newer(stored: Tensors, scales: dict[str, float], dtype: torch.dtype) -> Tensors:
    about = json.dumps({"format": str(dtype).removeprefix("torch."), "full_precision_matrix_mult": True})
    for number, (layer, scale) in enumerate(scales.items()):
        stored[f"{layer}.weight_scale"] = torch.tensor([scale] if number % 2 else scale)
        stored[f"{layer}.comfy_quant"] = torch.tensor(list(about.encode()), dtype=torch.uint8)
        stored[f"{layer}.input_scale"] = torch.tensor(0.5)
    return stored


def older(stored: Tensors, scales: dict[str, float], dtype: torch.dtype) -> Tensors:
    for layer, scale in scales.items():
        stored[f"{layer}.scale_weight"] = torch.tensor(scale)
        stored[f"{layer}.scale_input"] = torch.tensor(1.0)
    return stored | {f"{UNET}scaled_fp8": torch.empty(2, dtype=dtype)}


@pytest.mark.parametrize("layout", [newer, older])
@FP8
@DTYPES
def test_scaled_weights_are_the_product_rounded_once(
    tmp_path: Path,
    base: Tensors,
    layout: Callable[[Tensors, dict[str, float], torch.dtype], Tensors],
    dtype: torch.dtype,
    wanted: torch.dtype,
) -> None:
    stored, scales = scaled(base, dtype, linear)
    assert len(scales) > 50
    save_file(layout(dict(stored), scales, dtype), tmp_path / "scaled.safetensors", CONFIG)
    found = official_state_dict(load(tmp_path / "scaled.safetensors", dtype=wanted)[1])
    largest = 0.0
    for name, tensor in base.items():
        scale = scales.get(name.removesuffix(".weight"))
        exact = stored[name].double() * (1.0 if scale is None else float(torch.tensor(scale, dtype=torch.float32)))
        assert torch.equal(found[name], exact.to(found[name].dtype)), name
        largest = max(largest, float((exact - tensor).abs().max() / tensor.abs().max()))
    print(f"{len(scales)} scaled weights are exact; quantization itself moved them by {largest:.3f} of the largest")
    assert largest < 0.2


def test_stacked_weights_have_a_scale_each(tmp_path: Path, base: Tensors) -> None:
    """Queries, keys and values of the second text encoder in diffusers' layout."""
    names = layout("text_encoder_2", TINY)
    prefix = PARTS["text_encoder_2"].prefix
    theirs: Tensors = {}
    for name, tensor in base.items():
        if name.startswith(prefix):
            place = names.mapping(name.removeprefix(prefix))
            theirs |= {each: part.contiguous() for each, part in zip(place.names, place.split(tensor), strict=True)}
    stored, scales = scaled(theirs, torch.float8_e4m3fn, lambda name, tensor: "_proj.weight" in name)
    file = tmp_path / "folder" / "text_encoder_2" / "model.safetensors"
    single = tmp_path / "base.safetensors"
    save_file(base, single, CONFIG)
    write_folder(open_source(single), tmp_path / "folder", read_vocabulary(VOCABULARY))
    save_file(newer(dict(stored), scales, torch.float8_e4m3fn), file)
    found = official_state_dict(load(tmp_path / "folder", dtype=torch.float64)[1])
    key = f"{prefix}transformer.resblocks.0.attn.in_proj_weight"
    parts = []
    for letter in "qkv":
        layer = f"text_model.encoder.layers.0.self_attn.{letter}_proj"
        parts.append(stored[f"{layer}.weight"].double() * float(torch.tensor(scales[layer])))
    assert torch.equal(found[key], torch.cat(parts))


def test_a_converted_file_holds_what_was_read(tmp_path: Path, base: Tensors) -> None:
    """fp8 as fp16, which has all its numbers; scaled weights as fp32."""
    stored, scales = scaled(base, torch.float8_e4m3fn, linear)
    stored = {name: tensor.to(torch.float8_e5m2) if "norm" in name else tensor for name, tensor in stored.items()}
    save_file(older(dict(stored), scales, torch.float8_e4m3fn), tmp_path / "scaled.safetensors", CONFIG)
    write_single(open_source(tmp_path / "scaled.safetensors"), tmp_path / "plain.safetensors")
    plain = load_file(tmp_path / "plain.safetensors")
    read = official_state_dict(load(tmp_path / "scaled.safetensors")[1])
    assert {tensor.dtype for tensor in plain.values()} == {torch.float16, torch.float32}
    assert all(torch.equal(tensor.float(), read[name].float()) for name, tensor in plain.items())


def refusal(path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        load(path)
    message = str(caught.value)
    print(message)
    assert str(path) in message
    assert "\n" not in message
    assert len(message) < 500
    return message


def spoilt() -> dict[str, Callable[[str, Tensor], Tensors]]:
    """What is not fp8 with a scale, though it looks like it: tensors to put in for a weight."""

    def about(text: str) -> Tensor:
        return torch.tensor(list(text.encode()), dtype=torch.uint8)

    return {
        "blocks of mxfp8": lambda layer, weight: {
            f"{layer}.weight": weight.to(torch.float8_e4m3fn),
            f"{layer}.weight_scale": torch.ones(4, 2, dtype=torch.uint8),
            f"{layer}.comfy_quant": about('{"format": "mxfp8"}'),
        },
        "nvfp4": lambda layer, weight: {
            f"{layer}.weight": torch.zeros(len(weight), weight.shape[1] // 2, dtype=torch.uint8),
            f"{layer}.weight_scale": torch.ones(4, 2, dtype=torch.uint8),
            f"{layer}.weight_scale_2": torch.tensor(1.0),
            f"{layer}.comfy_quant": about('{"format": "nvfp4"}'),
        },
        "int8": lambda layer, weight: {
            f"{layer}.weight": weight.to(torch.int8),
            f"{layer}.weight_scale": torch.tensor(0.1),
            f"{layer}.comfy_quant": about('{"format": "int8_tensorwise"}'),
        },
        "rows": lambda layer, weight: {
            f"{layer}.weight": weight.to(torch.float8_e4m3fn),
            f"{layer}.weight_scale": torch.ones(len(weight), 1),
        },
        "another format": lambda layer, weight: {
            f"{layer}.weight": weight.to(torch.float8_e4m3fn),
            f"{layer}.weight_scale": torch.tensor(0.1),
            f"{layer}.comfy_quant": about('{"format": "float8_e5m2"}'),
        },
        "rotated": lambda layer, weight: {
            f"{layer}.weight": weight.to(torch.float8_e4m3fn),
            f"{layer}.weight_scale": torch.tensor(0.1),
            f"{layer}.comfy_quant": about('{"format": "float8_e4m3fn", "convrot": true}'),
        },
        "no JSON": lambda layer, weight: {
            f"{layer}.comfy_quant": about("{"),
            f"{layer}.weight_scale": torch.tensor(1.0),
        },
        "a format without a scale": lambda layer, weight: {
            f"{layer}.weight": weight.to(torch.float8_e4m3fn),
            f"{layer}.comfy_quant": about('{"format": "float8_e4m3fn"}'),
        },
        "smoothed": lambda layer, weight: {f"{layer}.pre_quant_scale": torch.ones(4)},
        "a scale without a weight": lambda layer, weight: {f"{layer}x.weight_scale": torch.tensor(1.0)},
    }


@pytest.mark.parametrize("name", spoilt())
def test_other_layouts_are_called_quantized(tmp_path: Path, base: Tensors, name: str) -> None:
    layer = f"{UNET}middle_block.1.transformer_blocks.0.attn1.to_q"
    save_file(base | spoilt()[name](layer, base[f"{layer}.weight"]), tmp_path / "x.safetensors", CONFIG)
    assert "is quantized by ComfyUI" in refusal(tmp_path / "x.safetensors")


@pytest.mark.parametrize("scale", [float("nan"), float("inf")])
def test_a_scale_that_is_not_finite_is_refused(tmp_path: Path, base: Tensors, scale: float) -> None:
    layer = f"{UNET}middle_block.1.transformer_blocks.0.attn1.to_q"
    save_file(base | {f"{layer}.weight_scale": torch.tensor(scale)}, tmp_path / "x.safetensors", CONFIG)
    assert f"has {scale} as {layer}.weight_scale, expected a finite number" in refusal(tmp_path / "x.safetensors")


def test_a_scale_of_1_changes_no_bit(tmp_path: Path, base: Tensors, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("minisdxl.checkpoint.tensorfile.MAPPED", 1)  # weights in full precision may have one, too
    layer = f"{UNET}middle_block.1.transformer_blocks.0.attn1.to_q"
    for scale in (1.0, 0.5):
        save_file(base | {f"{layer}.scale_weight": torch.tensor(scale)}, tmp_path / "x.safetensors", CONFIG)
        found = official_state_dict(load(tmp_path / "x.safetensors")[1])
        assert torch.equal(found[f"{layer}.weight"], base[f"{layer}.weight"] * scale)
