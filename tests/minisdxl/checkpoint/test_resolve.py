"""The forms in which models come: other parts put in, shards, variants, key_variants; and what is refused of them."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from minisdxl.checkpoint.errors import CheckpointError
from minisdxl.checkpoint.layouts import PARTS, layout
from minisdxl.checkpoint.modules import load, official_state_dict, open_source, read_config, save
from minisdxl.checkpoint.resolve import LCM_SCALE, guidance_embedding
from minisdxl.checkpoint.tensorfile import MAPPED
from minisdxl.config import SDXL_BASE, SDXL_INPAINTING
from minisdxl.convert import write_folder
from minisdxl.text import TextEmbeddings
from minisdxl.tokenizer import read_vocabulary
from tests import manifest
from tests.minisdxl.peers import diffusers_unet
from tests.minisdxl.published import OFFICIAL, write_json
from tests.minisdxl.tiny import TINY, VOCABULARY, sparse_file, tiny_file, tiny_modules

PREFIX = {part: PARTS[part].prefix for part in PARTS}
Tensors = dict[str, Tensor]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_file(tmp_path_factory.mktemp("base") / "base.safetensors")


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model with other weights."""
    return tiny_file(tmp_path_factory.mktemp("other") / "other.safetensors", seed=1)


@pytest.fixture
def folder(base: Path, tmp_path: Path) -> Path:
    """The first model as a diffusers folder."""
    write_folder(open_source(base), tmp_path / "folder", read_vocabulary(VOCABULARY))
    return tmp_path / "folder"


def part_of(file: Path, part: str) -> Tensors:
    """A part's official tensors without their prefix."""
    prefix = PREFIX[part]
    return {n.removeprefix(prefix): t for n, t in load_file(file).items() if n.startswith(prefix)}


def in_diffusers(file: Path, part: str) -> Tensors:
    """A part's tensors under diffusers' names, which test_layouts compares with diffusers'."""
    tensors: Tensors = {}
    for name, tensor in part_of(file, part).items():
        place = layout(part, TINY).mapping(name)
        tensors |= {theirs: view.contiguous() for theirs, view in zip(place.names, place.split(tensor), strict=True)}
    return tensors


def prefixed(tensors: Mapping[str, Tensor], prefix: str) -> Tensors:
    return {prefix + name: tensor for name, tensor in tensors.items()}


def older(tensors: Tensors) -> Tensors:
    """The VAE's attention as older releases of diffusers called it."""
    for old, new in (("query", "to_q"), ("key", "to_k"), ("value", "to_v"), ("proj_attn", "to_out.0")):
        tensors = {name.replace(f".{new}.", f".{old}."): tensor for name, tensor in tensors.items()}
    return tensors


def flat(tensors: Tensors) -> Tensors:
    """The VAE's attention as matrices."""
    return {name: tensor.squeeze() if ".attn_1." in name else tensor for name, tensor in tensors.items()}


def raised(tensors: Tensors) -> Tensors:
    """The VAE's attention as 1x1 convolutions."""
    matrices = [name for name, tensor in tensors.items() if ".attentions." in name and tensor.ndim == 2]
    return tensors | {name: tensors[name][..., None, None] for name in matrices}


def check(loaded: object, base: Path, other: Path, part: str) -> None:
    """That a model has the tensors of ``base``, and those of a part from ``other``."""
    expected = load_file(base) | prefixed(part_of(other, part), PREFIX[part])
    tensors = official_state_dict(loaded)  # type: ignore[arg-type]
    assert tensors.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(tensors[name], tensor), name


FORMS: dict[str, tuple[str, Callable[[Path], Tensors]]] = {
    "VAE": ("vae", lambda file: part_of(file, "vae")),
    "VAE with prefix": ("vae", lambda file: prefixed(part_of(file, "vae"), PREFIX["vae"])),
    "VAE with matrices": ("vae", lambda file: flat(part_of(file, "vae"))),
    "VAE with leftovers of training": (
        "vae",
        lambda file: part_of(file, "vae") | {"loss.logvar": torch.ones(1), "model_ema.decay": torch.ones(1)},
    ),
    "VAE of diffusers": ("vae", lambda file: in_diffusers(file, "vae")),
    "VAE of diffusers with convolutions": ("vae", lambda file: raised(in_diffusers(file, "vae"))),
    "VAE of older diffusers": ("vae", lambda file: older(in_diffusers(file, "vae"))),
    "VAE of a whole model": ("vae", load_file),
    "U-Net": ("unet", lambda file: part_of(file, "unet")),
    "U-Net with prefix": ("unet", lambda file: prefixed(part_of(file, "unet"), PREFIX["unet"])),
    "U-Net with ComfyUI's prefix": ("unet", lambda file: prefixed(part_of(file, "unet"), "diffusion_model.")),
    "U-Net of diffusers": ("unet", lambda file: in_diffusers(file, "unet")),
    "U-Net of a whole model": ("unet", load_file),
}


@pytest.mark.parametrize("form", FORMS)
def test_another_part_is_put_in(
    tmp_path: Path, base: Path, other: Path, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    part, tensors = FORMS[form]
    save_file({name: tensor.contiguous() for name, tensor in tensors(other).items()}, tmp_path / "part.safetensors")
    for mapped in (MAPPED, 1):
        monkeypatch.setattr("minisdxl.checkpoint.tensorfile.MAPPED", mapped)
        config, modules = load(base, **{part: tmp_path / "part.safetensors"})  # type: ignore[arg-type]
        assert config == TINY
        check(modules, base, other, part)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="reads what is mapped from /proc")
def test_what_the_file_has_just_so_is_mapped_part_by_part(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("minisdxl.checkpoint.tensorfile.MAPPED", 1)
    path = tmp_path / "nobody_else_maps_it.safetensors"
    path.write_bytes(base.read_bytes())
    source, expected = open_source(path), load_file(base)
    for dtype in (torch.float32, torch.float16):
        tensors = source.load(dict.fromkeys(source.shapes, dtype), "cpu")
        assert tensors.keys() == expected.keys()
        assert all(torch.equal(tensors[name], expected[name].to(dtype)) for name in expected)
        convolutions = [tensor for tensor in tensors.values() if tensor.ndim == 4]
        assert all(tensor.is_contiguous(memory_format=torch.channels_last) for tensor in convolutions)
        if dtype == torch.float16:
            assert mappings(path) == 0
    tensors = source.load(dict.fromkeys(source.shapes, torch.float32), "cpu")
    convolutions.clear()
    for gone, prefix in enumerate(PREFIX.values()):
        assert mappings(path) == len(PARTS) - gone
        tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith(prefix)}
    assert mappings(path) == 0


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="reads what is mapped from /proc")
def test_convolutions_in_fp16_are_mapped_and_no_others(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("minisdxl.checkpoint.tensorfile.MAPPED", 1)
    kernels = {name for name, tensor in load_file(base).items() if tensor.ndim == 4 and tensor.shape[2:] != (1, 1)}
    for dtype, mapped in ((torch.float16, 1), (torch.bfloat16, 0), (torch.float32, 0)):
        path = tmp_path / f"{dtype}.safetensors"
        expected = {name: tensor.to(dtype) for name, tensor in load_file(base).items()}
        save_file(expected, path, {"minisdxl.config": json.dumps(TINY.to_dict())})
        unet = {name for name in kernels if name.startswith(PREFIX["unet"])}
        tensors = open_source(path).load(dict.fromkeys(unet, dtype), "cpu")
        assert mappings(path) == mapped
        assert all(torch.equal(tensors[name], expected[name]) for name in unet)
        assert all(tensors[name].is_contiguous() == bool(mapped) for name in unet)


def mappings(path: Path) -> int:
    """How many times a file is mapped into this process."""
    return Path("/proc/self/maps").read_text().count(str(path))


@pytest.mark.parametrize("part", ["vae", "unet"])
def test_another_part_is_put_in_from_a_folder(tmp_path: Path, base: Path, folder: Path, other: Path, part: str) -> None:
    write_folder(open_source(other), tmp_path / "other", read_vocabulary(VOCABULARY))
    for source in (base, folder):
        for path in (tmp_path / "other", tmp_path / "other" / part):
            config, modules = load(source, **{part: path})  # type: ignore[arg-type]
            assert config == TINY
            check(modules, base, other, part)


@pytest.mark.parametrize("part", ["vae", "unet"])
def test_what_is_replaced_need_not_be_there(tmp_path: Path, base: Path, folder: Path, other: Path, part: str) -> None:
    less = tmp_path / "less.safetensors"
    metadata = {"minisdxl.config": json.dumps(TINY.to_dict())}
    save_file({n: t for n, t in load_file(base).items() if not n.startswith(PREFIX[part])}, less, metadata)
    (folder / part / "diffusion_pytorch_model.safetensors").unlink()
    for source in (less, folder):
        check(load(source, **{part: other})[1], base, other, part)  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match=f"only the .* of a model, without its {PARTS[part].label};"):
        load(less)


def test_both_parts_are_put_in(base: Path, other: Path) -> None:
    _, modules = load(base, vae=other, unet=other)
    expected = load_file(other) | {n: t for n, t in load_file(base).items() if n.startswith("conditioner.")}
    assert all(torch.equal(tensor, expected[name]) for name, tensor in official_state_dict(modules).items())


@pytest.mark.parametrize("prefix", ["", "text_model."], ids=["new names", "old names"])
@pytest.mark.parametrize(
    "positions", [None, torch.arange(77)[None], torch.arange(77.0)[None]], ids=["", "int", "float"]
)
def test_text_encoders_of_any_release(base: Path, folder: Path, prefix: str, positions: Tensor | None) -> None:
    for part in ("text_encoder", "text_encoder_2"):
        file = folder / part / "model.safetensors"
        tensors = {re.sub("^text_model[.]", prefix, name): tensor for name, tensor in load_file(file).items()}
        if positions is not None:
            tensors[f"{prefix}embeddings.position_ids"] = positions
        if part == "text_encoder_2":
            tensors["logit_scale"] = torch.tensor(4.6)
        save_file(tensors, file, {"format": "pt"})
    _, modules = load(folder)
    check(modules, base, base, "vae")


def shard(folder: Path, part: str, variant: str = "", older_index: bool = False) -> Path:
    """Splits a part's file into three, with an index; returns the index."""
    weights = PARTS[part].weights
    file = folder / part / f"{weights}{variant}.safetensors"
    tensors = load_file(file)
    file.unlink()
    table: dict[str, str] = {}
    for number in range(3):
        name = f"{weights}{variant}-{number + 1:05}-of-00003.safetensors"
        shard = {key: tensors[key] for key in sorted(tensors)[number::3]}
        table |= dict.fromkeys(shard, name)
        save_file(shard, folder / part / name, {"format": "pt"})
    index = (
        f"{weights}.safetensors{variant}.index.json" if older_index else f"{weights}.safetensors.index{variant}.json"
    )
    (folder / part / index).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": table}))
    return folder / part / index


def make_variant(folder: Path, part: str) -> None:
    """Adds the fp16 variant of a part's file."""
    file = folder / part / f"{PARTS[part].weights}.safetensors"
    save_file({name: tensor.half() for name, tensor in load_file(file).items()}, file.with_suffix(".fp16.safetensors"))


def test_shards_are_one_file(base: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for part in PARTS:
        shard(folder, part)
    source = open_source(folder)
    assert len(source.files) == 12
    for mapped in (MAPPED, 1):
        monkeypatch.setattr("minisdxl.checkpoint.tensorfile.MAPPED", mapped)
        check(load(folder)[1], base, base, "vae")


@pytest.mark.parametrize("older_index", [False, True], ids=["index", "older index"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_form_that_fits_the_dtype_is_chosen(
    base: Path, folder: Path, caplog: pytest.LogCaptureFixture, dtype: torch.dtype, older_index: bool
) -> None:
    for part in PARTS:
        make_variant(folder, part)
    shard(folder, "unet", ".fp16", older_index)
    shard(folder, "text_encoder_2")
    files = open_source(folder, dtype).files
    assert all((".fp16" in file.name) == (dtype == torch.float16) for file in files)
    _, modules = load(folder, dtype=dtype)
    print(caplog.messages)
    assert len(caplog.messages) == 1
    assert caplog.messages[0].startswith("there are plain and fp16 weights, reading ")
    assert caplog.messages[0].count(str(folder)) == len(PARTS)
    tensors = load_file(base)
    for name, tensor in official_state_dict(modules).items():
        stored = tensors[name].to(torch.float16 if dtype == torch.float16 else torch.float32)
        assert torch.equal(tensor, stored.to(tensor.dtype)), name


@pytest.mark.parametrize("sharded", [False, True], ids=["one file", "shards"])
def test_the_form_that_is_there_is_taken(
    base: Path, folder: Path, sharded: bool, caplog: pytest.LogCaptureFixture
) -> None:
    for part in PARTS:
        make_variant(folder, part)
        (folder / part / f"{PARTS[part].weights}.safetensors").unlink()
        if sharded:
            shard(folder, part, ".fp16")
    _, modules = load(folder)
    assert not caplog.messages
    tensors = load_file(base)
    for name, tensor in official_state_dict(modules).items():
        assert torch.equal(tensor, tensors[name].half().float()), name


def refusal(path: Path, **parts: Path) -> str:
    """The one line with which a model is refused."""
    with pytest.raises(CheckpointError) as caught:
        load(path, **parts)  # type: ignore[arg-type]
    message = str(caught.value)
    print(message)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("release", ["transformers 4", "transformers 5"])
def test_what_diffusers_own_script_writes_is_read(tmp_path: Path, base: Path, release: str) -> None:
    """``convert_diffusers_to_original_sdxl.py`` leaves the projection as diffusers has it, and names of transformers 5.

    The projection is square in SDXL: read without a transposition, it would fit, and be wrong.
    """
    prefix = PREFIX["text_encoder_2"]
    tensors = load_file(base)
    tensors[f"{prefix}text_projection.weight"] = tensors.pop(f"{prefix}text_projection").T.contiguous()
    if release == "transformers 5":
        tensors = {name.replace("0.transformer.text_model.", "0.transformer."): each for name, each in tensors.items()}
    save_file(tensors, tmp_path / "x.safetensors", {"minisdxl.config": json.dumps(TINY.to_dict())})
    check(load(tmp_path / "x.safetensors")[1], base, base, "vae")


@pytest.mark.parametrize("quantizer", ["nf4", "gguf", "svdquant"])
def test_quantized_folders_are_called_so(folder: Path, quantizer: str) -> None:
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    name = "mid_block.attentions.0.proj_in"
    if quantizer == "nf4":
        tensors |= {
            f"{name}.weight": torch.zeros(288, 1, dtype=torch.uint8),
            f"{name}.weight.absmax": torch.zeros(9),
            f"{name}.weight.quant_map": torch.zeros(16),
            f"{name}.weight.quant_state.bitsandbytes__nf4": torch.zeros(82, dtype=torch.uint8),
        }
        config = json.loads((folder / "unet" / "config.json").read_text())
        config["quantization_config"] = {"quant_method": "bitsandbytes", "bnb_4bit_quant_type": "nf4"}
        (folder / "unet" / "config.json").write_text(json.dumps(config))
        save_file(tensors, file)
        assert "is quantized by bitsandbytes to nf4; expected the U-Net of tiny" in refusal(folder)
    elif quantizer == "gguf":
        file.unlink()
        (folder / "unet" / "model-Q4_0.gguf").write_bytes(b"GGUF")
        assert "has no diffusion_pytorch_model.safetensors, only model-Q4_0.gguf; expected" in refusal(folder)
        assert "is a GGUF file of quantized weights" in refusal(folder / "unet" / "model-Q4_0.gguf")
    else:
        tensors |= {f"{name}.qweight": torch.zeros(2, 2, dtype=torch.int8), f"{name}.wscales": torch.zeros(2, 2)}
        save_file(tensors, file)
        assert "is quantized by SVDQuant (Nunchaku)" in refusal(folder)


def test_damaged_shards_are_refused(folder: Path) -> None:
    index = shard(folder, "unet")
    content = json.loads(index.read_text())
    table: dict[str, object] = content["weight_map"]
    first = min(table)

    def with_table(new: object) -> str:
        index.write_text(json.dumps({"weight_map": new}))
        return refusal(folder)

    assert "has no weight_map" in with_table(None)
    assert "has no weight_map" in with_table({})
    for outside in ("../vae/diffusion_pytorch_model.safetensors", "/etc/passwd", "", "..", "a\nb", 3, None):
        assert "expected the name of a file beside it" in with_table(table | {first: outside})
    assert "nowhere.safetensors does not exist" in with_table(table | {first: "nowhere.safetensors"})
    assert "does not hold 'nothing', which its index says it holds" in with_table(table | {"nothing": table[first]})
    index.write_text("{")
    assert "is not JSON" in refusal(folder)
    index.write_text(json.dumps(content))
    extra = folder / "unet" / str(table[first])
    second = next(name for name in sorted(table) if table[name] != table[first])
    save_file(load_file(extra) | {second: torch.ones(1)}, extra)
    assert f"has {second!r} in more than one shard" in refusal(folder)
    extra.unlink()
    assert "does not exist" in refusal(folder)


def test_what_does_not_fit_in_a_folder_is_named(folder: Path) -> None:
    file = folder / "text_encoder_2" / "model.safetensors"
    tensors = load_file(file)
    save_file({name: tensor for name, tensor in tensors.items() if "q_proj" not in name}, file)
    assert f"{file.parent} does not fit tiny: 6 missing tensors (text_model.encoder.layers.0.self_attn.q_" in refusal(
        folder
    )
    save_file(tensors | {"text_projection.weight": tensors["text_projection.weight"].T.contiguous()}, file)
    assert "1 mis-shaped tensor (text_projection.weight is [24, 20], expected [20, 24])" in refusal(folder)
    save_file(tensors | {"adapter": torch.ones(1)}, file)
    assert "1 unexpected tensor (adapter)" in refusal(folder)
    save_file(tensors | {"text_projection.weight": tensors["text_projection.weight"].to(torch.int8)}, file)
    assert "has 1 quantized or integer tensor (text_projection.weight is I8)" in refusal(folder)
    file.write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    assert f"{file} is a git-lfs pointer" in refusal(folder)


def test_parts_of_another_model_are_refused(tmp_path: Path, base: Path, other: Path) -> None:
    part = tmp_path / "part.safetensors"
    save_file(part_of(other, "vae"), part)
    assert "is only a VAE; expected the U-Net of tiny" in refusal(base, unet=part)
    assert "is only a VAE; expected a whole SDXL base model" in refusal(part)
    save_file(in_diffusers(other, "unet"), part)
    assert "is only a U-Net, in the diffusers layout; expected the VAE of tiny" in refusal(base, vae=part)
    assert "is only a U-Net, in the diffusers layout; expected a whole SDXL base model" in refusal(part)
    save_file({"lora_unet_mid_block_attentions_0_proj_in.lora_down.weight": torch.ones(8, 8)}, part)
    assert "is a LoRA" in refusal(base, unet=part)
    sparse_file(part, manifest.official_shapes(PREFIX["vae"]))
    assert f"{part} does not fit tiny: " in refusal(base, vae=part)
    save_file(part_of(other, "unet"), part, {"modelspec.prediction_type": "sample"})
    assert "has 'sample' as modelspec.prediction_type in its metadata" in refusal(base, unet=part)
    save_file(part_of(other, "vae") | {"cond_stage_model.transformer.text_model.x": torch.ones(1)}, part)
    assert "is a Stable Diffusion 1.x model" in refusal(base, vae=part)
    assert "does not exist" in refusal(base, vae=tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    assert "has no diffusion_pytorch_model.safetensors" in refusal(base, vae=tmp_path / "empty")


Shapes = dict[str, tuple[int, ...]]


@cache
def published(part: str) -> Shapes:
    """A part of full size under diffusers' names."""
    shapes: Shapes = {}
    for name, shape in manifest.official_shapes(PREFIX[part]).items():
        if not name.endswith(("position_ids", "logit_scale")):
            place = layout(part, SDXL_BASE).mapping(name)
            views = place.split(torch.empty(shape, device="meta"))
            shapes |= {theirs: tuple(view.shape) for theirs, view in zip(place.names, views, strict=True)}
    return shapes


def without_layers(shapes: Shapes, most: Mapping[int, int]) -> Shapes:
    """A U-Net with fewer transformer layers on each level."""

    def stays(name: str) -> bool:
        match = re.match(r"(?:down_blocks\.(\d)|(mid)_block)\..*transformer_blocks\.(\d+)\.", name)
        return match is None or int(match[3]) < most[int(match[1] or 2)]

    return {name: shape for name, shape in shapes.items() if stays(name)}


@pytest.fixture
def full_folder(tmp_path: Path) -> Path:
    """A folder of the published names, shapes and JSON, whose numbers take no room."""
    write_json(tmp_path / "full", OFFICIAL)
    for part in PARTS:
        sparse_file(tmp_path / "full" / part / f"{PARTS[part].weights}.fp16.safetensors", published(part))
    return tmp_path / "full"


def test_a_published_folder_is_recognized(full_folder: Path, tmp_path: Path) -> None:
    assert read_config(full_folder) == SDXL_BASE
    whole = sparse_file(tmp_path / "whole.safetensors", manifest.official_shapes())
    unet = full_folder / "unet" / "diffusion_pytorch_model.fp16.safetensors"
    assert read_config(whole, unet=unet, vae=full_folder / "vae") == SDXL_BASE  # as SDXL-Lightning and fp16-fix ship
    less = {name: shape for name, shape in manifest.official_shapes().items() if not name.startswith(PREFIX["vae"])}
    assert read_config(sparse_file(whole, less), vae=full_folder) == SDXL_BASE
    sparse_file(unet, published("unet") | {"time_embedding.cond_proj.weight": (320, 256)})  # as LCM-SDXL ships
    assert [note for note in open_source(full_folder).notes if "is an LCM U-Net" in note]


def test_a_published_inpainting_folder_is_recognized(full_folder: Path, tmp_path: Path) -> None:
    unet = full_folder / "unet" / "diffusion_pytorch_model.fp16.safetensors"
    sparse_file(unet, published("unet") | {"conv_in.weight": (320, 9, 3, 3)})
    assert "does not fit sdxl-base: 1 mis-shaped tensor" in refusal(full_folder)
    index = OFFICIAL["model_index.json"] | {"_class_name": "StableDiffusionXLInpaintPipeline"}
    unet_json = OFFICIAL["unet/config.json"] | {"in_channels": 9}
    write_json(full_folder, {"model_index.json": index, "unet/config.json": unet_json})
    assert read_config(full_folder) == SDXL_INPAINTING
    whole = sparse_file(tmp_path / "whole.safetensors", manifest.official_shapes())
    for place in (full_folder, unet.parent, unet):
        assert read_config(whole, unet=place) == SDXL_INPAINTING


FAMILIES: dict[str, tuple[Shapes, dict[str, object]]] = {
    "a pix2pix editing model": (published("unet") | {"conv_in.weight": (320, 8, 3, 3)}, {"in_channels": 8}),
    "SSD-1B": (
        without_layers(published("unet"), {1: 2, 2: 4}),
        {"transformer_layers_per_block": [[1, 1], [2, 2], [4, 4]]},
    ),
    "Segmind Vega": (without_layers(published("unet"), {1: 1, 2: 2}), {"transformer_layers_per_block": [1, 1, 2]}),
    "the SDXL refiner": (published("unet") | {"add_embedding.linear_1.weight": (1280, 2560)}, {}),
    "a ControlNet": (published("unet") | {"controlnet_cond_embedding.conv_in.weight": (16, 3, 3, 3)}, {}),
    "an AnimateDiff motion module": ({"down_blocks.0.motion_modules.0.norm.weight": (320,)}, {}),
    "a Stable Diffusion 1.x model": (
        {"down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight": (320, 768)},
        {"cross_attention_dim": 768},
    ),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_unets_of_other_families_are_named(full_folder: Path, tmp_path: Path, name: str) -> None:
    shapes, fields = FAMILIES[name]
    whole = sparse_file(tmp_path / "whole.safetensors", manifest.official_shapes())
    unet = sparse_file(full_folder / "unet" / "diffusion_pytorch_model.fp16.safetensors", shapes)
    for message in (refusal(whole, unet=unet), refusal(whole, unet=unet.parent)):
        assert name in message
        assert "expected the U-Net of sdxl-base" in message
    write_json(full_folder, {"unet/config.json": OFFICIAL["unet/config.json"] | fields})
    assert name in refusal(full_folder)


def test_extras_in_a_folder_are_skipped_with_one_line(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = folder / "text_encoder" / "model.safetensors"
    save_file(load_file(file) | {"text_projection.weight": torch.ones(16, 16)}, file)
    with caplog.at_level(logging.WARNING):
        load(folder)
    print(caplog.messages)
    assert len(caplog.messages) == 1
    assert "skipped 1 tensors that make no picture" in caplog.messages[0]


def test_guidance_is_embedded_as_in_diffusers() -> None:
    for channels in (16, 256):
        theirs = StableDiffusionXLPipeline.get_guidance_scale_embedding(None, torch.tensor([7.0]), channels)[0]
        error = (guidance_embedding(8.0, channels) - theirs).abs().max()
        print(f"{channels} channels: max error {error:.1e}")
        assert error <= 1e-3  # of angles up to 7000 in fp32


@torch.no_grad()
def test_an_lcm_unet_is_sdxls_at_one_guidance_scale(
    tmp_path: Path, base: Path, other: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Against diffusers' U-Net, which is told the scale at every call."""
    plain = diffusers_unet(tiny_modules(1).unet, size_channels=TINY.size_channels)
    fields = {name: value for name, value in plain.config.items() if not name.startswith("_")}
    peer = UNet2DConditionModel(**fields | {"time_cond_proj_dim": 16}).eval()
    projection = torch.randn(8, 16, generator=torch.Generator().manual_seed(2))
    peer.load_state_dict({**plain.state_dict(), "time_embedding.cond_proj.weight": projection})
    peer.save_pretrained(tmp_path / "lcm")
    caplog.clear()
    _, modules = load(base, unet=tmp_path / "lcm")
    assert len(caplog.messages) == 1
    assert "is an LCM U-Net: its guidance scale is fixed to 8, sample with cfg 1" in caplog.messages[0]
    check(modules._replace(unet=load(other)[1].unet), base, other, "unet")
    generator = torch.Generator().manual_seed(3)
    x, timestep = torch.randn(2, 4, 16, 16, generator=generator), torch.tensor([3, 700])
    context, vector = torch.randn(2, 7, 40, generator=generator), torch.randn(2, 44, generator=generator)
    sizes = torch.randint(64, (2, 6), generator=generator)
    ours = modules.unet(x, timestep, context, _vector(vector[:, :20], sizes))
    scale = torch.tensor([LCM_SCALE - 1] * 2)
    theirs = peer(
        x,
        timestep,
        context,
        timestep_cond=StableDiffusionXLPipeline.get_guidance_scale_embedding(None, scale, 16),
        added_cond_kwargs={"text_embeds": vector[:, :20], "time_ids": sizes},
    ).sample
    without = load(other)[1].unet(x, timestep, context, _vector(vector[:, :20], sizes))
    error, effect = (ours - theirs).abs().max(), (without - theirs).abs().max()
    print(f"max error {error:.1e}; without guidance it is {effect:.1e}; outputs up to {theirs.abs().max():.1e}")
    assert error <= 1e-5 * theirs.abs().max()
    assert effect >= 1e-2 * theirs.abs().max()
    save_file(
        {"time_embedding.cond_proj.weight": torch.ones(9, 16)} | in_diffusers(other, "unet"), tmp_path / "x.safetensors"
    )
    assert "1 unexpected tensor (time_embedding.cond_proj.weight)" in refusal(base, unet=tmp_path / "x.safetensors")


def _vector(pooled: Tensor, sizes: Tensor) -> Tensor:
    return TextEmbeddings(torch.zeros(2, 7, 40), pooled).vector(sizes, TINY.size_channels)


def test_a_config_that_asks_for_more_than_there_is_is_refused_at_once(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save(path, TINY, tiny_modules(), torch.float32)
    tensors = load_file(path)
    for before, after in (
        ('"middle_depth": 2', '"middle_depth": 1000000000000'),
        ('"res_blocks": 2', '"res_blocks": 1000000000000'),
        ('"layers": 3', '"layers": 1000000000000'),
    ):
        text = json.dumps(TINY.to_dict())
        assert before in text
        save_file(tensors, path, {"minisdxl.config": text.replace(before, after)})
        assert "layers, more than there are tensors" in refusal(path)
