"""Prompts encoded ahead of sampling, so that the text encoders can leave memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from minisdxl.text import TextEmbeddings
from minisdxl.tokenizer import Tokenizer


class Encoder(Protocol):
    """Text encoders, or what stands in for them."""

    def encode(self, prompts: Sequence[str], tokenizer: Tokenizer) -> TextEmbeddings:
        """As :meth:`minisdxl.text.TextEncoders.encode`."""

    def encode_negative(self, prompts: Sequence[str], tokenizer: Tokenizer) -> TextEmbeddings:
        """As :meth:`minisdxl.text.TextEncoders.encode_negative`."""


@dataclass(frozen=True)
class EncodedPrompts:
    """The embeddings of some prompts, one row each: stands in for text encoders that have left memory."""

    positive: Mapping[str, TextEmbeddings]
    negative: Mapping[str, TextEmbeddings]

    def encode(self, prompts: Sequence[str], tokenizer: Tokenizer) -> TextEmbeddings:
        """As :meth:`minisdxl.text.TextEncoders.encode`. Raises ``ValueError`` for a prompt that was not encoded."""
        return _rows(self.positive, prompts, "prompt")

    def encode_negative(self, prompts: Sequence[str], tokenizer: Tokenizer) -> TextEmbeddings:
        """As :meth:`encode`, for negative prompts."""
        return _rows(self.negative, prompts, "negative prompt")


@torch.no_grad()
def encode_each(
    text: Encoder, tokenizer: Tokenizer, prompts: Sequence[str], negatives: Sequence[str]
) -> EncodedPrompts:
    """Encodes every prompt and negative prompt by itself."""
    return EncodedPrompts(
        {prompt: text.encode([prompt], tokenizer) for prompt in prompts},
        {prompt: text.encode_negative([prompt], tokenizer) for prompt in negatives},
    )


def _rows(encoded: Mapping[str, TextEmbeddings], prompts: Sequence[str], kind: str) -> TextEmbeddings:
    """The rows of ``prompts``, stacked."""
    for prompt in prompts:
        if prompt not in encoded:
            raise ValueError(f"{kind} {prompt!r} was not encoded ahead, and the text encoders are gone")
    rows = [encoded[prompt] for prompt in prompts]
    return TextEmbeddings(torch.cat([row.context for row in rows]), torch.cat([row.pooled for row in rows]))
