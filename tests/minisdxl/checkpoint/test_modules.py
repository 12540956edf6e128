"""Whole models in one file: written and read back, the official layout, and files that are refused."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import subprocess
import sys
import time
import zlib
from collections.abc import Mapping
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.utils import convert_conv2d_weight_memory_format

from minisdxl.checkpoint.errors import CheckpointError
from minisdxl.checkpoint.layouts import PARTS
from minisdxl.checkpoint.modules import (
    CONFIG_KEY,
    Modules,
    load,
    official_shapes,
    official_state_dict,
    open_source,
    read_config,
    save,
)
from minisdxl.checkpoint.resolve import SKIPPED, UNUSED
from minisdxl.config import SDXL_BASE, SDXL_INPAINTING, SHAPES
from minisdxl.convert import write_folder
from minisdxl.tokenizer import clip_vocabulary, read_vocabulary
from tests import manifest
from tests.minisdxl.tiny import TINY, TINY_INPAINTING, VOCABULARY, sparse_file, tiny_file, tiny_modules

POSITION_IDS = "conditioner.embedders.0.transformer.text_model.embeddings.position_ids"
LOGIT_SCALE = "conditioner.embedders.1.model.logit_scale"
VAE_QUERY = "first_stage_model.decoder.mid.attn_1.q.weight"


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model in a file, fp32."""
    path = tmp_path_factory.mktemp("small") / "small.safetensors"
    save(path, TINY, tiny_modules(), torch.float32)
    return path


def changed(source: Path, target: Path, extra: Mapping[str, Tensor] | None = None, without: str = "$^") -> Path:
    """A copy of a file by the safetensors library, with more tensors, or less."""
    with safe_open(source, "pt") as file:
        metadata = file.metadata()
    tensors = {name: tensor for name, tensor in load_file(source).items() if not re.search(without, name)}
    save_file(tensors | dict(extra or {}), target, metadata)
    return target


def refusal(path: Path) -> str:
    """The one line with which ``load`` refuses a file; it names the file."""
    with pytest.raises(CheckpointError) as caught:
        load(path)
    message = str(caught.value)
    print(message)
    assert str(path) in message
    assert len(message.splitlines()) == 1
    return message


def same_outputs(ours: Modules, theirs: Modules) -> None:
    """Both models compute the same, to the bit, with the memory format that convolutions have after loading."""
    for module in (ours.unet, ours.vae, theirs.unet, theirs.vae):
        convert_conv2d_weight_memory_format(module, torch.channels_last)
    generator = torch.Generator().manual_seed(1)
    x, timestep = torch.randn(2, 4, 8, 8, generator=generator), torch.tensor([3, 700])
    context, vector = torch.randn(2, 77, 40, generator=generator), torch.randn(2, 44, generator=generator)
    ids = torch.randint(638, (2, 77), generator=generator).index_fill(1, torch.tensor([76]), 639)
    with torch.no_grad():
        assert torch.equal(ours.unet(x, timestep, context, vector), theirs.unet(x, timestep, context, vector))
        assert torch.equal(ours.vae.decode(x), theirs.vae.decode(x))
        ours_text, theirs_text = ours.text(ids, ids), theirs.text(ids, ids)
        assert torch.equal(ours_text.context, theirs_text.context)
        assert torch.equal(ours_text.pooled, theirs_text.pooled)


def test_names_and_shapes_are_official() -> None:
    ours = official_shapes(SDXL_BASE)
    assert len(ours) == 2513
    assert {**ours, POSITION_IDS: (1, 77), LOGIT_SCALE: ()} == manifest.official_shapes()


def test_a_model_comes_back_as_it_was(small: Path) -> None:
    modules = tiny_modules()
    config, loaded = load(small)
    assert config == TINY == read_config(small)
    for before, after in zip(modules, loaded, strict=True):
        weights = after.state_dict()
        assert weights.keys() == before.state_dict().keys()
        for name, tensor in before.state_dict().items():
            assert torch.equal(weights[name], tensor), name
        assert not after.training
        for name, tensor in [*after.named_parameters(), *after.named_buffers()]:
            assert tensor.device.type == "cpu", name
            convolution = tensor.ndim == 4 and tensor.shape[2:] != (1, 1)
            assert tensor.is_contiguous(
                memory_format=torch.channels_last if convolution else torch.contiguous_format
            ), name
    same_outputs(modules, loaded)


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("wanted", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_dtypes_are_converted_while_reading(tmp_path: Path, stored: torch.dtype, wanted: torch.dtype) -> None:
    path = tmp_path / "model.safetensors"
    modules = tiny_modules()
    save(path, TINY, modules, stored)
    assert {tensor.dtype for tensor in load_file(path).values()} == {stored}
    _, loaded = load(path, dtype=wanted)
    before = official_state_dict(modules)
    for name, tensor in official_state_dict(loaded).items():
        assert tensor.dtype == (torch.float32 if name.startswith("first_stage_model.") else wanted), name
        assert torch.equal(tensor, before[name].to(stored).to(tensor.dtype)), name


def test_the_library_reads_the_official_names(small: Path) -> None:
    """Stacked queries, keys and values, and the transposed projection, by hand."""
    tensors = load_file(small)
    encoder = tiny_modules().text.openclip
    state = encoder.state_dict()
    layer = next(name for name in state if name.endswith("layers.1.self_attn.q_proj.weight")).removesuffix(
        "q_proj.weight"
    )
    stacked = torch.cat([state[f"{layer}{part}_proj.weight"] for part in "qkv"])
    assert torch.equal(tensors["conditioner.embedders.1.model.transformer.resblocks.1.attn.in_proj_weight"], stacked)
    projection = state["text_projection.weight"]
    assert torch.equal(tensors["conditioner.embedders.1.model.text_projection"], projection.T)
    with safe_open(small, "pt") as file:
        assert json.loads(file.metadata()[CONFIG_KEY]) == json.loads(json.dumps(TINY.to_dict()))


def test_weights_in_another_memory_format_are_saved_alike(tmp_path: Path, small: Path) -> None:
    modules = tiny_modules()
    for parameter in modules.unet.parameters():
        if parameter.ndim == 4:
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
    save(tmp_path / "channels_last.safetensors", TINY, modules, torch.float32)
    assert (tmp_path / "channels_last.safetensors").read_bytes() == small.read_bytes()


def test_modules_that_do_not_fit_the_config_are_not_written(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    with pytest.raises(CheckpointError, match=r"do not fit tiny: .* missing tensors"):
        save(path, replace(TINY, unet=replace(TINY.unet, middle_depth=3)), tiny_modules())
    assert not path.exists()


@pytest.mark.parametrize(
    "positions",
    [None, torch.arange(77)[None], torch.arange(77.0).half()[None], torch.zeros(1, 77)],
    ids=["absent", "int64", "float", "wrong"],
)
@pytest.mark.parametrize("scale", [None, torch.tensor(4.6)], ids=["no scale", "scale"])
def test_what_is_not_used_may_be_there_or_not(
    tmp_path: Path, small: Path, caplog: pytest.LogCaptureFixture, positions: Tensor | None, scale: Tensor | None
) -> None:
    extra = {name: value for name, value in {POSITION_IDS: positions, LOGIT_SCALE: scale}.items() if value is not None}
    _, loaded = load(changed(small, tmp_path / "model.safetensors", extra))
    assert not caplog.messages
    same_outputs(load(small)[1], loaded)


def test_known_extras_are_skipped_with_one_line(tmp_path: Path, small: Path, caplog: pytest.LogCaptureFixture) -> None:
    names = ["model_ema.decay", "model_ema.diffusion_modelout2bias", "denoiser.sigmas", "embedding_manager.x.weight"]
    names += ["alphas_cumprod", "sqrt_one_minus_alphas_cumprod", "betas", "logvar", "posterior_variance"]
    names += ["log_one_minus_alphas_cumprod", "first_stage_model.loss.logvar", "embedding_manager_state"]
    names += ["conditioner.embedders.0.transformer.text_projection.weight"]
    path = changed(small, tmp_path / "model.safetensors", {name: torch.ones(2, dtype=torch.int8) for name in names})
    with caplog.at_level(logging.WARNING, logger="minisdxl.checkpoint.modules"):
        _, loaded = load(path)
    print(caplog.messages)
    assert len(caplog.messages) == 1
    assert f"{path}: skipped 13 tensors" in caplog.messages[0]
    assert "2 model_ema.*" in caplog.messages[0]
    same_outputs(load(small)[1], loaded)


def test_no_tensor_of_a_model_is_skipped() -> None:
    patterns = (*UNUSED, *SKIPPED)
    for config in (SDXL_BASE, SHAPES, TINY):
        assert not [name for name in official_shapes(config) for p in patterns if fnmatchcase(name, p)]


def test_vae_attention_may_be_stored_as_matrices(tmp_path: Path, small: Path) -> None:
    tensors = load_file(small)
    attention = {n: t.squeeze() for n, t in tensors.items() if n.startswith("first_stage_model.") and ".attn_1." in n}
    assert sum(tensors[name].ndim == 4 and matrix.ndim == 2 for name, matrix in attention.items()) == 8
    _, loaded = load(changed(small, tmp_path / "model.safetensors", attention))
    same_outputs(load(small)[1], loaded)


def test_missing_tensors_are_counted_and_named(tmp_path: Path, small: Path) -> None:
    message = refusal(changed(small, tmp_path / "model.safetensors", without=r"^model\.diffusion_model\.out\.2\.bias$"))
    assert "does not fit tiny: 1 missing tensor (model.diffusion_model.out.2.bias)" in message
    message = refusal(changed(small, tmp_path / "model.safetensors", without="resblocks"))
    assert "36 missing tensors (" in message
    assert message.count("resblocks") == 2
    assert ", ...)" in message


def test_unexpected_tensors_are_counted_and_named(tmp_path: Path, small: Path) -> None:
    extra = {f"model.diffusion_model.more.{i}": torch.ones(1) for i in range(7)}
    message = refusal(changed(small, tmp_path / "model.safetensors", extra))
    assert "7 unexpected tensors (model.diffusion_model.more.0, " in message
    assert message.count("more.") == 2


def test_mis_shaped_tensors_are_counted_and_named(tmp_path: Path, small: Path) -> None:
    name = "model.diffusion_model.out.2.weight"
    extra = {name: torch.ones(4, 8, 1, 1), VAE_QUERY: torch.ones(24, 1, 24)}
    extra[VAE_QUERY.replace(".q.", ".k.")] = torch.ones(24, 24, 1, 1, 1, 1)
    extra[VAE_QUERY.replace(".q.weight", ".q.bias")] = torch.ones(24, 1, 1)
    message = refusal(changed(small, tmp_path / "model.safetensors", extra))
    assert "4 mis-shaped tensors" in message
    assert f"{name} is [4, 8, 1, 1], expected [4, 8, 3, 3]" in message
    assert f"{VAE_QUERY} is [24, 1, 24], expected [24, 24, 1, 1]" in message


def test_all_differences_are_in_one_line(tmp_path: Path, small: Path) -> None:
    extra = {"model.diffusion_model.more": torch.ones(1), "model.diffusion_model.out.2.weight": torch.ones(1)}
    message = refusal(changed(small, tmp_path / "model.safetensors", extra, without=r"out\.2\.bias"))
    for part in ("1 missing tensor", "1 unexpected tensor", "1 mis-shaped tensor"):
        assert part in message


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.bool], ids=str)
def test_quantized_weights_are_refused(tmp_path: Path, small: Path, dtype: torch.dtype) -> None:
    name = "model.diffusion_model.out.2.bias"
    message = refusal(changed(small, tmp_path / "model.safetensors", {name: torch.ones(4).to(dtype)}))
    assert f"has 1 quantized or integer tensor ({name} is " in message
    assert "expected F64, F32, F16, BF16, F8_E4M3" in message


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        '{"name": "tiny"}',
        "[" * 100_000,
        json.dumps({**TINY.to_dict(), "more": 1}),
        json.dumps(TINY.to_dict()).replace('"model_channels": 8', '"model_channels": 8.0'),
        json.dumps(TINY.to_dict()).replace('"model_channels": 8', '"model_channels": 8000000000000'),
        json.dumps(TINY.to_dict()).replace('"multipliers": [1, 2, 3]', '"multipliers": []'),
        json.dumps(TINY.to_dict()).replace('"projection": null', '"projection": 7'),
        json.dumps(TINY.to_dict()).replace('"name": "tiny"', '"name": "a\\nb"'),
        json.dumps(TINY.to_dict()).replace('"steps": 1000', '"steps": 0'),
        json.dumps(TINY.to_dict()).replace('"pad_token": 639', '"pad_token": 640'),
        json.dumps(TINY.to_dict()).replace('"steps": 1000', '"a\\u2028b": 1000', 1),
    ],
    ids=[
        *("not JSON", "list", "incomplete", "deep", "more", "fraction", "huge", "no levels", "projection"),
        *("line break", "no noise", "token", "line separator"),
    ],
)
def test_a_damaged_config_is_refused(tmp_path: Path, small: Path, text: str) -> None:
    path = tmp_path / "model.safetensors"
    save_file(load_file(small), path, {CONFIG_KEY: text})
    assert f"holds a damaged {CONFIG_KEY}" in refusal(path)


def test_a_config_that_does_not_fit_is_refused(tmp_path: Path, small: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file(load_file(small), path, {CONFIG_KEY: json.dumps(SHAPES.to_dict())})
    assert "does not fit shapes: " in refusal(path)


def test_an_official_file_is_recognized_by_names_and_shapes(tmp_path: Path) -> None:
    path = sparse_file(tmp_path / "official.safetensors", manifest.official_shapes())
    assert path.stat().st_size > 6_937_000_000
    assert read_config(path) == SDXL_BASE
    sparse_file(path, {**manifest.official_shapes(), "denoiser.sigmas": (1000,)}, "F32")
    assert read_config(path) == SDXL_BASE
    merged = {n: s for n, s in manifest.official_shapes().items() if n not in (POSITION_IDS, LOGIT_SCALE)}
    sparse_file(path, {**merged, VAE_QUERY: (512, 512)})
    assert read_config(path) == SDXL_BASE


def test_inpainting_models_are_recognized(tmp_path: Path) -> None:
    """Whole, as a U-Net beside SDXL, and with SDXL's U-Net in its place."""
    path, unet = tmp_path / "model.safetensors", tmp_path / "unet.safetensors"
    official, first = manifest.official_shapes(), "model.diffusion_model.input_blocks.0.0.weight"
    sparse_file(path, {**official, first: (320, 9, 3, 3)})
    assert read_config(path) == SDXL_INPAINTING
    sparse_file(unet, {name: shape for name, shape in official.items() if name.startswith(PARTS["unet"].prefix)})
    assert read_config(path, unet=unet) == SDXL_BASE
    whole = sparse_file(tmp_path / "base.safetensors", official)
    assert read_config(whole, unet=path) == SDXL_INPAINTING
    assert "does not fit sdxl-inpainting" in refusal(sparse_file(path, {**official, first: (320, 9, 1, 1)}))


@torch.no_grad()
def test_an_inpainting_model_comes_back(tmp_path: Path) -> None:
    """From a file and from a diffusers folder."""
    path = tiny_file(tmp_path / "tiny.safetensors", config=TINY_INPAINTING)
    write_folder(open_source(path), tmp_path / "tiny", read_vocabulary(VOCABULARY))
    index = json.loads((tmp_path / "tiny" / "model_index.json").read_text())
    assert index["_class_name"] == "StableDiffusionXLInpaintPipeline"
    saved = official_state_dict(tiny_modules(config=TINY_INPAINTING))
    for place in (path, tmp_path / "tiny"):
        config, modules = load(place)
        assert replace(config, buckets=(), defaults=TINY.defaults) == TINY_INPAINTING
        read = official_state_dict(modules)
        assert read.keys() == saved.keys()
        assert all(torch.equal(read[name], tensor) for name, tensor in saved.items())


def test_an_official_file_is_compared_strictly(tmp_path: Path) -> None:
    path = tmp_path / "official.safetensors"
    official = manifest.official_shapes()
    sparse_file(path, {name: shape for name, shape in official.items() if "middle_block.1.norm" not in name})
    assert "does not fit sdxl-base: 2 missing tensors (model.diffusion_model.middle_block.1.norm.weight, " in refusal(
        path
    )
    sparse_file(path, {**official, "model.diffusion_model.out.2.bias": (8,)})
    assert "1 mis-shaped tensor (model.diffusion_model.out.2.bias is [8], expected [4])" in refusal(path)
    sparse_file(path, official, "I8")
    assert "2513 quantized or integer tensors" in refusal(path)
    sparse_file(path, official)
    os.truncate(path, path.stat().st_size - 1_234_567)
    assert "1,234,567 are missing" in refusal(path)


def test_other_families_are_named(tmp_path: Path) -> None:
    """One whole file of each kind of answer; test_recognize has every family."""
    path = tmp_path / "model.safetensors"
    official = manifest.official_shapes()
    sparse_file(path, {**official, "model.diffusion_model.input_blocks.0.0.weight": (320, 8, 3, 3)})
    assert "is a pix2pix editing model (8 input channels, not 4); expected a whole SDXL base model" in refusal(path)
    sparse_file(path, {name: shape for name, shape in official.items() if name.startswith("first_stage_model.")})
    assert "is only the VAE of a model" in refusal(path)
    path.write_bytes(b"<!DOCTYPE html>")
    assert "is an HTML page" in refusal(path)


# The whole size, with real numbers in it.

READ = """
import json, sys, time, zlib
from pathlib import Path
import torch
from minisdxl.checkpoint.modules import load, official_state_dict

start = time.perf_counter()
config, modules = load(sys.argv[1], dtype=getattr(torch, sys.argv[2]))
seconds = time.perf_counter() - start
status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
tensors = official_state_dict(modules)
print(json.dumps({
    "config": config.name,
    "seconds": seconds,
    "peak": int(status["VmHWM"].split()[0]) * 1024,
    "weights": sum(weight.nbytes for module in modules for weight in module.parameters()),
    "checksums": {
        name: zlib.crc32(tensors[name].contiguous().view(torch.uint8).numpy()) for name in json.loads(sys.argv[3])
    },
}))
"""


@pytest.fixture(scope="module")
def full_size(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """6.9 GB of random fp16 numbers in the official layout."""
    folder = tmp_path_factory.mktemp("official_size")
    if shutil.disk_usage(folder).free < 8e9:
        pytest.skip("needs 8 GB of disk")
    path = sparse_file(folder / "official.safetensors", manifest.official_shapes())
    generator = torch.Generator().manual_seed(0)
    with path.open("rb+") as file:
        header_bytes = 8 + int.from_bytes(file.read(8), "little")
        file.seek(header_bytes)
        for name, shape in manifest.official_shapes().items():  # the order in which sparse_file lays them out
            if name == POSITION_IDS:
                numbers = torch.arange(77)
            else:
                numbers = torch.randn(torch.Size(shape).numel(), generator=generator).half()
            file.write(numbers.numpy().data)
    return path


@pytest.fixture(scope="module")
def full_size_folder(full_size: Path) -> Path:
    """The same as a diffusers folder."""
    if shutil.disk_usage(full_size.parent).free < 8e9:
        pytest.skip("needs 16 GB of disk")
    write_folder(open_source(full_size), full_size.parent / "folder", clip_vocabulary())
    return full_size.parent / "folder"


@pytest.mark.official_size
@pytest.mark.timeout(1800)
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak memory of a process from /proc")
@pytest.mark.parametrize("form", ["full_size", "full_size_folder"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_loading_the_whole_size_takes_little_more_than_its_weights(
    request: pytest.FixtureRequest, full_size: Path, form: str, dtype: str
) -> None:
    probes = list(official_shapes(SDXL_BASE))[::40]
    command = [sys.executable, "-c", READ, str(request.getfixturevalue(form)), dtype, json.dumps(probes)]
    start = time.perf_counter()
    result = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    print(
        f"{form}, {dtype}: load {result['seconds']:.1f} s, whole process {time.perf_counter() - start:.1f} s; "
        f"peak of the process {result['peak'] / 2**30:.2f} GiB, weights {result['weights'] / 2**30:.2f} GiB"
    )
    assert result["config"] == "sdxl-base"
    assert result["peak"] <= result["weights"] + 2**30
    with safe_open(full_size, "pt") as file:
        for name in probes:
            in_vae = name.startswith("first_stage_model.")
            wanted = torch.float32 if in_vae else getattr(torch, dtype)
            numbers = file.get_tensor(name).to(wanted).contiguous().view(torch.uint8).numpy()
            assert result["checksums"][name] == zlib.crc32(numbers), name
