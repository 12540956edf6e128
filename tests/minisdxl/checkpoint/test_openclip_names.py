"""Models whose parts come from files of their own: text encoders under all their names, and whole models in parts."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.loaders.single_file_utils import convert_open_clip_checkpoint
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

from minisdxl.checkpoint.errors import CheckpointError
from minisdxl.checkpoint.layouts import PARTS, layout
from minisdxl.checkpoint.modules import (
    file_metadata,
    load,
    official_shapes,
    official_state_dict,
    open_source,
)
from minisdxl.checkpoint.resolve import Source
from minisdxl.config import SDXL_BASE
from minisdxl.convert import main as convert
from tests.minisdxl.tiny import TINY, VOCABULARY, sparse_file, tiny_file

Tensors = dict[str, Tensor]
CLIP, OPENCLIP = "text_encoder", "text_encoder_2"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two models with different weights, in one file each."""
    folder = tmp_path_factory.mktemp("files")
    return [tiny_file(folder / f"{seed}.safetensors", seed=seed) for seed in (0, 1)]


@pytest.fixture(scope="module")
def folder(files: list[Path]) -> Path:
    """The second one as a diffusers folder."""
    target = files[1].with_suffix("")
    convert([str(files[1]), str(target), "--tokenizer", str(VOCABULARY)])
    return target


def state(path: Path, **parts: Any) -> Tensors:
    return official_state_dict(load(path, "cpu", torch.float32, loras=(), **parts)[1])


def opened(path: Path, **parts: Any) -> Source:
    return open_source(path, torch.float32, **parts)


@pytest.fixture(scope="module")
def states(files: list[Path]) -> list[Tensors]:
    """The weights of both."""
    return [state(file) for file in files]


def own(folder: Path, part: str) -> Tensors:
    """A text encoder as transformers has it."""
    return load_file(folder / part / "model.safetensors")


OPENAI = {
    "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "text_model.final_layer_norm": "ln_final",
    "text_model.encoder.layers": "transformer.resblocks",
    "layer_norm": "ln_",
    "self_attn.out_proj": "attn.out_proj",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}


def as_openai(theirs: Mapping[str, Tensor]) -> Tensors:
    """A CLIP under OpenAI's names: three tensors of each attention are one."""
    tensors: Tensors = {}
    for name, tensor in theirs.items():
        if name.endswith("position_ids") or re.search(r"\.[kv]_proj\.", name):
            continue
        if ".q_proj." in name:
            tensor = torch.cat([theirs[name.replace(".q_proj.", f".{letter}_proj.")] for letter in "qkv"])
            name = name.replace("self_attn.q_proj.", "attn.in_proj_")
        for old, new in OPENAI.items():
            name = name.replace(old, new)
        tensors[name] = tensor
    return tensors


def with_prefix(prefix: str) -> Callable[[Mapping[str, Tensor]], Tensors]:
    return lambda tensors: {prefix + name: tensor for name, tensor in tensors.items()}


def without_prefix(tensors: Mapping[str, Tensor]) -> Tensors:
    return {name.removeprefix("text_model."): tensor for name, tensor in tensors.items()}


def whole_clip(tensors: Mapping[str, Tensor]) -> Tensors:
    """With the picture encoder and what else is in OpenAI's repository on the hub."""
    others = ("vision_model.embeddings.class_embedding", "visual_projection.weight", "text_projection.weight")
    more = {name: torch.ones(2, 2) for name in others}
    return dict(tensors) | more | {"logit_scale": torch.ones(()), "text_model.embeddings.position_ids": torch.arange(7)}


def whole_openai(tensors: Mapping[str, Tensor]) -> Tensors:
    more = {"visual.conv1.weight": torch.ones(2, 2), "text_projection": torch.ones(2, 2), "logit_scale": torch.ones(())}
    return as_openai(tensors) | more


def projected(tensors: Mapping[str, Tensor]) -> Tensors:
    """As older versions of ComfyUI saved it: the projection as OpenCLIP has it."""
    others = {name: tensor for name, tensor in tensors.items() if name != "text_projection.weight"}
    return others | {"text_projection": tensors["text_projection.weight"].T}


def openclip(tensors: Mapping[str, Tensor]) -> Tensors:
    others = {name: tensor for name, tensor in tensors.items() if name != "text_projection.weight"}
    return as_openai(others) | {"text_projection": tensors["text_projection.weight"].T}


SPELLINGS: dict[tuple[str, str], Callable[[Mapping[str, Tensor]], Tensors]] = {
    (CLIP, "transformers"): dict,
    (CLIP, "transformers 5"): without_prefix,
    (CLIP, "a whole CLIPModel"): whole_clip,
    (CLIP, "ComfyUI"): with_prefix("clip_l.transformer."),
    (CLIP, "ComfyUI's whole models"): with_prefix("text_encoders.clip_l.transformer."),
    (CLIP, "official"): with_prefix("conditioner.embedders.0.transformer."),
    (CLIP, "OpenAI"): as_openai,
    (CLIP, "OpenAI with its picture encoder"): whole_openai,
    (OPENCLIP, "transformers"): dict,
    (OPENCLIP, "ComfyUI"): with_prefix("clip_g.transformer."),
    (OPENCLIP, "ComfyUI's whole models"): with_prefix("text_encoders.clip_g.transformer."),
    (OPENCLIP, "older ComfyUI"): projected,
    (OPENCLIP, "OpenCLIP"): openclip,
    (OPENCLIP, "OpenCLIP with its picture encoder"): lambda tensors: (
        openclip(tensors) | {"visual.proj": torch.ones(2, 2), "logit_scale": torch.ones(())}
    ),
    (OPENCLIP, "official"): lambda tensors: with_prefix("conditioner.embedders.1.model.")(openclip(tensors)),
}


def check_replaced(after: Tensors, states: list[Tensors], part: str) -> None:
    """That one part is that of the second model, and all others those of the first."""
    first, second = states
    for name, tensor in after.items():
        assert torch.equal(tensor, (second if name.startswith(PARTS[part].prefix) else first)[name]), name
    assert any(not torch.equal(after[name], tensor) for name, tensor in first.items())


@pytest.mark.parametrize(("part", "name"), SPELLINGS)
def test_text_encoders_are_read_under_all_their_names(
    tmp_path: Path, files: list[Path], states: list[Tensors], folder: Path, part: str, name: str
) -> None:
    path = tmp_path / "part.safetensors"
    tensors = SPELLINGS[part, name](own(folder, part))
    save_file({each: tensor.contiguous() for each, tensor in tensors.items()}, path)
    check_replaced(state(files[0], **{part: path}), states, part)


@pytest.mark.parametrize("part", [CLIP, OPENCLIP])
@pytest.mark.parametrize("of", ["its folder", "the model's folder", "the model's file", "a CLIPModel's folder"])
def test_text_encoders_are_read_from_folders_and_models(
    tmp_path: Path, files: list[Path], states: list[Tensors], folder: Path, part: str, of: str
) -> None:
    path = {"its folder": folder / part, "the model's folder": folder, "the model's file": files[1]}.get(of, tmp_path)
    if path == tmp_path:
        config = json.loads((folder / part / "config.json").read_text())
        (path / "config.json").write_text(json.dumps({"model_type": "clip", "text_config": config}))
        save_file(own(folder, part), path / "model.safetensors")
    check_replaced(state(files[0], **{part: path}), states, part)


def test_the_names_of_openai_are_those_that_diffusers_reads(folder: Path) -> None:
    """The test's own renaming, read back by diffusers' conversion of such files."""
    theirs = own(folder, OPENCLIP)
    text = TINY.text[1]
    config = CLIPTextConfig(
        hidden_size=text.width,
        intermediate_size=4 * text.width,
        num_hidden_layers=text.layers,
        num_attention_heads=text.heads,
        vocab_size=text.vocabulary,
        projection_dim=text.projection,
    )
    prefix = "conditioner.embedders.1.model."
    model, stored = CLIPTextModelWithProjection(config), with_prefix(prefix)(openclip(theirs))
    read = convert_open_clip_checkpoint(model, stored, prefix)
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in read.items() if name in theirs)
    assert len(theirs.keys() & read.keys()) >= len(theirs) - 1


def parts_of(folder: Path, files: list[Path], target: Path) -> dict[str, Path]:
    """The second model in four files, as ComfyUI has them; the U-Net's says which model it is."""
    official = load_file(files[1])
    paths = {part: target / f"{part}.safetensors" for part in PARTS}
    for part in ("unet", "vae"):
        prefix = PARTS[part].prefix
        tensors = {name.removeprefix(prefix): each for name, each in official.items() if name.startswith(prefix)}
        save_file(tensors, paths[part], file_metadata(TINY) if part == "unet" else None)
    save_file(own(folder, CLIP), paths[CLIP])
    save_file({name: each.contiguous() for name, each in openclip(own(folder, OPENCLIP)).items()}, paths[OPENCLIP])
    return paths


def test_a_model_in_parts_is_the_whole_model(
    tmp_path: Path, files: list[Path], states: list[Tensors], folder: Path
) -> None:
    paths = parts_of(folder, files, tmp_path)
    unet = paths.pop("unet")
    whole, parts = states[1], state(unet, **paths)
    assert whole.keys() == parts.keys() and all(torch.equal(parts[name], tensor) for name, tensor in whole.items())
    options = [each for part, path in paths.items() for each in (f"--{part.replace('_', '-')}", str(path))]
    convert([str(unet), str(tmp_path / "one.safetensors"), *options])
    assert (tmp_path / "one.safetensors").read_bytes() == files[1].read_bytes()
    convert([str(unet), str(tmp_path / "folder"), *options, "--tokenizer", str(VOCABULARY)])
    for name in ("unet/diffusion_pytorch_model", "text_encoder_2/model"):
        written, right = (load_file(each / f"{name}.safetensors") for each in (tmp_path / "folder", folder))
        assert written.keys() == right.keys() and all(torch.equal(written[each], right[each]) for each in right)
    paths.pop("vae")
    with pytest.raises(CheckpointError, match=r"unet.safetensors is only a U-Net; expected the U-Net and VAE of tiny"):
        opened(unet, **paths)


def test_what_does_not_fit_is_refused(tmp_path: Path, files: list[Path], folder: Path) -> None:
    path, tensors = tmp_path / "x.safetensors", as_openai(own(folder, CLIP))
    stacked = "transformer.resblocks.1.attn.in_proj_weight"
    for shape in ((47, 16), (), (51, 16)):
        save_file(tensors | {stacked: torch.ones(shape)}, path)
        with pytest.raises(CheckpointError, match=r"x.safetensors does not fit tiny: "):
            state(files[0], text_encoder=path)
    save_file(tensors | {"more.weight": torch.ones(2)}, path)
    with pytest.raises(CheckpointError, match=r"1 unexpected tensor \(more.weight\)"):
        state(files[0], text_encoder=path)
    config = json.loads((folder / CLIP / "config.json").read_text()) | {"hidden_act": "gelu"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(own(folder, CLIP), tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"config.json does not fit tiny: text.*activation"):
        state(files[0], text_encoder=tmp_path)
    with pytest.raises(TypeError, match="text_encoder_3 is no part of a model, expected unet, vae, text_encoder, "):
        open_source(files[0], text_encoder_3=path)


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SDXL's own parts in full size, and other text encoders, all of them zeros."""
    place, shapes = tmp_path_factory.mktemp("sdxl"), official_shapes(SDXL_BASE)
    for part, name in (("unet", "unet"), ("vae", "vae"), (CLIP, "clip_l"), (OPENCLIP, "clip_g")):
        names, prefix = layout(part, SDXL_BASE), PARTS[part].prefix
        table: dict[str, tuple[int, ...]] = {}
        for official in (each for each in shapes if each.startswith(prefix)):
            mapping = names.mapping(official.removeprefix(prefix))
            views = mapping.split(torch.empty(shapes[official], device="meta"))
            table |= {their: tuple(view.shape) for their, view in zip(mapping.names, views, strict=True)}
        sparse_file(place / f"{name}.safetensors", table)
    block = "encoder.block.0.layer.0.SelfAttention.q.weight"
    sparse_file(place / "t5xxl.safetensors", {block: (4096, 4096), "shared.weight": (32128, 4096)})
    sparse_file(place / "qwen.safetensors", {"model.layers.0.mlp.gate_proj.weight": (9728, 2560)})
    sparse_file(place / "clip_h.safetensors", {"text_model.embeddings.token_embedding.weight": (49408, 1024)})
    return place


def test_sdxl_in_parts_needs_no_config(sdxl: Path, tmp_path: Path) -> None:
    others = {part: sdxl / f"{name}.safetensors" for part, name in ((CLIP, "clip_l"), (OPENCLIP, "clip_g"))}
    others["vae"] = sdxl / "vae.safetensors"
    assert opened(sdxl / "unet.safetensors", **others).config == SDXL_BASE
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet" / "diffusion_pytorch_model.safetensors").symlink_to(sdxl / "unet.safetensors")
    assert opened(tmp_path / "unet", **others).config == SDXL_BASE


GIVEN_FOR = {
    ("clip_g", CLIP): "is OpenCLIP ViT-bigG (clip_g), the second text encoder of SDXL; expected the first text encoder",
    ("clip_l", OPENCLIP): "is CLIP ViT-L (clip_l), the first text encoder of SDXL; expected the second text encoder",
    ("clip_h", CLIP): "is OpenCLIP ViT-H, the text encoder of Stable Diffusion 2.x; expected the first text encoder",
    ("t5xxl", CLIP): "is a T5 text encoder, of models newer than SDXL; expected the first text encoder",
    ("t5xxl", OPENCLIP): "is a T5 text encoder, of models newer than SDXL; expected the second text encoder",
    ("qwen", CLIP): "is a language model, the text encoder of models newer than SDXL; expected the first text encoder",
    ("vae", CLIP): "is only a VAE, in the diffusers layout; expected the first text encoder",
    ("unet", OPENCLIP): "is only a U-Net, in the diffusers layout; expected the second text encoder",
    ("clip_l", "vae"): "is CLIP ViT-L (clip_l), the first text encoder of SDXL; expected the VAE",
}


@pytest.mark.parametrize(("name", "part"), GIVEN_FOR)
def test_a_wrong_part_is_named(sdxl: Path, name: str, part: str) -> None:
    right = {"vae": "vae", CLIP: "clip_l", OPENCLIP: "clip_g"} | {part: name}
    others = {each: sdxl / f"{file}.safetensors" for each, file in right.items()}
    with pytest.raises(CheckpointError) as caught:
        opened(sdxl / "unet.safetensors", **others)
    print(caught.value)
    assert str(caught.value) == f"{sdxl / name}.safetensors {GIVEN_FOR[name, part]} of {SDXL_BASE.name}"
