"""Small configurations, models of random weights, and full-size files that take no room."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from minisdxl.checkpoint.modules import Modules, save
from minisdxl.config import SDXL_BASE, Level, ModelConfig, TextConfig, UNetConfig, VAEConfig
from minisdxl.pipeline import SDXL
from minisdxl.prompting.encoders import PromptEncoders
from minisdxl.text import TextEncoders
from minisdxl.tokenizer import Tokenizer, read_vocabulary
from minisdxl.unet import UNet
from minisdxl.vae import VAE

VOCABULARY = Path(__file__).parents[2] / "weights" / "shapes" / "tokenizer"
TOKENS = {"vocabulary": 640, "start_token": 638, "end_token": 639}
# All widths and depths differ, so that nothing fits where it does not belong; as diffusers has it, the middle is as
# deep as the last level.
TINY = ModelConfig(
    name="tiny",
    unet=UNetConfig(
        model_channels=8,
        levels=(Level(1, 0), Level(2, 1), Level(3, 2)),
        middle_depth=2,
        res_blocks=2,
        head_channels=8,
        context_channels=40,
        vector_channels=44,
        norm_groups=4,
    ),
    vae=VAEConfig(channels=8, multipliers=(1, 2, 3), res_blocks=1, scale_factor=0.5, norm_groups=4),
    text=(
        TextConfig(16, 2, 2, "quick_gelu", **TOKENS, pad_token=639),
        TextConfig(24, 3, 3, "gelu", **TOKENS, pad_token=0, projection=20),
    ),
    size=64,
    size_channels=4,
)


# SDXL's structure (three levels, depths 0, 2 and 3, label embedding) at widths for which 32 norm groups do.
SMALL_UNET = UNetConfig(
    model_channels=32,
    levels=(Level(1, 0), Level(2, 2), Level(4, 3)),
    middle_depth=3,
    res_blocks=2,
    head_channels=16,
    context_channels=48,
    vector_channels=40,
)
# SDXL's levels, less deep and less wide; as deep as pruning in three layers asks for.
DEEP_UNET = UNetConfig(32, (Level(1, 0), Level(2, 2), Level(4, 4)), 4, 1, 16, 24, 40, norm_groups=8)
# Three attention blocks, for what takes long on each.
SHALLOW_UNET = UNetConfig(16, (Level(1, 2),), 0, 1, 16, 24, 40, norm_groups=8)
SMALL_VAE = VAEConfig(channels=32, multipliers=(1, 2, 2), res_blocks=2, scale_factor=0.13025)
# What the benchmark of speed takes for SDXL: its contexts, and few channels.
BENCH_MODEL = replace(
    SDXL_BASE,
    name="tiny",
    unet=UNetConfig(32, (Level(1, 0), Level(2, 2), Level(4, 2)), 2, 2, 32, 2048, 2816),
)


# The same as an inpainting model.
TINY_INPAINTING = replace(TINY, name="tiny-inpainting", unet=replace(TINY.unet, in_channels=9))
# The refiner's structure: attention on the two levels in the middle, and SDXL's second text encoder alone.
TINY_REFINER = replace(
    TINY,
    name="tiny-refiner",
    unet=replace(
        TINY.unet,
        levels=(Level(1, 0), Level(2, 2), Level(3, 2), Level(3, 0)),
        context_channels=24,
        vector_channels=40,
    ),
    text=TINY.text[1:],
    scores=(6.0, 2.5),
)


def tiny_modules(seed: int = 0, config: ModelConfig = TINY) -> Modules:
    """Random weights, none of them left at 0 or 1, that make pictures of much contrast and little saturation."""
    torch.manual_seed(seed)
    modules = Modules(UNet(config.unet), VAE(config.vae), TextEncoders(config.text))
    with torch.no_grad():
        for module in modules:
            for part in module.modules():
                if isinstance(part, nn.GroupNorm | nn.LayerNorm):
                    part.weight.add_(0.3 * torch.randn_like(part.weight))
                    part.bias.add_(0.3 * torch.randn_like(part.bias))
            module.eval()
        modules.vae.decoder.conv_out.weight.mul_(2)
    return modules


def tiny_file(path: Path, dtype: torch.dtype = torch.float32, seed: int = 0, config: ModelConfig = TINY) -> Path:
    """The tiny model in one file."""
    save(path, config, tiny_modules(seed, config), dtype)
    return path


def tiny_sdxl(config: ModelConfig = TINY, seed: int = 0) -> SDXL:
    """A model of random weights with the bundled model's vocabulary."""
    modules = tiny_modules(seed, config)
    tokenizer = Tokenizer(*read_vocabulary(VOCABULARY), config.text)
    return SDXL(config, modules.unet, modules.vae, PromptEncoders(modules.text), tokenizer)


def sparse_file(path: Path, shapes: Mapping[str, tuple[int, ...]], dtype: str = "F16") -> Path:
    """A safetensors file of full size whose numbers are all zero and take no room on the disk."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    stop = 0
    for name, shape in shapes.items():
        code = "I64" if name.endswith("position_ids") else dtype
        start = stop
        stop += torch.Size(shape).numel() * {"I64": 8, "F16": 2, "F32": 4, "I8": 1}[code]
        header[name] = {"dtype": code, "shape": shape, "data_offsets": [start, stop]}
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    os.truncate(path, 8 + len(text) + stop)
    return path


def scale_weights(module: nn.Module, scale: float) -> None:
    """Multiplies every linear map and convolution, but no normalization: variances shrink towards eps, so eps shows."""
    for part in module.modules():
        if isinstance(part, nn.Linear | nn.Conv2d):
            for parameter in part.parameters():
                parameter.data.mul_(scale)


def random_unet(config: UNetConfig, dtype: torch.dtype, scale: float = 1.0) -> UNet:
    torch.manual_seed(0)
    unet = UNet(config).to(dtype).eval().requires_grad_(False)
    scale_weights(unet, scale)
    return unet


def unet_inputs(
    config: UNetConfig, size: tuple[int, int], dtype: torch.dtype, scale: float = 1.0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Latent, timestep, context and vector for a batch of two."""
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).mul(scale).to(dtype)

    x, context, vector = draw(2, 4, *size), draw(2, 77, config.context_channels), draw(2, config.vector_channels)
    return x, torch.tensor([801, 13]), context, vector


def random_vae(dtype: torch.dtype, scale: float) -> VAE:
    """A small VAE none of whose weights is at 0 or 1."""
    torch.manual_seed(0)
    vae = VAE(SMALL_VAE).to(dtype).eval()
    scale_weights(vae, scale)
    for part in vae.modules():
        if isinstance(part, nn.GroupNorm):
            part.weight.data.normal_(1, 0.3)
            part.bias.data.normal_(0, 0.3 * scale)
    return vae
