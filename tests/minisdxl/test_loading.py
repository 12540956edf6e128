"""Loading a model from a path: what is missing, and what loading must leave as it was."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest

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
