"""Prompts to token ids: CLIP's byte-pair encoding, shared by both text encoders, padded for each of them."""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import tokenizers
import torch
from tokenizers import normalizers, pre_tokenizers
from torch import Tensor

from minisdxl.bundled import WEIGHTS
from minisdxl.config import TextConfig

START, END = "<|startoftext|>", "<|endoftext|>"
FILES = ("vocab.json", "merges.txt")

# What is merged by itself (Radford et al. 2021): English endings, words, single digits, runs of other signs.
_WORDS = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"


class Vocabulary(NamedTuple):
    """A byte-pair encoding."""

    tokens: dict[str, int]  # the text of each token, with its id
    merges: list[tuple[str, str]]  # pairs of tokens that become one; the earlier is merged first

    @classmethod
    def from_merges(cls, merges: list[tuple[str, str]]) -> Vocabulary:
        """Numbers tokens as CLIP does (``simple_tokenizer.py`` of openai/CLIP).

        First the 256 bytes, then the bytes at the end of a word, then what each merge makes, then start and end token.
        """
        symbols = byte_symbols()
        texts = [*symbols, *(f"{symbol}</w>" for symbol in symbols), *map("".join, merges), START, END]
        return cls({text: index for index, text in enumerate(texts)}, merges)


class Tokenizer:
    """Turns prompts into the ids of both text encoders.

    The encoders share one vocabulary and differ in padding only (``TextConfig.pad_token``), so a prompt is encoded once
    and padded twice. The library ``tokenizers`` splits and merges; padding happens here, on ids. A pad token declared
    to the library would be special to it: the published tokenizer of encoder 2 declares "!" and so loses every "!" of a
    prompt. Here it stays the ordinary token "!</w>", as in Stability AI's own code.

    A literal ``<|startoftext|>`` or ``<|endoftext|>`` in a prompt becomes that special token, as in the published
    tokenizers (OpenCLIP would spell it out). The pooled output then describes the text before the first end token.
    """

    def __init__(self, vocabulary: dict[str, int], merges: list[tuple[str, str]], configs: tuple[TextConfig, ...]):
        """Checks the vocabulary against all configs. Raises ``ValueError`` where they do not belong together."""
        for config in configs:
            found = (len(vocabulary), vocabulary.get(START), vocabulary.get(END))
            expected = (config.vocabulary, config.start_token, config.end_token)
            if found != expected:
                raise ValueError(
                    f"vocabulary has (size, start, end token) {found}, the text encoder takes {expected}: name the "
                    "model's own by --tokenizer, or put it into a folder tokenizer beside the weights"
                )
        if sorted(vocabulary.values()) != list(range(len(vocabulary))):
            raise ValueError(f"vocabulary does not number its {len(vocabulary)} tokens 0 to {len(vocabulary) - 1}")
        for merge in merges:
            # Not a difference of sets: that goes through the whole vocabulary, for each of its merges.
            unknown = [token for token in ("".join(merge), *merge) if token not in vocabulary]
            if unknown:
                raise ValueError(f"merge {merge} needs {unknown}, which the vocabulary does not have")
        if len({config.context_length for config in configs}) > 1:
            raise ValueError(f"text encoders take {[c.context_length for c in configs]} tokens, expected one length")
        self.configs = configs
        self.encoder = byte_pair_encoder(vocabulary, merges)

    @classmethod
    def from_directory(cls, directory: str | Path, configs: tuple[TextConfig, ...]) -> Tokenizer:
        """Of the vocabulary in a folder. Raises what :func:`read_vocabulary` and the constructor raise."""
        return cls(*read_vocabulary(directory), configs)

    def __call__(self, prompts: Sequence[str]) -> tuple[Tensor, ...]:
        """Token ids for each of the encoders.

        Args:
            prompts: B texts. One with more tokens than fit is cut, with a ``UserWarning`` that shows the lost text.

        Returns:
            For each a (B, context_length) int64 tensor: start token, text, end token, then that encoder's pad token.

        Raises:
            TypeError: for a single string, which would be read letter by letter.
        """
        if isinstance(prompts, str):
            raise TypeError(f"prompts is the string {prompts!r}, expected a list of strings")
        rows = list(map(self._encode, prompts))
        return tuple(self.pad(rows, config) for config in self.configs)

    def _encode(self, prompt: str) -> list[int]:
        encoded = self.encoder.encode(prompt, add_special_tokens=False)
        ids, offsets = encoded.ids, encoded.offsets
        room = self.configs[0].context_length - 2
        if len(ids) > room:
            lost = prompt[offsets[room][0] :]
            warnings.warn(f"prompt has {len(ids)} tokens and only {room} fit: cut off {lost!r}", stacklevel=3)
        return [self.configs[0].start_token, *ids[:room], self.configs[0].end_token]

    @staticmethod
    def pad(rows: list[list[int]], config: TextConfig) -> Tensor:
        """Rows of at most ``context_length`` ids, as one tensor (B, context_length) for that encoder."""
        padded = torch.full((len(rows), config.context_length), config.pad_token)
        for target, row in zip(padded, rows, strict=True):
            target[: len(row)] = torch.tensor(row)
        return padded


def byte_pair_encoder(vocabulary: dict[str, int], merges: list[tuple[str, str]]) -> tokenizers.Tokenizer:
    """CLIP's own encoding of lower-case text, as of one line, without special tokens around it."""
    model = tokenizers.models.BPE(vocab=vocabulary, merges=merges, end_of_word_suffix="</w>", unk_token=END)
    encoder = tokenizers.Tokenizer(model)
    encoder.add_special_tokens([START, END])
    spaces = normalizers.Replace(tokenizers.Regex(r"\s+"), " ")
    encoder.normalizer = normalizers.Sequence([normalizers.NFC(), spaces, normalizers.Lowercase()])
    words = pre_tokenizers.Split(tokenizers.Regex(_WORDS), behavior="removed", invert=True)
    encoder.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    return encoder


def load_vocabulary(weights: Path, directory: str | Path | None) -> Vocabulary:
    """The vocabulary for a checkpoint, which is a file or a diffusers folder.

    That in ``directory`` where one is given; else that in the folder ``tokenizer`` in or beside ``weights``, or in a
    refiner's ``tokenizer_2``; else CLIP's own (:func:`clip_vocabulary`).

    Only tokens and merges are taken from a folder, so the ids of a prompt do not depend on where they came from. They
    are those of Stability AI's own code, which differ from the published tokenizer of encoder 2 in "!" alone: see
    :class:`Tokenizer`. Raises what :func:`read_vocabulary` raises.
    """
    if directory is not None:
        return read_vocabulary(directory)
    for folder in (weights / "tokenizer", weights / "tokenizer_2", weights.parent / "tokenizer"):
        if folder.is_dir():
            return read_vocabulary(folder)
    return clip_vocabulary()


def clip_vocabulary() -> Vocabulary:
    """CLIP's 49,408 tokens (OpenAI, MIT license: ``weights/clip``)."""
    return Vocabulary.from_merges(_read_merges(WEIGHTS / "clip" / "merges.txt"))


def read_vocabulary(directory: str | Path) -> Vocabulary:
    """Reads a folder ``tokenizer/`` as diffusers and transformers have it.

    Published folders hold ``vocab.json`` and ``merges.txt``; transformers 5 saves both in one ``tokenizer.json``.

    Raises:
        FileNotFoundError: if one of them is missing.
        ValueError: if one of them cannot be read as what it should be.
    """
    vocabulary, merges, both = (Path(directory) / name for name in (*FILES, "tokenizer.json"))
    if both.is_file() and not (vocabulary.is_file() and merges.is_file()):
        return _read_both(both)
    for file in (vocabulary, merges):
        if not file.is_file():
            raise FileNotFoundError(
                f"tokenizer file {file} is missing: expected a directory with CLIP's vocab.json and merges.txt, or "
                "tokenizer.json, such as tokenizer/ of a diffusers SDXL folder"
            )
    return Vocabulary(_tokens(vocabulary, _read_json(vocabulary)), _read_merges(merges))


def _read_both(file: Path) -> Vocabulary:
    content = _read_json(file)
    model = content.get("model") if isinstance(content, dict) else None
    if not isinstance(model, dict) or not isinstance(model.get("merges"), list):
        raise ValueError(f"{file} holds no byte-pair encoding, expected a model with vocab and merges")
    pairs = []
    for merge in model["merges"]:
        pair = merge.split(" ") if isinstance(merge, str) else merge  # a string in files of older releases
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(token, str) for token in pair):
            raise ValueError(f"{file} has the merge {merge!r}, expected two tokens")
        pairs.append((pair[0], pair[1]))
    return Vocabulary(_tokens(file, model.get("vocab")), pairs)


def _read_json(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not JSON: {error}") from error


def _tokens(file: Path, content: object) -> dict[str, int]:
    if not isinstance(content, dict) or not all(isinstance(token, int) for token in content.values()):
        raise ValueError(f"{file} holds no vocabulary, expected one object of tokens and their numbers")
    return content


def _read_merges(file: Path) -> list[tuple[str, str]]:
    """Pairs of tokens, one a line, after a ``#version`` line; the earlier is merged first."""
    try:
        lines = file.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not text: {error}") from error
    pairs = []
    for number, line in enumerate(lines, start=1):
        if not line or (number == 1 and line.startswith("#version")):
            continue
        pair = line.split(" ")
        if len(pair) != 2:
            raise ValueError(f"{file} line {number} is {line!r}, expected two tokens and a space between them")
        pairs.append((pair[0], pair[1]))
    return pairs


def byte_symbols() -> list[str]:
    """One character for each byte, in CLIP's order: printable bytes as themselves ("!" first), then the others."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    return [chr(byte) for byte in printable] + [chr(256 + index) for index in range(256 - len(printable))]


def first_end(ids: Tensor, end_token: int) -> Tensor:
    """The position (B,) of the first end token in each row of token ids (B, L).

    Raises ``ValueError`` for a row without one. On a GPU that is an assertion of the device, which waits for nothing.
    """
    ends = ids == end_token
    said = f"token ids have a row without the end token {end_token}, expected one in each row"
    if ids.is_cuda or ids.is_meta:
        torch._assert_async(ends.any(dim=1).all(), said)
    elif not ends.any(dim=1).all():
        raise ValueError(said)
    return ends.int().argmax(dim=1)
