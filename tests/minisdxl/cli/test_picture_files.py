"""Pictures to start from: every file format is read right, or refused in one line."""

from __future__ import annotations

import struct
import warnings
import zlib
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from minisdxl.cli.picture_files import read_picture

# Smooth colors, which lossy formats keep.
COLORS = np.asarray(
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (4, 4, 3), dtype=np.uint8)).resize(
        (64, 48), Image.Resampling.BICUBIC
    )
)
GRAY = np.tile(np.arange(256, dtype=np.uint16) * 257, (8, 1))  # a ramp of 16 bits


def read(path: Path) -> tuple[NDArray[np.float64], list[str]]:
    """The pixels of a picture, 0 to 255, and the lines that are said of it."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warnings.simplefilter("ignore", DeprecationWarning)  # of formats that Pillow will drop
        image = read_picture(path).image
    assert image.mode == "RGB"
    return np.asarray(image).astype(float), [str(warning.message) for warning in caught]


@pytest.mark.parametrize("suffix", sorted(Image.registered_extensions()))
def test_every_format_is_right_or_refused(tmp_path: Path, suffix: str) -> None:
    """Gray in 16 bits, colors, and colors with alpha, in every format that Pillow writes."""
    opaque = np.dstack([COLORS, np.full(COLORS.shape[:2], 255, np.uint8)])
    cut = opaque.copy()
    cut[:24, :, 3] = 0
    on_white = np.where(cut[..., 3:] == 0, 255, COLORS).astype(float)
    shades = np.repeat(GRAY[..., None] / 257.0, 3, axis=-1)
    pictures = {"gray": (GRAY, shades), "colors": (COLORS, COLORS.astype(float)), "alpha": (cut, on_white)}
    for name, (pixels, expected) in pictures.items():
        path = tmp_path / f"{name}{suffix}"
        try:
            Image.fromarray(pixels).save(path)
            kept = Image.open(path)
        except (OSError, KeyError, ValueError, SystemError):
            continue  # not written by Pillow, or not in this mode
        if (name == "gray" and kept.mode[0] not in "IF") or (name == "alpha" and not kept.has_transparency_data):
            continue  # the format has dropped what is tested here
        try:
            found, said = read(path)
        except ValueError as error:
            print(f"{path.name}: refused: {error}")
            assert len(str(error).splitlines()) == 1
            assert str(path) in str(error)
            continue
        if found.shape != expected.shape:  # of icons, which have sizes of their own
            assert suffix in (".ico", ".icns", ".cur")
            continue
        off = np.abs(found - expected).mean()
        print(f"{path.name}: mean error {off:.2f} of 255; {said}")
        assert off < (12 if kept.mode == "P" else 4)
        if name == "alpha":
            assert said == ["the picture is transparent in places, which are taken as white"]


def png(bits: int, kind: int, row: bytes, width: int, transparent: bytes = b"") -> bytes:
    """A PNG of one row, of any depth and color type, written here."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, 1, bits, kind, 0, 0, 0)
    chunks = [chunk(b"IHDR", header), chunk(b"tRNS", transparent) if transparent else b""]
    return b"".join([b"\x89PNG\r\n\x1a\n", *chunks, chunk(b"IDAT", zlib.compress(b"\0" + row)), chunk(b"IEND", b"")])


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (png(16, 0, struct.pack(">3H", 0, 32896, 65535), 3), [[0] * 3, [128] * 3, [255] * 3]),
        (png(16, 0, struct.pack(">2H", 257, 65535), 2, struct.pack(">H", 257)), [[255] * 3, [255] * 3]),
        (png(16, 4, struct.pack(">4H", 257, 65535, 0, 0), 2), [[1] * 3, [255] * 3]),
        (png(16, 2, struct.pack(">6H", 1000, 40000, 300, 65535, 0, 257), 2), [[3, 156, 1], [255, 0, 1]]),
        (
            png(16, 2, struct.pack(">6H", 1000, 40000, 300, 65535, 0, 257), 2, struct.pack(">3H", 1000, 40000, 300)),
            [[255] * 3, [255, 0, 1]],
        ),
        (png(2, 0, bytes([0b00011000]), 3, struct.pack(">H", 2)), [[0] * 3, [85] * 3, [255] * 3]),
        (png(4, 0, bytes([0x2F]), 2, struct.pack(">H", 2)), [[255] * 3, [255] * 3]),
        (png(1, 0, bytes([0b01000000]), 2, struct.pack(">H", 0)), [[255] * 3, [255] * 3]),
    ],
    ids=["gray", "gray cut", "gray alpha", "colors", "colors cut", "2 bits cut", "4 bits cut", "1 bit cut"],
)
def test_png_of_every_depth(tmp_path: Path, content: bytes, expected: list[list[int]]) -> None:
    (tmp_path / "x.png").write_bytes(content)
    found, _ = read(tmp_path / "x.png")
    assert np.abs(found[0] - np.array(expected)).max() <= 0.51


def test_dark_gray_of_16_bits_stays_dark(tmp_path: Path) -> None:
    for suffix in (".png", ".pgm", ".tiff"):
        Image.fromarray(np.full((4, 4), 200, np.uint16)).save(tmp_path / f"x{suffix}")
        found, said = read(tmp_path / f"x{suffix}")
        assert (found <= 1).all()
        assert not said


def test_picture_is_turned_upright(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: turn by 90 degrees clockwise to show
    Image.fromarray(COLORS).rotate(90, expand=True).save(tmp_path / "lying.png", exif=exif)
    assert np.array_equal(read(tmp_path / "lying.png")[0], COLORS)


def test_cmyk_is_read_as_colors(tmp_path: Path) -> None:
    Image.fromarray(COLORS).convert("CMYK").save(tmp_path / "x.jpg", quality=100)
    error = np.abs(read(tmp_path / "x.jpg")[0] - COLORS).mean()
    print(f"CMYK: mean error {error:.2f} of 255")
    assert error < 2


@pytest.mark.parametrize("suffix", ["gif", "png", "webp", "tiff"])
def test_the_first_of_several_frames_is_taken_and_said(tmp_path: Path, suffix: str) -> None:
    frames = [Image.fromarray(np.roll(COLORS, shift, axis=1)) for shift in (0, 10, 20)]
    path = tmp_path / f"x.{suffix}"
    options: dict[str, Any] = {"lossless": True} if suffix == "webp" else {}
    frames[0].save(path, save_all=True, append_images=frames[1:], **options)
    found, said = read(path)
    assert said == [f"{path} has 3 frames, the first is taken"]
    assert np.abs(found - COLORS).mean() < 12  # of a palette


@pytest.mark.parametrize("suffix", ["png", "tiff", "gif", "webp", "jpg", "pgm"])
def test_damaged_pictures_are_read_or_refused_in_one_line(tmp_path: Path, suffix: str) -> None:
    rng = np.random.default_rng(7)
    path, outcomes = tmp_path / f"x.{suffix}", Counter[bool]()
    pixels = GRAY[:, :64] if suffix in ("tiff", "pgm", "png") else COLORS
    Image.fromarray(pixels).save(path)
    sound = np.frombuffer(path.read_bytes(), dtype=np.uint8)
    for _ in range(150):
        damaged = sound.copy()
        damaged[rng.integers(0, min(len(sound), 200), 3)] = rng.integers(0, 256, 3)
        stop = len(sound) if rng.random() < 0.5 else int(rng.integers(0, len(sound)))
        path.write_bytes(damaged[:stop].tobytes())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                outcomes[read_picture(path).image.mode == "RGB"] += 1
            except ValueError as error:
                assert str(path) in str(error)
                assert len(str(error).splitlines()) == 1
                outcomes[False] += 1
    print(f"{suffix}: {outcomes[True]} read, {outcomes[False]} refused")
    assert outcomes[False] > 10


def test_numbers_that_are_no_shades_are_refused_with_the_file(tmp_path: Path) -> None:
    Image.fromarray(np.array([[-3, 1e6]], np.float32)).save(tmp_path / "x.tiff")
    with pytest.raises(
        ValueError, match=r"x\.tiff cannot be read as a picture \(the picture has values from -3 to 1e\+06"
    ):
        read_picture(tmp_path / "x.tiff")
