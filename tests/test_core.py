"""The core, from prompt to pixel with pruning on, can be read in one sitting: at most 1,600 lines."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
LINES, LINES_OF_A_FILE = 1600, 250

CORE = (
    "minisdxl/pipeline.py",
    "minisdxl/text.py",
    "minisdxl/sampler.py",
    "minisdxl/unet.py",
    "minisdxl/transformer.py",
    "minisdxl/operators.py",
    "atedm/tokens.py",
    "atedm/gwpr.py",
    "atedm/pruning.py",
    "atedm/recovery.py",
    "atedm/plan.py",
    "atedm/schedule.py",
    "minisdxl/vae_decoder.py",
)


def reading_list() -> list[str]:
    """The files that the README names one a line, or ``CORE`` if it has no such list."""
    readme = (ROOT / "README.md").read_text()
    return re.findall(r"^[ \t]*((?:minisdxl|atedm)/\w+\.py)\b", readme, re.MULTILINE) or list(CORE)


def test_the_core_is_read_in_one_sitting() -> None:
    files = reading_list()
    assert set(CORE) <= set(files)
    lines = {name: (ROOT / name).read_text().count("\n") for name in files}  # as `wc -l` counts
    print("\n".join(f"{count:5} {name}" for name, count in {**lines, "in all": sum(lines.values())}.items()))
    assert sum(lines.values()) <= LINES
    assert max(lines.values()) <= LINES_OF_A_FILE
