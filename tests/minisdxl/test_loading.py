"""Loading a model from a path: what is missing, and what loading must leave as it was."""

from __future__ import annotations

import gc
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

import minisdxl


def test_missing_weights_are_named(tmp_path: Path) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=r"nowhere\.safetensors"):
        minisdxl.load(tmp_path / "nowhere.safetensors")


def test_loading_leaves_garbage_collection_as_it_was(tmp_path: Path) -> None:
    assert gc.isenabled()
    minisdxl.load("shapes")
    assert gc.isenabled()
    with pytest.raises(FileNotFoundError):
        minisdxl.load(tmp_path / "missing.safetensors", tokenizer=tmp_path)
    assert gc.isenabled()
    gc.disable()
    try:
        minisdxl.load("shapes")
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_without_the_vaes_encoder_text_still_makes_the_same_picture() -> None:
    whole, lean = minisdxl.load("shapes"), minisdxl.load("shapes", vae_encoder=False)
    assert {name for name, tensor in lean.vae.state_dict().items() if tensor.is_meta} == {
        name for name in whole.vae.state_dict() if name.startswith("encoder.")
    }
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(lean.vae.decode(latents), whole.vae.decode(latents))
    with pytest.raises(ValueError, match="loaded without its VAE's encoder"):
        lean.generate(["a red circle"], image=Image.new("RGB", (64, 64)), strength=0.5, steps=2, size=(64, 64))


def test_a_picture_is_made_without_importing_the_compiler() -> None:
    """It takes a second to import, and 80 MB of every process."""
    code = (
        "import sys, minisdxl.sample; minisdxl.load().generate(['x'], steps=1, size=(64, 64), prune='at-edm');"
        "sys.exit('torch._dynamo' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
