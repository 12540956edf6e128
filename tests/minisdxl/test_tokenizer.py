"""Token ids against transformers' CLIPTokenizer and against instant-clip-tokenizer, an implementation of its own.

instant-clip-tokenizer carries its own copy of CLIP's vocabulary. transformers reads ours, written as the published
files of SDXL, which it then equals byte for byte.
"""

from __future__ import annotations

import hashlib
import json
import random
import shutil
import unicodedata
import warnings
from dataclasses import replace
from pathlib import Path

import instant_clip_tokenizer
import pytest
import torch
from transformers import CLIPTokenizer

import minisdxl
from minisdxl.checkpoint.modules import save
from minisdxl.config import SDXL_BASE, SHAPES
from minisdxl.text import TextEncoders
from minisdxl.tokenizer import Tokenizer, Vocabulary, clip_vocabulary, load_vocabulary, read_vocabulary
from tests.minisdxl.tiny import TINY, tiny_modules

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
        ("merges.txt", b"\xff\xfe", "merges.txt is not text"),
        ("vocab.json", "[" * 200_000, "vocab.json is not JSON"),
    ],
)
def test_a_broken_file_is_refused(tmp_path: Path, name: str, content: str | bytes, message: str) -> None:
    for file in BUNDLED.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
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


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "tokenizer.json is not JSON"),
        ("[]", "holds no byte-pair encoding"),
        ('{"model": {"type": "Unigram", "vocab": []}}', "holds no byte-pair encoding"),
        ('{"model": {"vocab": [], "merges": []}}', "holds no vocabulary"),
        ('{"model": {"vocab": {}, "merges": ["a b c"]}}', "has the merge 'a b c'"),
        ('{"model": {"vocab": {}, "merges": [["a", 1]]}}', r"has the merge \['a', 1\]"),
        ('{"model": {"vocab": {}, "merges": [7]}}', "has the merge 7"),
    ],
)
def test_a_broken_tokenizer_json_is_refused(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        Tokenizer.from_directory(tmp_path, SHAPES.text)


# sha256 of tokenizer/ in stabilityai/stable-diffusion-xl-base-1.0, as the hub has it.
PUBLISHED = {
    "vocab.json": "e089ad92ba36837a0d31433e555c8f45fe601ab5c221d4f607ded32d9f7a4349",
    "merges.txt": "9fd691f7c8039210e0fced15865466c65820d09b63988b0174bfe25de299051a",
}
WORLD = [
    *PROMPTS,
    "cafe\u0301 A\u030angstro\u0308m ﬁ Ⅷ ½ İstanbul ẞ",
    "絵を描く少女、夕焼け  서울의 밤  עברית ไทย हिन्दी \U0001d518\U0001d52b\U0001d526",
    "👩‍👩‍👧‍👦 🇯🇵 ✨♥️ \ufffd \u200b",
    "they're we've I'm you'll he'd it's can't 'tis rock'n'roll",
    "pneumonoultramicroscopicsilicovolcanoconiosis supercalifragilisticexpialidocious" + "x" * 40,
    "4k, 8k; (masterpiece:1.2) [[detailed]] <lora:a:1> 16:9 -- ~#@$%^&*_+=|\\/",
    " \t\n\r\x0b\x0c\xa0\u2003\u3000 ",
    "one\u3000two\xa0three\tfour\nfive",
]
EXCLAIMED = ["!", "!!", "wow!", "! a !! b!", "¡hola! ‼️", "!?!"]
LONG = "a portrait of a red fox, " * 12 + "by Ōhara Koson 木版画 🦊"


@pytest.fixture(scope="module")
def clip() -> Vocabulary:
    return clip_vocabulary()


@pytest.fixture(scope="module")
def published(clip: Vocabulary, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the published files, byte for byte."""
    folder = tmp_path_factory.mktemp("published") / "tokenizer"
    folder.mkdir()
    vocabulary = json.dumps(dict(sorted(clip.tokens.items())), indent=2, ensure_ascii=False)
    merges = "".join(f"{first} {second}\n" for first, second in clip.merges)
    (folder / "vocab.json").write_text(f"{vocabulary}\n", encoding="utf-8")
    (folder / "merges.txt").write_text(f"#version: 0.2\n{merges}", encoding="utf-8")
    return folder


def test_the_shipped_vocabulary_is_the_published_one(published: Path) -> None:
    found = {name: hashlib.sha256((published / name).read_bytes()).hexdigest() for name in PUBLISHED}
    assert found == PUBLISHED


def test_a_smaller_vocabulary_follows_the_same_rule() -> None:
    bundled = read_vocabulary(BUNDLED)
    assert Vocabulary.from_merges(bundled.merges) == bundled


@pytest.mark.parametrize("way", ["in it", "beside it", "given", "saved", "shipped"])
def test_all_ways_give_the_same_ids(way: str, clip: Vocabulary, published: Path, tmp_path: Path) -> None:
    weights, given = tmp_path / "weights", None
    weights.mkdir()
    if way == "in it":
        shutil.copytree(published, weights / "tokenizer")
    elif way == "beside it":
        shutil.copytree(published, tmp_path / "tokenizer")
        weights = tmp_path / "sd_xl_base_1.0.safetensors"
        weights.touch()
    elif way == "given":
        given = published
    elif way == "saved":  # by transformers itself, in the layout of its release
        CLIPTokenizer.from_pretrained(str(published)).save_pretrained(weights / "tokenizer")
    found = load_vocabulary(weights, given)
    assert found == clip

    tokenizer = Tokenizer(*found, SDXL_BASE.text)
    prompts = [*WORLD, *EXCLAIMED]
    peer = instant_clip_tokenizer.Tokenizer()
    rows = torch.from_numpy(
        peer.tokenize_batch([unicodedata.normalize("NFC", prompt) for prompt in prompts]).astype("int64")
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # one prompt is cut, here and there
        first, second = tokenizer(prompts)
    print(f"{way}: {(second != rows).sum()} of {rows.numel()} ids differ from instant-clip-tokenizer's")
    assert torch.equal(second, rows)
    assert torch.equal(first == 49407, (rows == 49407) | (rows == 0))
    with pytest.warns(UserWarning) as caught:
        cut, _ = tokenizer([LONG])
    lost = "fox, a portrait of a red fox, by Ōhara Koson 木版画 🦊"
    assert [str(warning.message) for warning in caught] == [f"prompt has 98 tokens and only 75 fit: cut off {lost!r}"]
    whole = peer.encode(LONG)
    assert len(whole) == 98 and cut[0].tolist() == [49406, *whole[:75], 49407] and peer.encode(lost) == whole[75:]


def test_one_checkpoint_file_is_enough(tmp_path: Path) -> None:
    first, second = (replace(each, vocabulary=49408, start_token=49406, end_token=49407) for each in TINY.text)
    text = (replace(first, pad_token=49407), second)
    modules = tiny_modules()._replace(text=TextEncoders(text))
    save(tmp_path / "model.safetensors", replace(TINY, text=text), modules, torch.float32)
    _, ids = minisdxl.load(tmp_path / "model.safetensors").tokenizer(EXCLAIMED)
    expected = torch.from_numpy(instant_clip_tokenizer.Tokenizer().tokenize_batch(EXCLAIMED).astype("int64"))
    assert torch.equal(ids, expected)


def test_equals_both_published_tokenizers(clip: Vocabulary, published: Path) -> None:
    tokenizer = Tokenizer(*clip, SDXL_BASE.text)
    prompts = [*WORLD, LONG]
    with pytest.warns(UserWarning, match="cut off"):
        ours = tokenizer(prompts)
    for ids, pad in zip(ours, ("<|endoftext|>", "!"), strict=True):
        peer = CLIPTokenizer.from_pretrained(str(published), pad_token=pad, model_max_length=77)
        expected = peer(prompts, padding="max_length", truncation=True, return_tensors="pt").input_ids
        print(f"padded with {pad}: {(ids != expected).sum()} of {ids.numel()} ids differ from transformers'")
        assert torch.equal(ids, expected)


def test_the_one_difference_is_the_exclamation_mark(clip: Vocabulary, published: Path) -> None:
    _, ours = Tokenizer(*clip, SDXL_BASE.text)(["wow ! a fox"])
    peer = CLIPTokenizer.from_pretrained(str(published), pad_token="!", model_max_length=77)
    theirs = peer(["wow ! a fox"], padding="max_length", return_tensors="pt").input_ids
    assert ours[0, 2] == 256 and theirs[0, 2] == 0  # theirs is what the rest of the row is padded with
    assert torch.equal(torch.where(ours == 256, 0, ours), theirs)


def test_random_texts_equal_the_independent_tokenizer(clip: Vocabulary) -> None:
    tokenizer, peer = Tokenizer(*clip, SDXL_BASE.text), instant_clip_tokenizer.Tokenizer()
    draw = random.Random(0)
    pieces = [text.removesuffix("</w>") for text in clip.tokens if text.isascii() and not text.startswith("<|")]
    prompts = ["".join(draw.choices(pieces, k=3)) + " " + draw.choice(pieces) for _ in range(2000)]
    letters = [chr(code) for code in (*range(0x20, 0x180), *range(0x3040, 0x30FF), *range(0x1F300, 0x1F64F))]
    prompts += [unicodedata.normalize("NFC", "".join(draw.choices(letters, k=8))) for _ in range(1000)]
    _, ids = tokenizer(prompts)
    expected = torch.from_numpy(peer.tokenize_batch(prompts).astype("int64"))
    print(f"{(ids != expected).any(1).sum()} of {len(prompts)} random texts differ")
    assert torch.equal(ids, expected)


def test_a_given_folder_is_taken_first_then_that_in_the_weights_then_that_beside_them(tmp_path: Path) -> None:
    weights = tmp_path / "weights"
    expected = {}
    for folder, merge in (
        (tmp_path / "given", ("a", "b")),
        (weights / "tokenizer", ("a", "c")),
        (tmp_path / "tokenizer", ("a", "d")),
    ):
        folder.mkdir(parents=True)
        expected[folder] = Vocabulary.from_merges([merge])
        model = {"vocab": expected[folder].tokens, "merges": [merge]}
        (folder / "tokenizer.json").write_text(json.dumps({"model": model}), encoding="utf-8")
    given, inside, beside = expected
    assert load_vocabulary(weights, given) == expected[given]
    assert load_vocabulary(weights, None) == expected[inside]
    shutil.rmtree(inside)
    assert load_vocabulary(weights, None) == expected[beside]


@pytest.mark.parametrize("given", [True, False])
def test_a_folder_without_the_files_is_not_passed_over(tmp_path: Path, given: bool) -> None:
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    with pytest.raises(FileNotFoundError, match=r"vocab.json is missing"):
        load_vocabulary(tmp_path / "model.safetensors", folder if given else None)


def test_merges_as_strings_are_read_too(published: Path, clip: Vocabulary, tmp_path: Path) -> None:
    model = {"vocab": clip.tokens, "merges": [" ".join(pair) for pair in clip.merges]}
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": model}), encoding="utf-8")
    assert read_vocabulary(tmp_path) == clip
