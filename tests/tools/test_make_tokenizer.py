"""The bundled vocabulary: what the tool writes is what the trained weights were trained with."""

from __future__ import annotations

from itertools import chain
from pathlib import Path

import pytest

from minisdxl.config import SHAPES
from tools import shapes
from tools.make_tokenizer import ENGLISH_WORDS, learn_merges, make_vocabulary, write

BUNDLED = Path(__file__).parents[2] / "weights" / "shapes" / "tokenizer"


def test_the_bundled_files_are_made_by_the_tool(tmp_path: Path) -> None:
    write(tmp_path, *make_vocabulary(SHAPES.text[0].vocabulary))
    for name in ("vocab.json", "merges.txt"):
        assert (tmp_path / name).read_bytes() == (BUNDLED / name).read_bytes()


def test_layout_is_that_of_clip() -> None:
    vocabulary, merges = make_vocabulary(640)
    assert len(vocabulary) == 640 and len(merges) == 126
    # Known ids of the published vocabulary, which begins with the same 512 symbols.
    published = {"!": 0, "~": 93, "¡": 94, "ÿ": 187, "Ā": 188, "!</w>": 256, "a</w>": 320, "Ā</w>": 444}
    assert {symbol: vocabulary[symbol] for symbol in published} == published
    assert [vocabulary["".join(pair)] for pair in merges] == list(range(512, 638))
    assert (vocabulary["<|startoftext|>"], vocabulary["<|endoftext|>"]) == (638, 639)


def test_every_caption_word_is_one_token() -> None:
    vocabulary, _ = make_vocabulary(640)
    spoken = chain(shapes.COLORS, shapes.BACKGROUNDS, shapes.SHAPES, shapes.SIZES, *map(str.split, shapes.RELATIONS))
    for word in [*spoken, "a", "on", "background"]:
        assert f"{word}</w>" in vocabulary


def test_merges_by_hand() -> None:
    # "ab" stands three times: first. Then "ab c" stands twice, then what is left of "abd".
    assert learn_merges(["abc", "abcx", "abd"], [], 9)[:2] == [("a", "b"), ("ab", "c</w>")]
    assert learn_merges(["aaab"], [("a", "a")], 3) == [("a", "a"), ("aa", "a"), ("aaa", "b</w>")]
    assert learn_merges(["ab"], [], 0) == []


def test_refuses_a_size_the_words_do_not_give() -> None:
    with pytest.raises(ValueError, match="caption words split"):
        make_vocabulary(560)
    with pytest.raises(ValueError, match=r"expected 5000"):
        make_vocabulary(5000)
    assert len(set(ENGLISH_WORDS.split())) == len(ENGLISH_WORDS.split())
