"""Names that are no paths: of ``minisdxl.download``, and ids of the hub, in a cache made here."""

from __future__ import annotations

import shutil
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from safetensors.torch import save_file

from minisdxl.bundled import BUNDLED
from minisdxl.checkpoint.errors import CheckpointError
from minisdxl.checkpoint.lora import LoRA
from minisdxl.checkpoint.modules import open_source
from minisdxl.checkpoint.published import find_weights
from minisdxl.convert import write_folder
from minisdxl.loading import load, weights_path
from minisdxl.tokenizer import read_vocabulary
from tests.minisdxl.tiny import VOCABULARY, tiny_file

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the hub; the current folder is empty, too."""
    (tmp_path / "cache").mkdir()
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        monkeypatch.setattr(huggingface_hub.constants, name, str(tmp_path / "cache"), raising=False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "cache"


def snapshot(cache: Path, repo: str) -> Path:
    """The folder of a repository in the cache, as the hub's library lays it out."""
    place = cache / f"models--{repo.replace('/', '--')}"
    (place / "refs").mkdir(parents=True)
    (place / "refs" / "main").write_text(COMMIT)
    folder = place / "snapshots" / COMMIT
    folder.mkdir(parents=True)
    return folder


def refusal(name: str) -> str:
    with pytest.raises(CheckpointError) as caught:
        find_weights(name)
    message = str(caught.value)
    print(message)
    assert "\n" not in message
    assert message.startswith(name)
    return message


@pytest.mark.parametrize(
    ("name", "repo", "file", "save_as"),
    [
        (
            "sdxl-base",
            "stabilityai/stable-diffusion-xl-base-1.0",
            "sd_xl_base_1.0.safetensors",
            "sd_xl_base_1.0.safetensors",
        ),
        (
            "lcm-lora",
            "latent-consistency/lcm-lora-sdxl",
            "pytorch_lora_weights.safetensors",
            "lcm_lora_sdxl.safetensors",
        ),
        ("sdxl-vae-fp16-fix", "madebyollin/sdxl-vae-fp16-fix", "sdxl_vae.safetensors", "sdxl_vae_fp16_fix.safetensors"),
    ],
)
def test_names_of_downloads_are_found(cache: Path, name: str, repo: str, file: str, save_as: str) -> None:
    message = refusal(name)
    assert f"python -m minisdxl.download {name} gets it (" in message
    assert save_as in message
    folder = snapshot(cache, repo)
    (folder / file).write_bytes(b"x")
    assert find_weights(name) == folder / file
    Path(save_as).write_bytes(b"x")
    assert find_weights(name) == Path(save_as)
    Path(name).write_bytes(b"x")  # a path that exists comes first
    assert find_weights(name) == Path(name)


def test_what_is_no_weights_is_a_path(cache: Path) -> None:
    for name in (
        "tokenizer",
        "nowhere",
        "x.safetensors",
        "a/b.safetensors",
        "/a/b",
        "../a/b",
        "a/b/c",
        "./a",
        "shapes",
    ):
        assert find_weights(name) == Path(name)
    Path("models").mkdir()
    assert find_weights("models/sdxl") == Path("models/sdxl")  # more likely a slip of the pen
    assert weights_path("shapes") == BUNDLED["shapes"]


def test_ids_of_the_hub_are_found_in_its_cache(cache: Path) -> None:
    name = "some-one/A_model.v1"
    message = refusal(name)
    assert "does not exist, and the hub's cache on this machine has no weights of that name" in message
    assert f"hf download {name} gets them" in message
    folder = snapshot(cache, name)
    (folder / "model_index.json").write_text("{}")
    assert "has no weights of that name" in refusal(name)  # a part of the repository
    (folder / "unet").mkdir()
    (folder / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"x")
    assert find_weights(name) == folder
    assert "does not exist" in refusal("bad--name/x")


def test_a_model_of_the_cache_is_loaded(cache: Path, tmp_path: Path) -> None:
    """The whole pipeline, its VAE alone, and a LoRA, by ids."""
    single = tiny_file(tmp_path / "tiny.safetensors")
    write_folder(open_source(single), tmp_path / "folder", read_vocabulary(VOCABULARY))
    folder = snapshot(cache, "some/model")
    shutil.copytree(tmp_path / "folder", folder, dirs_exist_ok=True)
    sdxl = load("some/model", vae="some/model")
    assert sdxl.config.name == "tiny"
    lora = snapshot(cache, "some/lora")
    module = "lora_unet_middle_block_1_transformer_blocks_0_attn1_to_q"
    tensors = {f"{module}.lora_down.weight": torch.ones(4, 24), f"{module}.lora_up.weight": torch.ones(24, 4)}
    save_file(tensors, lora / "pytorch_lora_weights.safetensors")
    changed = load("some/model", loras=["some/lora:0.5"])
    weight = "middle_block.1.transformer_blocks.0.attn1.to_q.weight"
    difference = changed.unet.state_dict()[weight] - sdxl.unet.state_dict()[weight]
    assert (difference - 2).abs().max() < 1e-5
    assert LoRA.parse("some/lora:0.5").file == lora / "pytorch_lora_weights.safetensors"
