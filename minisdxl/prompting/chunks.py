"""A prompt as chunks of up to 75 tokens, each of which a text encoder reads by itself."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from minisdxl.prompting.syntax import parse
from minisdxl.tokenizer import Tokenizer


@dataclass(frozen=True)
class Embedding:
    """A textual inversion: n learned vectors (n, width) for each text encoder, in place of n tokens."""

    clip: Tensor
    openclip: Tensor


class Token(NamedTuple):
    """One token: its id, its weight, and if it comes from an embedding, which of its vectors replaces the token's own.

    The id is then 0: it is looked up and not used.
    """

    id: int
    weight: float
    embedding: Embedding | None = None
    row: int = 0


Word = list[Token]
Chunk = list[Token]


def chunks(prompt: str, tokenizer: Tokenizer, embeddings: Mapping[str, Embedding]) -> list[Chunk]:
    """The chunks of a prompt in web-UI syntax; one empty chunk if it has no text.

    A chunk ends at ``BREAK``, or before the word that does not fit. Only a word of more tokens than a chunk is split.
    ``embeddings`` are found by their names, in lower case. Raises as :func:`minisdxl.prompting.syntax.parse`.
    """
    room = tokenizer.configs[0].context_length - 2  # without start and end token
    found: list[Chunk] = []
    for section in parse(prompt):
        found.append([])
        for word in (word for text, weight in section for word in _words(text, weight, tokenizer, embeddings)):
            if len(found[-1]) + len(word) > room and found[-1]:
                found.append([])
            for token in word:
                if len(found[-1]) == room:
                    found.append([])
                found[-1].append(token)
    return found


def embedding_pattern(embeddings: Mapping[str, Embedding]) -> re.Pattern[str]:
    """Finds the names of embeddings, as words of their own or after ``embedding:``; the name is group 1."""
    names = "|".join(re.escape(name) for name in sorted(embeddings, key=len, reverse=True))
    return re.compile(rf"(?<!\w)(?:embedding:)?({names})(?!\w)" if names else r"(?!)()", re.IGNORECASE)


def _words(text: str, weight: float, tokenizer: Tokenizer, embeddings: Mapping[str, Embedding]) -> Iterator[Word]:
    for index, part in enumerate(embedding_pattern(embeddings).split(text)):
        if index % 2:  # the groups of the pattern
            embedding = embeddings[part.lower()]
            yield [Token(0, weight, embedding, row) for row in range(len(embedding.clip))]
            continue
        encoded, word = tokenizer.encoder.encode(part, add_special_tokens=False), Word()
        for token, symbols in zip(encoded.ids, encoded.tokens, strict=True):
            word.append(Token(token, weight))
            if symbols.endswith("</w>"):
                yield word
                word = []
        if word:
            yield word
