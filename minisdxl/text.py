"""The text encoders of SDXL, CLIP ViT-L/14 and OpenCLIP ViT-bigG/14: prompts to context and pooled vector.

The U-Net attends to the context, and the pooled vector is added to its time embedding. The transformer layers are in
``clip``; this file says which of their states SDXL uses.
Shapes: B prompts, L tokens (``context_length``), C channels of both encoders together, P channels of the pooled text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor, nn

from minisdxl.clip import TextTransformer
from minisdxl.config import TextConfig
from minisdxl.embedding import sinusoidal_embedding
from minisdxl.tokenizer import Tokenizer, first_end


@dataclass(frozen=True)
class TextEmbeddings:
    """B encoded prompts: ``context`` (B, L, C) and ``pooled`` (B, P)."""

    context: Tensor
    pooled: Tensor

    def zeroed(self, rows: Tensor) -> TextEmbeddings:
        """The same with zeros, which mean "no prompt", where ``rows`` (B,) is true."""
        context = self.context.masked_fill(rows[:, None, None], 0)
        return TextEmbeddings(context, self.pooled.masked_fill(rows[:, None], 0))

    def vector(self, sizes: Tensor, size_channels: int) -> Tensor:
        """Pooled text and :func:`size_embedding` of ``sizes`` (B, 6), concatenated: (B, P + 6 * size_channels)."""
        return torch.cat([self.pooled, size_embedding(sizes, size_channels).to(self.pooled.dtype)], dim=-1)


def size_embedding(sizes: Tensor, channels: int) -> Tensor:
    """SDXL's micro-conditioning: each size number embedded on its own (official: ``ConcatTimestepEmbedderND``).

    ``sizes`` (B, 6): original height, width; crop top, left; target height, width, all in pixels. (B, 5) of the refiner
    end in an aesthetic score. ``channels`` is the width of one embedding. Returns (B, 6 * channels), float64 if
    ``sizes`` are, else float32. Raises ``ValueError`` for ``sizes`` of another shape.
    """
    if sizes.ndim != 2 or sizes.shape[1] not in (5, 6):
        raise ValueError(f"sizes have shape {tuple(sizes.shape)}, expected (B, 6), or (B, 5) for the refiner")
    embedded = sinusoidal_embedding(sizes.flatten(), channels)
    return rearrange(embedded, "(b n) c -> b (n c)", n=sizes.shape[1])


class TextEncoder(nn.Module):
    """One CLIP text encoder, with a projection of its pooled output where the config has one."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.end_token = config.end_token
        self.text_model = TextTransformer(config)
        self.text_projection: nn.Linear | None = None
        if config.projection is not None:
            self.text_projection = nn.Linear(config.width, config.projection, bias=False)
            nn.init.normal_(self.text_projection.weight, std=config.width**-0.5)  # as CLIP starts it

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor | None]:
        """Encodes token ids (B, L).

        Returns the hidden state before the last layer (B, L, width), without the final LayerNorm, and the pooled output
        (B, projection): the normalized last state at the first end token, projected; ``None`` without a projection.
        Raises as :func:`first_end`.
        """
        hidden = self.text_model(ids)
        if self.text_projection is None:
            return hidden, None
        rows = torch.arange(len(ids), device=ids.device)
        last = self.text_model.finish(hidden)[rows, first_end(ids, self.end_token)]
        return hidden, self.text_projection(last)


class TextEncoders(nn.Module):
    """Both text encoders, or the second alone in the refiner. ``configs`` is ``ModelConfig.text``."""

    def __init__(self, configs: tuple[TextConfig, ...]) -> None:
        super().__init__()
        self.configs = configs
        self.clip = TextEncoder(configs[0]) if len(configs) > 1 else None
        self.openclip = TextEncoder(configs[-1])

    def forward(self, *ids: Tensor) -> TextEmbeddings:
        """Encodes the tensors (B, L) of token ids of :class:`Tokenizer`, one padded for each encoder."""
        encoders = filter(None, (self.clip, self.openclip))
        hidden, pooled = zip(*(encoder(each) for encoder, each in zip(encoders, ids, strict=True)), strict=True)
        return TextEmbeddings(torch.cat(hidden, dim=-1), pooled[-1])

    def encode(self, prompts: Sequence[str], tokenizer: Tokenizer) -> TextEmbeddings:
        """Encodes B prompts on the device of the weights. Warns of a prompt that is too long, and truncates it."""
        device = next(self.parameters()).device
        return self(*(ids.to(device) for ids in tokenizer(prompts)))

    def encode_negative(self, prompts: Sequence[str], tokenizer: Tokenizer) -> TextEmbeddings:
        """Encodes B negative prompts for guidance. An empty one becomes zeros, not the encoding of ""."""
        embeddings = self.encode(prompts, tokenizer)
        empty = torch.tensor([not prompt.strip() for prompt in prompts], dtype=torch.bool)
        return embeddings.zeroed(empty.to(embeddings.pooled.device))
