"""The bundled vocabulary: what the tool writes is what the trained weights were trained with."""

from __future__ import annotations

from itertools import chain
from pathlib import Path

import pytest

from minisdxl.config import SHAPES
from tools.drawn import world
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
    spoken = chain(world.COLORS, world.SHAPES, world.SIZES, *map(str.split, [*world.RELATIONS, *world.GROUNDS]))
    for word in [*spoken, "a", "on", "background"]:
        assert f"{word}</w>" in vocabulary


def test_a_later_word_moves_no_earlier_one() -> None:
    """Token ids as the first weights were trained with them, before "huge" came."""
    vocabulary, _ = make_vocabulary(640)
    first = {
        **{"a": 320, "small": 524, "big": 526, "red": 528, "green": 531, "blue": 533, "yellow": 536, "orange": 539},
        **{"purple": 543, "cyan": 546, "pink": 549, "circle": 553, "square": 558, "triangle": 561, "above": 565},
        **{"below": 567, "left": 570, "right": 573, "of": 574, "on": 575, "and": 576, "white": 580, "black": 582},
        **{"gray": 584, "background": 591},
    }
    assert {word: vocabulary[f"{word}</w>"] for word in first} == first
    assert vocabulary["huge</w>"] == 637


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
