"""Checks whether a picture of the drawn world shows what its caption says.

python -m tools.check_shapes PICTURE.png ["CAPTION"]
python -m tools.check_shapes --self-test 1000
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter

if __name__ == "__main__":  # run as a file, Python looks for imports in tools/ and not in the repository
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tools.drawn.detector import check, self_test
from tools.drawn.painting import Picture
from tools.drawn.world import random_open_scene, random_scene

ACCURACY = 0.995  # the self-test must read at least this share of drawn pictures right
BLUR, NOISE = 1.0, 8.0  # standard deviations for harmed pictures, in pixels and in levels of 255


def harmed(picture: Picture) -> Picture:
    """A blurred picture with noise, about as a small VAE makes it. The noise is the same for the same picture."""
    blurred = np.asarray(Image.fromarray(picture).filter(ImageFilter.GaussianBlur(BLUR)), dtype=np.float64)
    noise = np.random.default_rng(int(picture.sum())).normal(0, NOISE, picture.shape)
    return np.clip(np.rint(blurred + noise), 0, 255).astype(np.uint8)


def _self_test(count: int) -> bool:
    """Prints the shares read right, and returns whether all reach ``ACCURACY``. Raises ``ValueError``."""
    if count < 1:
        raise ValueError(f"--self-test is {count}, expected 1 or more")
    good = True
    for kind, scenes in (("plain", random_scene), ("open", random_open_scene)):
        for side in (128, 256):
            for how, harm in (("", None), (", blur and noise", harmed)):
                result = self_test(scenes, count, side, harm)
                good = good and result.least >= ACCURACY
                print(f"{kind}, {side} px{how}: {result}", flush=True)
    return good


def _open(path: Path) -> tuple[Picture, str | None]:
    """A picture file as RGB, and the ``prompt`` in its PNG metadata. Raises ``ValueError`` if it cannot be read."""
    try:
        with Image.open(path) as image:
            return np.asarray(image.convert("RGB")), image.info.get("prompt")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:  # as raised by Pillow's readers
        raise ValueError(f"cannot read picture {path}: {error}") from error


def _run(arguments: argparse.Namespace) -> bool:
    if arguments.self_test is not None:
        return _self_test(arguments.self_test)
    if arguments.picture is None:
        raise ValueError("no picture given, expected a file or --self-test N")
    picture, prompt = _open(arguments.picture)
    caption = arguments.caption or prompt
    if not caption:
        raise ValueError(f"{arguments.picture} has no prompt in its metadata, expected a caption after the file")
    result = check(picture, caption)
    words = "as its caption says" if result.right else f"not as its caption says: {'; '.join(result.reasons)}"
    print(f"{arguments.picture}: {words} (found {result.found})")
    return result.right


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command. Exit code 0: right (or self-test passed), 1: not, 2: bad input, with one line on stderr."""
    parser = argparse.ArgumentParser(description="Checks whether a picture shows what its caption says.")
    parser.add_argument("picture", nargs="?", type=Path, help="a square picture file of at least 64 pixels a side")
    parser.add_argument("caption", nargs="?", help="(default: the prompt in the PNG's metadata)")
    parser.add_argument(
        "--self-test",
        type=int,
        metavar="N",
        help="check the detector on N drawn scenes of each kind",
    )
    try:
        return 0 if _run(parser.parse_args(arguments)) else 1
    except ValueError as error:
        print(f"check_shapes: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
