"""Prompts encoded ahead of sampling, so that the memory of the text encoders can be freed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch

from minisdxl.prompting.chunks import Embedding
from minisdxl.prompting.encoders import stack
from minisdxl.settings import check_prompts
from minisdxl.text import TextEmbeddings
from minisdxl.tokenizer import Tokenizer


class Encoder(Protocol):
    """The text encoders, or :class:`EncodedPrompts`."""

    @property
    def embeddings(self) -> Mapping[str, Embedding]:
        """Textual inversions by their names."""

    def encode(self, prompts: Sequence[str], tokenizer: Tokenizer) -> TextEmbeddings:
        """As :meth:`minisdxl.text.TextEncoders.encode`."""

    def encode_negative(self, prompts: Sequence[str], tokenizer: Tokenizer) -> TextEmbeddings:
        """As :meth:`minisdxl.text.TextEncoders.encode_negative`."""

    def context_length(self, prompts: Sequence[str], tokenizer: Tokenizer) -> int:
        """As :meth:`minisdxl.prompting.encoders.PromptEncoders.context_length`."""


@dataclass(frozen=True)
class EncodedPrompts:
    """The embeddings of some prompts, one row each, used instead of the text encoders."""

    positive: Mapping[str, TextEmbeddings]  # with that of "", which fills up contexts
    negative: Mapping[str, TextEmbeddings]
    embeddings: Mapping[str, Embedding] = field(default_factory=dict)  # textual inversions that the prompts may name

    def encode(self, prompts: Sequence[str], tokenizer: Tokenizer) -> TextEmbeddings:
        """As :meth:`minisdxl.text.TextEncoders.encode`. Raises ``ValueError`` for a prompt that was not encoded."""
        return self._rows(self.positive, prompts, "prompt")

    def encode_negative(self, prompts: Sequence[str], tokenizer: Tokenizer) -> TextEmbeddings:
        """As :meth:`encode`, for negative prompts."""
        return self._rows(self.negative, prompts, "negative prompt")

    def context_length(self, prompts: Sequence[str], tokenizer: Tokenizer) -> int:
        """Tokens of the context of the longest of ``prompts``, which may be negative ones."""
        encoded = {**self.positive, **self.negative}
        return max(encoded[prompt].context.shape[1] for prompt in prompts)

    def _rows(self, encoded: Mapping[str, TextEmbeddings], prompts: Sequence[str], kind: str) -> TextEmbeddings:
        """The embeddings of ``prompts`` as one batch."""
        for prompt in prompts:
            if prompt not in encoded:
                raise ValueError(f"{kind} {prompt!r} was not encoded ahead, and the text encoders have been dropped")
        return stack([encoded[prompt] for prompt in prompts], lambda: self.positive[""])


@torch.no_grad()
def encode_each(
    text: Encoder, tokenizer: Tokenizer, prompts: Sequence[str], negatives: Sequence[str]
) -> EncodedPrompts:
    """Encodes every prompt and negative prompt, so that ``text`` is no longer needed.

    Each is encoded alone, so pictures differ by rounding from those whose prompts are encoded as a batch. Raises
    ``ValueError`` for no prompts, or for one string. ``EncodedPrompts`` raises it for prompts that are not in it.
    """
    for texts in (prompts, negatives):
        check_prompts(texts)
    return EncodedPrompts(
        {prompt: text.encode([prompt], tokenizer) for prompt in ["", *prompts]},
        {prompt: text.encode_negative([prompt], tokenizer) for prompt in negatives},
        text.embeddings,
    )
