"""Finds every tensor of a model: the file, the name there, and the form.

A model is one file, a diffusers folder, or either with parts from other files. A :class:`Source` gives the tensors of
all of these in the same way, by official names.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import translate
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from minisdxl.checkpoint.errors import CheckpointError
from minisdxl.checkpoint.fp8_scales import Scale, find_scales
from minisdxl.checkpoint.identify import REFINER
from minisdxl.checkpoint.layouts import PARTS, TensorMapping, key_variants
from minisdxl.checkpoint.predictions import MARKS
from minisdxl.checkpoint.tensorfile import FLOATS, READABLE, Shape, TensorFile
from minisdxl.checkpoint.weight_files import WeightFiles
from minisdxl.config import ModelConfig

# Tensors that take no part in making a picture, by official names. A file may lack them or hold them in any dtype.
UNUSED = (
    "conditioner.embedders.?.*embeddings.position_ids",  # 0, 1, 2, ...
    "conditioner.embedders.*logit_scale",  # temperature of CLIP's training loss
)
# Tensors that training and merging programs add. Skipped with one line in the log.
SKIPPED = (
    "model_ema.*",
    "first_stage_model.model_ema.*",
    "first_stage_model.loss.*",
    "embedding_manager*",
    "conditioner.embedders.0.transformer.*text_projection*",  # CLIP's own, which SDXL does not use
    # The picture encoder of a whole CLIP, under transformers' and OpenCLIP's names.
    "conditioner.embedders.?.*vision_model.*",
    "conditioner.embedders.?.*visual*",
    "denoiser.*",
    # Noise levels, as buffers of the older ldm code.
    "betas",
    "logvar",
    "*alphas_cumprod*",
    "posterior_*",
)

BIAS, WEIGHT, GUIDANCE = (
    PARTS["unet"].prefix + f"time_embed.{name}" for name in ("0.bias", "0.weight", "cond_proj.weight")
)
SHOWN = 2  # names of each kind in a line that says what does not fit: each may take a hundred letters
LCM_SCALE = 8.0  # guidance scale for LCM U-Nets, as diffusers' documentation has it for latent-consistency/lcm-sdxl


@dataclass(frozen=True)
class TensorLocation:
    """The place of one official tensor: the file of each of ``mapping.names``, and its scale."""

    files: tuple[TensorFile, ...]
    mapping: TensorMapping
    scales: tuple[Scale | None, ...]  # factors of the stored numbers

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the stored numbers; for fp8 a wider one that is exact, fp32 if they have a scale."""
        code = self.files[0].entries[self.mapping.names[0]].dtype
        return torch.float32 if any(self.scales) else FLOATS.get(code, torch.float16)


@dataclass(frozen=True)
class Source:
    """All tensors of a model by their official names, and lines for the log."""

    config: ModelConfig
    shapes: Mapping[str, Shape]  # of the model's tensors; an LCM U-Net also stores GUIDANCE
    stored: Mapping[str, TensorLocation]
    notes: tuple[str, ...]

    @property
    def files(self) -> list[Path]:
        """The files that are read, each once."""
        return list(dict.fromkeys(file.path for stored in self.stored.values() for file in stored.files))

    def load(self, dtypes: Mapping[str, torch.dtype], device: torch.device | str) -> dict[str, Tensor]:
        """Loads tensors by official names, each in its dtype in ``dtypes``.

        Convolution weights are channels-last. On the CPU, large tensors that a file stores in the same form are mapped
        instead of read. (Convolution weights are mapped only in fp16, and then keep the file's memory format.)
        :meth:`TensorFile.map` says what must not happen to the file then.

        Raises:
            CheckpointError: if a file cannot be read or mapped, or has become shorter since it was opened.
        """
        mapped = self._map(dtypes) if torch.device(device).type == "cpu" else {}
        rest = {name: self._empty(name, dtype, device) for name, dtype in dtypes.items() if name not in mapped}
        self.read_into(rest)
        return mapped | rest

    def _map(self, dtypes: Mapping[str, torch.dtype]) -> dict[str, Tensor]:
        """Maps the tensors that can be mapped, part by part, because the text encoders may be freed before the rest."""
        groups: dict[tuple[str, Path], list[str]] = {}
        for name, dtype in dtypes.items():
            if self._can_map(name, dtype):
                prefix = next(part.prefix for part in PARTS.values() if name.startswith(part.prefix))
                groups.setdefault((prefix, self.stored[name].files[0].path), []).append(name)
        tensors: dict[str, Tensor] = {}
        for names in groups.values():
            theirs = {self.stored[name].mapping.names[0]: name for name in names}
            mapped = self.stored[names[0]].files[0].map(theirs)
            tensors |= {name: mapped[their].view(self.shapes[name]) for their, name in theirs.items()}
        return tensors

    def _can_map(self, name: str, dtype: torch.dtype) -> bool:
        """Whether a file stores a tensor in the form that it has in memory."""
        stored = self.stored[name]
        if len(stored.files) > 1 or stored.mapping.transposed or any(stored.scales):
            return False
        if name == BIAS:  # GUIDANCE is added as it is read
            return False
        if _is_convolution(self.shapes[name]) and dtype != torch.float16:
            return False  # becomes channels-last, which is faster in fp32 and bf16; few CPUs compute in fp16
        return stored.files[0].can_map(stored.mapping.names[0], dtype)

    def _empty(self, name: str, dtype: torch.dtype, device: torch.device | str) -> Tensor:
        shape = self.shapes[name]
        # Convolutions run faster on pixels with their channels side by side, and a token set is then a view.
        memory_format = torch.channels_last if _is_convolution(shape) else torch.contiguous_format
        return torch.empty(shape, dtype=dtype, device=device, memory_format=memory_format)

    def read_into(self, targets: Mapping[str, Tensor]) -> None:
        """Reads tensors, by official names, into others of the same shapes, of any dtype and on any device.

        Raises:
            CheckpointError: if a file cannot be read, or has become shorter since it was opened.
        """
        files: dict[Path, TensorFile] = {}
        views: dict[Path, dict[str, Tensor]] = {}
        for name, target in targets.items():
            stored = self.stored[name]
            for file, theirs, view in zip(
                stored.files, stored.mapping.names, stored.mapping.split(target), strict=True
            ):
                files[file.path] = file
                views.setdefault(file.path, {})[theirs] = view
        for path, file in files.items():
            file.read_into(views[path])
        for name, target in targets.items():
            stored = self.stored[name]
            for scale, view in zip(stored.scales, stored.mapping.split(target), strict=True):
                if scale is not None:
                    view.mul_(scale.read())
        if BIAS in targets and GUIDANCE in self.stored:
            targets[BIAS].add_(self._guidance().to(targets[BIAS]))

    def read(self, name: str, dtype: torch.dtype) -> Tensor:
        """One tensor on the CPU. Raises as :meth:`read_into`."""
        tensor = torch.empty(self.shapes[name], dtype=dtype, device="cpu")
        self.read_into({name: tensor})
        return tensor

    def _guidance(self) -> Tensor:
        """What an LCM U-Net's guidance scale adds to the bias of the time embedding, (4 * model_channels,).

        Such a U-Net adds a projection of the embedded scale to the embedded timestep, before the first linear map
        (Luo et al. 2023, section 4.2). At one scale that is a constant, and the rest is SDXL's U-Net.
        """
        weight = self.read(WEIGHT, torch.float32)
        entry = self.stored[GUIDANCE].files[0].entries[self.stored[GUIDANCE].mapping.names[0]]
        projection = torch.empty(entry.shape)
        self.read_into({GUIDANCE: projection})
        return weight @ (projection @ guidance_embedding(LCM_SCALE, projection.shape[1]))


def _is_convolution(shape: Shape) -> bool:
    """Whether weights of this shape depend on the memory format: those of 1x1 convolutions do not."""
    return len(shape) == 4 and shape[2:] != (1, 1)


def guidance_embedding(scale: float, channels: int) -> Tensor:
    """The embedding (channels,) of a guidance scale that LCM U-Nets are trained with.

    Sines, then cosines, of 1000 (scale - 1) at ``channels // 2`` frequencies from 1 down to 1 / 10000, both included
    (official: ``guidance_scale_embedding`` of the LCM code; other frequencies than those of timesteps).
    """
    half = channels // 2
    angles = 1000 * (scale - 1) * torch.exp(torch.arange(half) * (-math.log(10000) / (half - 1)))
    return torch.cat([angles.sin(), angles.cos()])


def find_source(config: ModelConfig, shapes: Mapping[str, Shape], weight_files: Sequence[WeightFiles]) -> Source:
    """Finds the tensors of a model in ``weight_files``, each of which has some of the parts.

    Args:
        config: of the model.
        shapes: of all its tensors, by official names.
        weight_files: the files.

    Raises:
        CheckpointError: if one has missing, unexpected, mis-shaped or quantized tensors, or is something else.
    """
    stored: dict[str, TensorLocation] = {}
    notes = []
    for files in weight_files:
        found = _find(files, config, shapes)
        stored |= found
        skipped = Counter(pattern for name in files.entries if (pattern := _match(name, files, SKIPPED)))
        if skipped:
            counts = ", ".join(f"{count} {pattern}" for pattern, count in skipped.items())
            notes.append(f"{files.path}: skipped {skipped.total()} tensors that make no picture: {counts}")
        if GUIDANCE in found:
            notes.append(
                f"{files.path} is an LCM U-Net: its guidance scale is fixed to {LCM_SCALE:g}, sample with cfg 1"
            )
    chosen = [str(files.files[0].path) for files in weight_files if files.both]
    if chosen:
        notes.append(f"there are plain and fp16 weights, reading {', '.join(chosen)}")
    return Source(config, shapes, stored, tuple(notes))


def _find(files: WeightFiles, config: ModelConfig, shapes: Mapping[str, Shape]) -> dict[str, TensorLocation]:
    """Where the tensors of the parts in ``files`` are, and GUIDANCE if it is there."""
    entries = files.entries
    shapes = {**shapes, **_guidance_shape(files, config)}
    mappings: dict[str, TensorMapping] = {}
    for part in files.parts:
        prefix = PARTS[part].prefix
        names = [name.removeprefix(prefix) for name in shapes if name.startswith(prefix)]
        ways = [{prefix + name: spelling(name) for name in names} for spelling in key_variants(part, config)]
        best: dict[str, TensorMapping] = max(ways, key=lambda way: _hits(way, entries))
        mappings |= best
    expected = {
        theirs: tuple(view.shape)
        for name, mapping in mappings.items()
        for theirs, view in zip(mapping.names, mapping.split(torch.empty(shapes[name], device="meta")), strict=True)
    }
    others = tuple(part.prefix for key, part in PARTS.items() if key not in files.parts)
    scales, of_scales = find_scales(files)
    has_unet = "unet" in files.parts or any(name.startswith(PARTS["unet"].prefix) for name in entries)
    not_weights = of_scales | set(MARKS if has_unet else ())
    found = {
        name: entry.shape
        for name, entry in entries.items()
        if name not in not_weights and not _match(name, files, UNUSED + SKIPPED) and not name.startswith(others)
    }
    problems = misfits(found, expected)
    what = files.family() if problems else None
    if what and not (what == REFINER and config.refines):
        raise CheckpointError(f"{files.path} is {what}; expected {_wanted(files, config)}")
    if problems:
        raise CheckpointError(f"{files.path} does not fit {config.name}: {problems}")
    others_dtypes = [f"{name} is {entries[name].dtype}" for name in expected if entries[name].dtype not in READABLE]
    if others_dtypes:
        what = _count(others_dtypes, "quantized or integer tensor")
        raise CheckpointError(f"{files.path} has {what}; expected {', '.join(READABLE)}")
    return {
        name: TensorLocation(tuple(map(files.file_of, mapping.names)), mapping, tuple(map(scales.get, mapping.names)))
        for name, mapping in mappings.items()
    }


def _hits(way: Mapping[str, TensorMapping], names: Collection[str]) -> int:
    """How many of the names a way of naming tensors comes upon."""
    return sum(theirs in names for mapping in way.values() for theirs in mapping.names)


def _guidance_shape(files: WeightFiles, config: ModelConfig) -> dict[str, Shape]:
    """The shape of GUIDANCE, if ``files`` is an LCM U-Net."""
    entry = files.entries.get("time_embedding.cond_proj.weight")
    match entry.shape if entry and "unet" in files.parts else ():
        case (config.unet.model_channels, channels) if channels >= 4 and channels % 2 == 0:
            return {GUIDANCE: (config.unet.model_channels, channels)}
    return {}


def _wanted(files: WeightFiles, config: ModelConfig) -> str:
    if len(files.parts) < len(PARTS):
        return f"the {' and '.join(PARTS[part].label for part in files.parts)} of {config.name}"
    return (
        "a whole SDXL base model in one file or in a diffusers folder; "
        "a part or LoRA goes beside one (--unet, --vae, --text-encoder, --text-encoder-2, --lora)"
    )


def _match(name: str, files: WeightFiles, patterns: tuple[str, ...]) -> str | None:
    """The first of the patterns that ``name`` matches, if any; files of one part may omit its prefix."""
    names = [name] + [PARTS[part].prefix + name for part in files.parts if len(files.parts) == 1]
    found = next(filter(None, map(_compiled(patterns).match, names)), None)
    return patterns[found.lastindex - 1] if found and found.lastindex else None


@cache
def _compiled(patterns: tuple[str, ...]) -> re.Pattern[str]:
    """One expression for all patterns, a group for each."""
    return re.compile("|".join(f"({translate(pattern)})" for pattern in patterns))


def misfits(found: Mapping[str, Shape], expected: Mapping[str, Shape]) -> str:
    """What differs, in one line: counts, and the first names of each kind; empty where nothing does."""
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
    """Equal, or a linear map of the VAE's attention stored as a matrix or as a 1x1 convolution."""
    attention = ".attn_1." in name or name.startswith(("encoder.mid_block.attentions", "decoder.mid_block.attentions"))
    matrix, convolution = sorted((found, expected), key=len)
    return found == expected or (attention and len(matrix) == 2 and (*matrix, 1, 1) == convolution)


def _count(names: Sequence[str], kind: str) -> str:
    plural, more = "" if len(names) == 1 else "s", ", ..." if len(names) > SHOWN else ""
    shown = [name if len(name) <= 200 else f"{name[:197]}..." for name in names[:SHOWN]]
    return f"{len(names)} {kind}{plural} ({', '.join(shown)}{more})"
