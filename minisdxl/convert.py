"""The command ``python -m minisdxl.convert``: writes a model as one official file or as a diffusers folder.

It reads, converts and writes one tensor at a time, so it needs no more memory than the largest tensor.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minisdxl.checkpoint.atomic import atomic_folder
from minisdxl.checkpoint.embeddings import read_embeddings
from minisdxl.checkpoint.errors import CheckpointError
from minisdxl.checkpoint.folder_reader import INDEX, SCHEDULER, noise_config
from minisdxl.checkpoint.folder_writer import json_files, tokenizer_files
from minisdxl.checkpoint.json_fields import Fields
from minisdxl.checkpoint.layouts import PARTS, file_name, layout, model_parts
from minisdxl.checkpoint.lora import Change, LoRA, merge, open_loras
from minisdxl.checkpoint.modules import file_metadata, open_source
from minisdxl.checkpoint.predictions import mark_tensors, prediction_text
from minisdxl.checkpoint.resolve import Source
from minisdxl.checkpoint.tensorfile import Spec, write_container, write_tensors
from minisdxl.cli.models import add_parts, parts_of
from minisdxl.cli.options import DTYPES, Parser, add_prediction
from minisdxl.config import ModelConfig
from minisdxl.loading import weights_path
from minisdxl.tokenizer import Vocabulary, load_vocabulary

logger = logging.getLogger(__name__)

Changes = Mapping[str, Sequence[Change]]  # by the official name of the tensor that they change


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command; exit code 0 on success, 2 with one line on bad input, 130 after Ctrl-C."""
    parser = Parser(prog="python -m minisdxl.convert", description="Writes a model in another layout or dtype.")
    add = parser.add_argument
    add("source", metavar="SOURCE", help="the bundled 'shapes', an SDXL .safetensors file, or a diffusers folder")
    add("target", type=Path, metavar="TARGET", help="the file or the new folder to write")
    add("--to", choices=("single", "diffusers"), help="(default: single for a .safetensors TARGET, else diffusers)")
    add("--dtype", choices=DTYPES, help="of the weights (default: each tensor keeps its own)")
    add_parts(parser)
    add_prediction(parser)
    add(
        "--lora",
        action="append",
        default=[],
        metavar="FILE|DIR[:SCALE[:SCALE]]",
        help="merge this LoRA into what is written, as for sample; may be given several times",
    )
    add("--tokenizer", metavar="DIR", help="folder of the vocabulary, for a diffusers TARGET (default: as for sample)")
    options = parser.parse_args(arguments)
    single = options.to == "single" if options.to else options.target.suffix == ".safetensors"
    dtype = DTYPES[options.dtype] if options.dtype else None
    with parser.one_line("nothing was written"):
        path = weights_path(options.source)
        source = open_source(path, dtype or torch.float32, prediction=options.prediction, **parts_of(options))
        loras = [LoRA.parse(text) for text in options.lora]
        changes = open_loras(loras, source.config, source.shapes)
        for note in [*source.notes, *_left_out(loras, source.config)]:
            logger.warning(note)
        if single:
            write_single(source, options.target, dtype, changes)
        else:
            vocabulary = load_vocabulary(path, options.tokenizer)
            write_folder(source, options.target, vocabulary, dtype, _own_scheduler(path, source), changes)
    kind = "one file; the vocabulary is not in it" if single else "a diffusers folder"
    noise = source.config.noise
    name = source.config.name + (f", predicts {prediction_text(noise)}" if noise.prediction != "noise" else "")
    print(f"{options.target}  {name}, {kind}")


def _own_scheduler(path: Path, source: Source) -> dict[str, Any] | None:
    """A folder's scheduler, which may have settings of its own, unless the model now predicts something else."""
    if not (path / SCHEDULER).is_file():
        return None
    fields = Fields.read(path / SCHEDULER)
    return fields.values if noise_config(fields) == source.config.noise else None


def _left_out(loras: Sequence[LoRA], config: ModelConfig) -> list[str]:
    """A line for each LoRA that has embeddings beside it. Raises ``CheckpointError`` if they are damaged."""
    bundled = {lora.file: ", ".join(read_embeddings([], [lora.file], config)) for lora in loras}
    return [
        f"{file} also has the embedding {names}, for which a model has no place: load it with --lora {file}:0"
        for file, names in bundled.items()
        if names
    ]


def write_single(source: Source, path: Path, dtype: torch.dtype | None = None, changes: Sequence[Change] = ()) -> None:
    """Writes one file in the official layout, whole or not at all. ``None`` keeps the dtype of each tensor.

    ``changes`` are merged into its tensors: what :func:`minisdxl.checkpoint.lora.open_loras` has found.

    Raises:
        CheckpointError: if the file cannot be written, numbers are too large for the dtype, or a LoRA cannot be read.
    """
    dtypes = {name: dtype or source.stored[name].dtype for name in source.shapes}
    specs: dict[str, Spec] = {
        file_name(name, source.config): (dtypes[name], shape) for name, shape in source.shapes.items()
    }
    table = _by_tensor(changes)
    tensors = (_read(source, name, dtypes[name], table) for name in dtypes)
    marks = mark_tensors(source.config)
    specs |= {name: (torch.float32, tuple(mark.shape)) for name, mark in marks.items()}
    write_tensors(path, specs, chain(tensors, marks.values()), file_metadata(source.config))


def write_folder(
    source: Source,
    path: Path,
    vocabulary: Vocabulary,
    dtype: torch.dtype | None = None,
    scheduler: Mapping[str, Any] | None = None,
    changes: Sequence[Change] = (),
) -> None:
    """Writes a new diffusers folder, whole or not at all.

    Args:
        source: the model.
        path: the folder.
        vocabulary: of both tokenizers.
        dtype: of all weights; ``None`` keeps the dtype of each tensor.
        scheduler: the content of ``scheduler_config.json``; ``None`` for the Euler sampler of this package.
        changes: to merge into the weights, as for :func:`write_single`.

    Raises:
        CheckpointError: if diffusers has no such model, if the folder exists or cannot be written, if numbers are too
            large for the dtype, or if a LoRA cannot be read.
        ValueError: if the vocabulary is not that of the text encoders.
    """
    described = json_files(path, source.config)
    if scheduler is not None:
        described[SCHEDULER] = dict(scheduler)
        described[INDEX]["scheduler"] = ["diffusers", str(scheduler.get("_class_name"))]
    files = {name: json.dumps(content, indent=2) for name, content in described.items()}
    files |= tokenizer_files(source.config, vocabulary)
    table = _by_tensor(changes)
    try:
        with atomic_folder(path) as temporary:
            for name, text in files.items():
                (temporary / name).parent.mkdir(exist_ok=True)
                (temporary / name).write_text(text, encoding="utf-8")
            for part in model_parts(source.config):
                _write_part(source, part, temporary / part / f"{PARTS[part].weights}.safetensors", dtype, table)
    except OSError as error:
        raise CheckpointError(f"cannot write {path}: {error.strerror or error}") from error


def _write_part(source: Source, part: str, path: Path, dtype: torch.dtype | None, changes: Changes) -> None:
    names, prefix = layout(part, source.config), PARTS[part].prefix
    mappings = {name: names.mapping(name.removeprefix(prefix)) for name in source.shapes if name.startswith(prefix)}
    dtypes = {name: dtype or source.stored[name].dtype for name in mappings}
    specs: dict[str, Spec] = {}
    for name, place in mappings.items():
        views = place.split(torch.empty(source.shapes[name], device="meta"))
        specs |= {theirs: (dtypes[name], tuple(view.shape)) for theirs, view in zip(place.names, views, strict=True)}

    def tensors() -> Iterator[Tensor]:
        for name, place in mappings.items():
            yield from place.split(_read(source, name, dtypes[name], changes))

    with path.open("wb") as file:
        write_container(file, specs, tensors(), {"format": "pt"})


def _by_tensor(changes: Sequence[Change]) -> Changes:
    table: dict[str, list[Change]] = {}
    for change in changes:
        table.setdefault(change.target.official, []).append(change)
    return table


def _read(source: Source, name: str, dtype: torch.dtype, changes: Changes) -> Tensor:
    tensor = source.read(name, dtype)
    merge(changes.get(name, ()), {name: tensor})
    if not tensor.isfinite().all():
        raise CheckpointError(f"{name} has values that are not finite numbers in {dtype}; try bf16 or fp32")
    return tensor


if __name__ == "__main__":
    main()
