"""Reads picture files to start from, and writes PNG files with the settings that made them."""

from __future__ import annotations

import hashlib
import json
import struct
import warnings
import zlib
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image, ImageDraw, ImageOps, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo

from minisdxl.checkpoint.atomic import atomic_path
from minisdxl.images import to_rgb

# Exceptions of Pillow's decoders for damaged files, beyond OSError.
DAMAGED = (
    *(ValueError, TypeError, SyntaxError, EOFError, LookupError, ArithmeticError, AttributeError, RuntimeError),
    *(struct.error, zlib.error, Image.DecompressionBombError),
)

# Pixels of a PNG in 2, 4 and 16 bits come in 8 from Pillow, its transparent shade as the file has it.
SHADES_OF_8_BITS = {"L;2": 85, "L;4": 17, "RGB;16B": 1 / 256}


class InitImage(NamedTuple):
    """A picture to start from, with the name and sha256 of its file."""

    image: Image.Image
    name: str
    sha256: str


def read_picture(path: str | Path) -> InitImage:
    """A picture of any format that Pillow reads, in RGB, turned upright as its EXIF data says.

    Warns as :func:`minisdxl.images.to_rgb`, and of a file with several frames, of which the first is taken.

    Raises:
        ValueError: if the file is no picture, or a damaged one, or has numbers that are no shades of gray.
        OSError: if there is no such file or it cannot be read.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path} is no file, expected a picture")
    data = Path(path).read_bytes()
    try:
        opened = Image.open(BytesIO(data))
        frames = getattr(opened, "n_frames", 1)
        if opened.format == "PNG":
            _scale_transparency(opened)
        image = ImageOps.exif_transpose(opened)
        image.load()
        if opened.format in ("PNG", "PPM") and image.mode == "I":  # 16 bits, which Pillow holds in 32
            image = image.convert("I;16")
        image = to_rgb(image)
    except (OSError, *DAMAGED) as error:
        reason = "" if isinstance(error, UnidentifiedImageError) else f" ({error})"
        raise ValueError(f"{path} cannot be read as a picture{reason}, expected a PNG, JPEG or WebP file") from error
    if frames > 1:
        warnings.warn(f"{path} has {frames} frames, the first is taken", stacklevel=2)
    return InitImage(image, Path(path).name, hashlib.sha256(data).hexdigest())


def _scale_transparency(opened: Image.Image) -> None:
    """Scales the transparent shade of a PNG to 8 bits, as Pillow will scale its pixels when it reads them."""
    scale = SHADES_OF_8_BITS.get(opened.tile[0].args) if opened.tile else None  # type: ignore[attr-defined]
    shade = opened.info.get("transparency")
    if scale is not None and shade is not None:
        shades = [int(each * scale) for each in (shade if isinstance(shade, tuple) else (shade,))]
        opened.info["transparency"] = tuple(shades) if len(shades) > 1 else shades[0]


def write_picture(path: Path, image: Image.Image, record: Mapping[str, Any]) -> None:
    """Writes a PNG file atomically, with ``record`` as JSON in its text ``minisdxl``. Raises ``OSError``."""
    with atomic_path(path) as temporary:
        image.save(temporary, pnginfo=_notes(record))


def picture_bytes(image: Image.Image, record: Mapping[str, Any]) -> bytes:
    """The bytes of the file that :func:`write_picture` writes."""
    data = BytesIO()
    image.save(data, "PNG", pnginfo=_notes(record))
    return data.getvalue()


def _notes(record: Mapping[str, Any]) -> PngInfo:
    notes = PngInfo()
    notes.add_itxt("prompt", record["prompt"])
    notes.add_itxt("minisdxl", json.dumps(record, ensure_ascii=False))
    return notes


def side_by_side(images: Mapping[str, Image.Image]) -> Image.Image:
    """Pictures of one size in a row, each with its name above."""
    first = next(iter(images.values()))
    label = max(20, first.height // 20)
    row = Image.new("RGB", (first.width * len(images), first.height + label), "white")
    draw = ImageDraw.Draw(row)
    for column, (name, image) in enumerate(images.items()):
        row.paste(image, (column * first.width, label))
        draw.text((column * first.width + 4, label // 2), name, "black", anchor="lm", font_size=label * 0.7)
    return row
