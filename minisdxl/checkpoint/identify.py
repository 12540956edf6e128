"""Recognizes models of other kinds by names, shapes and metadata, so that errors can name them."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from typing import Any

from minisdxl.checkpoint.layouts import PARTS, unet_layout
from minisdxl.checkpoint.tensorfile import Shape
from minisdxl.config import SDXL_BASE, Level

REFINER = "the SDXL refiner, which finishes pictures of the base model"

# Diffusion transformers by the names of their blocks, as they are and with underscores for dots, as kohya's scripts
# have them. Most telling first.
TRANSFORMERS = (
    (r"(?<!single_)transformer_blocks_\d+_(img|txt)_(mlp|mod)_", "a Qwen-Image model"),
    (r"double_blocks_\d+_(img|txt)_(mlp_fc|mod_linear)|individual_token_refiner_", "a HunyuanVideo model"),
    (r"joint_transformer_blocks_\d+_", "an AuraFlow model"),
    (r"(double|single|single_transformer)_blocks_\d+_", "a Flux model"),
    (r"joint_blocks_\d+_", "a Stable Diffusion 3 model"),
    (r"transformer_blocks_\d+_attn_add_[kqv]_proj", "a Stable Diffusion 3 or Flux model"),
    (
        r"(noise|context)_refiner_\d+_|(^|_)layers_\d+_(attention_(qkv|to_[qkv]|out)|feed_forward_w\d)",
        "a Z-Image model",
    ),
    (
        r"(?<!transformer_)blocks_\d+_(self_attn|cross_attn|ffn)_|^(transformer\.)?blocks\.\d+\.attn[12]\.",
        "a Wan model",
    ),
    (r"adaln_single|caption_projection", "a PixArt or LTX-Video model"),
    (r"^lora_prior_", "a Stable Cascade model"),
    (r"^(lora_)?transformer[_-](?!resblocks)", "a diffusion transformer"),
)

# Tensors that quantized weights come with, and what quantizes so. Most telling first.
QUANTIZED = (
    (r"\.(wscales|wcscales|wtscale|smooth_factor(_orig)?)$", "SVDQuant (Nunchaku)"),
    (r"\.bitsandbytes__nf4$", "bitsandbytes to nf4"),
    (r"\.bitsandbytes__fp4$", "bitsandbytes to fp4"),
    (r"\.(absmax|quant_map|SCB)$", "bitsandbytes"),
    (r"\.(qweight|qzeros|g_idx)$", "GPTQ or AWQ"),
    (r"\._(data|scale|shift)$", "optimum-quanto"),
    (r"\.(zero_point|svd_up)$", "SDNQ"),
    (r"(^|\.)(comfy_quant|scaled_fp8)$|\.(weight_scale(_2)?|scale_weight|pre_quant_scale)$", "ComfyUI"),
)

# Names that only one family of files has, most telling first.
CONTROL_LORA = (r"^lora_controlnet$", "a Control-LoRA, a ControlNet that is stored as a change of SDXL's U-Net")
LORA = r"lora_|[._]lora\.|\.hada_w\d|\.lokr_w\d|\.oft_blocks|\.(diff|diff_b|w_norm|b_norm|on_input)$"
FAMILIES = (
    CONTROL_LORA,
    (r"^lllite_", "a ControlNet-LLLite"),
    (r"(^|\.)encoder\.block\.\d+\.layer\.\d+\.", "a T5 text encoder, of models newer than SDXL"),
    (r"(^|\.)layers\.\d+\.mlp\.gate_proj\.", "a language model, the text encoder of models newer than SDXL"),
    (LORA, "a LoRA, a change to be applied to some whole model"),
    (r"^control_model\.|^controlnet_|(^|\.)input_hint_block\.", "a ControlNet"),
    (r"^(adapter\.)?body\.\d+\.", "a T2I-Adapter"),
    (r"^(ip_adapter|image_proj)\.", "an IP-Adapter"),
    (r"\.motion_modules\.", "an AnimateDiff motion module"),
    (r"^(clip_g|clip_l|emb_params|string_to_param.*|bundle_emb\..*)$", "a textual inversion embedding"),
    (r"^(taesd_)?((en|de)coder\.)?(layers\.)?\d+\.conv\.\d+\.", "TAESDXL or another tiny autoencoder for previews"),
)

# Transformer layers of each attention block on the way down, of models cut out of SDXL (which has 2, 2, 10, 10).
SMALLER_MODELS = {(2, 2, 4, 4): "SSD-1B", (1, 1, 2, 2): "Segmind Vega", (2, 5): "KOALA-700M", (2, 6): "KOALA-1B"}

# Names of one part alone, and which of the parts in ``layouts.PARTS`` it can be.
BARE_PARTS = (
    (r"^(unet\.)?down_blocks\.", "only a U-Net, in the diffusers layout", ("unet",)),
    (r"^(diffusion_model\.)?(input_blocks|middle_block|output_blocks)\.", "only a U-Net", ("unet",)),
    (r"^(encoder\.down_blocks|decoder\.up_blocks)\.", "only a VAE, in the diffusers layout", ("vae",)),
    (r"^(encoder|decoder)\.(conv_in|down|mid|up|conv_out)\b", "only a VAE", ("vae",)),
    (r"(^|\.)(text_model|resblocks|text_projection)\b", "only a text encoder", ("text_encoder", "text_encoder_2")),
)

# CLIP's text encoders by their width, and which of SDXL's parts they are.
TOKENS = re.compile(r"(^|\.)token_embedding\.weight$")
CLIPS = {
    768: ("text_encoder", "CLIP ViT-L (clip_l), the first text encoder of SDXL"),
    1280: ("text_encoder_2", "OpenCLIP ViT-bigG (clip_g), the second text encoder of SDXL"),
    1024: (None, "OpenCLIP ViT-H, the text encoder of Stable Diffusion 2.x"),
}

# Names of SDXL's U-Net in diffusers. Every level may have attention here: SD 1.x has it where SDXL has none.
UNET_LAYOUT = unet_layout(replace(SDXL_BASE.unet, levels=(Level(1, 1), Level(2, 1), Level(4, 1), Level(4, 1))))


def family(shapes: Mapping[str, Shape], parts: Collection[str] = tuple(PARTS)) -> str | None:
    """The kind of a file with these tensors, if it is known not to be the given parts of an SDXL base model.

    ``None`` if nothing is known. The names and shapes must still be compared one by one.
    """
    if transformer := transformer_family(shapes):
        return transformer
    if quantizer := _first(QUANTIZED, shapes):
        return f"quantized by {quantizer}"
    if what := _first(FAMILIES, shapes):
        return what
    if _has(shapes, "cond_stage_model.") and not _has(shapes, "conditioner."):
        return f"a Stable Diffusion {'1.x' if _has(shapes, 'cond_stage_model.transformer.') else '2.x'} model"
    return _variant(shapes) or _part(shapes, parts)


def transformer_family(names: Collection[str]) -> str | None:
    """The diffusion transformer to which these tensor names, or the names in its LoRA, belong; else ``None``."""
    return _first(TRANSFORMERS, [*names, *(name.replace(".", "_") for name in names)])


def _first(table: Iterable[tuple[str, str]], names: Collection[str]) -> str | None:
    """The entry of the first pattern that is found in one of the names."""
    return next((what for pattern, what in table if any(re.search(pattern, name) for name in names)), None)


def _variant(shapes: Mapping[str, Shape]) -> str | None:
    """Models whose U-Net or VAE has the names of SDXL's, official or diffusers', and other numbers."""
    unet = {_official(name): shape for name, shape in shapes.items()}
    if unet.get("label_emb.0.0.weight", ())[1:] == (2560,) or _has(shapes, "conditioner.embedders.0.model."):
        return REFINER
    in_channels = unet.get("input_blocks.0.0.weight", ())[1:2]
    if in_channels == (8,):
        return "a pix2pix editing model (8 input channels, not 4)"
    context = unet.get("input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight", ())[1:]
    if context in ((768,), (1024,)):
        return f"only the U-Net of a Stable Diffusion {'1.x' if context == (768,) else '2.x'} model"
    if any(shapes.get(f"{prefix}decoder.conv_in.weight", ())[1:2] == (16,) for prefix in ("", PARTS["vae"].prefix)):
        return "a VAE with 16 latent channels, such as that of Flux or Stable Diffusion 3"
    smaller = SMALLER_MODELS.get(_depths(unet)) if unet.get("input_blocks.0.0.weight", ())[:1] == (320,) else None
    return f"{smaller}, a smaller model cut out of SDXL" if smaller else None


def _official(name: str) -> str:
    """The official name of a tensor of a U-Net, without its prefix; other names as they are."""
    name = name.removeprefix("model.").removeprefix("diffusion_model.").removeprefix("unet.")
    try:
        return UNET_LAYOUT.official(name)
    except KeyError:
        return name


def _depths(names: Collection[str]) -> tuple[int, ...]:
    """Transformer layers of each attention block on the way down."""
    layers: dict[int, set[str]] = {}
    for name in names:
        if match := re.match(r"input_blocks\.(\d{1,3})\.1\.transformer_blocks\.(\d+)\.", name):
            layers.setdefault(int(match[1]), set()).add(match[2])
    return tuple(len(layers[block]) for block in sorted(layers))


def _part(shapes: Mapping[str, Shape], wanted: Collection[str]) -> str | None:
    """Some parts of a model without others that are wanted."""
    present = [part.label for part in PARTS.values() if _has(shapes, part.prefix)]
    absent = [PARTS[part].label for part in wanted if PARTS[part].label not in present]
    if not absent:
        return None
    if present:
        return f"only the {' and '.join(present)} of a model, without its {' and '.join(absent)}"
    if len(wanted) == 1 and (what := _text_encoder(shapes, next(iter(wanted)))):
        return what
    for pattern, what, parts in BARE_PARTS:
        if any(re.search(pattern, name) for name in shapes):
            return None if set(wanted) <= set(parts) else what
    return f"no model that is known here, with {len(shapes)} tensors"


def _text_encoder(shapes: Mapping[str, Shape], wanted: str) -> str | None:
    """Which CLIP a text encoder is by its width, if that is not SDXL's of the part ``wanted``."""
    widths = {shape[-1] for name, shape in shapes.items() if shape and TOKENS.search(name)}
    return next((what for width, (part, what) in CLIPS.items() if width in widths and part != wanted), None)


def _has(names: Collection[str], prefix: str) -> bool:
    return any(name.startswith(prefix) for name in names)


# diffusers' pipelines by the beginning of their names, most telling first.
PIPELINES = (
    ("StableDiffusionXLInstructPix2Pix", "a pix2pix editing model (8 input channels, not 4)"),
    ("StableDiffusion3", "a Stable Diffusion 3 model"),
    ("StableDiffusionXL", "a variant of SDXL"),
    ("StableDiffusion", "a Stable Diffusion 1.x or 2.x model"),
    ("Flux", "a Flux model"),
)


def pipeline_family(index: Mapping[str, Any]) -> str | None:
    """The kind of a diffusers folder by its ``model_index.json``, if that is not SDXL's; else ``None``."""
    name = str(index.get("_class_name"))
    if name in ("StableDiffusionXLPipeline", "StableDiffusionXLImg2ImgPipeline", "StableDiffusionXLInpaintPipeline"):
        return None
    what = next((what for begins, what in PIPELINES if name.startswith(begins)), "no model that is known here")
    return f"{what} ({name[:60]!r})"
