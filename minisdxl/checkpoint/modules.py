"""Loads and saves models as modules.

Whatever :func:`open_source` takes (one file in the official layout, a diffusers folder, either with other parts) is
read strictly, tensor by tensor, by official names. The U-Net and the VAE carry these themselves,
``text_names`` knows those of the text encoders. Files written here hold their ``ModelConfig`` as metadata; an official
file is recognized by its names and shapes, and a diffusers folder describes itself.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from minisdxl.checkpoint import folder_reader
from minisdxl.checkpoint.errors import CheckpointError
from minisdxl.checkpoint.json_fields import check_values
from minisdxl.checkpoint.layouts import PARTS, REFINER_TEXT, file_name, key_variants, model_parts
from minisdxl.checkpoint.lora import LoRA, merge, open_loras
from minisdxl.checkpoint.openclip_names import as_transformers
from minisdxl.checkpoint.predictions import (
    as_asked,
    as_stated,
    mark_metadata,
    mark_tensors,
    with_own_defaults,
)
from minisdxl.checkpoint.published import find_weights
from minisdxl.checkpoint.resolve import Source, find_source, misfits
from minisdxl.checkpoint.tensorfile import Shape, write_tensors
from minisdxl.checkpoint.text_names import load_official_text_state, official_text_state
from minisdxl.checkpoint.weight_files import WeightFiles, open_file, open_part
from minisdxl.config import SDXL_BASE, SDXL_INPAINTING, SDXL_REFINER, ModelConfig, inpainting_channels
from minisdxl.text import TextEncoders
from minisdxl.unet import UNet
from minisdxl.vae import VAE

logger = logging.getLogger(__name__)

UNET_PREFIX, VAE_PREFIX, TEXT_PREFIX = PARTS["unet"].prefix, PARTS["vae"].prefix, "conditioner."
VAE_ENCODER = VAE_PREFIX + "encoder."
INPUT = "input_blocks.0.0.weight"  # of the U-Net's first convolution
CONFIG_KEY = "minisdxl.config"  # of the file's metadata: ModelConfig.to_dict() as JSON


class Modules(NamedTuple):
    """The modules of a model."""

    unet: UNet
    vae: VAE
    text: TextEncoders


def part_dtype(name: str, dtype: torch.dtype) -> torch.dtype:
    """The dtype of the tensor ``name`` in a model of ``dtype``: that of the VAE is fp32 or wider.

    The official VAE overflows in fp16, and bf16 has no more digits than the picture.
    """
    return torch.promote_types(dtype, torch.float32) if name.startswith(VAE_PREFIX) else dtype


def read_config(path: str | Path, **others: str | Path | None) -> ModelConfig:
    """The config of a model, all of whose names and shapes fit it. Arguments and errors as :func:`open_source`."""
    return _open(Path(path), torch.float32, others, None).config


def load(
    path: str | Path,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    *,
    loras: Sequence[LoRA] = (),
    prediction: str | None = None,
    vae_encoder: bool = True,
    **others: str | Path | None,
) -> tuple[ModelConfig, Modules]:
    """Reads a model, in evaluation mode. Arguments and errors as :func:`open_source`.

    Without ``vae_encoder`` the weights of the VAE's encoder are not read, and stay on the meta device.

    Built without memory and filled by :meth:`Source.load`, which maps tensors or converts them one by one: at the peak
    there is little more in memory than the weights in their :func:`part_dtype`. Then ``loras`` are merged into them,
    tensor by tensor, with the errors of :func:`minisdxl.checkpoint.lora.open_loras` (before anything is read) and
    :func:`minisdxl.checkpoint.lora.merge`.
    """
    source = _open(Path(path), dtype, others, prediction)
    modules = without_memory(source.config)
    changes = open_loras(loras, source.config, source.shapes)
    for note in source.notes:
        logger.warning(note)
    names = [name for name in source.shapes if vae_encoder or not name.startswith(VAE_ENCODER)]
    tensors = source.load({name: part_dtype(name, dtype) for name in names}, device)
    merge(changes, tensors)
    for module in modules:
        module.eval()
    modules.unet.load_state_dict(_part(tensors, UNET_PREFIX), strict=True, assign=True)
    absent = {} if vae_encoder else modules.vae.encoder.state_dict(prefix="encoder.")
    modules.vae.load_state_dict(absent | _part(tensors, VAE_PREFIX), strict=True, assign=True)
    text = {name: tensor for name, tensor in tensors.items() if name.startswith(TEXT_PREFIX)}
    load_official_text_state(modules.text, text)
    return source.config, modules


def open_source(
    path: str | Path,
    dtype: torch.dtype = torch.float32,
    *,
    prediction: str | None = None,
    **others: str | Path | None,
) -> Source:
    """Finds every tensor of a model; reads headers, configs and marks only.

    Args:
        path: one file in the official layout, or a diffusers folder; or one part, if ``others`` are the rest.
        dtype: that is wanted: it decides between plain weights and an fp16 variant, where a folder has both.
        prediction: what the U-Net predicts, as :func:`minisdxl.checkpoint.predictions.parse_prediction` reads it;
            ``None`` for what the files say, and noise where they say nothing.
        others: for some of ``PARTS`` (``vae=``, ``unet=``, ``text_encoder=``, ``text_encoder_2=``), a file or folder
            with that part in either layout, or a name that :func:`minisdxl.checkpoint.published.find_weights` knows;
            ``None`` for the part in ``path``. What is replaced need not be in ``path``.

    Raises:
        CheckpointError: if something is damaged, something else, or has missing, unexpected or mis-shaped tensors, or
            if files contradict each other about the prediction.
        ValueError: if ``prediction`` is unknown.
    """
    return _open(Path(path), dtype, others, prediction)


def _open(path: Path, dtype: torch.dtype, given: Mapping[str, str | Path | None], prediction: str | None) -> Source:
    """The source of a model. Raises ``TypeError`` for a part that is not in ``PARTS``."""
    if given.keys() - PARTS.keys():
        raise TypeError(f"{min(given.keys() - PARTS.keys())} is no part of a model, expected {', '.join(PARTS)}")
    others = {part: find_weights(other) for part in PARTS if (other := given.get(part)) is not None}
    own = [part for part in PARTS if part not in others]
    if len(own) == 1 and path.is_dir() and not (path / folder_reader.INDEX).is_file():
        config, weight_files = SDXL_BASE, list[WeightFiles]()  # a folder of one part does not say which model it is of
        others[own[0]] = path
    elif path.is_dir():
        config = _folder_config(path)
        own = [part for part in model_parts(config) if part not in others]
        weight_files = [open_part(path / part, part, dtype) for part in own]
    else:
        whole = open_file(path, own)
        config = _file_config(whole)
        weight_files = [replace(whole, parts=tuple(part for part in own if part in model_parts(config)))]
    if absent := others.keys() - model_parts(config):
        raise CheckpointError(f"{path} is {config.name}, which has no {PARTS[min(absent)].label} to replace")
    weight_files += [_open_other(other, part, dtype, config) for part, other in others.items()]
    if "unet" in others:
        config = inpainting_or_not(config, next(files for files in weight_files if "unet" in files.parts))
    config, notes = _with_prediction(config, path, weight_files, others.get("unet"), prediction)
    try:
        _check_extent(config, sum(len(holder.entries) for holder in weight_files))
        shapes = official_shapes(config)
    except (ValueError, TypeError, RuntimeError, ArithmeticError) as error:  # of torch too, for impossible numbers
        raise _damaged(path, error) from error
    source = find_source(config, shapes, weight_files)
    for part, other in others.items():
        folder_reader.check_part(other, part, config)
    return replace(source, notes=(*notes, *source.notes))


def inpainting_or_not(config: ModelConfig, files: WeightFiles) -> ModelConfig:
    """The config with the input channels of the U-Net in ``files``, if they are those of one of both kinds."""
    names = [variant(INPUT).names[0] for variant in key_variants("unet", config)]
    channels = next((files.entries[name].shape[1:2] for name in names if name in files.entries), ())
    latent = config.vae.latent_channels
    if channels not in ((latent,), (inpainting_channels(latent),)) or channels == (config.unet.in_channels,):
        return config
    if config in (SDXL_BASE, SDXL_INPAINTING):
        return SDXL_INPAINTING if config == SDXL_BASE else SDXL_BASE
    return replace(config, unet=replace(config.unet, in_channels=channels[0]))


def _open_other(path: Path, part: str, dtype: torch.dtype, config: ModelConfig) -> WeightFiles:
    """A part in a file or folder of its own. Raises ``CheckpointError``."""
    files = open_part(path, part, dtype)
    return as_transformers(files, config.text[0]) if part == "text_encoder" else files


def save(path: str | Path, config: ModelConfig, modules: Modules, dtype: torch.dtype = torch.float16) -> None:
    """Writes a model of ``config`` in the official layout, whole or not at all.

    Raises:
        CheckpointError: if the file cannot be written, or the modules are not of ``config`` (nothing is written then).
    """
    tensors = official_state_dict(modules)
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    problems = misfits(shapes, official_shapes(config))
    if problems:
        raise CheckpointError(f"cannot write {path}: the modules do not fit {config.name}: {problems}")
    specs = {file_name(name, config): (dtype, shape) for name, shape in shapes.items()}
    marks = mark_tensors(config)
    specs |= {name: (torch.float32, tuple(mark.shape)) for name, mark in marks.items()}
    write_tensors(path, specs, (tensors | marks).values(), file_metadata(config))


def file_metadata(config: ModelConfig) -> dict[str, str]:
    """What a file says of the model in it."""
    return {"format": "pt", CONFIG_KEY: json.dumps(config.to_dict()), **mark_metadata(config)}


def official_state_dict(modules: Modules) -> dict[str, Tensor]:
    """All weights under their official names."""
    unet = {UNET_PREFIX + name: tensor for name, tensor in modules.unet.state_dict().items()}
    vae = {VAE_PREFIX + name: tensor for name, tensor in modules.vae.state_dict().items()}
    return unet | vae | official_text_state(modules.text)


@lru_cache(maxsize=8)
def official_shapes(config: ModelConfig) -> Mapping[str, Shape]:
    """Shape of every weight of a model, by its official name."""
    tensors = official_state_dict(without_memory(config))
    return MappingProxyType({name: tuple(tensor.shape) for name, tensor in tensors.items()})


def without_memory(config: ModelConfig) -> Modules:
    """A model whose weights have shapes and no numbers (the meta device)."""
    with torch.device("meta"), _Unfilled():
        return Modules(UNet(config.unet), VAE(config.vae), TextEncoders(config.text))


class _Unfilled(TorchFunctionMode):
    """A context in which ``nn.init`` leaves tensors as they are.

    On the meta device there is nothing to fill, and yet ``normal_`` would import the compiler there: a second, 80 MB.
    """

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if getattr(function, "__module__", None) == nn.init.__name__:
            return None  # what it would return, nobody takes
        return function(*args, **kwargs or {})


def _part(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _file_config(holder: WeightFiles) -> ModelConfig:
    """The config in a file's metadata, or the official one; the tensors are yet to be compared with it."""
    stored = holder.metadata.get(CONFIG_KEY)
    if stored is None:
        refines = any(name.startswith(REFINER_TEXT) for name in holder.entries)
        return SDXL_REFINER if refines else inpainting_or_not(SDXL_BASE, holder)
    try:
        config = ModelConfig.from_dict(json.loads(stored))
        check_values(config)
        return config
    except (ValueError, TypeError, RecursionError) as error:
        raise _damaged(holder.path, error) from error


def _with_prediction(
    config: ModelConfig, path: Path, weight_files: Sequence[WeightFiles], unet: Path | None, asked: str | None
) -> tuple[ModelConfig, list[str]]:
    """The config of the model in ``path`` with what its U-Net predicts, and lines for the log.

    A U-Net from elsewhere that says nothing is taken to predict what the model's own does. Raises as
    :func:`open_source`.
    """
    files = next(files for files in weight_files if "unet" in files.parts)
    if asked is not None:
        return with_own_defaults(as_asked(config, files, asked), SDXL_BASE), []
    notes: list[str] = []
    if path.is_file() or unet is None:
        own = weight_files[0] if path.is_file() else files
        config, notes = as_stated(config, own, declared=path.is_dir() or CONFIG_KEY in own.metadata)
    if unet is not None:
        theirs = _described_unet(unet, files)
        if theirs is not None:
            config = _with_unet(config, theirs)
        before = config
        config, more = as_stated(config, files, declared=theirs is not None)
        if before.vae.latents_std and before.noise.prediction != config.noise.prediction:
            raise CheckpointError(
                f"{files.path} predicts {config.noise.prediction!r}, not of the latents of {path}; expected a U-Net "
                f"that predicts {before.noise.prediction!r} beside it"
            )
        notes = [*notes, *more]
    return with_own_defaults(config, SDXL_BASE), notes


def _described_unet(path: Path, files: WeightFiles) -> ModelConfig | None:
    """The config of the whole model that a U-Net is taken from, if it is known by more than marks."""
    if (path / folder_reader.INDEX).is_file():
        return _folder_config(path)
    return _file_config(files) if CONFIG_KEY in files.metadata else None


def _with_unet(config: ModelConfig, theirs: ModelConfig) -> ModelConfig:
    """``config`` with what another model's U-Net predicts, and the scale of its latents where that is not SDXL's."""
    if theirs.vae.latents_std == config.vae.latents_std and theirs.vae.latents_mean == config.vae.latents_mean:
        return replace(config, noise=theirs.noise)
    scale = {key: getattr(theirs.vae, key) for key in folder_reader.LATENTS}
    return replace(config, noise=theirs.noise, vae=replace(config.vae, **scale))


def _folder_config(path: Path) -> ModelConfig:
    """The config that a diffusers folder describes, unless its U-Net is that of another family."""
    try:
        config = folder_reader.read_config(path)
    except CheckpointError as error:
        if what := _unet_family(path):
            raise CheckpointError(f"{path} is {what}; expected the folder of an SDXL base model") from error
        raise
    same_width = config.unet.model_channels == SDXL_BASE.unet.model_channels
    cut_out = same_width and config not in (SDXL_BASE, SDXL_INPAINTING)
    if cut_out and (what := _unet_family(path)):
        raise CheckpointError(f"{path} is {what}; expected the folder of an SDXL base model")
    return config


def _unet_family(path: Path) -> str | None:
    """What the U-Net of a diffusers folder is, if it is there and known as something else."""
    try:
        return open_part(path / "unet", "unet", torch.float32).family()
    except CheckpointError:
        return None


def _check_extent(config: ModelConfig, tensors: int) -> None:
    """Refuses to build a model that cannot be in files of so many tensors: a damaged number may ask for billions."""
    unet, vae = config.unet, config.vae
    layers = (2 * unet.res_blocks + 1) * sum(1 + level.depth for level in unet.levels) + unet.middle_depth
    layers += 2 * vae.res_blocks * len(vae.multipliers) + sum(text.layers for text in config.text)
    if config not in (SDXL_BASE, SDXL_INPAINTING, SDXL_REFINER) and layers > tensors:
        raise ValueError(f"{config.name} has {layers} layers, more than there are tensors ({tensors})")


def _damaged(path: Path, error: Exception) -> CheckpointError:
    what = CONFIG_KEY if path.is_file() else "config"
    return CheckpointError(f"{path} holds a damaged {what}: {(str(error).splitlines() or [''])[0]}")
