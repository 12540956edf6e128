"""LoRAs, merged into the weights of a model while it is loaded.

For some linear maps and convolutions W (out, in, ...) a LoRA has two small ones, ``down`` (rank, in, ...) and ``up``
(out, rank, ...), and often a number alpha, which is the rank where it has none. Merged is
W + scale * alpha / rank * up @ down (Hu et al. 2021, section 4.1).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from minisdxl.checkpoint.errors import CheckpointError
from minisdxl.checkpoint.layouts import PARTS, TensorMapping, key_variants, layout
from minisdxl.checkpoint.lora_names import (
    EMBEDDING,
    PREFIXES,
    Name,
    other_kind,
    partner,
    read_alphas,
    read_name,
    read_settings,
)
from minisdxl.checkpoint.published import find_weights
from minisdxl.checkpoint.resolve import misfits
from minisdxl.checkpoint.tensorfile import READABLE, Shape, TensorFile, open_tensors
from minisdxl.checkpoint.weight_files import LORA_FILE
from minisdxl.config import ModelConfig


@dataclass(frozen=True)
class LoRA:
    """A file or folder, and how much of it to merge: 1 is all. Raises ``ValueError`` for a scale that is not finite."""

    path: Path  # or the name of one that is published
    scale: float = 1.0

    def __post_init__(self) -> None:
        if not math.isfinite(self.scale):
            raise ValueError(f"scale of {self.path} is {self.scale}, expected a finite number, such as 0.8")

    @property
    def file(self) -> Path:
        """The file: of a folder, the one in which diffusers saves a LoRA. Raises ``CheckpointError`` if it has none."""
        path = find_weights(self.path)
        if not path.is_dir():
            return path
        if not (path / LORA_FILE).is_file():
            files = sorted(file.name for file in path.glob("*.safetensors"))[:5]
            only = f", only {', '.join(files)}" if files else ""
            raise CheckpointError(f"{path} is a folder without {LORA_FILE}{only}; expected the file of a LoRA")
        return path / LORA_FILE

    @classmethod
    def parse(cls, text: str) -> LoRA:
        """Reads ``FILE`` or ``FILE:SCALE``; a colon that no number follows belongs to the file's name.

        Raises ``ValueError`` for a text such as ``x.safetensors:abc``, unless it is the name of a file.
        """
        file, _, scale = text.rpartition(":")
        if not file:
            return cls(Path(text))
        try:
            number = float(scale)
        except ValueError:
            if file.endswith(".safetensors") and not Path(text).is_file():
                raise ValueError(f"scale of {file} is {scale!r}, expected a number, such as 0.8") from None
            return cls(Path(text))
        return cls(Path(file), number)


@dataclass(frozen=True)
class Target:
    """A linear map or convolution of the model: an official tensor, or one of those that are stacked in it."""

    official: str
    mapping: TensorMapping
    index: int
    shape: Shape

    def view(self, official: Tensor) -> Tensor:
        """Its part of the official tensor, in the shape (out, in, ...)."""
        return self.mapping.split(official)[self.index]


@dataclass(frozen=True)
class Change:
    """What one file does to one target."""

    target: Target
    file: TensorFile
    down: str
    up: str
    factor: float  # scale * alpha / rank

    def add_to(self, weight: Tensor) -> None:
        """Adds it in place to the target's weight, of any strides. Raises ``CheckpointError``."""
        down, up = (
            torch.empty(self.file.entries[name].shape, dtype=weight.dtype, device=weight.device)
            for name in (self.down, self.up)
        )
        self.file.read_into({self.down: down, self.up: up})
        product = up.view(len(up), -1) @ down.view(len(down), -1)
        weight.add_(product.view(weight.shape), alpha=self.factor)


def merge(changes: Iterable[Change], tensors: Mapping[str, Tensor]) -> None:
    """Adds changes in place to the weights of a model, which are given by official names.

    Each weight is computed in fp32, or its own dtype if that is wider, and rounded once. What one file changes in one
    weight is all that is held at a time, and a copy of that weight if it is narrower. A scale of 0 changes no bit.

    Raises:
        CheckpointError: if a file cannot be read, or makes a weight that is not finite in its dtype.
    """
    by_target: dict[Target, list[Change]] = {}
    for change in (change for change in changes if change.factor != 0):
        by_target.setdefault(change.target, []).append(change)
    for target, group in by_target.items():
        weight = target.view(tensors[target.official])
        wide = weight.to(torch.promote_types(weight.dtype, torch.float32))  # no copy where it is that wide
        for change in group:
            change.add_to(wide)
        if wide is not weight:
            weight.copy_(wide)
        if not weight.isfinite().all():
            files = ", ".join(dict.fromkeys(str(change.file.path) for change in group))
            raise CheckpointError(
                f"{files} makes {target.official} have values that are not finite numbers in {weight.dtype}; "
                "try a smaller scale or another dtype, or download it again"
            )


def open_loras(loras: Sequence[LoRA], config: ModelConfig, shapes: Mapping[str, Shape]) -> list[Change]:
    """Finds what LoRAs change in a model; reads headers and alphas only.

    Args:
        loras: the files; several may change the same weight.
        config: of the model.
        shapes: of all its tensors, by official names.

    Raises:
        CheckpointError: if a file is damaged, something else, of a kind that is not a plain LoRA, or for another
            model, or has half of a pair, a mis-shaped tensor, or an alpha that is not a finite number.
    """
    targets = _targets(config, shapes)
    return [change for lora in loras for change in _changes(lora.scale, open_tensors(lora.file), config, targets)]


def _targets(config: ModelConfig, shapes: Mapping[str, Shape]) -> dict[tuple[str, str], Target]:
    """All targets, by part and by each name that files have for the module, with underscores for dots."""
    table: dict[tuple[str, str], Target] = {}
    for part in dict.fromkeys(PREFIXES.values()):
        prefix, theirs, ways = PARTS[part].prefix, layout(part, config), key_variants(part, config)
        for official in (name for name in shapes if name.startswith(prefix) and len(shapes[name]) > 1):
            name = official.removeprefix(prefix)
            mapping = theirs.mapping(name)
            views = mapping.split(torch.empty(shapes[official], device="meta"))
            targets = [Target(official, mapping, index, tuple(view.shape)) for index, view in enumerate(views)]
            for way in ways:
                # What OpenCLIP stacks has one name officially, and that is not the name of a module's weight.
                modules = [_module(part, weight) for weight in way(name).names if weight.endswith(".weight")]
                table |= dict(zip(modules, targets, strict=False))
    return table


def _module(part: str, weight: str) -> tuple[str, str]:
    return part, weight.removesuffix(".weight").replace(".", "_")


def _changes(
    scale: float, file: TensorFile, config: ModelConfig, targets: Mapping[tuple[str, str], Target]
) -> list[Change]:
    """What one file changes at a scale."""
    found: dict[Target, dict[str, str]] = {}  # the names of its tensors by their roles
    spelled: dict[Target, Name] = {}
    for tensor in file.entries:
        name = read_name(tensor)
        target = targets.get(_module(name.part, name.module)) if name else None
        if name and target:
            tensors = found.setdefault(target, {})
            if name.role in tensors:
                raise CheckpointError(f"{file.path} has two for one module: {tensors[name.role]} and {tensor}")
            tensors[name.role], spelled[target] = tensor, name
    _check(file, config, found)
    alphas = read_alphas(file, [tensors["alpha"] for tensors in found.values() if "alpha" in tensors])
    settings = read_settings(file)

    def factor(target: Target, tensors: Mapping[str, str]) -> float:
        part, module, _ = spelled[target]
        rank = file.entries[tensors["down"]].shape[0]
        return alphas[tensors["alpha"]] / rank if "alpha" in tensors else settings[part].factor(module, rank)

    return [
        Change(target, file, tensors["down"], tensors["up"], scale * factor(target, tensors))
        for target, tensors in found.items()
    ]


def _check(file: TensorFile, config: ModelConfig, found: Mapping[Target, Mapping[str, str]]) -> None:
    """Compares a file with what its targets ask for. Raises ``CheckpointError``."""
    shapes = {name: entry.shape for name, entry in file.entries.items()}
    if found:
        shapes = {name: shape for name, shape in shapes.items() if not EMBEDDING.fullmatch(name)}
    expected: dict[str, Shape] = {}
    for target, tensors in found.items():
        expected |= _expected(target, tensors, shapes)
    problems = misfits(shapes, expected)
    what = other_kind(shapes) if problems or not found else None
    if what:
        raise CheckpointError(
            f"{file.path} is {what}; expected a LoRA for {config.name}, made of lora_down and lora_up"
        )
    if problems:
        raise CheckpointError(f"{file.path} does not fit {config.name}: {problems}")
    for tensors in found.values():
        for role, tensor in tensors.items():
            dtype = file.entries[tensor].dtype
            if dtype not in READABLE and (role, dtype) != ("alpha", "I64"):
                raise CheckpointError(f"{file.path} has {tensor} as {dtype}; expected {', '.join(READABLE)}")


def _expected(target: Target, tensors: Mapping[str, str], shapes: Mapping[str, Shape]) -> dict[str, Shape]:
    """The shapes of a target's tensors. Without one of the pair nothing is expected, not even an alpha."""
    if not {"down", "up"} & tensors.keys():
        return {}
    down = tensors.get("down") or partner(tensors["up"])
    up = partner(down)  # the other half of another adapter is unexpected
    rank = (shapes.get(down, ())[:1] or shapes.get(up, ())[1:2] or (1,))[0] or 1  # rank 0 is mis-shaped
    out, *inner = target.shape
    wanted: dict[str, Shape] = {down: (rank, *inner), up: (out, rank, *[1] * len(inner[1:]))}
    if "alpha" in tensors:
        wanted[tensors["alpha"]] = ()
    return {name: shapes[name] if _fits(shapes.get(name), shape) else shape for name, shape in wanted.items()}


def _fits(found: Shape | None, wanted: Shape) -> bool:
    """Equal, or a matrix and a 1x1 convolution, or a number and a list of one."""
    if found is None:
        return False
    forms = [shape[:-2] if shape[2:] == (1, 1) else shape for shape in (found, wanted)]
    return forms[0] == forms[1] or (found, wanted) == ((1,), ())
