"""Token ids against transformers' CLIPTokenizer and against instant-clip-tokenizer, an implementation of its own."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace
from pathlib import Path

import instant_clip_tokenizer
import pytest
import torch
from transformers import CLIPTokenizer

from minisdxl.config import SDXL_BASE, SHAPES
from minisdxl.tokenizer import Tokenizer

BUNDLED = Path(__file__).parents[2] / "weights" / "shapes" / "tokenizer"
PROMPTS = [
    "",
    "a small red circle above a big blue square on a white background",
    "A  SMALL\tRed\nCircle ",
    "it's 24 o'clock; they'll've known, don't you?",
    "naïve café, Ångström — Žižek",
    "日本の絵 и Москва",
    "🦊🏳️‍🌈 :-) ...",
    "antidisestablishmentarianism x" * 2,
]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_directory(BUNDLED, SHAPES.text)


def test_equals_transformers_with_its_own_padding(tokenizer: Tokenizer) -> None:
    for ids, pad in zip(tokenizer(PROMPTS), ("<|endoftext|>", "!"), strict=True):
        peer = CLIPTokenizer.from_pretrained(str(BUNDLED), pad_token=pad, model_max_length=77)
        expected = peer(PROMPTS, padding="max_length", truncation=True, return_tensors="pt").input_ids
        assert ids.dtype == torch.int64 and torch.equal(ids, expected)


def test_equals_an_independent_tokenizer(tokenizer: Tokenizer) -> None:
    peer = instant_clip_tokenizer.Tokenizer.load(str(BUNDLED / "merges.txt"), 640)
    prompts = [*PROMPTS, "wow!", "! a !! b!"]
    _, ids = tokenizer(prompts)
    assert torch.equal(ids, torch.from_numpy(peer.tokenize_batch(prompts, context_length=77).astype("int64")))


def test_single_symbols_have_the_published_ids(tokenizer: Tokenizer) -> None:
    official = instant_clip_tokenizer.Tokenizer()
    symbols = [chr(code) for code in range(ord("!"), ord("~") + 1)]
    ids, _ = tokenizer(symbols)
    assert ids[:, 1].tolist() == [official.encode(symbol)[0] for symbol in symbols]


def test_an_exclamation_mark_stays_a_token(tokenizer: Tokenizer) -> None:
    for ids, config in zip(tokenizer(["a red circle! !"]), SHAPES.text, strict=True):
        assert ids[0, 4:6].tolist() == [256, 256]
        assert ids[0, 6] == config.end_token and (ids[0, 7:] == config.pad_token).all()


def test_padding_is_each_encoders_own(tokenizer: Tokenizer) -> None:
    first, second = tokenizer(["a red circle", ""])
    assert first.shape == second.shape == (2, 77)
    assert first[1].tolist() == [638] + [639] * 76
    assert second[1].tolist() == [638, 639] + [0] * 75
    assert torch.equal(first[0, :5], second[0, :5])


def test_a_literal_end_token_is_special_as_in_the_published_tokenizers(tokenizer: Tokenizer) -> None:
    peer = CLIPTokenizer.from_pretrained(str(BUNDLED), model_max_length=77)
    prompt = "a red <|endoftext|> circle <|startoftext|>"
    ids = tokenizer([prompt])[0][0].tolist()
    assert ids == peer(prompt, padding="max_length").input_ids
    assert ids.index(639) == 3 and ids[5] == 638


def test_a_long_prompt_is_cut_and_the_lost_text_shown(tokenizer: Tokenizer) -> None:
    fits = " ".join(["red"] * 75)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        whole, _ = tokenizer([fits])
    with pytest.warns(UserWarning, match=r"77 tokens and only 75 fit: cut off 'BIG Circle'") as caught:
        cut, cut_2 = tokenizer([f"{fits} BIG Circle"])
    assert len(caught) == 1 and caught[0].filename == __file__
    assert torch.equal(cut, whole) and torch.equal(cut_2, whole)  # full: no room for padding
    peer = CLIPTokenizer.from_pretrained(str(BUNDLED), model_max_length=77)
    assert cut[0].tolist() == peer(f"{fits} BIG Circle", truncation=True).input_ids


def test_the_lost_text_of_other_scripts_is_whole(tokenizer: Tokenizer) -> None:
    prompt = " ".join(["red"] * 74) + "  é Ö 日本"  # a letter beyond ASCII takes two tokens or more
    with pytest.warns(UserWarning, match=r"cut off 'é Ö 日本'"):
        tokenizer([prompt])


def test_batches_of_none_and_single_strings(tokenizer: Tokenizer) -> None:
    assert [ids.shape for ids in tokenizer([])] == [(0, 77), (0, 77)]
    with pytest.raises(TypeError, match="'a red circle', expected a list of strings"):
        tokenizer("a red circle")


@pytest.mark.parametrize("name", ["vocab.json", "merges.txt"])
def test_a_missing_file_is_named(tmp_path: Path, name: str) -> None:
    for file in BUNDLED.iterdir():
        if file.name != name:
            (tmp_path / file.name).write_bytes(file.read_bytes())
    with pytest.raises(FileNotFoundError, match=rf"{name} is missing: expected a directory with CLIP's"):
        Tokenizer.from_directory(tmp_path, SHAPES.text)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("vocab.json", "<html>", "vocab.json is not JSON"),
        ("vocab.json", "[1, 2]", "vocab.json holds no vocabulary"),
        ("vocab.json", '{"a": "b"}', "vocab.json holds no vocabulary"),
        ("merges.txt", "#version: 0.2\na b\na b c\n", "merges.txt line 3 is 'a b c'"),
        ("merges.txt", "a zz\n", r"merge \('a', 'zz'\) needs \['azz', 'zz'\]"),
    ],
)
def test_a_broken_file_is_refused(tmp_path: Path, name: str, content: str, message: str) -> None:
    for file in BUNDLED.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        Tokenizer.from_directory(tmp_path, SHAPES.text)


def test_a_vocabulary_of_another_model_is_refused() -> None:
    with pytest.raises(ValueError, match=r"\(640, 638, 639\), the text encoder takes \(49408, 49406, 49407\)"):
        Tokenizer.from_directory(BUNDLED, SDXL_BASE.text)
    vocabulary = json.loads((BUNDLED / "vocab.json").read_text(encoding="utf-8"))
    with pytest.raises(ValueError, match="does not number its 640 tokens"):
        Tokenizer(vocabulary | {"a": 1}, [], SHAPES.text)
    first, second = SHAPES.text
    with pytest.raises(ValueError, match=r"take \[77, 64\] tokens, expected one length"):
        Tokenizer(vocabulary, [], (first, replace(second, context_length=64)))
