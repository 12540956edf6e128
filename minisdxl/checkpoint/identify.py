"""What a file is when it is not the checkpoint that it should be: said in the words of whoever downloaded it."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

from minisdxl.checkpoint.layouts import PARTS, unet_layout
from minisdxl.checkpoint.tensorfile import Shape
from minisdxl.config import SDXL_BASE, Level

V_PREDICTION = "a v-prediction model, not one that predicts epsilon"
REFINER = "the SDXL refiner, which finishes pictures of the base model"

# Names that only one family of files has, most telling first.
FAMILIES = (
    (r"lora_|[._]lora\.|\.hada_w\d|\.lokr_w\d|\.oft_blocks", "a LoRA, a change to be applied to some whole model"),
    (r"^control_model\.|^controlnet_|(^|\.)input_hint_block\.", "a ControlNet"),
    (r"^(ip_adapter|image_proj)\.", "an IP-Adapter"),
    (r"\.motion_modules\.", "an AnimateDiff motion module"),
    (r"^(clip_g|clip_l|emb_params)$", "a textual inversion embedding"),
    (r"(^|\.)joint_blocks\.", "a Stable Diffusion 3 model"),
    (r"(^|\.)double_blocks\.", "a Flux model"),
    (r"^transformer_blocks\.", "a diffusion transformer in the diffusers layout"),
    (r"^edm_(mean|std)$", "Playground 2.5 or another model with EDM latents"),
    (r"^edm_vpred\.", "CosXL or another model that predicts v at EDM noise levels"),
    (r"^(v_pred|ztsnr)$", V_PREDICTION),
)

# What predicts v, as other programs write it into a file's metadata.
V_PREDICTION_METADATA = (("modelspec.prediction_type", "v"), ("modelspec.predict_key", "v"))

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

# Names of SDXL's U-Net in diffusers. Every level may have attention here: SD 1.x has it where SDXL has none.
UNET_LAYOUT = unet_layout(replace(SDXL_BASE.unet, levels=(Level(1, 1), Level(2, 1), Level(4, 1), Level(4, 1))))


def family(shapes: Mapping[str, Shape], parts: Collection[str] = tuple(PARTS)) -> str | None:
    """What a file with these tensors is, if something says that it is not what it should be; else ``None``.

    It should be the given parts of an SDXL base model, or all. ``None`` is no promise: names and shapes are still to
    be compared one by one.
    """
    for pattern, what in FAMILIES:
        if any(re.search(pattern, name) for name in shapes):
            return what
    if _has(shapes, "cond_stage_model.") and not _has(shapes, "conditioner."):
        return f"a Stable Diffusion {'1.x' if _has(shapes, 'cond_stage_model.transformer.') else '2.x'} model"
    return _unet_variant(shapes) or _part(shapes, parts)


def predicts_v(metadata: Mapping[str, str]) -> str | None:
    """What a file is whose metadata says that it predicts v; else ``None``."""
    return V_PREDICTION if any(metadata.get(key) == value for key, value in V_PREDICTION_METADATA) else None


def _unet_variant(shapes: Mapping[str, Shape]) -> str | None:
    """Models whose U-Net has the names of SDXL's, official or diffusers', and other numbers."""
    unet = {_official(name): shape for name, shape in shapes.items()}
    if unet.get("label_emb.0.0.weight", ())[1:] == (2560,) or _has(shapes, "conditioner.embedders.0.model."):
        return REFINER
    in_channels = unet.get("input_blocks.0.0.weight", ())[1:2]
    if in_channels == (9,):
        return "an inpainting model (9 input channels, not 4)"
    if in_channels == (8,):
        return "a pix2pix editing model (8 input channels, not 4)"
    context = unet.get("input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight", ())[1:]
    if context in ((768,), (1024,)):
        return f"only the U-Net of a Stable Diffusion {'1.x' if context == (768,) else '2.x'} model"
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
    for pattern, what, parts in BARE_PARTS:
        if any(re.search(pattern, name) for name in shapes):
            return None if set(wanted) <= set(parts) else what
    return f"no model that is known here, with {len(shapes)} tensors"


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
    """What a diffusers folder with this ``model_index.json`` is, where it says that it is no SDXL model."""
    name = str(index.get("_class_name"))
    if name in ("StableDiffusionXLPipeline", "StableDiffusionXLImg2ImgPipeline", "StableDiffusionXLInpaintPipeline"):
        return REFINER if index.get("text_encoder") == [None, None] else None
    what = next((what for begins, what in PIPELINES if name.startswith(begins)), "no model that is known here")
    return f"{what} ({name[:60]!r})"


def scheduler_family(scheduler: Mapping[str, Any]) -> str | None:
    """What a diffusers folder with this ``scheduler_config.json`` is, where that says it does not predict epsilon."""
    name, predicted = str(scheduler.get("_class_name")), scheduler.get("prediction_type", "epsilon")
    if name.startswith("FlowMatch"):
        return f"a flow-matching model ({name[:60]!r})"
    if name.startswith("EDM"):
        return f"Playground 2.5 or another model with EDM noise levels ({name[:60]!r})"
    if predicted == "v_prediction":
        return V_PREDICTION
    return None if predicted == "epsilon" else f"a model that predicts {str(predicted)[:60]!r}"
