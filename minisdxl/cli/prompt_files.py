"""Prompts from a file: a ``.txt`` of lines, a ``.jsonl`` of objects, or a ``.csv`` with a header."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

from minisdxl.sampler import check_seed

KEYS = ("prompt", "negative", "seed")


@dataclass(frozen=True)
class Prompt:
    """What to draw, and for its pictures alone what to steer away from and the seed of the first; ``None`` if unsaid.

    Raises ``ValueError`` for values that are none of this.
    """

    prompt: str
    negative: str | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        for key, text in (("prompt", self.prompt), ("negative", "" if self.negative is None else self.negative)):
            if not isinstance(text, str) or (key == "prompt" and not text.strip()):
                raise ValueError(f"{key} is {text!r}, expected text")
            if re.search("[\ud800-\udfff]", text):  # JSON may escape one half of a pair; UTF-8 cannot hold it
                raise ValueError(f"{key} is {text!r}, which has half of a surrogate pair, expected text")
        if self.seed is not None:
            if type(self.seed) is not int:  # true is an int, too
                raise ValueError(f"seed is {self.seed!r}, expected a whole number")
            check_seed(self.seed)


def read_prompts(path: str | Path) -> list[Prompt]:
    """All prompts of a file in UTF-8, in order.

    A line of ``.txt`` is a prompt. An object of ``.jsonl``, one a line, and a row of ``.csv`` have a ``prompt`` and may
    have ``negative`` and ``seed``; an empty cell of these is unsaid. Blank lines are skipped.

    Raises:
        ValueError: for another kind of file, one without prompts, and what is no prompt; names the file and the line.
        OSError: if the file cannot be read.
    """
    path = Path(path)
    reader = {".txt": _text_lines, ".jsonl": _json_lines, ".csv": _csv_rows}.get(path.suffix.lower())
    if reader is None:
        raise ValueError(f"file of prompts is {path}, expected a .txt, .jsonl or .csv file")
    if not path.is_file():
        raise FileNotFoundError(f"{path} is no file, expected one of prompts")
    data = path.read_bytes()
    try:
        text = data.decode("utf-8-sig")  # Windows programs put a mark in front
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise ValueError(f"{path}, line {line}: bytes that are no UTF-8, expected text in UTF-8") from error
    prompts = list(reader(path, text.replace("\r\n", "\n").replace("\r", "\n")))
    if not prompts:
        raise ValueError(f"{path} holds no prompts, expected one or more")
    return prompts


def _text_lines(path: Path, text: str) -> Iterator[Prompt]:
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            with _at(path, number):
                prompt = Prompt(line.strip())
            yield prompt


def _json_lines(path: Path, text: str) -> Iterator[Prompt]:
    for number, line in enumerate(text.split("\n"), start=1):  # not splitlines: JSON may hold other kinds of line ends
        if line.strip():
            with _at(path, number):
                try:
                    value = json.loads(line)
                except (ValueError, RecursionError) as error:
                    raise ValueError(f"not JSON ({error}), expected an object with {KEYS[0]}") from error
                if not isinstance(value, dict):
                    raise ValueError(f"JSON is {line.strip()[:40]!r}, expected an object with {KEYS[0]}")
                prompt = _prompt(value)
            yield prompt


def _csv_rows(path: Path, text: str) -> Iterator[Prompt]:
    header: list[str] = []
    for line, cells in _csv_cells(path, text):
        with _at(path, line):
            if not header:
                header = [cell.strip() for cell in cells]
                _check_keys(header)
                continue
            if len(cells) != len(header):
                raise ValueError(
                    f"{len(cells)} cells, expected {len(header)}: {', '.join(header)}; text with a comma needs quotes"
                )
            said: dict[str, Any] = {key: cell.strip() for key, cell in zip(header, cells, strict=True) if cell.strip()}
            if re.fullmatch("[0-9]{1,20}", said.get("seed", "")):
                said["seed"] = int(said["seed"])
            prompt = _prompt({"prompt": "", **said})
        yield prompt


def _csv_cells(path: Path, text: str) -> Iterator[tuple[int, list[str]]]:
    """Rows that are not blank, each with the number of its first line."""
    rows = csv.reader(StringIO(text, newline=""), strict=True)
    while True:
        line = rows.line_num + 1
        with _at(path, line):
            try:
                cells = next(rows, None)
            except csv.Error as error:
                raise ValueError(f"not CSV: {error}") from error
        if cells is None:
            return
        if cells:
            yield line, cells


def _prompt(fields: dict[str, Any]) -> Prompt:
    _check_keys(list(fields))
    return Prompt(**fields)


def _check_keys(keys: list[str]) -> None:
    if "prompt" not in keys:
        raise ValueError(f"no prompt among the keys {', '.join(keys)[:80] or '(none)'}, expected one")
    for index, key in enumerate(keys):
        if key not in KEYS or key in keys[:index]:
            raise ValueError(f"{key!r} is unknown or twice, expected {', '.join(KEYS)}, each once")


@contextmanager
def _at(path: Path, line: int) -> Iterator[None]:
    """Names the place in what is raised."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{path}, line {line}: {error}") from error
