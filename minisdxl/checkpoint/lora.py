"""LoRAs and their relatives (LyCORIS, DoRA), merged into the weights of a model while it is loaded.

For some weights W of the model a file has small tensors, from which ``adapters`` makes a change D, and often a number
alpha, which is the rank where it has none. Merged is W + scale * alpha / rank * D. With the lengths of a DoRA, it is
W + scale * (R - W), where R is W + alpha / rank * D rescaled: any scale lies between W and R or beyond. What LyCORIS
and PEFT do at scales other than 1 differs; ComfyUI and AUTOMATIC1111's web UI do this.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from minisdxl.checkpoint.adapters import MAGNITUDES, Kind, kind_of, magnitude_shapes, rescale
from minisdxl.checkpoint.errors import CheckpointError
from minisdxl.checkpoint.layouts import PARTS, TensorMapping, key_variants, layout
from minisdxl.checkpoint.lora_names import (
    EMBEDDING,
    PREFIXES,
    Name,
    other_kind,
    read_name,
    read_numbers,
    read_settings,
    sibling,
)
from minisdxl.checkpoint.published import find_weights
from minisdxl.checkpoint.resolve import misfits
from minisdxl.checkpoint.tensorfile import READABLE, Shape, TensorFile, open_tensors
from minisdxl.checkpoint.weight_files import LORA_FILE
from minisdxl.config import ModelConfig

NUMBERS = ("alpha", "scalar", "on_input")  # roles of tensors that hold one number
Place = tuple[str, str, str]  # part, module, and weight or bias


@dataclass(frozen=True)
class LoRA:
    """A file or folder, and how much of it to merge: 1 is all. Raises ``ValueError`` for a scale that is not finite."""

    path: Path  # or the name of one that is published
    scale: float = 1.0  # for the U-Net
    text_scale: float | None = None  # for the text encoders; ``None``: as for the U-Net

    def __post_init__(self) -> None:
        for scale in (self.scale, self.scale_of("text_encoder")):
            if not math.isfinite(scale):
                raise ValueError(f"scale of {self.path} is {scale}, expected a finite number, such as 0.8")

    @property
    def scales(self) -> dict[str, float]:
        """Both scales by the names of their fields, without the second where it is the first."""
        return {"scale": self.scale} | ({} if self.text_scale is None else {"text_scale": self.text_scale})

    def scale_of(self, part: str) -> float:
        """The scale for a part of the model, one of ``PARTS``."""
        return self.scale if part == "unet" or self.text_scale is None else self.text_scale

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
        """Reads ``FILE``, ``FILE:SCALE``, or ``FILE:SCALE:SCALE`` with another scale for the text encoders.

        A colon that no number follows belongs to the file's name, as does one in the name of an existing file. Raises
        ``ValueError`` for a text such as ``x.safetensors:abc``, unless it is the name of a file.
        """
        file, scales = text, list[float]()
        while len(scales) < 2 and not Path(file).exists():
            start, _, scale = file.rpartition(":")
            number = _number(scale)
            if not start or number is None:
                if match := re.fullmatch(r"(.*\.safetensors)(:[^:/]*)?", start):
                    raise ValueError(f"scale of {match[1]} is {scale!r}, expected a number, such as 0.8")
                break
            file, scales = start, [number, *scales]
        return cls(Path(file), *scales)


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


@dataclass(frozen=True)
class Target:
    """A weight or bias of the model: an official tensor, or one of those that are stacked in it."""

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
    kind: Kind
    tensors: Mapping[str, str]  # names by roles
    factor: float  # alpha / rank
    scale: float

    @property
    def lengths(self) -> str | None:
        """The role of the lengths of a DoRA, if it is one."""
        return next((role for role in MAGNITUDES if role in self.tensors), None)

    @property
    def reads_weight(self) -> bool:
        """Whether the change depends on the weight that it changes."""
        return self.kind.reads_weight or self.lengths is not None

    def add_to(self, weight: Tensor, base: Tensor) -> None:
        """Adds the change of ``base`` in place to a weight, which may be the same. Raises ``CheckpointError``."""
        shapes = {role: self.file.entries[name].shape for role, name in self.tensors.items()}
        shapes |= {role: shape for role, shape in self.kind.shapes(self.target.shape, shapes).items() if role in shapes}
        tensors = {role: torch.empty(shape, dtype=weight.dtype, device=weight.device) for role, shape in shapes.items()}
        self.file.read_into({self.tensors[role]: tensor for role, tensor in tensors.items()})
        product, factor = self.kind.product(tensors, base).reshape(weight.shape), self.factor
        if self.lengths is not None:
            product, factor = rescale(base + factor * product, tensors[self.lengths], self.lengths) - base, 1
        weight.add_(product, alpha=self.scale * factor)


def merge(changes: Iterable[Change], tensors: Mapping[str, Tensor]) -> None:
    """Adds changes in place to the weights of a model, which are given by official names.

    Each weight is computed in fp32, or its own dtype if that is wider, and rounded once. Every change is made from the
    weight as it was before all of them, so their order does not matter. What one file changes in one weight is all
    that is held at a time, and up to two copies of that weight. A scale of 0 changes no bit.

    Raises:
        CheckpointError: if a file cannot be read, or makes a weight that is not finite in its dtype.
    """
    by_target: dict[Target, list[Change]] = {}
    for change in (change for change in changes if change.scale != 0):
        by_target.setdefault(change.target, []).append(change)
    for target, group in by_target.items():
        weight = target.view(tensors[target.official])
        wide = weight.to(torch.promote_types(weight.dtype, torch.float32))  # no copy where it is that wide
        base = wide.clone() if len(group) > 1 and any(change.reads_weight for change in group) else wide
        for change in group:
            change.add_to(wide, base)
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
        CheckpointError: if a file is damaged, something else, of a kind that cannot be merged, or for another model,
            or has half of a pair, a mis-shaped tensor, or an alpha that is not a finite number.
    """
    targets = _targets(config, shapes)
    return [change for lora in loras for change in _changes(lora, open_tensors(lora.file), config, targets)]


def _targets(config: ModelConfig, shapes: Mapping[str, Shape]) -> dict[Place, Target]:
    """All targets, by part and by each name that files have for the module, with underscores for dots."""
    table: dict[Place, Target] = {}
    for part in dict.fromkeys(PREFIXES.values()):
        prefix, theirs, ways = PARTS[part].prefix, layout(part, config), key_variants(part, config)
        for official in (name for name in shapes if name.startswith(prefix)):
            name = official.removeprefix(prefix)
            mapping = theirs.mapping(name)
            views = mapping.split(torch.empty(shapes[official], device="meta"))
            targets = [Target(official, mapping, index, tuple(view.shape)) for index, view in enumerate(views)]
            for way in ways:
                # What OpenCLIP stacks has one name officially, and that is not the name of a module's weight.
                tensors = [each for each in way(name).names if each.endswith((".weight", ".bias"))]
                table |= dict(zip([_place(part, *each.rsplit(".", 1)) for each in tensors], targets, strict=False))
    return table


def _place(part: str, module: str, of: str) -> Place:
    return part, module.replace(".", "_"), of


def _changes(lora: LoRA, file: TensorFile, config: ModelConfig, targets: Mapping[Place, Target]) -> list[Change]:
    """What one file changes."""
    found: dict[Target, dict[str, str]] = {}  # the names of its tensors by their roles
    spelled: dict[Target, Name] = {}
    for tensor in file.entries:
        name = read_name(tensor, file.entries)
        target = targets.get(_place(name.part, name.module, name.of)) if name else None
        if name and target and (len(target.shape) > 1 or name.role == "diff"):
            tensors = found.setdefault(target, {})
            if name.role in tensors:
                raise CheckpointError(f"{file.path} has two for one module: {tensors[name.role]} and {tensor}")
            tensors[name.role], spelled[target] = tensor, name
    _check(file, config, found)
    names = [tensors[role] for tensors in found.values() for role in NUMBERS if role in tensors]
    numbers, settings = read_numbers(file, names), read_settings(file)

    def change(target: Target, tensors: dict[str, str]) -> Change:
        part, module, _, _ = spelled[target]
        read = {role: name for role, name in tensors.items() if role not in NUMBERS}
        said = {role: numbers[tensors[role]] for role in NUMBERS if role in tensors}
        kind = kind_of(tensors)
        assert kind is not None  # _check has refused those without
        if "on_input" in said:
            read = {"inputs" if said["on_input"] else "outputs": read["weight"]}
            _check_ia3(file, read, target.shape)
        rank = kind.rank and kind.rank({role: file.entries[name].shape for role, name in read.items()})
        factor = said.get("scalar", 1.0)
        if rank is not None:
            factor *= said["alpha"] / rank if "alpha" in said else settings[part].factor(module, rank)
        return Change(target, file, kind, read, factor, lora.scale_of(part))

    return [change(target, tensors) for target, tensors in found.items()]


def _check_ia3(file: TensorFile, tensors: Mapping[str, str], shape: Shape) -> None:
    """Raises ``CheckpointError`` if a vector for the inputs is as long as the outputs are many, or the reverse."""
    for role, name in tensors.items():
        found, wanted = math.prod(file.entries[name].shape), shape[1 if role == "inputs" else 0]
        if found != wanted:
            raise CheckpointError(f"{file.path} has {found} numbers in {name}, expected {wanted} for the {role}")


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
        raise CheckpointError(f"{file.path} is {what}; expected a LoRA for {config.name}")
    if problems:
        raise CheckpointError(f"{file.path} does not fit {config.name}: {problems}")
    for tensors in found.values():
        for role, tensor in tensors.items():
            dtype = file.entries[tensor].dtype
            if dtype not in READABLE and (role not in NUMBERS or dtype != "I64"):
                raise CheckpointError(f"{file.path} has {tensor} as {dtype}; expected {', '.join(READABLE)}")


def _expected(target: Target, tensors: Mapping[str, str], shapes: Mapping[str, Shape]) -> dict[str, Shape]:
    """The shapes of a target's tensors. Where only an alpha or the like is there, nothing is expected."""
    kind = kind_of(tensors)
    if kind is None:
        return {}
    start = next(tensors[role] for role in kind.start if role in tensors)
    forms: dict[str, list[Shape]] = {}
    for role, shape in kind.shapes(target.shape, {role: shapes[name] for role, name in tensors.items()}).items():
        # The other matrix of a LoRA is that of the same adapter; one of another adapter is unexpected.
        name = sibling(start, role) if role not in tensors or "down" in kind.start else tensors[role]
        forms[name] = [shape]
    if kind.rank is not None:
        others: dict[str, list[Shape]] = {"alpha": [()], "scalar": [()], **magnitude_shapes(target.shape)}
        forms |= {tensors[role]: shapes_of for role, shapes_of in others.items() if role in tensors}
    return {
        name: next((shapes[name] for shape in allowed if _fits(shapes.get(name), shape)), allowed[0])
        for name, allowed in forms.items()
    }


def _fits(found: Shape | None, wanted: Shape) -> bool:
    """Equal, or a matrix and a 1x1 convolution, or a number and a list of one."""
    if found is None:
        return False
    forms = [shape[:-2] if shape[2:] == (1, 1) else shape for shape in (found, wanted)]
    return forms[0] == forms[1] or (found, wanted) == ((1,), ())
