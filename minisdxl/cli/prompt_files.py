"""Prompts from a file: a ``.txt`` of lines, a ``.jsonl`` of objects, or a ``.csv`` or ``.tsv`` with a header."""

from __future__ import annotations

import csv
import json
import math
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from io import StringIO
from pathlib import Path
from typing import Any

from minisdxl.seeds import check_seed

RANDOM = -1  # stands for a seed that is drawn
# Fields of a prompt by the names of columns and keys, in lower case and with underscores.
COLUMNS = {
    **dict.fromkeys(("prompt", "prompts"), "prompt"),
    **dict.fromkeys(("negative", "negative_prompt"), "negative"),
    "seed": "seed",
    "width": "width",
    "height": "height",
    **dict.fromkeys(("steps", "num_inference_steps"), "steps"),
    **dict.fromkeys(("cfg", "cfg_scale", "guidance_scale"), "cfg"),
}
# Options after a prompt in a ``.txt`` file, as in the scripts of kohya-ss/sd-scripts.
OPTIONS = {"n": "negative", "w": "width", "h": "height", "d": "seed", "l": "cfg", "s": "steps"}
EXACT = 2**53  # a float represents all whole numbers up to this


@dataclass(frozen=True)
class Prompt:
    """A prompt and the settings of its own pictures; ``None`` stands for the command's options.

    Raises ``ValueError`` for wrong values.
    """

    prompt: str
    negative: str | None = None
    seed: int | None = None  # of its first picture; RANDOM is drawn later
    width: int | None = None
    height: int | None = None
    steps: int | None = None
    cfg: float | None = None
    place: str = field(default="", compare=False)  # the file and the line that it comes from

    def __post_init__(self) -> None:
        for key, text in (("prompt", self.prompt), ("negative", "" if self.negative is None else self.negative)):
            if not isinstance(text, str):
                raise ValueError(f"{key} is {text!r}, expected text")
            if re.search("[\ud800-\udfff]", text):  # JSON may escape one half of a pair; UTF-8 cannot hold it
                raise ValueError(f"{key} is {text!r}, which has half of a surrogate pair, expected text")
        if self.seed not in (None, RANDOM):
            try:
                check_seed(self.seed)
            except ValueError as error:
                raise ValueError(f"{error}, or {RANDOM} for a random one") from error


def read_prompts(path: str | Path) -> list[Prompt]:
    """All prompts of a file in UTF-8, in order.

    A line of ``.txt`` is a prompt, which ``OPTIONS`` may follow as in ``--n ugly --d 7``; lines that begin with ``#``
    are comments. An object of ``.jsonl``, one a line, and a row of ``.csv`` or ``.tsv`` have the fields of ``COLUMNS``,
    of which only the prompt is needed; empty cells of others count as missing. Blank lines are skipped. Warns once of
    columns that are not used.

    Raises:
        ValueError: for another kind of file, a file without prompts, or a line that is no prompt. Names file and line.
        OSError: if the file cannot be read.
    """
    path = Path(path)
    readers = {".txt": _text_lines, ".jsonl": _json_lines, ".csv": _csv_rows, ".tsv": _csv_rows}
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise ValueError(f"file of prompts is {path}, expected a .txt, .jsonl, .csv or .tsv file")
    if not path.is_file():
        raise FileNotFoundError(f"{path} is no file, expected one of prompts")
    data = path.read_bytes()
    try:
        text = data.decode("utf-8-sig")  # Windows programs put a mark in front
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise ValueError(f"{path}, line {line}: bytes that are no UTF-8, expected text in UTF-8") from error
    prompts, unused = list[Prompt](), dict[str, None]()
    for line, values in reader(path, text.replace("\r\n", "\n").replace("\r", "\n")):
        with _at(path, line):
            prompts.append(_prompt(values, f"{path}, line {line}"))
        unused |= dict.fromkeys(key for key in values if _column(key) is None)
    if not prompts:
        raise ValueError(f"{path} holds no prompts, expected one or more")
    if unused:
        names = ", ".join(key.strip()[:40] or "one without a name" for key in unused)
        warnings.warn(f"{path} has columns that are not used: {names[:400]}", stacklevel=2)
    return prompts


Rows = Iterator[tuple[int, dict[str, Any]]]  # numbers of lines, and the values there by their keys


def _text_lines(path: Path, text: str) -> Rows:
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip() and not line.strip().startswith("#"):
            prompt, *options = re.split(r"(?:^|\s)--(?=[^\W\d_])", line.strip())
            with _at(path, number):
                values = dict(map(_option, options))
                if len(values) < len(options):
                    raise ValueError(f"{line.strip()[:80]!r} has an option twice, expected each once")
            yield number, {"prompt": prompt.strip(), **values}


def _option(text: str) -> tuple[str, str]:
    """The column and the value of an option, without its hyphens."""
    letter, _, value = text.strip().partition(" ")
    if letter.lower() not in OPTIONS:
        known = ", ".join(f"--{letter}" for letter in OPTIONS)
        raise ValueError(f"--{text.strip()[:60]} is no option of a prompt here, expected some of {known}")
    return OPTIONS[letter.lower()], value.strip()


def _json_lines(path: Path, text: str) -> Rows:
    for number, line in enumerate(text.split("\n"), start=1):  # not splitlines: JSON may hold other kinds of line ends
        if line.strip():
            with _at(path, number):
                try:
                    values = json.loads(line)
                except (ValueError, RecursionError) as error:
                    raise ValueError(f"not JSON ({error}), expected an object with a prompt") from error
                if not isinstance(values, dict):
                    raise ValueError(f"JSON is {line.strip()[:40]!r}, expected an object with a prompt")
                _check_keys(values)
            yield number, values


def _csv_rows(path: Path, text: str) -> Rows:
    header: list[str] = []
    for line, cells in _csv_cells(path, text):
        with _at(path, line):
            if not header:
                header = cells
                _check_keys(header)
                continue
            if len(cells) != len(header):
                names = ", ".join(header)[:200]
                raise ValueError(f"{len(cells)} cells, expected {len(header)}: {names}; text with a comma needs quotes")
        values = {key: cell.strip() for key, cell in zip(header, cells, strict=True)}
        yield line, {key: cell for key, cell in values.items() if cell or _column(key) in (None, "prompt")}


def _csv_cells(path: Path, text: str) -> Iterator[tuple[int, list[str]]]:
    """Rows that are not blank, each with the number of its first line."""
    tabs = path.suffix.lower() == ".tsv"  # where a quote may stand in the midst of text
    rows = csv.reader(StringIO(text, newline=""), delimiter="\t" if tabs else ",", strict=not tabs)
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


def _column(key: str) -> str | None:
    """The field of a column or key; ``None`` for one that is not used."""
    return COLUMNS.get(key.strip().lower().replace(" ", "_"))


def _check_keys(keys: Iterable[str]) -> None:
    """Raises ``ValueError`` unless there is a prompt among the keys, and nothing that is used is there twice."""
    seen: dict[str, str] = {}
    for key in keys:
        column = _column(key)
        if column in seen:
            raise ValueError(f"{seen[column]!r} and {key!r} are both the {column}, expected one of them")
        if column is not None:
            seen[column] = key
    if "prompt" not in seen:
        raise ValueError(f"no prompt among the keys {', '.join(keys)[:80] or '(none)'}, expected one")


def _prompt(values: Mapping[str, Any], place: str) -> Prompt:
    """The prompt with these values by key or column. Raises ``ValueError``."""
    known: dict[str, Any] = {}
    for key, value in values.items():
        match _column(key):
            case "prompt" | "negative" as column:
                known[column] = value
            case "cfg":
                known["cfg"] = None if value is None else _number("cfg", value)
            case "seed" | "width" | "height" | "steps" as column:
                known[column] = None if value is None else _whole(column, value)
    return Prompt(**known, place=place)


def _number(column: str, value: Any) -> float:
    """A finite number, or the text of one."""
    try:
        number = float(value) if type(value) in (int, float, str) else math.nan  # true is an int, too
    except (ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"{column} is {value!r:.60}, expected a finite number")
    return number


def _whole(column: str, value: Any) -> int:
    """A whole number, which may look like 42.0, or the text of one."""
    if isinstance(value, str) and (match := re.fullmatch(r"([+-]?[0-9]{1,20})(\.0*)?", value)):
        return int(match[1])
    if type(value) is int:
        return value
    if isinstance(value, float) and value.is_integer() and abs(value) < EXACT:
        return int(value)
    raise ValueError(f"{column} is {value!r:.60}, expected a whole number")


@contextmanager
def _at(path: Path, line: int) -> Iterator[None]:
    """A context that puts file and line before the message of a ``ValueError``."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{path}, line {line}: {error}") from error
