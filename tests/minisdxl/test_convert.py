"""``python -m minisdxl.convert``: both layouts into each other, and diffusers' own programs on what it writes."""

from __future__ import annotations

import hashlib
import json
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import minisdxl
from minisdxl.bundled import BUNDLED
from minisdxl.checkpoint.errors import CheckpointError
from minisdxl.checkpoint.layouts import PARTS
from minisdxl.checkpoint.modules import load, official_state_dict, open_source, read_config
from minisdxl.checkpoint.resolve import Source
from minisdxl.config import SHAPES
from minisdxl.convert import main, write_folder, write_single
from minisdxl.flops import find_config
from minisdxl.sample import main as sample
from minisdxl.tokenizer import read_vocabulary
from tests.minisdxl.tiny import TINY, VOCABULARY, tiny_file

PROMPT = "a small red circle above a big blue square on a white background"
TOKENIZER = ["--tokenizer", str(VOCABULARY)]


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_file(tmp_path_factory.mktemp("single") / "tiny.safetensors")


@pytest.fixture(scope="module")
def folder(single: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("folder") / "tiny"
    main([str(single), str(target), *TOKENIZER])
    return target


@pytest.fixture(scope="module")
def pipeline(folder: Path) -> Any:
    """diffusers' pipeline of the folder."""
    pipeline = StableDiffusionXLPipeline.from_pretrained(folder, add_watermarker=False)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The one line of a command that must fail with exit code 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in arguments])
    assert stop.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1, err
    print(err, end="")
    return err


@torch.no_grad()
def our_picture(weights: Path, steps: int) -> np.ndarray:
    """In [0, 1], (H, W, 3), not rounded."""
    sdxl = minisdxl.load(weights, tokenizer=VOCABULARY if weights.is_file() else None)
    latents: list[Tensor] = []
    sdxl.generate([PROMPT], steps=steps, cfg=5.0, seed=3, on_step=lambda _, x: latents.append(x))
    picture = sdxl.vae.decode(latents[-1])[0].add(1).div(2).clamp(0, 1)
    return picture.permute(1, 2, 0).double().numpy()


def their_picture(pipeline: Any, steps: int) -> np.ndarray:
    """The same of diffusers' pipeline, from the same noise."""
    noise = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(3))
    pipeline.scheduler.set_timesteps(steps)
    sigma = pipeline.scheduler.sigmas[0]
    # Stability AI's code scales it to unit data variance plus noise, diffusers to the noise alone.
    latents = noise * (1 + sigma**2).sqrt() / pipeline.scheduler.init_noise_sigma
    picture = pipeline(PROMPT, num_inference_steps=steps, guidance_scale=5.0, latents=latents, output_type="np").images[
        0
    ]
    return np.asarray(picture, dtype=np.float64)


def test_diffusers_makes_the_same_picture_of_our_folder(single: Path, folder: Path, pipeline: Any) -> None:
    steps = 4
    ours, theirs = our_picture(single, steps), their_picture(pipeline, steps)
    assert ours.shape == theirs.shape == (64, 64, 3)
    error = np.abs(ours - theirs)
    print(
        f"picture, in [0, 1]: max error {error.max():.1e}, mean {error.mean():.1e}; "
        f"deviation {theirs.std():.2f}, at the ends {np.mean((theirs == 0) | (theirs == 1)):.0%}"
    )
    assert error.max() <= 1e-4
    assert theirs.std() > 0.05, "the picture shows nothing that could differ"
    assert np.array_equal(our_picture(folder, steps), ours)  # our own reading of the folder, to the bit


def same_weights(path: Path, single: Path, dtype: torch.dtype = torch.float32) -> None:
    """The model at ``path`` has the tensors of a file, rounded to ``dtype``."""
    config, modules = load(path)
    expected = load_file(single)
    tensors = official_state_dict(modules)
    assert tensors.keys() == expected.keys()
    for name, tensor in tensors.items():
        assert torch.equal(tensor, expected[name].to(dtype).float()), name
    assert (config.unet, config.vae, config.text, config.size) == (TINY.unet, TINY.vae, TINY.text, TINY.size)
    assert (config.size_channels, config.noise) == (TINY.size_channels, TINY.noise)


@pytest.mark.parametrize("variant", [None, "fp16"])
@pytest.mark.parametrize("shards", ["10GB", "30KB"], ids=["one file", "shards"])
def test_what_diffusers_saves_is_read(
    tmp_path: Path, single: Path, pipeline: Any, variant: str | None, shards: str
) -> None:
    target = tmp_path / "saved"
    pipeline.save_pretrained(target, variant=variant, max_shard_size=shards)
    if variant:  # diffusers keeps the dtype; the published variant is fp16
        for file in target.rglob("*.safetensors"):
            with safe_open(file, "pt") as opened:
                metadata = opened.metadata()
            save_file({name: tensor.half() for name, tensor in load_file(file).items()}, file, metadata)
    names = sorted(str(file.relative_to(target)) for file in target.rglob("*") if "tokenizer" not in str(file))
    print(len(names), names[:12])
    assert any("-00002-of-" in name for name in names) == (shards != "10GB")
    same_weights(target, single, torch.float16 if variant else torch.float32)
    sdxl, ours = minisdxl.load(target), minisdxl.load(single, tokenizer=VOCABULARY)
    for theirs, mine in zip(sdxl.tokenizer(["a red circle!", ""]), ours.tokenizer(["a red circle!", ""]), strict=True):
        assert torch.equal(theirs, mine)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_there_and_back_is_the_same_file(tmp_path: Path, dtype: torch.dtype) -> None:
    source, there, back = (
        tiny_file(tmp_path / "source.safetensors", dtype),
        tmp_path / "there",
        tmp_path / "back.safetensors",
    )
    main([str(source), str(there), *TOKENIZER])
    main([str(there), str(back)])
    assert back.read_bytes() == source.read_bytes()
    assert read_config(back) == TINY
    for file in there.rglob("*.safetensors"):
        assert {tensor.dtype for tensor in load_file(file).values()} == {dtype}


def test_the_bundled_model_goes_there_and_back(tmp_path: Path) -> None:
    main(["shapes", str(tmp_path / "there")])
    config, modules = load(tmp_path / "there")
    assert (config.unet, config.vae, config.text, config.name) == (SHAPES.unet, SHAPES.vae, SHAPES.text, SHAPES.name)
    expected = official_state_dict(load(BUNDLED["shapes"])[1])
    assert all(torch.equal(tensor, expected[name]) for name, tensor in official_state_dict(modules).items())
    assert minisdxl.load(tmp_path / "there").tokenizer.configs == SHAPES.text


@pytest.mark.parametrize(
    ("name", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)]
)
def test_dtypes_are_converted(tmp_path: Path, single: Path, folder: Path, name: str, dtype: torch.dtype) -> None:
    for source, target in ((single, tmp_path / "folder"), (folder, tmp_path / "file.safetensors")):
        main([str(source), str(target), "--dtype", name, *TOKENIZER])
        same_weights(target, single, dtype)
        for file in [target] if target.is_file() else target.rglob("*.safetensors"):
            assert {tensor.dtype for tensor in load_file(file).values()} == {dtype}


def test_without_a_dtype_each_tensor_keeps_its_own(tmp_path: Path, single: Path) -> None:
    with safe_open(single, "pt") as file:
        metadata = file.metadata()
    mixed = {n: t if n.startswith("first_stage_model.") else t.half() for n, t in load_file(single).items()}
    save_file(mixed, tmp_path / "mixed.safetensors", metadata)
    main([str(tmp_path / "mixed.safetensors"), str(tmp_path / "folder"), *TOKENIZER])
    main([str(tmp_path / "folder"), str(tmp_path / "back.safetensors")])
    back = load_file(tmp_path / "back.safetensors")
    for name, tensor in mixed.items():
        assert back[name].dtype == tensor.dtype
        assert torch.equal(back[name], tensor)


def test_the_target_says_the_layout_unless_it_is_named(tmp_path: Path, single: Path) -> None:
    main([str(single), str(tmp_path / "file"), "--to", "single"])
    assert (tmp_path / "file").read_bytes() == single.read_bytes()
    main([str(single), str(tmp_path / "folder.safetensors"), "--to", "diffusers", *TOKENIZER])
    same_weights(tmp_path / "folder.safetensors", single)


def test_other_parts_are_put_in(tmp_path: Path, single: Path, folder: Path) -> None:
    other = tiny_file(tmp_path / "other.safetensors", seed=1)
    main([str(single), str(tmp_path / "mixed.safetensors"), "--vae", str(other), "--unet", str(folder)])
    mixed, others = load_file(tmp_path / "mixed.safetensors"), load_file(other)
    for name, tensor in load_file(single).items():
        expected = others[name] if name.startswith(PARTS["vae"].prefix) else tensor
        assert torch.equal(mixed[name], expected), name


def lora_files(folder: Path) -> list[str]:
    """A LoRA for the U-Net and a text encoder, and a LyCORIS file for the same and a bias, each with its scales."""
    torch.manual_seed(4)
    attention, text = "unet_mid_block_attentions_0_proj_in", "te2_text_model_encoder_layers_1_self_attn_v_proj"
    pair = {
        f"lora_{module}.lora_{role}.weight": 0.3 * torch.randn(shape)
        for module in (attention, text)
        for role, shape in (("down", (2, 24)), ("up", (24, 2)))
    }
    lycoris = {
        f"lora_{attention}.diff_b": torch.randn(24),
        f"lora_{attention}.lokr_w1": torch.randn(4, 4),
        f"lora_{attention}.lokr_w2": 0.1 * torch.randn(6, 6),
        f"lora_{attention}.dora_scale": torch.rand(24, 1),
        f"lora_{text}.diff": 0.3 * torch.randn(24, 24),
    }
    for name, tensors in (("pair", pair), ("lycoris", lycoris)):
        save_file(tensors, folder / f"{name}.safetensors")
    return [f"{folder}/pair.safetensors:0.7:-0.4", f"{folder}/lycoris.safetensors:0.5"]


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
@pytest.mark.parametrize("target", ["baked.safetensors", "baked"])
def test_merged_loras_are_those_of_loading(tmp_path: Path, dtype: str, target: str) -> None:
    """The same bits, and so the same pictures."""
    stored = {"fp32": torch.float32, "fp16": torch.float16}[dtype]
    base, loras = tiny_file(tmp_path / "base.safetensors", stored), lora_files(tmp_path)
    options = [each for lora in loras for each in ("--lora", lora)]
    main([str(base), str(tmp_path / target), *options, *TOKENIZER])
    tokenizer = VOCABULARY if target.endswith(".safetensors") else None
    baked = minisdxl.load(tmp_path / target, dtype=stored, tokenizer=tokenizer)
    loaded = minisdxl.load(base, dtype=stored, tokenizer=VOCABULARY, loras=loras)
    plain = minisdxl.load(base, dtype=stored, tokenizer=VOCABULARY)
    changed = 0
    for one, other, before in zip(*(state_of(each) for each in (baked, loaded, plain)), strict=True):
        assert one.dtype == other.dtype and torch.equal(one, other)
        changed += not torch.equal(one, before)
    print(f"{changed} tensors changed")
    assert changed == 3
    if dtype == "fp32":
        pictures = [each.generate([PROMPT], steps=2, seed=3)[0].tobytes() for each in (baked, loaded, plain)]
        assert pictures[0] == pictures[1] != pictures[2]


def state_of(sdxl: minisdxl.SDXL) -> list[Tensor]:
    tensors: list[Tensor] = []
    for part in (sdxl.unet, sdxl.vae, sdxl.text):
        assert isinstance(part, nn.Module)
        tensors += part.state_dict().values()
    return tensors


def test_embeddings_beside_a_lora_are_not_lost_silently(
    tmp_path: Path, single: Path, caplog: pytest.LogCaptureFixture
) -> None:
    lora_files(tmp_path)
    tensors = load_file(tmp_path / "pair.safetensors")
    file = tmp_path / "bundle.safetensors"
    widths = zip(("clip_l", "clip_g"), TINY.text, strict=True)
    save_file(tensors | {f"bundle_emb.gloop.{name}": torch.ones(1, text.width) for name, text in widths}, file)
    main([str(single), str(tmp_path / "a.safetensors"), "--lora", str(file)])
    assert f"{file} also has the embedding gloop, for which a model has no place" in caplog.text


def test_a_folder_keeps_its_scheduler(tmp_path: Path, single: Path, folder: Path) -> None:
    assert json.loads((folder / "scheduler" / "scheduler_config.json").read_text())["timestep_spacing"] == "trailing"
    scheduler = {
        "_class_name": "LCMScheduler",
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
    }
    write_folder(open_source(single), tmp_path / "one", read_vocabulary(VOCABULARY), scheduler=scheduler)
    main([str(tmp_path / "one"), str(tmp_path / "two"), "--dtype", "bf16"])
    assert json.loads((tmp_path / "two" / "scheduler" / "scheduler_config.json").read_text()) == scheduler


def test_both_tokenizers_are_diffusers_own(pipeline: Any) -> None:
    assert pipeline.tokenizer.pad_token_id == 639
    assert pipeline.tokenizer_2.pad_token_id == 0
    assert pipeline.tokenizer.model_max_length == pipeline.tokenizer_2.model_max_length == 77
    ours = minisdxl.load(BUNDLED["shapes"]).tokenizer([PROMPT])
    for tokenizer, ids in zip((pipeline.tokenizer, pipeline.tokenizer_2), ours, strict=True):
        theirs = tokenizer(PROMPT, padding="max_length", truncation=True, return_tensors="pt").input_ids
        assert torch.equal(theirs, ids)


def test_the_target_is_announced(tmp_path: Path, single: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main([str(single), str(tmp_path / "a.safetensors")])
    assert capsys.readouterr().out == f"{tmp_path / 'a.safetensors'}  tiny, one file; the vocabulary is not in it\n"
    main([str(single), str(tmp_path / "a"), *TOKENIZER])
    assert capsys.readouterr().out == f"{tmp_path / 'a'}  tiny, a diffusers folder\n"


def test_bad_input_is_one_line(tmp_path: Path, single: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "target"
    before = sorted(tmp_path.iterdir())
    assert "nowhere does not exist" in refused(capsys, tmp_path / "nowhere", target)
    assert "has no model_index.json" in refused(capsys, tmp_path, target)
    assert "--dtype" in refused(capsys, single, target, "--dtype", "int3")
    assert "--to" in refused(capsys, single, target, "--to", "ckpt")
    assert "nowhere does not exist" in refused(capsys, single, target, *TOKENIZER, "--vae", tmp_path / "nowhere")
    lora = ("--lora", tmp_path / "x.safetensors")
    assert "x.safetensors does not exist" in refused(capsys, single, target, *TOKENIZER, *lora)
    assert "is a whole SDXL model; expected a LoRA" in refused(capsys, single, target, *TOKENIZER, "--lora", single)
    assert "vocab.json is missing" in refused(capsys, single, target, "--tokenizer", tmp_path)
    assert f"cannot write {folder}" in refused(capsys, single, folder, *TOKENIZER)
    assert "is already there, expected the name of a new folder" in refused(
        capsys, single, single, "--to", "diffusers", *TOKENIZER
    )
    assert "is a folder, expected a file" in refused(capsys, single, folder, "--to", "single")
    for name in ("a.safetensors", "a"):
        assert "No such file or directory" in refused(capsys, single, tmp_path / "nowhere" / name, *TOKENIZER)
    assert sorted(tmp_path.iterdir()) == before


def test_an_empty_folder_may_be_there(tmp_path: Path, single: Path) -> None:
    (tmp_path / "folder").mkdir()
    main([str(single), str(tmp_path / "folder"), *TOKENIZER])
    same_weights(tmp_path / "folder", single)
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_a_file_can_be_written_over_itself(tmp_path: Path, single: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(single.read_bytes())
    main([str(path), str(path), "--dtype", "bf16"])
    same_weights(path, single, torch.bfloat16)


def test_numbers_beyond_the_dtype_are_refused(tmp_path: Path, single: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with safe_open(single, "pt") as file:
        metadata = file.metadata()
    name = "model.diffusion_model.out.2.bias"
    save_file(load_file(single) | {name: torch.full((4,), 1e5)}, tmp_path / "large.safetensors", metadata)
    for target in ("small.safetensors", "small"):
        message = refused(capsys, tmp_path / "large.safetensors", tmp_path / target, "--dtype", "fp16", *TOKENIZER)
        assert f"{name} has values that are not finite numbers in torch.float16; try bf16 or fp32" in message
    assert [path.name for path in tmp_path.iterdir()] == ["large.safetensors"]
    main([str(tmp_path / "large.safetensors"), str(tmp_path / "small"), "--dtype", "bf16", *TOKENIZER])


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Lets this process write files of at most ``size`` bytes: like a full disk, in the middle of a write."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("name", ["target", "target.safetensors"])
def test_a_full_disk_leaves_nothing_behind(
    tmp_path: Path, single: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    with largest_file(60_000):  # room for the text files, and not for the U-Net
        message = refused(capsys, single, tmp_path / name, *TOKENIZER)
    assert f"cannot write {tmp_path / name}: File too large" in message
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["target", "target.safetensors"])
def test_ctrl_c_leaves_nothing_behind(
    tmp_path: Path, single: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    read, names = Source.read, []

    def read_until_interrupted(self: Source, name: str, dtype: torch.dtype) -> Tensor:
        names.append(name)
        if len(names) > 100:
            raise KeyboardInterrupt
        return read(self, name, dtype)

    monkeypatch.setattr(Source, "read", read_until_interrupted)
    with pytest.raises(SystemExit) as stop:
        main([str(single), str(tmp_path / name), *TOKENIZER])
    assert stop.value.code == 130
    assert capsys.readouterr().err == "interrupted: nothing was written\n"
    assert not list(tmp_path.iterdir())


def test_no_more_than_a_tensor_is_in_memory(tmp_path: Path, single: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each official tensor is asked for once, in order, and nothing else is read."""
    read, names = Source.read, []

    def count(self: Source, name: str, dtype: torch.dtype) -> Tensor:
        names.append(name)
        return read(self, name, dtype)

    monkeypatch.setattr(Source, "read", count)
    source = open_source(single)
    write_single(source, tmp_path / "a.safetensors")
    assert names == list(source.shapes)
    names.clear()
    write_folder(source, tmp_path / "folder", read_vocabulary(VOCABULARY))
    assert sorted(names) == sorted(source.shapes)


def test_a_vocabulary_of_other_encoders_is_refused(tmp_path: Path, single: Path) -> None:
    vocabulary = read_vocabulary(VOCABULARY)
    fewer = vocabulary._replace(tokens=dict(list(vocabulary.tokens.items())[:-1]))
    with pytest.raises(ValueError, match="vocabulary has"):
        write_folder(open_source(single), tmp_path / "folder", fewer)
    assert not list(tmp_path.iterdir())


def test_a_model_that_diffusers_cannot_have_is_refused(tmp_path: Path, single: Path) -> None:
    source = open_source(single)
    source = replace(source, config=replace(TINY, size=66))
    with pytest.raises(CheckpointError, match="diffusers has no such model, it would be read as one whose size is 64"):
        write_folder(source, tmp_path / "folder", read_vocabulary(VOCABULARY))
    assert not list(tmp_path.iterdir())


def test_commands_take_a_folder_and_other_parts(tmp_path: Path, single: Path, folder: Path) -> None:
    assert find_config(str(folder)) == TINY
    other = tiny_file(tmp_path / "other.safetensors", seed=1)
    pictures = []
    for number, arguments in enumerate(
        (
            ["--weights", str(folder), "--vae", str(other)],
            ["--weights", str(single), "--vae", str(other), "--unet", str(folder), *TOKENIZER],
        )
    ):
        target = tmp_path / f"{number}.png"
        sample([PROMPT, *arguments, "--steps", "1", "--out", str(target)])
        with Image.open(target) as image:
            pictures.append((image.tobytes(), json.loads(image.text["minisdxl"])))  # type: ignore[attr-defined]
    (first, record), (second, other_record) = pictures
    assert first == second
    assert (record["weights"], record["vae"], "unet" in record) == ("tiny", "other.safetensors", False)
    assert (other_record["weights"], other_record["unet"]) == ("tiny.safetensors", "tiny")
    files = [folder / part / f"{PARTS[part].weights}.safetensors" for part in PARTS if part != "vae"]
    content = b"".join(file.read_bytes() for file in [*files, other])
    assert record["sha256"] == hashlib.sha256(content).hexdigest()
