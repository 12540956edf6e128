"""Files as they are found in the wild, and what the error message calls them."""

from __future__ import annotations

import gzip
import io
import json
import pickle
import re
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from minisdxl.checkpoint.containers import container
from minisdxl.checkpoint.errors import CheckpointError
from minisdxl.checkpoint.identify import family
from minisdxl.checkpoint.modules import open_source
from minisdxl.convert import write_folder
from minisdxl.tokenizer import read_vocabulary
from tests.manifest import official_shapes
from tests.minisdxl.tiny import TINY, VOCABULARY, sparse_file, tiny_file

Shapes = dict[str, tuple[int, ...]]

UNET = "model.diffusion_model."


def saved(value: object, zipped: bool) -> bytes:
    """What ``torch.save`` writes, in its present and its older form."""
    buffer = io.BytesIO()
    torch.save(value, buffer, _use_new_zipfile_serialization=zipped)
    return buffer.getvalue()


def zip_of(name: str) -> bytes:
    """A zip archive with one file."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr(name, "text " * 100)
    return buffer.getvalue()


WEIGHTS = {"weight": torch.ones(3)}
CONTAINERS: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "an empty file"),
    "HTML": (b"<!DOCTYPE html>\n<html lang=en>", "an HTML page"),
    "HTML, other beginning": (b"\xef\xbb\xbf\n  <HTML><head>", "an HTML page"),
    "XML": (b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>', "an XML page"),
    "git-lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:31e35c\nsize 6938078334\n", "git-lfs pointer"),
    "torch.save": (saved(WEIGHTS, zipped=True), "a PyTorch pickle"),
    "torch.save, older": (saved(WEIGHTS, zipped=False), "a pickle"),
    **{f"pickle {p}": (pickle.dumps({"weight": [1.0]}, protocol=p), "a pickle") for p in range(2, 6)},
    "zip": (zip_of("model.safetensors"), "a zip archive"),
    "gzip": (gzip.compress(b"text"), "a gzip archive"),
    "GGUF": (b"GGUF\x03\x00\x00\x00" + bytes(16), "a GGUF file"),
    "HDF5": (b"\x89HDF\r\n\x1a\n" + bytes(16), "an HDF5 file"),
    "PNG": (b"\x89PNG\r\n\x1a\n" + bytes(16), "a picture"),
    "JSON": (b'{"error": "Repository not found"}', "a JSON text"),
    "text": (b"Entry not found", "a text that begins 'Entry not found'"),
    "text of two lines": (b"\nInvalid username\nor password", "a text that begins 'Invalid username'"),
    "zeros": (bytes(512), "all zeros at its beginning"),
}


@pytest.mark.parametrize("name", CONTAINERS)
def test_containers_are_named(name: str) -> None:
    content, expected = CONTAINERS[name]
    what = container(content[:512])
    print(what)
    assert what is not None
    assert expected in what
    assert "\n" not in what


def test_bytes_that_say_nothing_get_no_name() -> None:
    for content in (
        b"\x00",
        b"\n \n",
        b"\x01\x02\x03\x04",
        b"\x80\x02\x00\x00\x00\x00\x00\x00",
        bytes(range(200, 256)),
    ):
        assert container(content) is None


def without(pattern: str) -> Shapes:
    """The official model without the tensors whose names match ``pattern``."""
    return {name: shape for name, shape in official_shapes().items() if not re.search(pattern, name)}


def with_tensors(**shapes: tuple[int, ...]) -> Shapes:
    """The official model with some tensors replaced or added; ``__`` stands for the dot."""
    return {**official_shapes(), **{name.replace("__", "."): shape for name, shape in shapes.items()}}


def with_depths(depths: dict[int, int]) -> Shapes:
    """The official model with fewer transformer layers, or none, in the attention blocks of the way down."""

    def stays(name: str) -> bool:
        match = re.match(r"model\.diffusion_model\.input_blocks\.(\d+)\.1\.transformer_blocks\.(\d+)\.", name)
        return match is None or int(match[2]) < depths.get(int(match[1]), 0)

    return {name: shape for name, shape in official_shapes().items() if stays(name)}


def sd_1(context: int, text: str) -> Shapes:
    """Signature tensors of Stable Diffusion 1.x and 2.x."""
    return {
        f"{UNET}input_blocks.0.0.weight": (320, 4, 3, 3),
        f"{UNET}input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": (320, context),
        "first_stage_model.encoder.conv_in.weight": (128, 3, 3, 3),
        "alphas_cumprod": (1000,),
        text: (49408, context),
    }


SD_1_TEXT = "cond_stage_model.transformer.text_model.embeddings.token_embedding.weight"
SD_2_TEXT = "cond_stage_model.model.token_embedding.weight"
FAMILIES: dict[str, tuple[Shapes, str]] = {
    "SD 1.x": (sd_1(768, SD_1_TEXT), "a Stable Diffusion 1.x model"),
    "SD 2.x": (sd_1(1024, SD_2_TEXT), "a Stable Diffusion 2.x model"),
    "SD 1.x inpainting": ({**sd_1(768, SD_1_TEXT), f"{UNET}input_blocks.0.0.weight": (320, 9, 3, 3)}, "Diffusion 1.x"),
    "SD 1.x U-Net": (
        {n: s for n, s in sd_1(768, SD_1_TEXT).items() if n.startswith(UNET)},
        "only the U-Net of a Stable Diffusion 1.x model",
    ),
    "refiner": (
        {
            f"{UNET}label_emb.0.0.weight": (1536, 2560),
            "conditioner.embedders.0.model.ln_final.weight": (1280,),
            "first_stage_model.quant_conv.weight": (8, 8, 1, 1),
        },
        "the SDXL refiner",
    ),
    "refiner U-Net": ({"label_emb.0.0.weight": (1536, 2560), "input_blocks.0.0.bias": (384,)}, "the SDXL refiner"),
    "pix2pix": (with_tensors(model__diffusion_model__input_blocks__0__0__weight=(320, 8, 3, 3)), "a pix2pix"),
    "SSD-1B": (with_depths({4: 2, 5: 2, 7: 4, 8: 4}), "SSD-1B"),
    "Vega": (with_depths({4: 1, 5: 1, 7: 2, 8: 2}), "Segmind Vega"),
    "KOALA-700M": (with_depths({4: 2, 7: 5}), "KOALA-700M"),
    "KOALA-1B": (with_depths({4: 2, 7: 6}), "KOALA-1B"),
    "LoRA, kohya": ({"lora_unet_mid_block_attentions_0_proj_in.lora_down.weight": (8, 1280)}, "a LoRA"),
    "LoRA, peft": ({"unet.mid_block.attentions.0.proj_in.lora_A.weight": (8, 1280)}, "a LoRA"),
    "LoRA, older diffusers": ({"unet.down_blocks.1.to_q_lora.down.weight": (8, 1280)}, "a LoRA"),
    "LoHa": ({"unet_mid_block.hada_w1_a": (8, 8)}, "a LoRA"),
    "VAE, official": (official_shapes("first_stage_model."), "only a VAE"),
    "VAE with prefix": (
        without("^(model|conditioner)"),
        "only the VAE of a model, without its U-Net and first text encoder",
    ),
    "VAE, diffusers": ({"encoder.down_blocks.0.resnets.0.norm1.weight": (128,), "quant_conv.bias": (8,)}, "only a VAE"),
    "U-Net": (official_shapes(UNET), "only a U-Net"),
    "U-Net with prefix": (without("^(first|conditioner)"), "only the U-Net of a model, without its VAE and first text"),
    "U-Net, diffusers": ({"down_blocks.0.resnets.0.norm1.weight": (320,)}, "only a U-Net, in the diffusers layout"),
    "no VAE": (
        without("^first_stage_model"),
        "only the U-Net and first text encoder and second text encoder of a model",
    ),
    "text encoders": (without("^(model|first_stage_model)"), "only the first text encoder and second text encoder"),
    "text encoder, transformers": ({"text_model.final_layer_norm.weight": (768,)}, "only a text encoder"),
    "text encoder, OpenCLIP": ({"transformer.resblocks.0.ln_1.weight": (1280,)}, "only a text encoder"),
    "Control-LoRA": (
        {"lora_controlnet": (0,), "input_blocks.0.0.down": (16, 4, 3, 3), "input_hint_block.0.weight": (16, 3, 3, 3)},
        "a Control-LoRA",
    ),
    "ControlNet-LLLite": ({"lllite_unet_input_blocks_4_1_proj_in.conditioning1.0.weight": (32, 3, 4, 4)}, "LLLite"),
    "T2I-Adapter": ({"adapter.body.0.resnets.0.block1.weight": (320, 320, 3, 3)}, "a T2I-Adapter"),
    "TAESDXL": (
        {"encoder.layers.0.weight": (64, 3, 3, 3), "encoder.layers.1.conv.0.weight": (64, 64, 3, 3)},
        "TAESDXL or another tiny autoencoder",
    ),
    "TAESDXL's decoder": ({"1.weight": (64, 4, 3, 3), "3.conv.0.weight": (64, 64, 3, 3)}, "TAESDXL or another tiny"),
    "VAE of Flux": (
        {**official_shapes("first_stage_model."), "decoder.conv_in.weight": (512, 16, 3, 3)},
        "a VAE with 16 latent channels",
    ),
    "Wan": ({f"{UNET}blocks.0.self_attn.q.weight": (5120, 5120)}, "a Wan model"),
    "Wan, diffusers": ({"blocks.0.attn1.to_q.weight": (5120, 5120)}, "a Wan model"),
    "Qwen-Image": ({"transformer_blocks.0.img_mlp.net.0.proj.weight": (12288, 3072)}, "a Qwen-Image model"),
    "Z-Image": ({"layers.0.attention.qkv.weight": (11520, 3840), "noise_refiner.0.x.weight": (1,)}, "a Z-Image model"),
    "HunyuanVideo": ({"double_blocks.0.img_mlp.fc1.weight": (12288, 3072)}, "a HunyuanVideo model"),
    "AuraFlow": ({"joint_transformer_blocks.0.attn.to_q.weight": (3072, 3072)}, "an AuraFlow model"),
    "SVDQuant": (
        {
            "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_out.0.qweight": (640, 320),
            "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_out.0.wscales": (10, 640),
            "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_out.0.lora_down": (640, 32),
        },
        "quantized by SVDQuant",
    ),
    "nf4": (
        {
            "mid_block.attentions.0.proj_in.weight": (819200, 1),
            "mid_block.attentions.0.proj_in.weight.absmax": (25600,),
            "mid_block.attentions.0.proj_in.weight.quant_state.bitsandbytes__nf4": (82,),
        },
        "quantized by bitsandbytes to nf4",
    ),
    "int8 of bitsandbytes": ({"mid_block.x.weight": (2, 2), "mid_block.x.SCB": (2,)}, "quantized by bitsandbytes"),
    "GPTQ": ({"mid_block.x.qweight": (2, 2), "mid_block.x.qzeros": (2,)}, "quantized by GPTQ or AWQ"),
    "quanto": ({"mid_block.x.weight._data": (2, 2), "mid_block.x.weight._scale": (2,)}, "quantized by optimum-quanto"),
    "SDNQ": ({"mid_block.x.weight": (2, 2), "mid_block.x.zero_point": (2,)}, "quantized by SDNQ"),
    "SD 3": ({f"{UNET}joint_blocks.0.x_block.attn.qkv.weight": (4608, 1536)}, "a Stable Diffusion 3 model"),
    "Flux": ({"double_blocks.0.img_attn.qkv.weight": (9216, 3072)}, "a Flux model"),
    "Flux, diffusers": ({"transformer_blocks.0.attn.to_q.weight": (3072, 3072)}, "a diffusion transformer"),
    "ControlNet": ({"control_model.input_blocks.0.0.weight": (320, 4, 3, 3)}, "a ControlNet"),
    "ControlNet, diffusers": (
        {"down_blocks.0.resnets.0.norm1.weight": (320,), "controlnet_cond_embedding.conv_in.weight": (16, 3, 3, 3)},
        "a ControlNet",
    ),
    "IP-Adapter": (
        {"image_proj.proj.weight": (8192, 1280), "ip_adapter.1.to_k_ip.weight": (640, 2048)},
        "an IP-Adapter",
    ),
    "AnimateDiff": ({"down_blocks.0.motion_modules.0.norm.weight": (320,)}, "an AnimateDiff motion module"),
    "textual inversion": ({"clip_g": (8, 1280), "clip_l": (8, 768)}, "a textual inversion embedding"),
    "something else": ({"lm_head.weight": (32000, 4096)}, "no model that is known here"),
    "nothing": ({}, "no model that is known here"),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_families_are_named(name: str) -> None:
    shapes, expected = FAMILIES[name]
    what = family(shapes)
    print(what)
    assert what is not None
    assert expected in what


@pytest.mark.parametrize(
    ("name", "parts", "expected"),
    [
        ("U-Net", ["unet"], None),
        ("U-Net, diffusers", ["unet"], None),
        ("U-Net with prefix", ["unet"], None),
        ("U-Net", ["vae"], "only a U-Net"),
        ("U-Net, diffusers", ["vae"], "only a U-Net, in the diffusers layout"),
        ("VAE, official", ["vae"], None),
        ("VAE with prefix", ["vae"], None),
        ("VAE, diffusers", ["vae"], None),
        ("VAE, diffusers", ["unet"], "only a VAE, in the diffusers layout"),
        ("VAE with prefix", ["unet"], "only the VAE of a model, without its U-Net"),
        ("no VAE", ["unet", "text_encoder", "text_encoder_2"], None),
        (
            "no VAE",
            ["vae"],
            "only the U-Net and first text encoder and second text encoder of a model, without its VAE",
        ),
        ("text encoder, transformers", ["text_encoder"], None),
        ("text encoder, transformers", ["unet"], "only a text encoder"),
        ("SD 1.x", ["vae"], "a Stable Diffusion 1.x model"),
        ("SSD-1B", ["unet"], "SSD-1B, a smaller model cut out of SDXL"),
    ],
)
def test_a_part_may_be_all_that_is_wanted(name: str, parts: list[str], expected: str | None) -> None:
    assert family(FAMILIES[name][0], parts) == expected


OTHER_MODELS = [
    *("SD 1.x", "SD 2.x", "SD 1.x U-Net", "refiner U-Net", "pix2pix", "SSD-1B", "Vega"),
    *("KOALA-700M", "KOALA-1B", "LoRA, kohya", "LoRA, peft", "SD 3", "Flux"),
    *("TAESDXL", "Control-LoRA", "Wan", "Qwen-Image", "Z-Image", "HunyuanVideo", "SVDQuant", "nf4", "quanto"),
    *("Flux, diffusers", "ControlNet", "ControlNet, diffusers", "text encoder, transformers", "text encoder, OpenCLIP"),
]


@pytest.fixture(scope="module")
def tiny_forms(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A sound model as a file and as a folder."""
    place = tmp_path_factory.mktemp("tiny")
    file = tiny_file(place / "tiny.safetensors")
    write_folder(open_source(file), place / "tiny", read_vocabulary(VOCABULARY))
    return file, place / "tiny"


@pytest.mark.parametrize("name", OTHER_MODELS)
def test_other_models_are_named_in_every_form(
    tmp_path: Path, tiny_forms: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """As the one file, as --unet and --vae beside a good model, as the U-Net of a folder and as one of its shards."""
    monkeypatch.setattr("minisdxl.checkpoint.modules.SDXL_BASE", TINY)  # what a file is taken for that says nothing
    shapes, what = FAMILIES[name]
    file = sparse_file(tmp_path / "other.safetensors", shapes)
    base, folder = tiny_forms
    good = folder / "unet" / "diffusion_pytorch_model.safetensors"
    sharded = tmp_path / "sharded"
    shutil.copytree(folder, sharded, ignore=lambda place, _: [good.name] if place.endswith("unet") else [])
    index = {"weight_map": {next(iter(shapes)): file.name}}
    (sharded / "unet" / f"{good.name}.index.json").write_text(json.dumps(index))
    (sharded / "unet" / file.name).symlink_to(file)
    plain = tmp_path / "plain"
    shutil.copytree(folder, plain, ignore=lambda place, _: [good.name] if place.endswith("unet") else [])
    (plain / "unet" / good.name).symlink_to(file)
    for path, parts, named in (
        (file, {}, file),
        (base, {"unet": file}, file),
        (base, {"vae": file}, file),
        (folder, {"unet": file}, file),
        (sharded, {}, sharded),
        (plain, {}, plain),
    ):
        with pytest.raises(CheckpointError) as caught:
            open_source(path, **parts)  # type: ignore[arg-type]
        message = str(caught.value)
        print(message)
        assert what in message
        assert str(named) in message
        assert "\n" not in message


CHANGES: dict[str, Callable[[], Shapes]] = {
    "as published": official_shapes,
    "without what is not used": lambda: without("position_ids|logit_scale"),
    "a tensor missing": lambda: without(r"out\.2\.bias"),
    "extra tensors": lambda: with_tensors(denoiser__sigmas=(1000,), model_ema__decay=(), anything__else=(3,)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_the_official_model_and_its_kin_are_not_called_something_else(change: str) -> None:
    assert family(CHANGES[change]()) is None
