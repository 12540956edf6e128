"""The models that ``tools.bench`` times: this U-Net with token plans, one attention block of it, and diffusers' U-Net.

All share one set of random weights, so that they fit into memory together. Only convolution weights exist twice, if
diffusers runs with its default memory format: its kernels are channels first, ours channels last.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import convert_conv2d_weight_memory_format

from atedm.plan import DENSE, TokenPlan
from atedm.presets import parse_preset
from minisdxl.checkpoint.folder_writer import json_files
from minisdxl.checkpoint.layouts import unet_layout
from minisdxl.config import SDXL_BASE, ModelConfig
from minisdxl.runtime.compiled import CompiledUNet
from minisdxl.text import TextEmbeddings
from minisdxl.transformer import AttentionBlock
from minisdxl.unet import UNet

# The small model has SDXL's depth and a fifth of its width.
CONFIGS = {
    "full": SDXL_BASE,
    "small": replace(SDXL_BASE, name="small", unet=replace(SDXL_BASE.unet, model_channels=64)),
}
PEERS = ("diffusers", "diffusers-channels-last", "tomesd")


@dataclass(frozen=True)
class Contender:
    """A model to be timed: ``call`` runs one step on the device."""

    name: str
    call: Callable[[], Tensor]


def plan_of(preset: str, config: ModelConfig) -> TokenPlan:
    """The plan of ``preset`` at the last of 50 steps, the steady one. Raises ``ValueError`` for an unknown preset."""
    if preset == "dense":
        return DENSE
    return parse_preset(preset).plan(49, 50, config.unet.attention_sites())


def randomize(module: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    """Moves a module from the meta device to ``device``, with random weights scaled so that all parts matter."""
    torch.manual_seed(0)
    module.to(dtype).to_empty(device=device).eval().requires_grad_(False)
    for name, weight in module.named_parameters():
        if weight.ndim > 1:
            weight.normal_(std=weight[0].numel() ** -0.5)
        else:
            weight.fill_(float(name.endswith("weight")))  # normalizations scale by 1, biases are 0
    convert_conv2d_weight_memory_format(module, torch.channels_last)  # as they are loaded


def unets(
    config: ModelConfig,
    size: int,
    batch: int,
    presets: Sequence[str],
    peers: Sequence[str],
    device: torch.device,
    dtype: torch.dtype,
    compile_all: bool = False,
) -> Iterator[Contender]:
    """One call of the U-Net each, for ``batch`` latents of pictures with ``size`` pixels on a side.

    What depends only on the prompt is computed before, as after the first step of a picture: encoded words, and in this
    package their keys and values too. ``compile_all`` compiles all U-Nets, with CUDA graphs on a GPU. Raises
    ``ValueError`` for an unknown preset.
    """
    plans = {preset: plan_of(preset, config) for preset in presets}
    side = size // config.vae.downscale
    with torch.device("meta"):
        unet = UNet(config.unet)
    randomize(unet, device, dtype)
    with device:
        x = torch.randn(batch, config.unet.in_channels, side, side, dtype=dtype)
        timestep = torch.full((batch,), 500)
        words = TextEmbeddings(
            torch.randn(batch, config.text[0].context_length, config.unet.context_channels, dtype=dtype),
            torch.randn(batch, config.text[1].projection or 0, dtype=dtype),
        )
        sizes = torch.tensor([[size, size, 0, 0, size, size]]).expand(batch, -1)
    vector, text = words.vector(sizes, config.size_channels).to(dtype), unet.project_context(words.context)
    network = CompiledUNet(unet) if compile_all else unet
    for preset, plan in plans.items():
        yield Contender(preset, lambda plan=plan: network(x, timestep, text, vector, plan))  # type: ignore[misc]
    added = {"text_embeds": words.pooled, "time_ids": sizes}
    plain: dict[Tensor, Tensor] = {}  # convolution weights in channels-first order, shared by two peers
    for name in peers:
        peer = diffusers_unet(unet, config, None if name == "diffusers-channels-last" else plain)
        if name == "tomesd":
            import tomesd

            tomesd.apply_patch(peer, ratio=0.5, max_downsample=4)
        if compile_all:
            peer = torch.compile(peer, mode="reduce-overhead" if device.type == "cuda" else None)
        yield Contender(
            name,
            lambda peer=peer: peer(x, timestep, words.context, added_cond_kwargs=added, return_dict=False)[0],  # type: ignore[misc]
        )


def diffusers_unet(unet: UNet, config: ModelConfig, plain: dict[Tensor, Tensor] | None) -> Any:
    """diffusers' U-Net with our tensors; ``plain`` collects copies in channels-first order, ``None`` copies none."""
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        peer = UNet2DConditionModel.from_config(json_files(Path(config.name), config)["unet/config.json"])
    table, tensors = unet_layout(config.unet), dict[str, Tensor]()
    for official, weight in unet.named_parameters():
        tensor = weight.detach()
        if plain is not None and not tensor.is_contiguous():
            tensor = plain.setdefault(weight, tensor.contiguous())
        mapping = table.mapping(official)
        tensors.update(zip(mapping.names, mapping.split(tensor), strict=True))
    peer.load_state_dict(tensors, assign=True)
    return peer.eval().requires_grad_(False)


def blocks(
    config: ModelConfig,
    name: str,
    size: int,
    batch: int,
    presets: Sequence[str],
    device: torch.device,
    dtype: torch.dtype,
) -> Iterator[Contender]:
    """The attention block ``name`` alone, under each preset. Raises ``ValueError`` for unknown blocks or presets."""
    plans = {preset: plan_of(preset, config).get(name) for preset in presets}
    sites = {site.name: site for site in config.unet.attention_sites()}
    if name not in sites:
        raise ValueError(f"there is no attention block {name!r}, expected one of {', '.join(sites)}")
    site, c = sites[name], config.unet
    with torch.device("meta"):
        block = AttentionBlock(site, c)
    randomize(block, device, dtype)
    side = -(-(size // config.vae.downscale) >> site.level)
    with device:
        x = torch.randn(batch, site.channels, side, side, dtype=dtype).to(memory_format=torch.channels_last)
        text = block.project_context(torch.randn(batch, config.text[0].context_length, c.context_channels, dtype=dtype))
    for preset, plan in plans.items():
        yield Contender(preset, lambda plan=plan: block(x, text, plan))  # type: ignore[misc]
