"""Text encoders that read weights, long prompts and embeddings.

A weight w moves a token's states from those of the empty prompt at the same position, z0 + w (z - z0), as compel does
for w >= 1 and ComfyUI for all weights. The web UI of AUTOMATIC1111 scales z itself and then restores its mean.
The pooled output is that of the first chunk, without weights, as in ComfyUI and AUTOMATIC1111's web UI. compel pools
the first 75 tokens of the prompt as it is typed, brackets included.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from itertools import accumulate, pairwise

import torch
from torch import Tensor, nn

from minisdxl.prompting.chunks import Chunk, Embedding, chunks
from minisdxl.text import TextEmbeddings, TextEncoders
from minisdxl.tokenizer import Tokenizer


class PromptEncoders(TextEncoders):
    """Text encoders that share the weights of others, and know ``embeddings`` by their names in lower case."""

    def __init__(self, encoders: TextEncoders, embeddings: Mapping[str, Embedding] | None = None) -> None:
        nn.Module.__init__(self)
        self.configs, self.clip, self.openclip = encoders.configs, encoders.clip, encoders.openclip
        self.embeddings = embeddings or {}

    def encode(self, prompts: Sequence[str], tokenizer: Tokenizer) -> TextEmbeddings:
        """Encodes B prompts: context (B, 77 k, C), where k is the number of chunks of the longest.

        A prompt without syntax that fits into one chunk is encoded as by :meth:`TextEncoders.encode`, bit for bit.
        Raises ``ValueError`` as :func:`minisdxl.prompting.syntax.parse`.
        """
        found = [chunks(prompt, tokenizer, self.embeddings) for prompt in prompts]
        every = [chunk for each in found for chunk in each]
        encoded = self._encode_chunks(every, tokenizer)
        context = encoded.context
        if any(token.weight != 1 for chunk in every for token in chunk):
            context = _weigh(context, self.encode([""], tokenizer).context, every)
        starts = accumulate(map(len, found), initial=0)
        rows = [
            TextEmbeddings(context[start:stop].flatten(0, 1)[None], encoded.pooled[start : start + 1])
            for start, stop in pairwise(starts)
        ]
        return stack(rows, lambda: self.encode([""], tokenizer))

    def encode_negative(self, prompts: Sequence[str], tokenizer: Tokenizer) -> TextEmbeddings:
        """As :meth:`TextEncoders.encode_negative`. The refiner's encoder encodes empty prompts as well."""
        return self.encode(prompts, tokenizer) if self.clip is None else super().encode_negative(prompts, tokenizer)

    def context_length(self, prompts: Sequence[str], tokenizer: Tokenizer) -> int:
        """Tokens of the context that the longest of ``prompts`` needs."""
        longest = max(len(chunks(prompt, tokenizer, self.embeddings)) for prompt in prompts)
        return longest * self.configs[0].context_length

    def _encode_chunks(self, every: Sequence[Chunk], tokenizer: Tokenizer) -> TextEmbeddings:
        """Encodes chunks, one a row, without weights."""
        device = next(self.parameters()).device
        start, end = self.configs[0].start_token, self.configs[0].end_token
        ids = [[start, *(token.id for token in chunk), end] for chunk in every]
        padded = [tokenizer.pad(ids, config).to(device) for config in self.configs]
        with ExitStack() as hooks:
            for encoder, name in ((self.clip, "clip"), (self.openclip, "openclip")):
                if encoder is None:
                    continue
                table = encoder.text_model.embeddings.token_embedding
                hooks.enter_context(table.register_forward_hook(_placing(every, name)))
            return self(*padded)


def same_length(each: Sequence[TextEmbeddings], empty: Callable[[], TextEmbeddings]) -> list[TextEmbeddings]:
    """Pads contexts to the length of the longest by the chunk of the ``empty`` prompt, as compel does.

    Rows of zeros, which mean "no prompt", stay zeros, as in diffusers. ``empty`` is called if there is a chunk to add.
    """
    longest = max(text.context.shape[1] for text in each)
    if all(text.context.shape[1] == longest for text in each):
        return list(each)
    chunk = empty().context  # (1, 77, C)
    padded = []
    for text in each:
        missing = (longest - text.context.shape[1]) // chunk.shape[1]
        filler = chunk.repeat(len(text.context), missing, 1)
        filler[(text.context == 0).flatten(1).all(dim=1)] = 0
        padded.append(replace(text, context=torch.cat([text.context, filler], dim=1)))
    return padded


def stack(rows: Sequence[TextEmbeddings], empty: Callable[[], TextEmbeddings]) -> TextEmbeddings:
    """One batch of all rows, padded by :func:`same_length`."""
    padded = same_length(rows, empty)
    return TextEmbeddings(torch.cat([row.context for row in padded]), torch.cat([row.pooled for row in padded]))


def _weigh(context: Tensor, empty: Tensor, every: Sequence[Chunk]) -> Tensor:
    """Applies the weights of chunks' tokens to their states (chunks, L, C); those of weight 1 keep every bit."""
    weights = torch.ones(context.shape[:2])
    for row, chunk in zip(weights, every, strict=True):
        row[1 : 1 + len(chunk)] = torch.tensor([token.weight for token in chunk])
    weights = weights.to(context.device)[..., None]
    z, z0 = context.float(), empty.float()
    return torch.where(weights == 1, context, (z0 + weights * (z - z0)).to(context.dtype))


def _placing(every: Sequence[Chunk], encoder: str) -> Callable[[nn.Module, object, Tensor], Tensor]:
    """A hook that puts the vectors of embeddings into what the table of token embeddings gives (chunks, L, width)."""

    def place(_: nn.Module, __: object, looked_up: Tensor) -> Tensor:
        for row, chunk in enumerate(every):
            for column, token in enumerate(chunk, start=1):  # after the start token
                if token.embedding is not None:
                    looked_up[row, column] = getattr(token.embedding, encoder)[token.row].to(looked_up)
        return looked_up

    return place
