"""Words and the places of their tokens, against the token ids that the text encoders get."""

from __future__ import annotations

import torch

from minisdxl.config import SDXL_BASE
from minisdxl.inspector.words import find_words
from minisdxl.prompting.chunks import Embedding
from minisdxl.tokenizer import Tokenizer, clip_vocabulary

TOKENIZER = Tokenizer(*clip_vocabulary(), SDXL_BASE.text)


def test_places_are_those_of_the_ids() -> None:
    prompt = "An astronaut riding a pterodactyl, 4k"
    ids, _ = TOKENIZER([prompt])
    words = find_words(prompt, TOKENIZER, {})
    assert [word.text for word in words] == ["an", "astronaut", "riding", "a", "pterodactyl", ",", "4", "k"]
    assert [place for word in words for place in word.tokens] == list(range(1, int((ids[0] == 49407).int().argmax())))
    for word in words:
        alone = TOKENIZER.encoder.encode(word.text, add_special_tokens=False).ids
        assert ids[0, list(word.tokens)].tolist() == alone
    assert len(words[4].tokens) > 1


def test_letters_beyond_ascii_and_weights() -> None:
    words = find_words("(café:1.3) \\(東京\\) 🎨", TOKENIZER, {})
    assert [word.text for word in words] == ["café", "(", "東京", ")", "🎨"]


def test_second_chunks_begin_after_their_own_start_token() -> None:
    words = find_words("red BREAK blue", TOKENIZER, {})
    assert [(word.text, word.tokens) for word in words] == [("red", (1,)), ("blue", (78,))]


def test_a_textual_inversion_is_one_word() -> None:
    style = Embedding(torch.zeros(3, 768), torch.zeros(3, 1280))
    words = find_words("a mystyle dog", TOKENIZER, {"mystyle": style})
    assert [(word.text, word.tokens) for word in words] == [("a", (1,)), ("mystyle", (2, 3, 4)), ("dog", (5,))]


def test_no_words() -> None:
    assert find_words("", TOKENIZER, {}) == []
