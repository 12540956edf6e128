"""Files that hold parts of a model: a single file, or the file, shards or fp16 variant in a folder."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from minisdxl.checkpoint.errors import CheckpointError
from minisdxl.checkpoint.identify import family
from minisdxl.checkpoint.json_fields import Fields
from minisdxl.checkpoint.layouts import PARTS
from minisdxl.checkpoint.tensorfile import Entry, TensorFile, open_tensors

LORA_FILE = "pytorch_lora_weights.safetensors"  # of a folder in which diffusers saves a LoRA
WEIGHTS = (".safetensors", ".bin", ".ckpt", ".pt", ".msgpack", ".onnx", ".gguf")  # suffixes


@dataclass(frozen=True)
class WeightFiles:
    """Files that hold some parts of a model: one file, or the shards of one."""

    path: Path  # what the user calls it
    parts: tuple[str, ...]  # keys of PARTS
    files: tuple[TensorFile, ...]
    both: bool = False  # whether both plain and fp16 files exist

    @cached_property
    def entries(self) -> dict[str, Entry]:
        """All tensors."""
        return {name: entry for file in self.files for name, entry in file.entries.items()}

    @property
    def metadata(self) -> dict[str, str]:
        """All metadata."""
        return {key: value for file in self.files for key, value in file.metadata.items()}

    def family(self) -> str | None:
        """The kind of the files, if they are known not to be these parts of SDXL; else ``None``."""
        return family({name: entry.shape for name, entry in self.entries.items()}, self.parts)

    def file_of(self, name: str) -> TensorFile:
        """The file that holds a tensor."""
        return next(file for file in self.files if name in file.entries)


def open_file(path: Path, parts: Sequence[str]) -> WeightFiles:
    """One file that is to hold ``parts``. Raises ``CheckpointError``."""
    return WeightFiles(path, tuple(parts), (open_tensors(path),))


def open_part(path: Path, part: str, dtype: torch.dtype) -> WeightFiles:
    """The files of one part: a file, its folder as diffusers saves it, or the folder of a whole model.

    Where a folder has plain weights and an fp16 variant, the variant is for ``dtype`` fp16 and the plain ones for
    others. Raises ``CheckpointError``.
    """
    if not path.is_dir():
        return open_file(path, [part])
    folder = part_folder(path, part)
    forms = {variant: files for variant in ("", "fp16") if (files := _files(folder, part, variant))}
    if not forms:
        raise CheckpointError(f"{folder} has no {PARTS[part].weights}.safetensors{_instead(folder)}")
    wanted = "fp16" if dtype == torch.float16 else ""
    files = forms.get(wanted) or next(iter(forms.values()))
    return WeightFiles(folder, (part,), _opened(folder, files), both=len(forms) > 1)


def part_folder(path: Path, part: str) -> Path:
    """The folder of a part: ``path``, or its sub-folder where it is that of a whole model."""
    return path / part if (path / part).is_dir() else path


def _files(folder: Path, part: str, variant: str) -> dict[Path, list[str]]:
    """The files of a part in one form, each with the tensors that an index promises of it; empty if there are none."""
    weights, dotted = PARTS[part].weights, f".{variant}" if variant else ""
    single = folder / f"{weights}{dotted}.safetensors"
    if single.is_file():
        return {single: []}
    # diffusers has had two names for the index of a variant.
    for name in (f"{weights}.safetensors.index{dotted}.json", f"{weights}.safetensors{dotted}.index.json"):
        if (folder / name).is_file():
            return _shards(Fields.read(folder / name))
    return {}


def _shards(index: Fields) -> dict[Path, list[str]]:
    table = index.values.get("weight_map")
    if not isinstance(table, dict) or not table:
        raise CheckpointError(f"{index.path} has no weight_map, expected a table of tensors and their files")
    files: dict[Path, list[str]] = {}
    for name, shard in table.items():
        if not isinstance(shard, str) or not re.fullmatch(r"[\w.-]+\.safetensors", shard):
            raise CheckpointError(f"{index.path} places {name!r} in {shard!r}, expected the name of a file beside it")
        files.setdefault(index.path.with_name(shard), []).append(name)
    return files


def _opened(folder: Path, files: dict[Path, list[str]]) -> tuple[TensorFile, ...]:
    """The files, checked to hold what their index says, and no tensor twice."""
    opened, seen = [], set[str]()
    for path, promised in files.items():
        file = open_tensors(path)
        absent = [name for name in promised if name not in file.entries]
        if absent:
            raise CheckpointError(f"{path} does not hold {absent[0]!r}, which its index says it holds")
        twice = seen & file.entries.keys()
        if twice:
            raise CheckpointError(f"{folder} has {min(twice)!r} in more than one shard")
        seen |= file.entries.keys()
        opened.append(file)
    return tuple(opened)


def _instead(folder: Path) -> str:
    """Describes a folder without weights."""
    others = sorted(file.name for file in folder.glob("*") if file.suffix in WEIGHTS)
    return f", only {', '.join(others[:5])}; expected safetensors weights, which cannot run code" if others else ""
