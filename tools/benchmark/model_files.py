"""Files of random weights in the official layout, and the folder that diffusers needs beside them."""

from __future__ import annotations

import argparse
import json
import math
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from minisdxl.bundled import BUNDLED
from minisdxl.checkpoint.folder_writer import json_files, tokenizer_files
from minisdxl.checkpoint.modules import file_metadata, official_shapes, read_config
from minisdxl.checkpoint.tensorfile import write_tensors
from minisdxl.config import SDXL_BASE, SHAPES, ModelConfig
from minisdxl.tokenizer import load_vocabulary

CONFIGS = {"full": SDXL_BASE, "small": SHAPES}


def write_random(path: Path, config: ModelConfig) -> None:
    """Writes random fp16 weights in the official layout, scaled so that no part overflows.

    Raises:
        OSError: if the disk has no room for the file.
        CheckpointError: if the file cannot be written.
    """
    shapes = official_shapes(config)
    needed, free = 2 * sum(map(math.prod, shapes.values())), shutil.disk_usage(path.parent).free
    if free < 1.01 * needed:
        raise OSError(f"{path} needs {needed / 1e9:.2f} GB of disk, {free / 1e9:.2f} are free; name another --folder")
    generator = torch.Generator().manual_seed(0)

    def numbers() -> Iterator[Tensor]:
        for name, shape in shapes.items():
            if len(shape) > 1:
                yield torch.randn(shape, generator=generator).div(math.sqrt(math.prod(shape[1:])))
            else:
                yield torch.full(shape, float(name.endswith("weight")))  # normalizations scale by 1, biases are 0

    write_tensors(
        path, {name: (torch.float16, shape) for name, shape in shapes.items()}, numbers(), file_metadata(config)
    )


def write_description(folder: Path, config: ModelConfig, weights: Path, tokenizer: Path | None) -> None:
    """Writes the folder of configs and tokenizers that diffusers needs beside the weights.

    Raises:
        CheckpointError: if diffusers has no such model.
        FileNotFoundError: if there is no vocabulary.
        ValueError: if the vocabulary is not that of the model.
    """
    files = {name: json.dumps(content) for name, content in json_files(folder, config).items()}
    files |= tokenizer_files(config, load_vocabulary(weights, tokenizer))
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")


@contextmanager
def prepared(options: argparse.Namespace) -> Iterator[tuple[Path, Path]]:
    """The weights and the folder that describes them. Both are deleted afterwards, except weights that were given."""
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        weights, tokenizer = options.weights, options.tokenizer
        if weights is None:
            weights = folder / f"{options.scale}.safetensors"
            if options.scale == "small" and tokenizer is None:
                tokenizer = BUNDLED["shapes"].parent / "tokenizer"
            print(f"writing {weights}", file=sys.stderr)
            write_random(weights, CONFIGS[options.scale])
        write_description(folder, read_config(weights), weights, tokenizer)
        yield weights.absolute(), folder
