"""The similarity kernel makes alike tokens attend to each other, and the watch sees it."""

from __future__ import annotations

import torch

from atedm.graph.inputs import AttentionInputs
from minisdxl.config import SHAPES
from minisdxl.pipeline import SDXL
from minisdxl.transformer import TransformerLayer
from minisdxl.unet import UNet
from tools.training.likeness import attention_map, measure, similarity_kernel, watch


def test_a_token_attends_to_what_is_like_it() -> None:
    unet = UNet(SHAPES.unet)
    similarity_kernel(unet, torch.Generator().manual_seed(0))
    attention = next(layer for layer in unet.modules() if isinstance(layer, TransformerLayer)).attn1
    torch.manual_seed(0)
    tokens = torch.randn(4, attention.to_q.in_features).repeat(8, 1)  # 32 tokens of four kinds
    tokens = tokens + 0.1 * torch.randn_like(tokens)
    heads = attention.heads
    query, key = (m(tokens).view(1, 32, heads, -1).transpose(1, 2) for m in (attention.to_q, attention.to_k))
    maps = (query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5).softmax(dim=-1).mean(dim=1)[0]
    kind = torch.arange(32) % 4
    own = maps[kind[:, None] == kind].sum() / 32
    print(f"{own:.3f} of the attention goes to the token's own kind, a quarter of all tokens")
    assert own > 0.9


def test_measures_by_hand() -> None:
    values = torch.tensor([[[1.0, 0.0], [1.0, 0.1], [-1.0, 0.0], [-1.0, -0.1]]])
    inputs = AttentionInputs(10 * values[:, None], values[:, None], 1.0)
    found: dict[str, list[float]] = {"source": [], "likest": [], "entropy": []}
    maps = attention_map(inputs)
    assert torch.allclose(maps.sum(dim=-1), torch.ones(1, 1, 4))
    measure(maps, values, found)
    assert found["source"] == found["likest"]  # each token's source is its twin
    assert found["likest"][0] > 0.99
    measure(torch.full((1, 1, 4, 4), 0.25), values, found)
    assert abs(found["entropy"][1] - 1) < 1e-6 and found["entropy"][0] < 0.6


def test_watch_measures_plain_and_open_scenes(shapes: SDXL) -> None:
    figures = watch(shapes, pictures=1)
    names = {name.removeprefix("plain_") for name in figures if name.startswith("plain_")}
    assert {*figures} == {f"{kind}_{name}" for kind in ("plain", "open") for name in names}
    assert 0 < figures["plain_error"] < 0.01 < 1 < figures["plain_uniform"]
    assert figures["plain_source"] <= figures["plain_likest"] <= 1
    assert 0 < figures["open_entropy"] < 1 and 0 < figures["open_objects"] < 1
