"""Where the files that come with the package lie: the included model, CLIP's vocabulary, the table of downloads."""

from __future__ import annotations

from pathlib import Path

_PACKAGE = Path(__file__).parent
# In the wheel they are in the package, in a clone beside it. A clone's folder comes first on Python's path when a
# command is run in it, so this must hold there too after "pip install .".
WEIGHTS = next(folder for folder in (_PACKAGE / "weights", _PACKAGE.parent / "weights") if folder.is_dir())
BUNDLED = {"shapes": WEIGHTS / "shapes" / "shapes.safetensors"}
