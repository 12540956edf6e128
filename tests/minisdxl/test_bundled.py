"""The files that come with the package are found wherever the package lies."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]


def test_they_are_found_in_a_clone_that_is_not_installed(tmp_path: Path) -> None:
    """After ``pip install .``, a command in the clone's folder still runs the clone's code."""
    code = (
        "import sys; sys.meta_path = [each for each in sys.meta_path if 'editable' not in str(each)]; "
        f"sys.path.insert(0, {str(REPOSITORY)!r}); "
        "from minisdxl.bundled import BUNDLED; from minisdxl.tokenizer import clip_vocabulary; "
        "clip_vocabulary(); print(BUNDLED['shapes'])"
    )
    found = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert found.stdout.strip() == str(REPOSITORY / "weights" / "shapes" / "shapes.safetensors"), found.stderr
