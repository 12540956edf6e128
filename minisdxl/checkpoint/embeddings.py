"""Files of embeddings (textual inversion, Gal et al. 2022).

An embedding has one vector for CLIP and one for OpenCLIP at every token. Files hold them as ``clip_l`` and ``clip_g``
(kohya's scripts, OneTrainer), as ``text_encoders_0`` and ``text_encoders_1`` (diffusers), as ``bundle_emb.NAME.clip_l``
and ``bundle_emb.NAME.clip_g`` beside a LoRA, or as one tensor under its name in each of ``x.safetensors`` and
``x_2.safetensors`` (diffusers' ``textual_inversion_sdxl.py``).
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from minisdxl.checkpoint.errors import CheckpointError
from minisdxl.checkpoint.lora_names import EMBEDDING
from minisdxl.checkpoint.tensorfile import READABLE, TensorFile, open_tensors
from minisdxl.config import ModelConfig
from minisdxl.prompting.chunks import Embedding

PAIRS = (("clip_l", "clip_g"), ("text_encoders_0", "text_encoders_1"))
SECOND = "_2"  # ends the stem of diffusers' file for the second text encoder
Place = tuple[TensorFile, str]  # of a tensor


@dataclass(frozen=True)
class EmbeddingFile:
    """A file, and what prompts call its embedding; ``None``: as the file does, or else by the file's own name."""

    path: Path
    name: str | None = None

    @classmethod
    def parse(cls, text: str) -> EmbeddingFile:
        """Reads ``FILE`` or ``FILE:NAME``; a colon in the name of an existing file is not a separator."""
        file, _, name = text.rpartition(":")
        return cls(Path(text)) if not file or not name or Path(text).is_file() else cls(Path(file), name)


def read_embeddings(
    files: Iterable[str | Path | EmbeddingFile], bundles: Iterable[Path], config: ModelConfig
) -> dict[str, Embedding]:
    """The embeddings in ``files``, and those in ``bundles``, which are LoRAs; by their names in lower case.

    Raises:
        CheckpointError: if a file is damaged, holds no embedding for both text encoders, or one of another size.
        ValueError: for a name that a prompt cannot hold, or that two embeddings have.
    """
    found: dict[str, Embedding] = {}
    asked = [file if isinstance(file, EmbeddingFile) else EmbeddingFile.parse(str(file)) for file in files]
    named = [_find(file) for file in asked] + [each for path in bundles for each in _bundled(path)]
    for name, places in named:
        path = places[0][0].path
        if not re.fullmatch(r"[^\s()\[\]\\:]+", name):
            raise ValueError(
                f"embedding {path} is called {name!r}, expected a name without spaces, brackets, colons and "
                "backslashes: give it one as FILE:NAME"
            )
        if name.lower() in found:
            raise ValueError(f"embedding {path} is called {name!r}, as another is: give it a name as FILE:NAME")
        found[name.lower()] = _read(name, places, config)
    return found


def _find(asked: EmbeddingFile) -> tuple[str, Sequence[Place]]:
    """The name of a file's embedding, and its two tensors. Raises ``CheckpointError``."""
    file = open_tensors(asked.path)
    for pair in PAIRS:
        if set(pair) == set(file.entries):
            return asked.name or file.path.stem, [(file, tensor) for tensor in pair]
    second = asked.path.with_stem(asked.path.stem + SECOND)
    (tensor, *more) = file.entries or ("",)
    if not more and second.is_file() and tensor in (other := open_tensors(second)).entries:
        return asked.name or tensor, [(file, tensor), (other, tensor)]
    shown = ", ".join(list(file.entries)[:3]) + (", ..." if len(file.entries) > 3 else "")
    raise CheckpointError(
        f"{file.path} is no embedding for SDXL: it has {shown or 'no tensors'}; expected clip_l and clip_g, or one "
        f"tensor and another of its name in {second.name}"
    )


def _bundled(path: Path) -> list[tuple[str, Sequence[Place]]]:
    """The names and tensors of all embeddings in a LoRA's file. Warns of those in other forms."""
    file = open_tensors(path)
    bundles: dict[str, list[str]] = {}  # the tensors of each embedding
    for match in filter(None, map(EMBEDDING.fullmatch, file.entries)):
        bundles.setdefault(match[1], []).append(match[0])
    found: list[tuple[str, Sequence[Place]]] = []
    for name, tensors in bundles.items():
        expected = [f"bundle_emb.{name}.{encoder}" for encoder in PAIRS[0]]
        if set(tensors) != set(expected):
            warnings.warn(
                f"{path} has the embedding {name!r} as {tensors}, which is not loaded; expected {expected}",
                stacklevel=2,
            )
        else:
            found.append((name, [(file, tensor) for tensor in expected]))
    return found


def _read(name: str, places: Sequence[Place], config: ModelConfig) -> Embedding:
    """Checks and reads both tensors. Raises ``CheckpointError``."""
    if config.refines:
        raise CheckpointError(f"{places[0][0].path} is for the two text encoders of SDXL, {config.name} has one")
    room, vectors = config.text[0].context_length - 2, []
    for (file, tensor), text in zip(places, config.text, strict=True):
        entry, what = file.entries[tensor], f"{file.path} has {tensor} of the embedding {name!r}"
        shape = entry.shape if len(entry.shape) != 1 else (1, *entry.shape)
        if len(shape) != 2 or shape[1] != text.width or not 1 <= shape[0] <= room:
            raise CheckpointError(
                f"{what} as {list(entry.shape)}, expected [n, {text.width}] for {config.name}, n from 1 to {room}"
            )
        if entry.dtype not in READABLE:
            raise CheckpointError(f"{what} as {entry.dtype}; expected {', '.join(READABLE)}")
        vectors.append(torch.empty(shape))
        file.read_into({tensor: vectors[-1]})
        if not vectors[-1].isfinite().all():
            raise CheckpointError(f"{what} with values that are not finite numbers")
    clip, openclip = vectors
    if len(clip) != len(openclip):
        raise CheckpointError(
            f"{places[0][0].path} has {len(clip)} and {len(openclip)} vectors for the two text encoders in the "
            f"embedding {name!r}, expected as many of both"
        )
    return Embedding(clip, openclip)
