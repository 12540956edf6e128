"""Prompts to token ids: CLIP's byte-pair encoding, shared by both text encoders, padded for each of them."""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from huggingface_hub import try_to_load_from_cache
from torch import Tensor
from transformers import CLIPTokenizer

from minisdxl.config import TextConfig

START, END = "<|startoftext|>", "<|endoftext|>"
HUB_VOCABULARIES = (
    ("stabilityai/stable-diffusion-xl-base-1.0", "tokenizer/vocab.json"),
    ("openai/clip-vit-large-patch14", "vocab.json"),
)


class Tokenizer:
    """Turns prompts into the ids of both text encoders.

    The encoders share one vocabulary and differ in padding only (``TextConfig.pad_token``), so a prompt is encoded once
    and padded twice. ``transformers`` splits and merges; padding happens here, on ids. A pad token declared to the
    library would be special to it: the published tokenizer of encoder 2 declares "!" and so loses every "!" of a
    prompt. Here it stays the ordinary token "!</w>", as in Stability AI's own code.

    A literal ``<|startoftext|>`` or ``<|endoftext|>`` in a prompt becomes that special token, as in the published
    tokenizers (OpenCLIP would spell it out). The pooled output then describes the text before the first end token.
    """

    def __init__(
        self, vocabulary: dict[str, int], merges: list[tuple[str, str]], configs: tuple[TextConfig, TextConfig]
    ):
        """Checks the vocabulary against both configs. Raises ``ValueError`` where they do not belong together."""
        for config in configs:
            found = (len(vocabulary), vocabulary.get(START), vocabulary.get(END))
            expected = (config.vocabulary, config.start_token, config.end_token)
            if found != expected:
                raise ValueError(f"vocabulary has (size, start, end token) {found}, the text encoder takes {expected}")
        if sorted(vocabulary.values()) != list(range(len(vocabulary))):
            raise ValueError(f"vocabulary does not number its {len(vocabulary)} tokens 0 to {len(vocabulary) - 1}")
        for merge in merges:
            unknown = {*merge, "".join(merge)} - vocabulary.keys()
            if unknown:
                raise ValueError(f"merge {merge} needs {sorted(unknown)}, which the vocabulary does not have")
        if configs[0].context_length != configs[1].context_length:
            raise ValueError(f"text encoders take {[c.context_length for c in configs]} tokens, expected one length")
        self.configs = configs
        self._encoder = CLIPTokenizer(vocab=vocabulary, merges=merges)

    @classmethod
    def from_directory(cls, directory: str | Path, configs: tuple[TextConfig, TextConfig]) -> Tokenizer:
        """Reads ``vocab.json`` and ``merges.txt``, the layout of a diffusers folder's ``tokenizer/``.

        Raises:
            FileNotFoundError: if one of them is missing.
            ValueError: if one of them cannot be read as what it should be, or does not fit ``configs``.
        """
        vocabulary_file, merges_file = (Path(directory) / name for name in ("vocab.json", "merges.txt"))
        for file in (vocabulary_file, merges_file):
            if not file.is_file():
                raise FileNotFoundError(
                    f"tokenizer file {file} is missing: expected a directory with CLIP's vocab.json and merges.txt, "
                    "such as tokenizer/ of a diffusers SDXL folder"
                )
        try:
            vocabulary = json.loads(vocabulary_file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{vocabulary_file} is not JSON: {error}") from error
        if not isinstance(vocabulary, dict) or not all(isinstance(token, int) for token in vocabulary.values()):
            raise ValueError(f"{vocabulary_file} holds no vocabulary, expected one object of tokens and their numbers")
        return cls(vocabulary, _read_merges(merges_file), configs)

    def __call__(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Token ids for each of the two encoders.

        Args:
            prompts: B texts. One with more tokens than fit is cut, with a ``UserWarning`` that shows the lost text.

        Returns:
            Two (B, context_length) int64 tensors: start token, text, end token, then that encoder's pad token.

        Raises:
            TypeError: for a single string, which would be read letter by letter.
        """
        if isinstance(prompts, str):
            raise TypeError(f"prompts is the string {prompts!r}, expected a list of strings")
        rows = list(map(self._encode, prompts))
        first, second = (self._pad(rows, config) for config in self.configs)
        return first, second

    def _encode(self, prompt: str) -> list[int]:
        encoded = self._encoder(prompt, add_special_tokens=False, return_offsets_mapping=True)
        ids, offsets = encoded["input_ids"], encoded["offset_mapping"]
        room = self.configs[0].context_length - 2
        if len(ids) > room:
            lost = prompt[offsets[room][0] :]
            warnings.warn(f"prompt has {len(ids)} tokens and only {room} fit: cut off {lost!r}", stacklevel=3)
        return [self.configs[0].start_token, *ids[:room], self.configs[0].end_token]

    @staticmethod
    def _pad(rows: list[list[int]], config: TextConfig) -> Tensor:
        padded = torch.full((len(rows), config.context_length), config.pad_token)
        for target, row in zip(padded, rows, strict=True):
            target[: len(row)] = torch.tensor(row)
        return padded


def _read_merges(file: Path) -> list[tuple[str, str]]:
    """Pairs of tokens, one a line, after a ``#version`` line; the earlier is merged first."""
    pairs = []
    for number, line in enumerate(file.read_text(encoding="utf-8").split("\n"), start=1):
        if not line or (number == 1 and line.startswith("#version")):
            continue
        pair = line.split(" ")
        if len(pair) != 2:
            raise ValueError(f"{file} line {number} is {line!r}, expected two tokens and a space between them")
        pairs.append((pair[0], pair[1]))
    return pairs


def find_vocabulary(weights: Path, directory: str | Path | None) -> Path:
    """The folder with the vocabulary for a checkpoint file, which holds none itself.

    ``directory`` where one is given; else the folder ``tokenizer`` beside ``weights``; else what the hub's cache on
    this machine has of SDXL or CLIP. Nothing is downloaded. Raises ``FileNotFoundError`` naming these ways.
    """
    if directory is not None:
        return Path(directory)
    beside = weights.parent / "tokenizer"
    if beside.is_dir():
        return beside
    for repository, file in HUB_VOCABULARIES:
        cached = try_to_load_from_cache(repository, file)
        if isinstance(cached, str):
            return Path(cached).parent
    raise FileNotFoundError(
        f"no CLIP vocabulary (vocab.json and merges.txt) for {weights}: expected a folder {beside}, one given by "
        f"--tokenizer, or {HUB_VOCABULARIES[1][0]} in the hub's cache on this machine"
    )
