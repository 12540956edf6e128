"""A model of SDXL's kind that is small enough to be written, read and run in a moment; and SDXL's published JSON."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from minisdxl.checkpoint.modules import Modules, save
from minisdxl.config import Level, ModelConfig, TextConfig, UNetConfig, VAEConfig
from minisdxl.text import TextEncoders
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


def tiny_modules(seed: int = 0) -> Modules:
    """Random weights, none of them left at 0 or 1, that make pictures of much contrast and little saturation."""
    torch.manual_seed(seed)
    modules = Modules(UNet(TINY.unet), VAE(TINY.vae), TextEncoders(TINY.text))
    with torch.no_grad():
        for module in modules:
            for part in module.modules():
                if isinstance(part, nn.GroupNorm | nn.LayerNorm):
                    part.weight.add_(0.3 * torch.randn_like(part.weight))
                    part.bias.add_(0.3 * torch.randn_like(part.bias))
            module.eval()
        modules.vae.decoder.conv_out.weight.mul_(2)
    return modules


def tiny_file(path: Path, dtype: torch.dtype = torch.float32, seed: int = 0) -> Path:
    """The tiny model in one file."""
    save(path, TINY, tiny_modules(seed), dtype)
    return path


def sparse_file(path: Path, shapes: Mapping[str, tuple[int, ...]], dtype: str = "F16") -> Path:
    """A safetensors file of full size whose numbers are all zero and take no room on the disk."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    stop = 0
    for name, shape in shapes.items():
        code = "I64" if name.endswith("position_ids") else dtype
        start = stop
        stop += torch.Size(shape).numel() * {"I64": 8, "F16": 2, "F32": 4, "F8_E4M3": 1}[code]
        header[name] = {"dtype": code, "shape": shape, "data_offsets": [start, stop]}
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    os.truncate(path, 8 + len(text) + stop)
    return path


# stabilityai/stable-diffusion-xl-base-1.0, as published.
OFFICIAL: dict[str, dict[str, Any]] = {
    "model_index.json": {
        "_class_name": "StableDiffusionXLPipeline",
        "_diffusers_version": "0.19.0.dev0",
        "force_zeros_for_empty_prompt": True,
        "add_watermarker": None,
        "scheduler": ["diffusers", "EulerDiscreteScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "tokenizer_2": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    },
    "scheduler/scheduler_config.json": {
        "_class_name": "EulerDiscreteScheduler",
        "_diffusers_version": "0.19.0.dev0",
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "clip_sample": False,
        "interpolation_type": "linear",
        "num_train_timesteps": 1000,
        "prediction_type": "epsilon",
        "sample_max_value": 1.0,
        "set_alpha_to_one": False,
        "skip_prk_steps": True,
        "steps_offset": 1,
        "timestep_spacing": "leading",
        "trained_betas": None,
        "use_karras_sigmas": False,
    },
    "unet/config.json": {
        "_class_name": "UNet2DConditionModel",
        "_diffusers_version": "0.19.0.dev0",
        "act_fn": "silu",
        "addition_embed_type": "text_time",
        "addition_embed_type_num_heads": 64,
        "addition_time_embed_dim": 256,
        "attention_head_dim": [5, 10, 20],
        "block_out_channels": [320, 640, 1280],
        "center_input_sample": False,
        "class_embed_type": None,
        "class_embeddings_concat": False,
        "conv_in_kernel": 3,
        "conv_out_kernel": 3,
        "cross_attention_dim": 2048,
        "cross_attention_norm": None,
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        "downsample_padding": 1,
        "dual_cross_attention": False,
        "encoder_hid_dim": None,
        "encoder_hid_dim_type": None,
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "in_channels": 4,
        "layers_per_block": 2,
        "mid_block_only_cross_attention": None,
        "mid_block_scale_factor": 1,
        "mid_block_type": "UNetMidBlock2DCrossAttn",
        "norm_eps": 1e-05,
        "norm_num_groups": 32,
        "num_attention_heads": None,
        "num_class_embeds": None,
        "only_cross_attention": False,
        "out_channels": 4,
        "projection_class_embeddings_input_dim": 2816,
        "resnet_out_scale_factor": 1.0,
        "resnet_skip_time_act": False,
        "resnet_time_scale_shift": "default",
        "sample_size": 128,
        "time_cond_proj_dim": None,
        "time_embedding_act_fn": None,
        "time_embedding_dim": None,
        "time_embedding_type": "positional",
        "timestep_post_act": None,
        "transformer_layers_per_block": [1, 2, 10],
        "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
        "upcast_attention": None,
        "use_linear_projection": True,
    },
    "vae/config.json": {
        "_class_name": "AutoencoderKL",
        "_diffusers_version": "0.20.0.dev0",
        "_name_or_path": "../sdxl-vae/",
        "act_fn": "silu",
        "block_out_channels": [128, 256, 512, 512],
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "force_upcast": True,
        "in_channels": 3,
        "latent_channels": 4,
        "layers_per_block": 2,
        "norm_num_groups": 32,
        "out_channels": 3,
        "sample_size": 1024,
        "scaling_factor": 0.13025,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
    },
    "text_encoder/config.json": {
        "architectures": ["CLIPTextModel"],
        "attention_dropout": 0.0,
        "bos_token_id": 0,
        "dropout": 0.0,
        "eos_token_id": 2,
        "hidden_act": "quick_gelu",
        "hidden_size": 768,
        "initializer_factor": 1.0,
        "initializer_range": 0.02,
        "intermediate_size": 3072,
        "layer_norm_eps": 1e-05,
        "max_position_embeddings": 77,
        "model_type": "clip_text_model",
        "num_attention_heads": 12,
        "num_hidden_layers": 12,
        "pad_token_id": 1,
        "projection_dim": 768,
        "torch_dtype": "float16",
        "transformers_version": "4.32.0.dev0",
        "vocab_size": 49408,
    },
    "text_encoder_2/config.json": {
        "architectures": ["CLIPTextModelWithProjection"],
        "attention_dropout": 0.0,
        "bos_token_id": 0,
        "dropout": 0.0,
        "eos_token_id": 2,
        "hidden_act": "gelu",
        "hidden_size": 1280,
        "initializer_factor": 1.0,
        "initializer_range": 0.02,
        "intermediate_size": 5120,
        "layer_norm_eps": 1e-05,
        "max_position_embeddings": 77,
        "model_type": "clip_text_model",
        "num_attention_heads": 20,
        "num_hidden_layers": 32,
        "pad_token_id": 1,
        "projection_dim": 1280,
        "torch_dtype": "float16",
        "transformers_version": "4.32.0.dev0",
        "vocab_size": 49408,
    },
}


def write_json(folder: Path, files: Mapping[str, object]) -> Path:
    """Writes JSON files by their names in a folder."""
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps(content))
    return folder
