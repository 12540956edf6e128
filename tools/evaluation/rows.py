"""The folder of an evaluation: its settings, a row for every picture, the pictures, and the dense model's latents.

    settings.json            settings of all rows; other settings need another folder
    rows.csv                 or rows-2-of-4.csv for the second of four shards
    pictures/PRESET/NUMBER.png
    latents/NUMBER.npy       of the dense model, float32
    features/PRESET/NUMBER.npz    with workers: features for FID, and the cosine for CLIP score

The folder is on any file system that fsspec knows. Every file appears whole or not at all. Folders of several shards
are merged by copying them into one.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from fnmatch import fnmatch
from functools import cached_property
from io import BytesIO, StringIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from minisdxl.cli.picture_files import DAMAGED
from minisdxl.scale.store import Store

ROWS, SETTINGS = "rows.csv", "settings.json"
DENSE = "dense"  # the dense model, where rows name a preset


@dataclass(frozen=True)
class Row:
    """One picture, and its measures. The fields are the columns of the CSV file.

    ``number`` counts captions from 0. ``obeyed`` says that the picture is right: recorded files have this word for it.
    ``held_out`` says that training never saw the caption, and ``objects`` how many objects the picture shows. All three
    are ``None`` for captions that are not of the drawn world. ``psnr``, ``ssim`` and ``latent_error`` compare with the
    dense picture of the same seed; for that picture they are infinite, 1 and 0. ``flops_share`` is the FLOPs of the
    picture, ranking left out, as a share of dense.
    """

    preset: str
    number: int
    seed: int
    steps: int
    cfg: float
    caption: str
    obeyed: bool | None
    held_out: bool | None
    objects: int | None
    reasons: str
    psnr: float
    ssim: float
    latent_error: float
    flops_share: float
    seconds: float
    machine: str


COLUMNS = tuple(field.name for field in fields(Row))
_READERS: dict[str, Any] = {
    "str": str,
    "int": int,
    "float": float,
    "int | None": lambda text: int(text) if text else None,
    "bool | None": lambda text: {"": None, "0": False, "1": True}[text],
}
Rows = dict[tuple[str, int], Row]  # by preset and number


def rows_csv(rows: Iterable[Row]) -> bytes:
    """A CSV file with a header, and floats with all their digits."""
    text = StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for row in rows:
        writer.writerow("" if value is None else int(value) if isinstance(value, bool) else value for value in _of(row))
    return text.getvalue().encode()


def parse_rows(data: bytes, file: str) -> list[Row]:
    """The rows of a CSV file. Raises ``ValueError``, naming ``file`` and line, for a line that is no row."""
    reader = csv.reader(StringIO(data.decode(), newline=""))
    if tuple(next(reader, ())) != COLUMNS:
        raise ValueError(f"{file} has another header, expected {','.join(COLUMNS)}")
    rows = []
    for cells in reader:
        try:
            pairs = zip(fields(Row), cells, strict=True)
            rows.append(Row(**{field.name: _READERS[str(field.type)](cell) for field, cell in pairs}))
        except (ValueError, KeyError) as error:
            raise ValueError(f"{file}, line {reader.line_num}: no row of an evaluation ({error})") from error
    return rows


def read_rows(path: Path) -> list[Row]:
    """The rows of a local CSV file. Raises as :func:`parse_rows`, and ``OSError``."""
    return parse_rows(path.read_bytes(), str(path))


class Folder:
    """An evaluation in the folder ``place``, a path or what fsspec reads, as ``s3://BUCKET/FOLDER``.

    Raises ``ValueError`` if its rows were made with other settings, or contradict each other; ``OSError`` as the file
    system does; and as :class:`minisdxl.scale.store.Store`.
    """

    def __init__(self, place: str | Path, settings: Mapping[str, Any]) -> None:
        self.store = Store(str(place))
        self._names = self.store.names()
        self._check_settings(settings)

    @cached_property
    def rows(self) -> Rows:
        """All rows, read when they are first needed."""
        rows: Rows = {}
        files = self._row_files()
        for file, found in zip(files, self.store.each(files, bytes), strict=True):
            for row in parse_rows(found, f"{self.store.url}/{file}"):
                known = rows.setdefault((row.preset, row.number), row)
                if _facts(known) != _facts(row):
                    raise ValueError(
                        f"{self.store.url}/{file} has another {row.preset} of caption {row.number} "
                        "than the file before it"
                    )
        return rows

    def has(self, preset: str, number: int) -> bool:
        """Whether this row and its files exist."""
        files = {picture_name(preset, number), *([_latent_name(number)] if preset == DENSE else [])}
        return (preset, number) in self.rows and files <= self._names

    def has_features(self, preset: str, number: int) -> bool:
        """Whether the features of a picture exist."""
        return _features_name(preset, number) in self._names

    def add(self, file: str, rows: Iterable[Row]) -> None:
        """Adds rows to the CSV file of that name, which is written again."""
        there = parse_rows(self.store.read(file), file) if file in self._names else []
        mine = {(row.preset, row.number): row for row in (*there, *rows)}
        self._write(file, rows_csv(mine.values()))
        self.rows.update(mine)

    def merge_files(self) -> None:
        """Merges all files of rows into ``rows.csv``."""
        files = self._row_files()
        if files != [ROWS]:
            self._write(ROWS, rows_csv(self.rows.values()))
            self.store.remove(file for file in files if file != ROWS)

    def save_picture(self, preset: str, number: int, image: Image.Image) -> None:
        """Writes a picture as a PNG file."""
        data = BytesIO()
        image.save(data, "PNG")
        self._write(picture_name(preset, number), data.getvalue())

    def save_features(self, preset: str, number: int, features: Mapping[str, NDArray[Any]]) -> None:
        """Writes what the metrics of all pictures together need of one, by name."""
        arrays, data = dict[str, Any](features), BytesIO()
        np.savez(data, **arrays)
        self._write(_features_name(preset, number), data.getvalue())

    def features(self, preset: str, number: int) -> dict[str, NDArray[Any]]:
        """The features of a picture. Raises ``OSError`` or ``ValueError`` if they are missing or damaged."""
        with np.load(self._open(_features_name(preset, number)), allow_pickle=False) as arrays:
            return dict(arrays)

    def picture(self, preset: str, number: int) -> NDArray[np.uint8]:
        """A picture (H, W, 3). Raises ``OSError`` or ``ValueError`` if it is missing or damaged."""
        name = picture_name(preset, number)
        try:
            with Image.open(self._open(name)) as image:
                return np.asarray(image.convert("RGB"))
        except DAMAGED as error:
            raise ValueError(f"{name} in {self.store.url} is damaged ({error}), expected a PNG file") from error

    def save_latent(self, number: int, latent: Tensor) -> None:
        """Writes the dense model's latent."""
        data = BytesIO()
        np.save(data, latent.float().cpu().numpy(), allow_pickle=False)
        self._write(_latent_name(number), data.getvalue())

    def latent(self, number: int) -> Tensor:
        """The dense model's latent (4, h, w), float32. Raises ``OSError`` or ``ValueError`` if it is damaged."""
        return torch.from_numpy(np.load(self._open(_latent_name(number)), allow_pickle=False))

    def _row_files(self) -> list[str]:
        return sorted(name for name in self._names if fnmatch(name, "rows*.csv"))

    def _open(self, name: str) -> BytesIO:
        return BytesIO(self.store.read(name))

    def _write(self, name: str, data: bytes) -> None:
        self.store.write(name, data)
        self._names.add(name)

    def _check_settings(self, settings: Mapping[str, Any]) -> None:
        if SETTINGS not in self._names:
            self._write(SETTINGS, (json.dumps(settings, indent=1) + "\n").encode())
            return
        there = json.loads(self.store.read(SETTINGS))
        for name in {**there, **settings}:
            if there.get(name) != settings.get(name):
                raise ValueError(
                    f"{self.store.url} was made with {name} {there.get(name)!r}, not {settings.get(name)!r}: "
                    "expected the same settings, or another folder"
                )


def preset_folder(preset: str) -> str:
    """The name of a preset in the names of files."""
    return re.sub(r"[^\w.=+@-]+", "-", preset)


def picture_name(preset: str, number: int) -> str:
    """The file of a picture, in its folder."""
    return f"pictures/{preset_folder(preset)}/{number:05}.png"


def _features_name(preset: str, number: int) -> str:
    return f"features/{preset_folder(preset)}/{number:05}.npz"


def _latent_name(number: int) -> str:
    return f"latents/{number:05}.npy"


def _of(row: Row) -> tuple[Any, ...]:
    return tuple(asdict(row).values())


def _facts(row: Row) -> dict[str, Any]:
    """A row without the fields that differ from run to run."""
    return {name: value for name, value in asdict(row).items() if name not in ("seconds", "machine")}
