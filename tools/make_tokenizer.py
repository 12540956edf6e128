"""The command ``python -m tools.make_tokenizer [DIRECTORY]``: makes the small vocabulary of the bundled model.

The layout is CLIP's: 256 byte symbols, the same 256 with an end-of-word mark, merges in the order in which they were
learned, then the start and the end token. Trained weights depend on the token ids. A change to a word list below
changes ids, and models trained before it no longer understand their prompts.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from itertools import pairwise
from pathlib import Path

from minisdxl.config import SHAPES
from minisdxl.tokenizer import Vocabulary

# Every word of a caption. Each becomes one token.
CAPTION_WORDS = (
    "a small big red green blue yellow orange purple cyan pink circle square triangle above below left right of on and "
    "white black gray background"
)
# Caption words added later. They replace the last English tokens, so that no other id changes.
LATER_WORDS = "huge"
# Frequent English words fill the other merges, so that other text takes fewer tokens than letters.
ENGLISH_WORDS = (
    "the be to in that have it for not with as you do at this but his by from they we say her she or an will my one "
    "all would there their what so up out if about who get which go me when make can like time no just him know take"
)


def apply_merge(word: tuple[str, ...], pair: tuple[str, str]) -> tuple[str, ...]:
    """``word`` with every occurrence of ``pair``, from the left, merged into one symbol."""
    merged: list[str] = []
    for symbol in word:
        if merged and (merged[-1], symbol) == pair:
            merged[-1] += symbol
        else:
            merged.append(symbol)
    return tuple(merged)


def learn_merges(words: list[str], merges: list[tuple[str, str]], most: int) -> list[tuple[str, str]]:
    """Learns merges by byte-pair encoding: extends ``merges`` until all words are one token or there are ``most``.

    Each new merge is the most frequent pair, or the first one to occur of equally frequent pairs. Words are lower-case
    ASCII, each counted once.
    """
    merges = list(merges)
    split = [(*word[:-1], word[-1] + "</w>") for word in words]
    for pair in merges:
        split = [apply_merge(word, pair) for word in split]
    while len(merges) < most:
        counts = Counter(pair for word in split for pair in pairwise(word))
        if not counts:
            break
        best = max(counts, key=lambda pair: counts[pair])
        merges.append(best)
        split = [apply_merge(word, best) for word in split]
    return merges


def make_vocabulary(size: int) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Vocabulary of exactly ``size`` tokens, and its merges. Raises ``ValueError`` if the words do not fill it."""
    room = size - 2 * 256 - 2
    merges = learn_merges(CAPTION_WORDS.split(), [], room)
    merges = learn_merges(ENGLISH_WORDS.split(), merges, room)
    later = learn_merges(LATER_WORDS.split(), merges, size)[len(merges) :]
    merges = [*merges[: room - len(later)], *later]
    vocabulary = Vocabulary.from_merges(merges).tokens
    missing = [word for word in [*CAPTION_WORDS.split(), *LATER_WORDS.split()] if f"{word}</w>" not in vocabulary]
    if missing or len(vocabulary) != size:
        raise ValueError(f"vocabulary has {len(vocabulary)} tokens, expected {size}; caption words split: {missing}")
    return vocabulary, merges


def write(directory: Path, vocabulary: dict[str, int], merges: list[tuple[str, str]]) -> None:
    """Writes ``vocab.json`` and ``merges.txt`` in the format of the published CLIP tokenizers."""
    directory.mkdir(parents=True, exist_ok=True)
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (directory / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (directory / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False) + "\n", encoding="utf-8")


def main() -> None:
    """Writes the bundled model's tokenizer files."""
    parser = argparse.ArgumentParser(description="Makes the vocab.json and merges.txt of the bundled model.")
    default = Path(__file__).parents[1] / "weights" / SHAPES.name / "tokenizer"
    parser.add_argument("directory", nargs="?", type=Path, default=default, help="(default: the bundled model's)")
    directory = parser.parse_args().directory
    vocabulary, merges = make_vocabulary(SHAPES.text[0].vocabulary)
    write(directory, vocabulary, merges)
    print(f"{directory}: {len(vocabulary)} tokens, {len(merges)} merges")


if __name__ == "__main__":
    main()
