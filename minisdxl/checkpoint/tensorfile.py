"""Safetensors files: header parsing, checks, memory-mapped and buffered reading, and writing.

A file has 8 bytes with the length of a JSON header, the header, and the tensors' bytes one after the other without gaps
(https://huggingface.co/docs/safetensors). The header is checked before anything is read. Tensors that need no
conversion can be mapped into memory; all others are read through one small buffer. Files are written tensor by tensor.
So there is never a second copy of a model in memory.
"""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from minisdxl.checkpoint.atomic import atomic_path
from minisdxl.checkpoint.containers import container
from minisdxl.checkpoint.errors import CheckpointError

Shape = tuple[int, ...]
FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# Dtypes for storage only. FLOATS represent all their numbers, so they are read as those.
FP8 = {"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}
READABLE = FLOATS | FP8
# Bits of a number, for all dtypes of the safetensors library.
BITS = {
    **{"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8},
    **{"BOOL": 8, "U8": 8, "I8": 8, "U16": 16, "I16": 16, "F16": 16, "BF16": 16, "U32": 32, "I32": 32, "F32": 32},
    **{"U64": 64, "I64": 64, "F64": 64, "C64": 64, "F8_E8M0": 8},
}
MAX_RANK = 64  # of a tensor of PyTorch
MAX_HEADER = 100_000_000  # bytes; the limit of the safetensors library
BUFFER = 2**24  # bytes read at a time
MAPPED = 2**19  # bytes; smaller tensors are read, which leaves the files of a small model unmapped
METADATA = "__metadata__"
Spec = tuple[torch.dtype, Shape]  # of a tensor to be written


@dataclass(frozen=True)
class Entry:
    """One tensor: the container's name of its dtype, its shape, and its first and last + 1 byte after the header."""

    dtype: str
    shape: Shape
    start: int
    stop: int


@dataclass(frozen=True)
class TensorFile:
    """A file whose header has been read, and is consistent in itself and with the file's size."""

    path: Path
    entries: dict[str, Entry]  # in the order of their bytes
    metadata: dict[str, str]
    header_bytes: int  # what comes before the first tensor

    def read_into(self, targets: Mapping[str, Tensor]) -> None:
        """Reads tensors into ``targets`` with as many elements, of any dtype, device and strides.

        All numbers go through one small buffer. A buffer for each tensor would leave holes in the process's memory,
        1.1 GiB of them for SDXL read from fp16 to bf16.

        Raises:
            CheckpointError: if the file cannot be read, or has become shorter since it was opened.
            ValueError: if a target has another number of elements, or the file's dtype is not in ``READABLE``.
        """
        buffer = torch.empty(BUFFER, dtype=torch.uint8, device="cpu")
        try:
            with self.path.open("rb") as file:
                for name in (name for name in self.entries if name in targets):  # in the order of their bytes
                    entry, target = self.entries[name], targets[name]
                    if entry.dtype not in READABLE or math.prod(entry.shape) != target.numel():
                        raise ValueError(f"{name} is {entry.dtype} {entry.shape}, its target is {tuple(target.shape)}")
                    dtype = READABLE[entry.dtype]
                    file.seek(self.header_bytes + entry.start)
                    for part in _pieces(target, BUFFER // dtype.itemsize):
                        piece = buffer[: part.numel() * dtype.itemsize]
                        if file.readinto(_bytes_of(piece)) != piece.numel():
                            raise CheckpointError(f"{self.path} ended within {name} while it was being read")
                        part.copy_(piece.view(dtype).view(part.shape))
        except OSError as error:
            raise CheckpointError(f"cannot read {self.path}: {error.strerror}") from error

    def raw(self, name: str) -> bytes:
        """The bytes of a tensor of any dtype, such as a text. Raises ``CheckpointError`` as :meth:`read_into`."""
        entry = self.entries[name]
        try:
            with self.path.open("rb") as file:
                file.seek(self.header_bytes + entry.start)
                return file.read(entry.stop - entry.start)
        except OSError as error:
            raise CheckpointError(f"cannot read {self.path}: {error.strerror}") from error

    def can_map(self, name: str, dtype: torch.dtype) -> bool:
        """Whether the file stores a tensor as ``dtype``, aligned to its size, and large enough to be mapped."""
        entry = self.entries[name]
        aligned = (self.header_bytes + entry.start) % dtype.itemsize == 0
        return FLOATS.get(entry.dtype) == dtype and aligned and entry.stop - entry.start >= MAPPED

    def map(self, names: Collection[str]) -> dict[str, Tensor]:
        """The named tensors, mapped into memory instead of read. :meth:`can_map` must hold for each.

        The mapping is private: writing to these tensors changes only this process. It lasts as long as one of them.

        NOTE: do not change the file while it is mapped. If it becomes shorter, the system kills a process that uses a
        page beyond its end (SIGBUS). If it is overwritten, as by ``cp`` or safetensors' ``save_file``, the tensors may
        change. Replacing or deleting the file is safe.

        Raises:
            CheckpointError: if the file cannot be mapped, or has become shorter since it was opened.
        """
        size = self.header_bytes + max(self.entries[name].stop for name in names)
        try:
            storage = torch.UntypedStorage.from_file(str(self.path), shared=False, nbytes=size)
        except RuntimeError as error:  # says what the system said, or that the file is too short
            raise CheckpointError(f"cannot map {self.path}: {(str(error).splitlines() or [''])[0]}") from error
        tensors = {}
        for name in names:
            entry = self.entries[name]
            # Each tensor has its own storage, which keeps the mapping alive: saving a tensor saves all of its storage.
            own = storage[self.header_bytes + entry.start : self.header_bytes + entry.stop]
            tensors[name] = torch.empty(0, dtype=FLOATS[entry.dtype], device="cpu").set_(own).view(entry.shape)
        return tensors


def open_tensors(path: str | Path) -> TensorFile:
    """Reads and checks the header of a safetensors file.

    Raises:
        CheckpointError: if there is no such file, it is something else (its first bytes say what), its header is
            damaged, or it is shorter or longer than its header says.
    """
    path = Path(path)
    try:
        text, size = _header(path)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from error
    try:
        entries, metadata = _parse(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} has a damaged header: {error}; download or write it again") from error
    header_bytes = 8 + len(text)
    expected = header_bytes + max((entry.stop for entry in entries.values()), default=0)
    if size < expected:
        raise CheckpointError(
            f"{path} is truncated: {size:,} of {expected:,} bytes, {expected - size:,} are missing; download it again"
        )
    if size > expected:
        raise CheckpointError(
            f"{path} is too long: {size:,} bytes, {size - expected:,} more than the {expected:,} of its header"
        )
    return TensorFile(path, entries, metadata, header_bytes)


def _header(path: Path) -> tuple[bytes, int]:
    """The header's bytes, and the size of the file."""
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "is not a file" if path.exists() else "does not exist"
        raise CheckpointError(f"{path} {what}; expected one .safetensors file")
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        head = file.read(512)
        length = int.from_bytes(head[:8], "little")
        if length > MAX_HEADER or head[8:9] != b"{":
            what = container(head) or f"of an unknown kind, {size:,} bytes that begin with {head[:8].hex(' ')}"
            raise CheckpointError(f"{path} is {what}; expected a safetensors file")
        file.seek(8)
        text = file.read(length)
    if len(text) < length:
        missing = 8 + length - size
        raise CheckpointError(
            f"{path} is truncated: the last {missing:,} bytes of its header are missing, and all after"
        )
    return text, size


def write_tensors(
    path: str | Path, specs: Mapping[str, Spec], tensors: Iterable[Tensor], metadata: Mapping[str, str]
) -> None:
    """Writes a safetensors file, whole or not at all.

    Args:
        path: the file, which is replaced where it exists.
        specs: dtype and shape of each tensor, as it is to be in the file.
        tensors: the tensors in that order, converted as they are written: they may be made one by one.
        metadata: strings for the file's header.

    Raises:
        CheckpointError: if the file cannot be written (no folder, disk full, ...).
        ValueError: if a dtype is not in ``FLOATS``, or the tensors are not those of ``specs``.
    """
    try:
        with atomic_path(path) as temporary, temporary.open("wb") as file:
            write_container(file, specs, tensors, metadata)
    except OSError as error:
        raise CheckpointError(f"cannot write {path}: {error.strerror or error}") from error


def write_container(
    file: BinaryIO, specs: Mapping[str, Spec], tensors: Iterable[Tensor], metadata: Mapping[str, str]
) -> None:
    """Writes header and tensors. Arguments and errors as :func:`write_tensors`, and ``OSError`` as it comes."""
    codes = {dtype: code for code, dtype in FLOATS.items()}
    header: dict[str, Any] = {METADATA: dict(metadata)}
    stop = 0
    for name, (dtype, shape) in specs.items():
        if dtype not in codes:
            raise ValueError(f"{name} cannot be written as {dtype}, expected one of {list(codes)}")
        start, stop = stop, stop + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": codes[dtype], "shape": list(shape), "data_offsets": [start, stop]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # aligns the tensors for readers that map the file
    file.write(len(text).to_bytes(8, "little") + text)
    for (name, (dtype, shape)), tensor in zip(specs.items(), tensors, strict=True):
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{name} to be written is {list(tensor.shape)}, expected {list(shape)}")
        file.write(_bytes_of(tensor.detach().to("cpu", dtype).contiguous()))


def _pieces(tensor: Tensor, limit: int) -> Iterator[Tensor]:
    """Views of a tensor, one after the other as a file has it, row by row, of at most ``limit`` numbers each."""
    if tensor.numel() <= limit:
        yield tensor
    elif tensor.is_contiguous():
        yield from torch.split(tensor.view(-1), limit)
    else:
        for rows in torch.split(tensor, max(limit // tensor[0].numel(), 1)):
            yield from _pieces(rows if len(rows) > 1 else rows[0], limit)


def _bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor; safetensors and every machine that runs this are little-endian."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def _parse(text: bytes) -> tuple[dict[str, Entry], dict[str, str]]:
    """Entries, in the order of their bytes, and metadata of a header. Raises ``ValueError`` where it is damaged."""
    header = json.loads(text.decode(), object_pairs_hook=_without_duplicates, parse_constant=_no_constant)
    metadata = header.pop(METADATA, None)
    metadata = {} if metadata is None else metadata
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError(f"{METADATA} is not a table of strings")
    entries = {name: _entry(name, value) for name, value in header.items()}
    entries = dict(sorted(entries.items(), key=lambda item: (item[1].start, item[1].stop)))
    end = 0
    for name, entry in entries.items():
        if entry.start != end:
            raise ValueError(f"tensor {name} begins at byte {entry.start}, expected {end}, where the one before ends")
        end = entry.stop
    return entries, metadata


def _entry(name: str, value: Any) -> Entry:
    if not name.isprintable():
        raise ValueError(f"tensor name {name!r} is not printable")
    match value:
        case {"dtype": str(dtype), "shape": [*shape], "data_offsets": [start, stop], **rest} if not rest:
            if dtype not in BITS:
                raise ValueError(f"tensor {name} has the unknown dtype {dtype!r:.60}")
            numbers = (*shape, start, stop)
            if len(shape) <= MAX_RANK and all(type(n) is int and 0 <= n < 2**63 for n in numbers) and start <= stop:
                if (stop - start) * 8 != math.prod(shape) * BITS[dtype]:
                    raise ValueError(f"tensor {name} has {stop - start} bytes for {dtype} of shape {shape}")
                return Entry(dtype, tuple(shape), start, stop)
    raise ValueError(f"tensor {name} has no usable dtype, shape and data_offsets")


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) < len(pairs):
        name, count = Counter(name for name, _ in pairs).most_common(1)[0]
        raise ValueError(f"{name!r:.100} is there {count} times")
    return table


def _no_constant(text: str) -> Any:
    raise ValueError(f"{text} is no number of JSON")
