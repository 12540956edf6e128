"""A whole model in one file: the official SDXL layout, read strictly and written.

The U-Net and the VAE carry the official names themselves; :mod:`minisdxl.text` knows those of the text encoders. Files
written here hold their ``ModelConfig`` as metadata; an official file is recognized by its names and shapes.
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from minisdxl.config import SDXL_BASE, ModelConfig
from minisdxl.recognize import UNET_PREFIX, VAE_PREFIX, Shape, family
from minisdxl.tensorfile import FLOATS, CheckpointError, TensorFile, open_tensors, write_tensors
from minisdxl.text import TextEncoders
from minisdxl.unet import UNet
from minisdxl.vae import VAE

logger = logging.getLogger(__name__)

TEXT_PREFIX = "conditioner."
CONFIG_KEY = "minisdxl.config"  # of the file's metadata: ModelConfig.to_dict() as JSON

# Tensors of the official layout that take no part in making a picture. A file may lack them or hold them in any dtype.
UNUSED = (
    "conditioner.embedders.0.transformer.text_model.embeddings.position_ids",  # 0, 1, 2, ...
    "conditioner.embedders.*logit_scale",  # temperature of CLIP's training loss
)
# Tensors that training and merging programs add. Skipped with one line in the log.
SKIPPED = (
    "model_ema.*",
    "first_stage_model.model_ema.*",
    "first_stage_model.loss.*",
    "embedding_manager*",
    "conditioner.embedders.0.*text_projection*",  # CLIP's own, which SDXL does not use
    "denoiser.*",
    # Noise levels, as buffers of the older ldm code.
    "betas",
    "logvar",
    "*alphas_cumprod*",
    "posterior_*",
)


class Modules(NamedTuple):
    """What a checkpoint holds."""

    unet: UNet
    vae: VAE
    text: TextEncoders


def part_dtype(name: str, dtype: torch.dtype) -> torch.dtype:
    """The dtype of the tensor ``name`` in a model of ``dtype``: the official VAE overflows in fp16 and gets fp32."""
    if name.startswith(VAE_PREFIX) and dtype == torch.float16:
        return torch.float32
    return dtype


def read_config(path: str | Path) -> ModelConfig:
    """The config of the model in a file, all of whose names and shapes fit it. Raises ``CheckpointError``."""
    _, config, _ = _open(path)
    return config


def load(
    path: str | Path, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> tuple[ModelConfig, Modules]:
    """Reads a model, in evaluation mode.

    Built without memory and filled tensor by tensor, converted as they are read: at the peak there is little more in
    memory than the weights in their :func:`part_dtype`.

    Raises:
        CheckpointError: if the file is damaged, something else, or has missing, unexpected or mis-shaped tensors.
    """
    file, config, modules = _open(path)
    _log_skipped(file)
    tensors = {
        name: torch.empty(shape, dtype=part_dtype(name, dtype), device=device)
        for name, shape in official_shapes(modules).items()
    }
    file.read_into(tensors)
    for module in modules:
        module.eval()
    modules.unet.load_state_dict(_part(tensors, UNET_PREFIX), strict=True, assign=True)
    modules.vae.load_state_dict(_part(tensors, VAE_PREFIX), strict=True, assign=True)
    modules.text.load_official_state_dict({name: tensors[name] for name in tensors if name.startswith(TEXT_PREFIX)})
    return config, modules


def save(path: str | Path, config: ModelConfig, modules: Modules, dtype: torch.dtype = torch.float16) -> None:
    """Writes a model of ``config`` in the official layout, whole or not at all.

    Raises:
        CheckpointError: if the file cannot be written, or the modules are not of ``config`` (nothing is written then).
    """
    tensors = official_state_dict(modules)
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    problems = _misfits(shapes, official_shapes(without_memory(config)))
    if problems:
        raise CheckpointError(f"cannot write {path}: the modules do not fit {config.name}: {problems}")
    write_tensors(path, tensors, {"format": "pt", CONFIG_KEY: json.dumps(config.to_dict())}, dtype)


def official_state_dict(modules: Modules) -> dict[str, Tensor]:
    """All weights under their official names."""
    unet = {UNET_PREFIX + name: tensor for name, tensor in modules.unet.state_dict().items()}
    vae = {VAE_PREFIX + name: tensor for name, tensor in modules.vae.state_dict().items()}
    return unet | vae | modules.text.official_state_dict()


def official_shapes(modules: Modules) -> dict[str, Shape]:
    """Shape of every weight, by its official name."""
    return {name: tuple(tensor.shape) for name, tensor in official_state_dict(modules).items()}


def without_memory(config: ModelConfig) -> Modules:
    """A model whose weights have shapes and no numbers (the meta device)."""
    with torch.device("meta"):
        return Modules(UNet(config.unet), VAE(config.vae), TextEncoders(config.text))


def _part(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _open(path: str | Path) -> tuple[TensorFile, ModelConfig, Modules]:
    """A file, its config, and a model without memory that all of its tensors fit. Raises ``CheckpointError``."""
    file = open_tensors(path)
    config, modules = _recognize(file)
    found = {name: entry.shape for name, entry in file.entries.items() if not _match(name, UNUSED + SKIPPED)}
    problems = _misfits(found, official_shapes(modules))
    if problems:
        raise CheckpointError(f"{path} does not fit {config.name}: {problems}")
    others = [f"{name} is {file.entries[name].dtype}" for name in found if file.entries[name].dtype not in FLOATS]
    if others:
        what = _count(others, "quantized or integer tensor")
        raise CheckpointError(f"{path} has {what}; expected F64, F32, F16 or BF16")
    return file, config, modules


def _recognize(file: TensorFile) -> tuple[ModelConfig, Modules]:
    """The config in the file, or the official one, and its model; the tensors are yet to be compared with it."""
    stored = file.metadata.get(CONFIG_KEY)
    if stored is not None:
        try:
            config = ModelConfig.from_dict(json.loads(stored))
            return config, without_memory(config)
        except (ValueError, TypeError, RuntimeError) as error:  # of the JSON, the config, or the model that it asks for
            raise CheckpointError(f"{file.path} holds a damaged {CONFIG_KEY}: {error}") from error
    other = family({name: entry.shape for name, entry in file.entries.items()}, file.metadata)
    if other is not None:
        raise CheckpointError(
            f"{file.path} is {other}; expected a whole SDXL base model in one file, like sd_xl_base_1.0.safetensors"
        )
    return SDXL_BASE, without_memory(SDXL_BASE)


def _log_skipped(file: TensorFile) -> None:
    skipped = Counter(pattern for name in file.entries for pattern in _match(name, SKIPPED))
    if skipped:
        counts = ", ".join(f"{count} {pattern}" for pattern, count in skipped.items())
        logger.warning("%s: skipped %d tensors that make no picture: %s", file.path, skipped.total(), counts)


def _match(name: str, patterns: Sequence[str]) -> list[str]:
    """The first of the patterns that ``name`` matches, if any."""
    return [pattern for pattern in patterns if fnmatchcase(name, pattern)][:1]


def _misfits(found: Mapping[str, Shape], expected: Mapping[str, Shape]) -> str:
    """What differs, in one line: counts, and the first five names of each kind; empty where nothing does."""
    missing = [name for name in expected if name not in found]
    unexpected = [name for name in found if name not in expected]
    misshaped = [
        f"{name} is {list(found[name])}, expected {list(shape)}"
        for name, shape in expected.items()
        if name in found and not _same_shape(name, found[name], shape)
    ]
    kinds = {"missing": missing, "unexpected": unexpected, "mis-shaped": misshaped}
    return "; ".join(_count(names, f"{kind} tensor") for kind, names in kinds.items() if names)


def _same_shape(name: str, found: Shape, expected: Shape) -> bool:
    """Equal, or a linear map of the VAE's attention stored as a matrix and not as a 1x1 convolution."""
    return found == expected or (name.startswith(VAE_PREFIX) and ".attn_" in name and (*found, 1, 1) == expected)


def _count(names: Sequence[str], kind: str) -> str:
    plural, more = "" if len(names) == 1 else "s", ", ..." if len(names) > 5 else ""
    return f"{len(names)} {kind}{plural} ({', '.join(names[:5])}{more})"
