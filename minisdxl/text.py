"""Token ids to what the U-Net is told: the context it attends to, and one vector of pooled text and picture sizes.

Two text encoders: CLIP ViT-L/14 and OpenCLIP ViT-bigG/14 in the published model. Their layers are in ``clip``; which of
their states are used is written here, and what the official checkpoint calls their weights in ``layouts``.

Shapes: B prompts, L tokens (``context_length``), C channels of both encoders together, P channels of the pooled text.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor, nn

from minisdxl.clip import TextTransformer
from minisdxl.config import TextConfig
from minisdxl.embedding import sinusoidal_embedding
from minisdxl.layouts import CLIP_LAYOUT, PARTS, Place, openclip_layout
from minisdxl.tokenizer import Tokenizer


@dataclass(frozen=True)
class Conditioning:
    """What the text encoders say about B prompts: ``context`` (B, L, C) and ``pooled`` (B, P)."""

    context: Tensor
    pooled: Tensor

    def zeroed(self, rows: Tensor) -> Conditioning:
        """The same with zeros, "no prompt", where ``rows`` (B,) is true."""
        context = self.context.masked_fill(rows[:, None, None], 0)
        return Conditioning(context, self.pooled.masked_fill(rows[:, None], 0))

    def vector(self, sizes: Tensor, size_channels: int) -> Tensor:
        """Pooled text, then the :func:`size_embedding` of ``sizes`` (B, 6): (B, P + 6 * size_channels)."""
        return torch.cat([self.pooled, size_embedding(sizes, size_channels).to(self.pooled.dtype)], dim=-1)


def size_embedding(sizes: Tensor, channels: int) -> Tensor:
    """SDXL's micro-conditioning: each size number embedded on its own (official: ``ConcatTimestepEmbedderND``).

    Args:
        sizes: (B, 6) in pixels: original height, width; crop top, left; target height, width.
        channels: width of the embedding of one number (``ModelConfig.size_channels``).

    Returns:
        (B, 6 * channels), float64 where ``sizes`` are, float32 otherwise.

    Raises:
        ValueError: for ``sizes`` of another shape.
    """
    if sizes.ndim != 2 or sizes.shape[1] != 6:
        raise ValueError(f"sizes have shape {tuple(sizes.shape)}, expected (B, 6)")
    embedded = sinusoidal_embedding(sizes.flatten(), channels)
    return rearrange(embedded, "(b n) c -> b (n c)", n=6)


class TextEncoder(nn.Module):
    """One CLIP text encoder, with a projection of its pooled output where the config has one."""

    def __init__(self, config: TextConfig) -> None:
        """Random weights, as CLIP starts them."""
        super().__init__()
        self.end_token = config.end_token
        self.text_model = TextTransformer(config)
        self.text_projection: nn.Linear | None = None
        if config.projection is not None:
            self.text_projection = nn.Linear(config.width, config.projection, bias=False)
            nn.init.normal_(self.text_projection.weight, std=config.width**-0.5)

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor | None]:
        """Encodes token ids (B, L).

        Returns:
            The hidden state before the last layer (B, L, width), without the final LayerNorm; and the pooled output
            (B, projection), ``None`` without a projection: the normalized last state at the first end token, projected.

        Raises:
            ValueError: if a row has no end token to pool at.
        """
        hidden = self.text_model(ids)
        if self.text_projection is None:
            return hidden, None
        ends = ids == self.end_token
        if not ends.any(dim=1).all():
            raise ValueError(f"token ids have a row without the end token {self.end_token}, expected one in each row")
        first_end = ends.int().argmax(dim=1)
        rows = torch.arange(len(ids), device=ids.device)
        return hidden, self.text_projection(self.text_model.finish(hidden)[rows, first_end])


class TextEncoders(nn.Module):
    """Both text encoders of SDXL."""

    def __init__(self, configs: tuple[TextConfig, TextConfig]) -> None:
        """``configs`` is ``ModelConfig.text``; random weights, or none under ``torch.device("meta")``."""
        super().__init__()
        self.configs = configs
        self.clip, self.openclip = (TextEncoder(config) for config in configs)

    def forward(self, ids: Tensor, ids_2: Tensor) -> Conditioning:
        """Encodes the two (B, L) tensors of ids that :class:`Tokenizer` gives, one padded for each encoder."""
        hidden, _ = self.clip(ids)
        hidden_2, pooled = self.openclip(ids_2)
        return Conditioning(torch.cat([hidden, hidden_2], dim=-1), pooled)

    def encode(self, prompts: Sequence[str], tokenizer: Tokenizer) -> Conditioning:
        """Encodes B prompts on the device of the weights. A prompt that is too long is cut, with a warning."""
        device = next(self.parameters()).device
        ids, ids_2 = tokenizer(prompts)
        conditioning: Conditioning = self(ids.to(device), ids_2.to(device))
        return conditioning

    def encode_negative(self, prompts: Sequence[str], tokenizer: Tokenizer) -> Conditioning:
        """Encodes B negative prompts for guidance: an empty one gives zeros, not the encoding of ""."""
        conditioning = self.encode(prompts, tokenizer)
        empty = torch.tensor([not prompt.strip() for prompt in prompts], dtype=torch.bool)
        return conditioning.zeroed(empty.to(conditioning.pooled.device))

    def official_state_dict(self) -> dict[str, Tensor]:
        """The weights under the names and in the layout of the official single file."""
        state = {_part_and_name(name): tensor for name, tensor in self.state_dict().items()}
        return {
            PARTS[part].prefix + name: place.join([state[part, theirs] for theirs in place.names])
            for part, name, place in self._places(state)
        }

    def load_official_state_dict(self, official: Mapping[str, Tensor]) -> None:
        """Takes over (does not copy) the weights of :meth:`official_state_dict`; also for encoders on the meta device.

        Raises:
            ValueError: for missing or unexpected names.
            RuntimeError: for tensors of another shape, from ``load_state_dict``.
        """
        ours = {_part_and_name(name): name for name in self.state_dict()}
        places = {PARTS[part].prefix + name: (part, place) for part, name, place in self._places(ours)}
        missing, unexpected = sorted(places.keys() - official.keys()), sorted(official.keys() - places.keys())
        if missing or unexpected:
            raise ValueError(
                f"text encoder weights do not fit: {len(missing)} missing {missing[:5]}, "
                f"{len(unexpected)} unexpected {unexpected[:5]}"
            )
        state: dict[str, Tensor] = {}
        for name, (part, place) in places.items():
            tensors = place.split(official[name])
            for theirs, tensor in zip(place.names, tensors, strict=True):
                state[ours[part, theirs]] = tensor.contiguous()
        self.load_state_dict(state, strict=True, assign=True)

    def _places(self, names: Iterable[tuple[str, str]]) -> list[tuple[str, str, Place]]:
        """Part, official name and place of each official tensor that the parts' diffusers names make up."""
        layouts = {"text_encoder": CLIP_LAYOUT, "text_encoder_2": openclip_layout(self.configs[1])}
        official = dict.fromkeys((part, layouts[part].official(name)) for part, name in names)
        return [(part, name, layouts[part].place(name)) for part, name in official]


def _part_and_name(name: str) -> tuple[str, str]:
    """The part that a weight of ``TextEncoders`` belongs to, and its name there, in diffusers' layout."""
    encoder, _, rest = name.partition(".")
    return "text_encoder" if encoder == "clip" else "text_encoder_2", rest
