"""The lessons of docs/walkthrough as text: their cells and exercises, and the modules that lie beside them."""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

WALKTHROUGH = Path(__file__).parents[2] / "docs" / "walkthrough"
LESSONS = sorted(WALKTHROUGH.glob("[1-8]_*.py"))
CELL = re.compile(r"^# %%( \[markdown\])?\n(.*?)(?=^# %%|\Z)", re.MULTILINE | re.DOTALL)
CHECK = re.compile(r'^check\("(\d\.\d)", ', re.MULTILINE)


def code_cells(lesson: Path) -> list[str]:
    """The code of each cell, without the empty lines around it."""
    return [code.strip() for text, code in CELL.findall(lesson.read_text(encoding="utf-8")) if not text]


def exercises(lesson: Path) -> list[str]:
    """The exercises that a lesson checks, in order."""
    return [number for cell in code_cells(lesson) for number in CHECK.findall(cell)]


def solution(exercise: str) -> Any:
    """The answer to an exercise from the folder of solutions."""
    number, _, part = exercise.partition(".")
    return getattr(load_module(f"solutions.lesson_{number}"), f"exercise_{number}_{part}")


def load_module(name: str) -> ModuleType:
    """A module that lies beside the lessons, found as in a notebook, which runs in their folder."""
    if str(WALKTHROUGH) not in sys.path:
        sys.path.insert(0, str(WALKTHROUGH))
    return importlib.import_module(name)
