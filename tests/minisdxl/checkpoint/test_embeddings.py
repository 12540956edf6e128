"""Textual inversions against diffusers' on the same text encoders, every form of file, and what is refused."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import minisdxl
from minisdxl.checkpoint.embeddings import EmbeddingFile, read_embeddings
from minisdxl.checkpoint.errors import CheckpointError
from minisdxl.config import SDXL_BASE, SHAPES
from minisdxl.prompting.chunks import Embedding
from minisdxl.prompting.encoders import PromptEncoders
from minisdxl.tokenizer import Tokenizer
from tests.minisdxl.test_text import BUNDLED, SMALL, assert_close, peer_of, random_encoders

Tensors = dict[str, Tensor]
WIDTHS = tuple(config.width for config in SHAPES.text)


def pair(count: int = 2, widths: tuple[int, ...] = WIDTHS, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    clip, openclip = (torch.randn(count, width, generator=generator) for width in widths)
    return clip, openclip


@pytest.mark.parametrize("count", [1, 3], ids=["one vector", "three vectors"])
@torch.no_grad()
def test_parity_with_diffusers(count: int) -> None:
    vectors = pair(count, tuple(config.width for config in SMALL))
    tokenizer, peer = Tokenizer.from_directory(BUNDLED, SMALL), peer_of(random_encoders())
    for vector, tokens, model in zip(
        vectors, (peer.tokenizer, peer.tokenizer_2), (peer.text_encoder, peer.text_encoder_2), strict=True
    ):
        peer.load_textual_inversion(vector, token="gloop", tokenizer=tokens, text_encoder=model)
    prompt = "a small gloop above a big blue square, gloop"
    context, _, pooled, _ = peer.encode_prompt(prompt, device=torch.device("cpu"), do_classifier_free_guidance=False)
    encoders = PromptEncoders(random_encoders(), {"gloop": Embedding(*vectors)})
    for ours in (prompt, prompt.replace("gloop", "embedding:Gloop")):
        found = encoders.encode([ours], tokenizer)
        assert_close(f"context, {count} vectors", found.context, context, 1e-6)
        assert_close(f"pooled, {count} vectors", found.pooled, pooled, 1e-6)
    plain = PromptEncoders(random_encoders()).encode([prompt], tokenizer)
    assert not torch.allclose(plain.context, found.context, atol=1e-2)


@torch.no_grad()
def test_an_embedding_is_weighted_counted_and_never_split() -> None:
    vectors = pair(10, tuple(config.width for config in SMALL))
    tokenizer = Tokenizer.from_directory(BUNDLED, SMALL)
    encoders = PromptEncoders(random_encoders(), {"gloop": Embedding(*vectors)})
    assert encoders.context_length([f"{'red ' * 65} gloop"], tokenizer) == 77
    assert encoders.context_length([f"{'red ' * 66} gloop"], tokenizer) == 154
    assert encoders.context_length(["gloops " * 9, "agloop"], tokenizer) == 77  # other words
    apart = encoders.encode([f"{'red ' * 66} BREAK gloop"], tokenizer)
    assert_close("context", encoders.encode([f"{'red ' * 66} gloop"], tokenizer).context, apart.context, 1e-6)
    plain, empty, heavy = (encoders.encode([each], tokenizer).context for each in ("gloop", "", "(gloop:1.5)"))
    expected = plain.clone()
    expected[:, 1:11] = (empty + 1.5 * (plain - empty))[:, 1:11]
    assert_close("weighted", heavy, expected, 1e-5)


def kohya(folder: Path, clip: Tensor, openclip: Tensor) -> tuple[list[str], list[Path], str]:
    save_file({"clip_l": clip, "clip_g": openclip}, folder / "gloop.safetensors")
    return [str(folder / "gloop.safetensors")], [], "gloop"


def named(folder: Path, clip: Tensor, openclip: Tensor) -> tuple[list[str], list[Path], str]:
    save_file({"clip_l": clip, "clip_g": openclip}, folder / "an embedding (1).safetensors")
    return [f"{folder / 'an embedding (1).safetensors'}:Gloop"], [], "gloop"


def diffusers(folder: Path, clip: Tensor, openclip: Tensor) -> tuple[list[str], list[Path], str]:
    save_file({"<Gloop>": clip}, folder / "learned_embeds.safetensors")
    save_file({"<Gloop>": openclip}, folder / "learned_embeds_2.safetensors")
    return [str(folder / "learned_embeds.safetensors")], [], "<gloop>"


def old_diffusers(folder: Path, clip: Tensor, openclip: Tensor) -> tuple[list[str], list[Path], str]:
    save_file({"text_encoders_0": clip, "text_encoders_1": openclip}, folder / "gloop.safetensors")
    return [str(folder / "gloop.safetensors")], [], "gloop"


def bundle(folder: Path, clip: Tensor, openclip: Tensor) -> tuple[list[str], list[Path], str]:
    tensors = {"bundle_emb.gloop-v2.clip_l": clip, "bundle_emb.gloop-v2.clip_g": openclip}
    save_file({**tensors, "lora_unet_x.alpha": torch.ones(())}, folder / "lora.safetensors")
    return [], [folder / "lora.safetensors"], "gloop-v2"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("form", [kohya, named, diffusers, old_diffusers, bundle])
def test_every_form_of_file(
    tmp_path: Path, form: Callable[..., tuple[list[str], list[Path], str]], dtype: torch.dtype
) -> None:
    clip, openclip = (vectors.to(dtype) for vectors in pair())
    files, bundles, name = form(tmp_path, clip, openclip)
    found = read_embeddings(files, bundles, SHAPES)
    assert list(found) == [name]
    assert torch.equal(found[name].clip, clip.float()) and torch.equal(found[name].openclip, openclip.float())


def test_a_single_vector_may_have_one_dimension(tmp_path: Path) -> None:
    clip, openclip = pair(1)
    files, _, _ = kohya(tmp_path, clip[0], openclip[0])
    assert torch.equal(read_embeddings(files, [], SHAPES)["gloop"].openclip, openclip)


def test_names_after_a_colon(tmp_path: Path) -> None:
    (tmp_path / "a:b.safetensors").touch()
    assert EmbeddingFile.parse("x.safetensors:y") == EmbeddingFile(Path("x.safetensors"), "y")
    assert EmbeddingFile.parse("x.safetensors") == EmbeddingFile(Path("x.safetensors"))
    assert EmbeddingFile.parse(f"{tmp_path}/a:b.safetensors") == EmbeddingFile(tmp_path / "a:b.safetensors")


def with_nan(vectors: Tensor) -> Tensor:
    return vectors.index_fill(1, torch.tensor([3]), torch.nan)


CLIP, OPENCLIP = pair()
BAD: dict[str, tuple[Tensors, str]] = {
    "SD 1.x": ({"emb_params": torch.zeros(2, 768)}, "is no embedding for SDXL: it has emb_params; expected clip_l and"),
    "half": ({"clip_l": CLIP}, "is no embedding for SDXL: it has clip_l; expected clip_l and clip_g"),
    "more": ({"clip_l": CLIP, "clip_g": OPENCLIP, "clip_l_out": CLIP.clone()}, "it has clip_g, clip_l, clip_l_out"),
    "empty": ({}, "it has no tensors"),
    "SDXL's": (
        {"clip_l": torch.zeros(2, 768), "clip_g": torch.zeros(2, 1280)},
        r"has clip_l of the embedding 'x' as \[2, 768\], expected \[n, 64\] for shapes, n from 1 to 75",
    ),
    "three dimensions": ({"clip_l": CLIP[None], "clip_g": OPENCLIP}, r"as \[1, 2, 64\], expected \[n, 64\]"),
    "none": ({"clip_l": CLIP[:0], "clip_g": OPENCLIP[:0]}, r"as \[0, 64\], expected \[n, 64\]"),
    "76": ({"clip_l": torch.zeros(76, 64), "clip_g": torch.zeros(76, 128)}, r"as \[76, 64\]"),
    "different counts": ({"clip_l": CLIP, "clip_g": OPENCLIP[:1]}, "has 2 and 1 vectors for the two text encoders"),
    "integers": ({"clip_l": CLIP.long(), "clip_g": OPENCLIP}, "has clip_l of the embedding 'x' as I64; expected F64"),
    "not finite": ({"clip_l": CLIP, "clip_g": with_nan(OPENCLIP)}, "clip_g of the embedding 'x' with values that are"),
}


@pytest.mark.parametrize("name", BAD)
def test_other_files_are_refused_in_one_line(tmp_path: Path, name: str) -> None:
    tensors, message = BAD[name]
    path = tmp_path / "x.safetensors"
    save_file(tensors, path)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_embeddings([path], [], SHAPES)
    print(caught.value)
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)


@pytest.mark.parametrize("ends", [["clip_l"], ["clip_l", "clip_g", "clip_l_out"], ["string_to_param.*"]], ids=str)
def test_a_bundled_embedding_of_another_form_is_left_out_and_said(tmp_path: Path, ends: list[str]) -> None:
    path = tmp_path / "lora.safetensors"
    save_file({f"bundle_emb.y.{end}": CLIP.clone() for end in ends}, path)
    with pytest.warns(UserWarning, match=rf"{path} has the embedding 'y' as \[.*\], which is not loaded; expected \["):
        assert read_embeddings([], [path], SHAPES) == {}


def test_sizes_of_sdxl(tmp_path: Path) -> None:
    files, _, _ = kohya(tmp_path, *pair(4, (768, 1280)))
    assert read_embeddings(files, [], SDXL_BASE)["gloop"].openclip.shape == (4, 1280)


@pytest.mark.parametrize("name", ["two words", "a(b)", "[x]", r"a\b"])
def test_a_name_that_no_prompt_can_hold_is_refused(tmp_path: Path, name: str) -> None:
    files, _, _ = kohya(tmp_path, *pair())
    with pytest.raises(ValueError, match=rf"is called {re.escape(repr(name))}, expected a name without .* FILE:NAME"):
        read_embeddings([EmbeddingFile(Path(files[0]), name)], [], SHAPES)


def test_two_of_a_name_are_refused(tmp_path: Path) -> None:
    files, _, _ = kohya(tmp_path, *pair())
    with pytest.raises(ValueError, match="is called 'GLOOP', as another is"):
        read_embeddings([*files, f"{files[0]}:GLOOP"], [], SHAPES)


def test_an_embedding_of_a_words_own_vectors_draws_the_same_picture(tmp_path: Path) -> None:
    """An embedding that holds the token vectors of "red" stands for the word, also encoded ahead."""
    plain = minisdxl.load("shapes")
    assert isinstance(plain.text, PromptEncoders)
    assert plain.text.clip is not None
    token = plain.tokenizer.encoder.encode("red", add_special_tokens=False).ids
    clip, openclip = (
        encoder.text_model.embeddings.token_embedding.weight[token].detach().clone()
        for encoder in (plain.text.clip, plain.text.openclip)
    )
    files, _, _ = kohya(tmp_path, clip, openclip)
    settings: dict[str, Any] = {"steps": 2, "size": (64, 64)}
    expected = plain.generate(["a red circle"], **settings)[0]
    loaded = minisdxl.load("shapes", embeddings=files)
    assert loaded.generate(["a gloop circle"], **settings)[0].tobytes() == expected.tobytes()
    ahead = loaded.encode_ahead(["a embedding:gloop circle"])
    assert ahead.generate(["a embedding:gloop circle"], **settings)[0].tobytes() == expected.tobytes()
    assert plain.generate(["a gloop circle"], **settings)[0].tobytes() != expected.tobytes()
