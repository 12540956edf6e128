"""The words of a prompt, and where their tokens lie in the context that the U-Net attends to."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from tokenizers.decoders import ByteLevel

from minisdxl.prompting.chunks import Embedding, chunks
from minisdxl.tokenizer import Tokenizer

END_OF_WORD = "</w>"


class Word(NamedTuple):
    """A word, a number or a sign of the prompt, and the positions of its tokens in the context."""

    text: str
    tokens: tuple[int, ...]


def find_words(prompt: str, tokenizer: Tokenizer, embeddings: Mapping[str, Embedding]) -> list[Word]:
    """The words in reading order. A textual inversion is one word, by its name.

    Raises ``ValueError`` as :func:`minisdxl.prompting.syntax.parse`.
    """
    words: list[Word] = []
    symbols: list[str] = []
    taken: list[int] = []

    def finish(text: str) -> None:
        words.append(Word(text, tuple(taken)))
        symbols.clear()
        taken.clear()

    length = tokenizer.configs[0].context_length
    for number, chunk in enumerate(chunks(prompt, tokenizer, embeddings)):
        for place, token in enumerate(chunk, start=number * length + 1):  # after the start token
            taken.append(place)
            if token.embedding is not None:
                if token.row == len(token.embedding.clip) - 1:
                    finish(next(name for name, each in embeddings.items() if each is token.embedding))
                continue
            symbol = tokenizer.encoder.id_to_token(token.id) or ""
            symbols.append(symbol.removesuffix(END_OF_WORD))
            if symbol.endswith(END_OF_WORD):
                finish(ByteLevel().decode(symbols))
        if symbols:  # a special token, or a word longer than a chunk
            finish(ByteLevel().decode(symbols))
    return words
