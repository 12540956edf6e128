"""CLIP's weights under OpenCLIP's names, which OpenAI's have too, as if the file had them as transformers does.

SDXL's official names for its first text encoder are those of transformers. In OpenCLIP's layout queries, keys and
values are stacked in one tensor. Its rows lie one after the other in the file, so a table of other entries is enough.
"""

from __future__ import annotations

from dataclasses import replace

from minisdxl.checkpoint.layouts import openclip_layout
from minisdxl.checkpoint.tensorfile import Entry, TensorFile
from minisdxl.checkpoint.weight_files import WeightFiles
from minisdxl.config import TextConfig

SIGN = "transformer.resblocks.0.attn.in_proj_weight"  # is in every file of this layout


def as_transformers(files: WeightFiles, config: TextConfig) -> WeightFiles:
    """The files with the names of transformers; as they are if they have no names of OpenCLIP."""
    if SIGN not in files.entries:
        return files
    return replace(files, files=tuple(_renamed(file, config) for file in files.files))


def _renamed(file: TensorFile, config: TextConfig) -> TensorFile:
    names = openclip_layout(config)
    entries: dict[str, Entry] = {}
    for name, entry in file.entries.items():
        try:
            theirs = names.mapping(name).names
        except KeyError:  # such as those of the picture encoder
            theirs = (name,)
        entries |= _split(entry, theirs)
    return replace(file, entries=entries)


def _split(entry: Entry, names: tuple[str, ...]) -> dict[str, Entry]:
    """Entries of as many rows each, one after the other. Where they do not divide, the shapes are refused later."""
    count = len(names)
    if count == 1 or not entry.shape or entry.shape[0] % count:
        return {names[0]: entry}
    shape, size = (entry.shape[0] // count, *entry.shape[1:]), (entry.stop - entry.start) // count
    starts = [entry.start + index * size for index in range(count)]
    return {name: Entry(entry.dtype, shape, start, start + size) for name, start in zip(names, starts, strict=True)}
