"""The official single-file checkpoint's tensors, from the copy of its manifest in weights/."""

from __future__ import annotations

import json
from pathlib import Path

MANIFEST = Path(__file__).parents[1] / "weights" / "sd_xl_base_1.0.keys.json"


def official_shapes(prefix: str = "") -> dict[str, tuple[int, ...]]:
    """Shape of every official tensor whose name begins with ``prefix``, by the name after it."""
    shapes: dict[str, list[int]] = json.loads(MANIFEST.read_text())
    return {name.removeprefix(prefix): tuple(shape) for name, shape in shapes.items() if name.startswith(prefix)}
