"""The text transformer of CLIP (Radford et al. 2021). Names are those of the library transformers.

Shapes: B prompts, L tokens, C channels, h heads, d = C / h.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from minisdxl.config import TextConfig


def quick_gelu(x: Tensor) -> Tensor:
    """OpenAI's approximation of GELU, used by CLIP ViT-L/14."""
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"quick_gelu": quick_gelu, "gelu": F.gelu}


class SelfAttention(nn.Module):
    """Causal multi-head self-attention."""

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(channels, channels) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        """(B, L, C) -> (B, L, C)."""
        projected = (project(x) for project in (self.q_proj, self.k_proj, self.v_proj))
        q, k, v = (rearrange(y, "b l (h d) -> b h l d", h=self.heads) for y in projected)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out_proj(rearrange(attended, "b h l d -> b l (h d)"))


class FeedForward(nn.Module):
    """Linear map to four times the width, activation, linear map back."""

    def __init__(self, channels: int, activation: str) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[activation]
        self.fc1 = nn.Linear(channels, 4 * channels)
        self.fc2 = nn.Linear(4 * channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        """(B, L, C) -> (B, L, C)."""
        return self.fc2(self.activation(self.fc1(x)))


class Layer(nn.Module):
    """Norm, attend, add; norm, feed forward, add."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(config.width, eps=1e-5)
        self.self_attn = SelfAttention(config.width, config.heads)
        self.layer_norm2 = nn.LayerNorm(config.width, eps=1e-5)
        self.mlp = FeedForward(config.width, config.activation)

    def forward(self, x: Tensor) -> Tensor:
        """(B, L, C) -> (B, L, C)."""
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class Embeddings(nn.Module):
    """The sum of token and position embeddings."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(config.vocabulary, config.width)
        self.position_embedding = nn.Embedding(config.context_length, config.width)

    def forward(self, ids: Tensor) -> Tensor:
        """(B, L) -> (B, L, C)."""
        return self.token_embedding(ids) + self.position_embedding.weight[: ids.shape[1]]


class Layers(nn.Module):
    """The list of layers, which exists for its name."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.layers))


class TextTransformer(nn.Module):
    """The text transformer in two parts, all layers but the last, and the last: SDXL uses the states after both."""

    def __init__(self, config: TextConfig) -> None:
        """Random weights, as CLIP starts them."""
        super().__init__()
        self.embeddings = Embeddings(config)
        self.encoder = Layers(config)
        self.final_layer_norm = nn.LayerNorm(config.width, eps=1e-5)
        self._start(config)

    def forward(self, ids: Tensor) -> Tensor:
        """The hidden state (B, L, C) before the last layer, of token ids (B, L)."""
        x = self.embeddings(ids)
        for layer in self.encoder.layers[:-1]:
            x = layer(x)
        return x

    def finish(self, hidden: Tensor) -> Tensor:
        """The normalized last state (B, L, C), from the result of :meth:`forward`."""
        return self.final_layer_norm(self.encoder.layers[-1](hidden))

    def _start(self, config: TextConfig) -> None:
        """Initializes weights as CLIP's ``initialize_parameters``: the sum over all layers keeps its size."""
        into_sum = config.width**-0.5 * (2 * config.layers) ** -0.5
        spreads = {"_embedding": 0.02, "out_proj": config.width**-0.5, "fc1": (2 * config.width) ** -0.5}
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                spread = next((number for end, number in spreads.items() if name.endswith(end)), into_sum)
                nn.init.normal_(module.weight, std=spread)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)
