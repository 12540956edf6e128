"""The text files of a diffusers folder, made from a ``ModelConfig`` and a vocabulary."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from minisdxl.checkpoint.errors import CheckpointError
from minisdxl.checkpoint.folder_reader import (
    EDM_PREDICTION_TYPES,
    FLOW,
    INDEX,
    NOISE,
    PREDICTION_TYPES,
    SCHEDULER,
    TEXT,
    UNET,
    VAE,
    described_config,
)
from minisdxl.checkpoint.json_fields import Fields, differences
from minisdxl.config import ModelConfig, NoiseConfig, TextConfig
from minisdxl.preconditioning import SIGMA_DATA
from minisdxl.tokenizer import END, START, Tokenizer, Vocabulary

COMPONENTS = {
    "text_encoder": ["transformers", "CLIPTextModel"],
    "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "tokenizer_2": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}

TEXTS, TOKENIZERS = ("text_encoder", "text_encoder_2"), ("tokenizer", "tokenizer_2")  # the refiner has the second ones


def json_files(folder: Path, config: ModelConfig) -> dict[str, dict[str, Any]]:
    """Content of each JSON file that describes a model, by its name in the folder that is to be.

    Raises:
        CheckpointError: if they would not describe ``config`` whole, because diffusers has no such model. Training
            sizes (``buckets``) and ``defaults`` have no place there.
    """
    scheduler = _scheduler(config.noise)
    kind = "Img2Img" if config.refines else "Inpaint" if config.inpaints else ""
    refiner = {"requires_aesthetics_score": True, "text_encoder": [None, None], "tokenizer": [None, None]}
    texts = dict(zip(TEXTS[-len(config.text) :], config.text, strict=True))
    files: dict[str, dict[str, Any]] = {
        INDEX: {
            "_class_name": f"StableDiffusionXL{kind}Pipeline",
            "_name_or_path": config.name,
            "force_zeros_for_empty_prompt": not config.refines,
            **COMPONENTS,
            "scheduler": ["diffusers", scheduler["_class_name"]],
            **(refiner if config.refines else {}),
        },
        SCHEDULER: scheduler,
        "unet/config.json": _unet(config),
        "vae/config.json": _vae(config),
        **{f"{part}/config.json": _text(part, text) for part, text in texts.items()},
    }
    described = described_config(folder, lambda name: Fields(folder / name, files[name]))
    lost = differences(replace(described, buckets=config.buckets, defaults=config.defaults), config)
    if lost:
        raise CheckpointError(
            f"cannot write {folder}: diffusers has no such model, it would be read as one whose {', '.join(lost)}"
        )
    return files


def tokenizer_files(config: ModelConfig, vocabulary: Vocabulary) -> dict[str, str]:
    """Text of each file of the tokenizers, by its name in the folder.

    Raises:
        ValueError: if the vocabulary is not that of the text encoders.
    """
    Tokenizer(*vocabulary, config.text)
    texts = {index: token for token, index in vocabulary.tokens.items()}
    shared = {
        "vocab.json": json.dumps(vocabulary.tokens),
        "merges.txt": "\n".join(["#version: 0.2", *(f"{first} {second}" for first, second in vocabulary.merges), ""]),
    }
    files: dict[str, str] = {}
    for folder, text in zip(TOKENIZERS[-len(config.text) :], config.text, strict=True):
        settings = {
            "tokenizer_class": COMPONENTS[folder][1],
            "add_prefix_space": False,
            "bos_token": START,
            "do_lower_case": True,
            "eos_token": END,
            "model_max_length": text.context_length,
            "pad_token": texts[text.pad_token],
            "unk_token": END,
        }
        files |= {f"{folder}/{name}": content for name, content in shared.items()}
        files[f"{folder}/tokenizer_config.json"] = json.dumps(settings, indent=2)
    return files


def _unet(config: ModelConfig) -> dict[str, Any]:
    unet = config.unet
    depths = [level.depth for level in unet.levels]
    widths = [unet.channels(level) for level in range(len(depths))]
    return {
        "_class_name": COMPONENTS["unet"][1],
        **UNET,
        "addition_time_embed_dim": config.size_channels,
        "attention_head_dim": [max(width // unet.head_channels, 1) for width in widths],
        "block_out_channels": widths,
        "cross_attention_dim": unet.context_channels,
        "down_block_types": ["CrossAttnDownBlock2D" if depth else "DownBlock2D" for depth in depths],
        "in_channels": unet.in_channels,
        "layers_per_block": unet.res_blocks,
        "norm_num_groups": unet.norm_groups,
        "out_channels": unet.out_channels,
        "projection_class_embeddings_input_dim": unet.vector_channels,
        "sample_size": config.size // config.vae.downscale,
        # The last is the middle's too, and the only one that counts where the last level has no attention.
        "transformer_layers_per_block": [*(max(depth, 1) for depth in depths[:-1]), depths[-1] or unet.middle_depth],
        "up_block_types": ["CrossAttnUpBlock2D" if depth else "UpBlock2D" for depth in reversed(depths)],
    }


def _vae(config: ModelConfig) -> dict[str, Any]:
    vae = config.vae
    levels = len(vae.multipliers)
    return {
        "_class_name": COMPONENTS["vae"][1],
        **VAE,
        "block_out_channels": [vae.channels * multiplier for multiplier in vae.multipliers],
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "force_upcast": True,  # the official VAE overflows in fp16
        "in_channels": vae.image_channels,
        "latent_channels": vae.latent_channels,
        "latents_mean": list(vae.latents_mean) or None,
        "latents_std": list(vae.latents_std) or None,
        "layers_per_block": vae.res_blocks,
        "norm_num_groups": vae.norm_groups,
        "out_channels": vae.image_channels,
        "sample_size": config.size,
        "scaling_factor": vae.scale_factor,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
    }


def _text(part: str, config: TextConfig) -> dict[str, Any]:
    return {
        "architectures": [COMPONENTS[part][1]],
        "model_type": "clip_text_model",
        **TEXT,
        "attention_dropout": 0.0,
        "bos_token_id": config.start_token,
        "eos_token_id": config.end_token,
        "hidden_act": config.activation,
        "hidden_size": config.width,
        "intermediate_size": 4 * config.width,
        "max_position_embeddings": config.context_length,
        "num_attention_heads": config.heads,
        "num_hidden_layers": config.layers,
        "pad_token_id": config.pad_token,
        "projection_dim": config.projection or config.width,
        "vocab_size": config.vocabulary,
    }


def _scheduler(noise: NoiseConfig) -> dict[str, Any]:
    types = {ours: theirs for names in (PREDICTION_TYPES, EDM_PREDICTION_TYPES) for theirs, ours in names.items()}
    match noise.prediction:
        case "flow":
            kind = "FlowMatchEulerDiscreteScheduler"
            return {"_class_name": kind, **FLOW, "num_train_timesteps": noise.steps, "shift": noise.shift}
        case "edm" | "edm-v":
            return {
                "_class_name": "EDMEulerScheduler",
                "num_train_timesteps": noise.steps,
                "prediction_type": types[noise.prediction],
                "sigma_data": SIGMA_DATA[noise.prediction],
                "sigma_max": noise.sigma_max,
                "sigma_min": noise.sigma_min,
                "sigma_schedule": "karras" if noise.prediction == "edm" else "exponential",
            }
    return {
        "_class_name": "EulerDiscreteScheduler",
        **NOISE,
        "prediction_type": types[noise.prediction],
        "rescale_betas_zero_snr": noise.zero_terminal_snr,
        "beta_end": noise.beta_end,
        "beta_start": noise.beta_start,
        "num_train_timesteps": noise.steps,
        "timestep_spacing": "trailing",  # the timesteps of Stability AI's own code, and ours
    }
