"""Token ids to what the U-Net is told: the context it attends to, and one vector of pooled text and picture sizes.

Two text encoders: CLIP ViT-L/14 and OpenCLIP ViT-bigG/14 in the published model. ``transformers`` has the layers; which
of their states are used, and what the official checkpoint calls their weights, is written here.

Shapes: B prompts, L tokens (``context_length``), C channels of both encoders together, P channels of the pooled text.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

from minisdxl.config import TextConfig
from minisdxl.embedding import sinusoidal_embedding
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
        self.transformer = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=config.vocabulary,
                hidden_size=config.width,
                intermediate_size=4 * config.width,
                num_hidden_layers=config.layers,
                num_attention_heads=config.heads,
                max_position_embeddings=config.context_length,
                hidden_act=config.activation,
                layer_norm_eps=1e-5,
                attention_dropout=0.0,
                bos_token_id=config.start_token,
                eos_token_id=config.end_token,
                pad_token_id=config.pad_token,
            )
        )
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
        output = self.transformer(input_ids=ids, output_hidden_states=True)
        hidden = output.hidden_states[-2]
        if self.text_projection is None:
            return hidden, None
        ends = ids == self.end_token
        if not ends.any(dim=1).all():
            raise ValueError(f"token ids have a row without the end token {self.end_token}, expected one in each row")
        first_end = ends.int().argmax(dim=1)
        rows = torch.arange(len(ids), device=ids.device)
        return hidden, self.text_projection(output.last_hidden_state[rows, first_end])

    def fill_buffers(self) -> None:
        """Gives position indices, which are in no checkpoint, to an encoder that was built on the meta device."""
        for module in self.transformer.modules():
            if "position_ids" in dict(module.named_buffers(recurse=False)):
                weight = module.get_parameter("position_embedding.weight")
                positions = torch.arange(len(weight), device=weight.device)[None]
                module.register_buffer("position_ids", positions, persistent=False)


class TextEncoders(nn.Module):
    """Both text encoders of SDXL."""

    def __init__(self, configs: tuple[TextConfig, TextConfig]) -> None:
        """``configs`` is ``ModelConfig.text``; random weights, or none under ``torch.device("meta")``."""
        super().__init__()
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
        state = self.state_dict()
        return {entry.name: entry.to_official(state) for entry in self._official_entries()}

    def load_official_state_dict(self, official: Mapping[str, Tensor]) -> None:
        """Takes over (does not copy) the weights of :meth:`official_state_dict`; also for encoders on the meta device.

        Raises:
            ValueError: for missing or unexpected names.
            RuntimeError: for tensors of another shape, from ``load_state_dict``.
        """
        entries = self._official_entries()
        names = {entry.name for entry in entries}
        missing, unexpected = sorted(names - official.keys()), sorted(official.keys() - names)
        if missing or unexpected:
            raise ValueError(
                f"text encoder weights do not fit: {len(missing)} missing {missing[:5]}, "
                f"{len(unexpected)} unexpected {unexpected[:5]}"
            )
        state: dict[str, Tensor] = {}
        for entry in entries:
            state |= entry.from_official(official[entry.name])
        self.load_state_dict(state, strict=True, assign=True)
        for encoder in (self.clip, self.openclip):
            encoder.fill_buffers()

    def _official_entries(self) -> list[OfficialEntry]:
        return official_entries(self.state_dict().keys())


@dataclass(frozen=True)
class OfficialEntry:
    """One tensor of the official file, and the weights of ours that it holds."""

    name: str
    parts: tuple[str, ...]  # one, or queries, keys and values, which OpenCLIP stacks
    transposed: bool  # OpenCLIP's projection is stored (in, out), a Linear's weight is (out, in)

    def to_official(self, state: Mapping[str, Tensor]) -> Tensor:
        """The official tensor, out of a state dict of ours."""
        tensors = [state[part] for part in self.parts]
        tensor = tensors[0] if len(tensors) == 1 else torch.cat(tensors)
        return tensor.T.contiguous() if self.transposed else tensor

    def from_official(self, tensor: Tensor) -> dict[str, Tensor]:
        """Entries for a state dict of ours, out of the official tensor."""
        tensor = tensor.T.contiguous() if self.transposed else tensor
        return dict(zip(self.parts, tensor.chunk(len(self.parts)), strict=True))


# Names of our weights and of the official file's, as patterns. ``text_model.`` is there or not by transformers release.
_CLIP = r"clip\.transformer\.(?:text_model\.)?"
_OPENCLIP = r"openclip\.transformer\.(?:text_model\.)?"
_OPENCLIP_LAYER = _OPENCLIP + r"encoder\.layers\.(\d+)\."
_OFFICIAL_CLIP = r"conditioner.embedders.0.transformer.text_model."
_OFFICIAL_OPENCLIP = r"conditioner.embedders.1.model."
_OFFICIAL_OPENCLIP_LAYER = _OFFICIAL_OPENCLIP + r"transformer.resblocks.\1."
_OFFICIAL_NAMES = {
    _CLIP + r"(.+)": _OFFICIAL_CLIP + r"\1",
    _OPENCLIP + r"embeddings\.token_embedding\.weight": _OFFICIAL_OPENCLIP + "token_embedding.weight",
    _OPENCLIP + r"embeddings\.position_embedding\.weight": _OFFICIAL_OPENCLIP + "positional_embedding",
    _OPENCLIP + r"final_layer_norm\.(weight|bias)": _OFFICIAL_OPENCLIP + r"ln_final.\1",
    _OPENCLIP_LAYER + r"layer_norm([12])\.(weight|bias)": _OFFICIAL_OPENCLIP_LAYER + r"ln_\2.\3",
    _OPENCLIP_LAYER + r"self_attn\.[qkv]_proj\.(weight|bias)": _OFFICIAL_OPENCLIP_LAYER + r"attn.in_proj_\2",
    _OPENCLIP_LAYER + r"self_attn\.out_proj\.(weight|bias)": _OFFICIAL_OPENCLIP_LAYER + r"attn.out_proj.\2",
    _OPENCLIP_LAYER + r"mlp\.fc1\.(weight|bias)": _OFFICIAL_OPENCLIP_LAYER + r"mlp.c_fc.\2",
    _OPENCLIP_LAYER + r"mlp\.fc2\.(weight|bias)": _OFFICIAL_OPENCLIP_LAYER + r"mlp.c_proj.\2",
    r"openclip\.text_projection\.weight": _OFFICIAL_OPENCLIP + "text_projection",
}


def official_entries(names: Iterable[str]) -> list[OfficialEntry]:
    """Sorts the names of our weights into the official tensors that hold them.

    Raises:
        KeyError: for a name that has no place in the official file.
    """
    parts: dict[str, list[str]] = {}
    for name in names:
        parts.setdefault(_official_name(name), []).append(name)
    # A fused tensor stacks q, k, v; the names come in the order of the module's own definition.
    return [
        OfficialEntry(official, tuple(sorted(ours, key=_query_key_value)), official.endswith(".text_projection"))
        for official, ours in parts.items()
    ]


def _official_name(name: str) -> str:
    for pattern, replacement in _OFFICIAL_NAMES.items():
        match = re.fullmatch(pattern, name)
        if match:
            return match.expand(replacement)
    raise KeyError(f"text encoder weight {name} has no name in the official file")


def _query_key_value(name: str) -> int:
    match = re.search(r"\.([qkv])_proj\.", name)
    return "qkv".index(match[1]) if match else 0
