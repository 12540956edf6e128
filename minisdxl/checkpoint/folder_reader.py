"""Reads the JSON files of a diffusers folder as a ``ModelConfig``.

JSON files describe the parts (``unet/config.json``, ``scheduler/scheduler_config.json``, ...). Fields of a
``ModelConfig`` are read from them. Every other field that changes the model's output must have SDXL's value. The names
of fields are those of diffusers and transformers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from minisdxl.checkpoint.errors import CheckpointError
from minisdxl.checkpoint.identify import pipeline_family
from minisdxl.checkpoint.json_fields import Fields, check_values, differences
from minisdxl.checkpoint.layouts import PARTS
from minisdxl.checkpoint.predictions import predicting
from minisdxl.checkpoint.weight_files import LORA_FILE, WEIGHTS, part_folder
from minisdxl.config import (
    SDXL_BASE,
    SDXL_INPAINTING,
    SDXL_REFINER,
    Level,
    ModelConfig,
    NoiseConfig,
    TextConfig,
    UNetConfig,
    VAEConfig,
    known_defaults,
)
from minisdxl.preconditioning import SIGMA_DATA

INDEX = "model_index.json"
SCHEDULER = "scheduler/scheduler_config.json"

# Fields of SDXL's U-Net that UNetConfig does not have. Missing fields take these values; the two in UNET_NEEDED are
# required.
UNET = {
    "act_fn": "silu",
    "addition_embed_type": "text_time",
    "attention_type": "default",
    "center_input_sample": False,
    "class_embed_type": None,
    "conv_in_kernel": 3,
    "conv_out_kernel": 3,
    "cross_attention_norm": None,
    "downsample_padding": 1,
    "dual_cross_attention": False,
    "encoder_hid_dim": None,
    "encoder_hid_dim_type": None,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "mid_block_scale_factor": 1,
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "norm_eps": 1e-5,
    "num_attention_heads": None,  # for historical reasons the number of heads is called attention_head_dim
    "num_class_embeds": None,
    "only_cross_attention": False,
    "resnet_out_scale_factor": 1.0,
    "resnet_skip_time_act": False,
    "resnet_time_scale_shift": "default",
    "reverse_transformer_layers_per_block": None,
    "time_embedding_act_fn": None,
    "time_embedding_dim": None,
    "time_embedding_type": "positional",
    "timestep_post_act": None,
    "use_linear_projection": True,
}
UNET_NEEDED = ("addition_embed_type", "use_linear_projection")  # diffusers' defaults for them are not SDXL's
VAE = {
    "act_fn": "silu",
    "mid_block_add_attention": True,
    "shift_factor": None,
    "use_post_quant_conv": True,
    "use_quant_conv": True,
}
TEXT = {"layer_norm_eps": 1e-5}
# The same for schedulers: of discrete noise levels, and of flows.
NOISE = {"beta_schedule": "scaled_linear", "timestep_type": "discrete", "trained_betas": None}
FLOW = {"invert_sigmas": False, "shift_terminal": None, "use_dynamic_shifting": False}
# What schedulers call predictions: of discrete noise levels, and of those whose class begins with EDM.
PREDICTION_TYPES = {"epsilon": "noise", "v_prediction": "v"}
EDM_PREDICTION_TYPES = {"epsilon": "edm", "v_prediction": "edm-v"}
# How SDXL's VAE scales latents.
LATENTS: dict[str, Any] = {"latents_mean": (), "latents_std": (), "scale_factor": SDXL_BASE.vae.scale_factor}
_ATTENDS = {"DownBlock2D": False, "CrossAttnDownBlock2D": True}


def read_config(folder: Path) -> ModelConfig:
    """The config of the model in a diffusers folder; ``SDXL_BASE`` or ``SDXL_INPAINTING`` for one of that size.

    Raises:
        CheckpointError: if a JSON file is missing or damaged, describes another kind of model, or differs from SDXL in
            some numbers only.
    """
    if not (folder / INDEX).is_file():
        raise CheckpointError(
            f"{folder} {_without_index(folder)}; expected a diffusers folder or one .safetensors file"
        )
    return described_config(folder, lambda name: Fields.read(folder / name))


def described_config(folder: Path, read: Callable[[str], Fields]) -> ModelConfig:
    """As :func:`read_config`, from JSON files that ``read`` returns by name; the folder need not exist."""
    index = read(INDEX)
    other = pipeline_family(index.values)
    if other is not None:
        raise CheckpointError(f"{folder} is {other}; expected the folder of a StableDiffusionXLPipeline")
    refines = index.values.get("text_encoder") == [None, None]
    index.check({"force_zeros_for_empty_prompt": not refines, "requires_aesthetics_score": refines})
    scheduler = read(SCHEDULER)
    parts = [part for part in PARTS if part != "text_encoder" or not refines]
    fields = {part: read(f"{part}/config.json") for part in parts}
    try:
        vae, unet = vae_config(fields["vae"]), unet_config(fields["unet"])
        config = ModelConfig(
            name=_name(index, folder),
            unet=unet,
            vae=vae,
            text=tuple(
                text_config(fields[part], part == "text_encoder") for part in parts if part.startswith("text_encoder")
            ),
            size=fields["unet"].integer("sample_size", 128) * vae.downscale,
            size_channels=fields["unet"].integer("addition_time_embed_dim"),
            noise=noise_config(scheduler),
            defaults=known_defaults(_name(index, folder)),
            scores=SDXL_REFINER.scores if refines else (),
        )
        check_values(config)
    except (ValueError, ArithmeticError) as error:  # of the config, for numbers that do not go together
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{folder} does not describe an SDXL model: {error}") from error
    official = SDXL_REFINER if refines else SDXL_INPAINTING if config.inpaints else SDXL_BASE
    if (unet.model_channels, unet.levels) != (official.unet.model_channels, official.unet.levels):
        return config
    # Nothing in a folder says what SDXL was trained on; and Turbo, which has SDXL's numbers, names another size.
    config = replace(
        config, name=official.name, size=official.size, buckets=official.buckets, defaults=official.defaults
    )
    # What its kin may have of their own: another prediction, and other latents.
    plain = replace(config, noise=predicting(config.noise, "noise"))
    if config.vae.latents_std:
        plain = replace(plain, vae=replace(vae, **LATENTS))
    if plain != official:
        raise CheckpointError(f"{folder} is not quite SDXL: {', '.join(differences(plain, official))}")
    return config


def _name(index: Fields, folder: Path) -> str:
    name = index.values.get("_name_or_path")
    return name if isinstance(name, str) and name.isprintable() else folder.absolute().name


def _without_index(folder: Path) -> str:
    """Describes a folder that has no index of a pipeline."""
    if (folder / "config.json").is_file():
        kind = Fields.read(folder / "config.json").values.get("_class_name")
        return f"is the folder of one part ({kind!r}) and not of a whole model"
    if (folder / LORA_FILE).is_file():
        return f"is the folder of a LoRA ({LORA_FILE}), which goes beside a model (--lora)"
    files = sorted(file.name for file in folder.glob("*") if file.suffix in WEIGHTS)
    return f"has no {INDEX}" + (f", only {', '.join(files[:5])}" if files else "")


def unet_config(fields: Fields) -> UNetConfig:
    """The U-Net that a ``config.json`` describes. Raises ``ValueError``, mostly ``CheckpointError``."""
    channels, multipliers = fields.multipliers("block_out_channels")
    count = len(multipliers)
    kinds = fields.values.get("down_block_types")
    if not isinstance(kinds, list) or len(kinds) != count or not all(kind in _ATTENDS for kind in map(str, kinds)):
        raise fields.error("down_block_types", f"{count} of {list(_ATTENDS)}")
    attends = [_ATTENDS[kind] for kind in kinds]
    fields.check(UNET, UNET_NEEDED)
    fields.check({"up_block_types": [kind.replace("Down", "Up") for kind in reversed(kinds)]}, ("up_block_types",))
    depths = fields.integers("transformer_layers_per_block", count, 1)
    heads = fields.integers("attention_head_dim", count, 8)  # the number of heads, despite its name
    widths = {channels * multipliers[i] / heads[i] for i in range(count) if attends[i] or i == count - 1}
    if len(widths) > 1 or not min(widths).is_integer():
        raise fields.error("attention_head_dim", "numbers of heads that are equally wide on all levels")
    blocks = fields.integers("layers_per_block", count, 2)
    if len(set(blocks)) > 1:
        raise fields.error("layers_per_block", "as many on all levels")
    return UNetConfig(
        model_channels=channels,
        levels=tuple(Level(multipliers[i], depths[i] if attends[i] else 0) for i in range(count)),
        middle_depth=depths[-1],
        res_blocks=blocks[0],
        head_channels=int(min(widths)),
        context_channels=fields.integer("cross_attention_dim"),
        vector_channels=fields.integer("projection_class_embeddings_input_dim"),
        in_channels=fields.integer("in_channels", 4),
        out_channels=fields.integer("out_channels", 4),
        norm_groups=fields.integer("norm_num_groups", 32),
    )


def vae_config(fields: Fields) -> VAEConfig:
    """The autoencoder that a ``config.json`` describes. Raises ``ValueError``, mostly ``CheckpointError``."""
    channels, multipliers = fields.multipliers("block_out_channels")
    fields.check(VAE)
    ways = (("Down", "Encoder"), ("Up", "Decoder"))
    kinds = {f"{way.lower()}_block_types": [f"{way}{coder}Block2D"] * len(multipliers) for way, coder in ways}
    fields.check(kinds, tuple(kinds))
    fields.check({"out_channels": fields.integer("in_channels", 3)})
    latents = fields.integer("latent_channels", 4)
    return VAEConfig(
        channels=channels,
        multipliers=multipliers,
        res_blocks=fields.integer("layers_per_block", 1),
        scale_factor=fields.number("scaling_factor", 0.18215),
        latent_channels=latents,
        image_channels=fields.integer("in_channels", 3),
        norm_groups=fields.integer("norm_num_groups", 32),
        latents_mean=fields.numbers("latents_mean", latents),
        latents_std=fields.numbers("latents_std", latents),
    )


def text_config(fields: Fields, first: bool) -> TextConfig:
    """The text encoder that a ``config.json`` describes. Raises ``ValueError``, mostly ``CheckpointError``."""
    width, vocabulary = fields.integer("hidden_size", 512), fields.integer("vocab_size", 49408)
    fields.check({**TEXT, "intermediate_size": 4 * width}, ("intermediate_size",))
    # Published configs have 0 and 2 for the start and end tokens, of which transformers knows that they are not meant.
    end = fields.integer("eos_token_id", 49407)
    end = vocabulary - 1 if end == 2 else end
    return TextConfig(
        width=width,
        layers=fields.integer("num_hidden_layers", 12),
        heads=fields.integer("num_attention_heads", 8),
        activation=str(fields.values.get("hidden_act", "quick_gelu")),
        vocabulary=vocabulary,
        start_token=end - 1,
        end_token=end,
        pad_token=end if first else 0,  # as SDXL pads; pad_token_id of a published config is not meant either
        projection=None if first else fields.integer("projection_dim", 512),
        context_length=fields.integer("max_position_embeddings", 77),
    )


def noise_config(fields: Fields) -> NoiseConfig:
    """What a ``scheduler_config.json`` says of noise levels and prediction.

    How a scheduler spaces the steps of a run is not of the model. Raises ``ValueError``, mostly ``CheckpointError``.
    """
    kind = str(fields.values.get("_class_name"))
    levels = NoiseConfig(steps=fields.integer("num_train_timesteps", 1000))
    if kind.startswith("FlowMatch"):
        fields.check(FLOW)
        return predicting(levels, "flow", {"shift": fields.number("shift", 1.0)})
    names = EDM_PREDICTION_TYPES if kind.startswith("EDM") else PREDICTION_TYPES
    prediction = names.get(str(fields.values.get("prediction_type", "epsilon")))
    if prediction is None:
        raise fields.error("prediction_type", " or ".join(map(repr, names)))
    if kind.startswith("EDM"):
        sigma_data = SIGMA_DATA[prediction]
        fields.check({"sigma_data": sigma_data}, ("sigma_data",) if sigma_data != 0.5 else ())  # diffusers' default
        ends = {"sigma_min": 0.002, "sigma_max": 80.0}  # diffusers' defaults
        return predicting(levels, prediction, {key: fields.number(key, value) for key, value in ends.items()})
    fields.check(NOISE, ("beta_schedule",))
    zero_snr = fields.values.get("rescale_betas_zero_snr", False)
    if type(zero_snr) is not bool or (zero_snr and prediction == "noise"):
        raise fields.error("rescale_betas_zero_snr", "False" if prediction == "noise" else "True or False")
    levels = replace(levels, beta_start=fields.number("beta_start", 0.0001), beta_end=fields.number("beta_end", 0.02))
    return predicting(levels, prediction, {"ztsnr": int(zero_snr)})


def check_part(path: Path, part: str, config: ModelConfig) -> None:
    """Refuses the folder of a part whose ``config.json`` describes another one than ``config`` has."""
    file = part_folder(path, part) / "config.json"
    if not file.is_file():
        return
    fields = Fields.read(file)
    try:
        found = _with_part(config, part, fields)
    except (ValueError, ArithmeticError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{file} does not fit {config.name}: {error}") from error
    if config.vae.latents_std and not found.vae.latents_std:  # these and the scale are of the U-Net's latents
        found = replace(found, vae=replace(found.vae, **{key: getattr(config.vae, key) for key in LATENTS}))
    if found != config:
        raise CheckpointError(f"{file} does not fit {config.name}: {', '.join(differences(found, config))}")


def _with_part(config: ModelConfig, part: str, fields: Fields) -> ModelConfig:
    """The config with the part that a ``config.json`` describes. Raises as :func:`unet_config`."""
    if part == "unet":
        return replace(config, unet=unet_config(fields))
    if part == "vae":
        return replace(config, vae=vae_config(fields))
    whole = fields.values.get("text_config")  # of a CLIPModel, which has a picture encoder too
    fields = Fields(fields.path, whole) if isinstance(whole, dict) else fields
    first = part == "text_encoder"
    text = text_config(fields, first)
    return replace(config, text=(text, config.text[1]) if first else (config.text[0], text))
