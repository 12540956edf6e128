"""The folder of an evaluation: its settings, a row for every picture, the pictures, and the dense model's latents.

    settings.json            settings of all rows; other settings need another folder
    rows.csv                 or rows-2-of-4.csv for the second of four shards
    pictures/PRESET/NUMBER.png
    latents/NUMBER.npy       of the dense model, float32
    features/PRESET/NUMBER.npz    with workers: features for FID, and the cosine for CLIP score

Every file appears whole or not at all. Folders of several shards are merged by copying them into one.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from minisdxl.checkpoint.atomic import atomic_path
from minisdxl.cli.picture_files import read_picture

DENSE = "dense"  # the dense model, where rows name a preset


@dataclass(frozen=True)
class Row:
    """One picture, and its measures. The fields are the columns of the CSV file.

    ``number`` counts captions from 0. ``obeyed`` says that the picture is right: recorded files have this word for it.
    ``held_out`` says that training never saw the caption. Both are ``None`` for captions that are not of the drawn
    world. ``psnr``, ``ssim`` and ``latent_error`` compare with the dense picture of the same seed; for that picture
    they are infinite, 1 and 0. ``flops_share`` is the FLOPs of the picture, ranking left out, as a share of dense.
    """

    preset: str
    number: int
    seed: int
    steps: int
    cfg: float
    caption: str
    obeyed: bool | None
    held_out: bool | None
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
    "bool | None": lambda text: {"": None, "0": False, "1": True}[text],
}
Rows = dict[tuple[str, int], Row]  # by preset and number


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    """Writes a CSV file with a header, and floats with all their digits."""
    text = StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for row in rows:
        writer.writerow("" if value is None else int(value) if isinstance(value, bool) else value for value in _of(row))
    with atomic_path(path) as temporary:
        temporary.write_text(text.getvalue(), newline="")


def read_rows(path: Path) -> list[Row]:
    """The rows of a CSV file. Raises ``ValueError``, naming file and line, for a line that is no row; ``OSError``."""
    with path.open(newline="") as lines:
        reader = csv.reader(lines)
        if tuple(next(reader, ())) != COLUMNS:
            raise ValueError(f"{path} has another header, expected {','.join(COLUMNS)}")
        rows = []
        for cells in reader:
            try:
                pairs = zip(fields(Row), cells, strict=True)
                rows.append(Row(**{field.name: _READERS[str(field.type)](cell) for field, cell in pairs}))
            except (ValueError, KeyError) as error:
                raise ValueError(f"{path}, line {reader.line_num}: no row of an evaluation ({error})") from error
        return rows


class Folder:
    """An evaluation in the folder at ``path``, which is made if it does not exist.

    Raises ``ValueError`` if its rows were made with other settings, or contradict each other; and ``OSError``.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        self.path = path
        path.mkdir(parents=True, exist_ok=True)
        self._check_settings(settings)

    @cached_property
    def rows(self) -> Rows:
        """All rows, read when they are first needed."""
        rows: Rows = {}
        for file in sorted(self.path.glob("rows*.csv")):
            for row in read_rows(file):
                known = rows.setdefault((row.preset, row.number), row)
                if _facts(known) != _facts(row):
                    raise ValueError(f"{file} has another {row.preset} of caption {row.number} than the file before it")
        return rows

    def has(self, preset: str, number: int) -> bool:
        """Whether this row and its files exist."""
        files = [self.picture_path(preset, number), *([self._latent_path(number)] if preset == DENSE else [])]
        return (preset, number) in self.rows and all(file.is_file() for file in files)

    def add(self, file: str, rows: Iterable[Row]) -> None:
        """Adds rows to the CSV file of that name, which is written again."""
        target = self.path / file
        mine = {(row.preset, row.number): row for row in (read_rows(target) if target.exists() else [])}
        mine |= {(row.preset, row.number): row for row in rows}
        write_rows(target, mine.values())
        self.rows.update(mine)

    def merge_files(self) -> None:
        """Merges all files of rows into ``rows.csv``."""
        files = sorted(self.path.glob("rows*.csv"))
        if files != [self.path / "rows.csv"]:
            write_rows(self.path / "rows.csv", self.rows.values())
            for file in files:
                if file.name != "rows.csv":
                    file.unlink()

    def picture_path(self, preset: str, number: int) -> Path:
        """The path of a picture."""
        return self.path / "pictures" / re.sub(r"[^\w.=+@-]+", "-", preset) / f"{number:05}.png"

    def save_picture(self, preset: str, number: int, image: Image.Image) -> None:
        """Writes a picture as a PNG file."""
        target = self.picture_path(preset, number)
        target.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(target) as path:
            image.save(path)

    def features_path(self, preset: str, number: int) -> Path:
        """The path of what the metrics of all pictures together need of one."""
        return self.path / "features" / self.picture_path(preset, number).parent.name / f"{number:05}.npz"

    def save_features(self, preset: str, number: int, features: Mapping[str, NDArray[Any]]) -> None:
        """Writes the features of a picture, by name."""
        target = self.features_path(preset, number)
        target.parent.mkdir(parents=True, exist_ok=True)
        arrays: dict[str, Any] = dict(features)
        with atomic_path(target) as path:
            np.savez(path, **arrays)

    def features(self, preset: str, number: int) -> dict[str, NDArray[Any]]:
        """The features of a picture. Raises ``OSError`` or ``ValueError`` if they are missing or damaged."""
        with np.load(self.features_path(preset, number), allow_pickle=False) as arrays:
            return dict(arrays)

    def picture(self, preset: str, number: int) -> NDArray[np.uint8]:
        """A picture (H, W, 3). Raises ``OSError`` or ``ValueError`` if it is missing or damaged."""
        return np.asarray(read_picture(self.picture_path(preset, number)).image.convert("RGB"))

    def save_latent(self, number: int, latent: Tensor) -> None:
        """Writes the dense model's latent."""
        target = self._latent_path(number)
        target.parent.mkdir(exist_ok=True)
        with atomic_path(target) as path:
            np.save(path, latent.float().cpu().numpy(), allow_pickle=False)

    def latent(self, number: int) -> Tensor:
        """The dense model's latent (4, h, w), float32. Raises ``OSError`` or ``ValueError`` if it is damaged."""
        return torch.from_numpy(np.load(self._latent_path(number), allow_pickle=False))

    def _latent_path(self, number: int) -> Path:
        return self.path / "latents" / f"{number:05}.npy"

    def _check_settings(self, settings: Mapping[str, Any]) -> None:
        file = self.path / "settings.json"
        if not file.exists():
            with atomic_path(file) as path:
                path.write_text(json.dumps(settings, indent=1) + "\n")
            return
        there = json.loads(file.read_text())
        for name in {**there, **settings}:
            if there.get(name) != settings.get(name):
                raise ValueError(
                    f"{self.path} was made with {name} {there.get(name)!r}, not {settings.get(name)!r}: "
                    "expected the same settings, or another folder"
                )


def _of(row: Row) -> tuple[Any, ...]:
    return tuple(asdict(row).values())


def _facts(row: Row) -> dict[str, Any]:
    """A row without the fields that differ from run to run."""
    return {name: value for name, value in asdict(row).items() if name not in ("seconds", "machine")}
