"""Prompts from files: every form gives the same prompts, and what is wrong is named with its line."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path

import pytest

from minisdxl.cli.prompt_files import Prompt, read_prompts


def written(folder: Path, name: str, text: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_lines_of_text(tmp_path: Path) -> None:
    lines = ["a red circle, big", "", "  a blue square ", "\t", 'ein "grünes" Dreieck', "# 1 🙂"]
    wanted = [Prompt(line.strip()) for line in lines if line.strip()]
    assert len(wanted) == 4
    for end in ("\n", "\r\n", "\r"):
        assert read_prompts(written(tmp_path, "p.txt", end.join(lines))) == wanted
        assert read_prompts(written(tmp_path, "p.TXT", "\ufeff" + end.join(lines) + end)) == wanted


PROMPTS = [
    Prompt("a red circle"),
    Prompt('text with "quotes", commas; and\ttabs', "blue, green"),
    Prompt("ein grünes Dreieck 🙂", None, 0),
    Prompt("two\nlines", "ugly", 2**32 - 1),
]


def test_json_lines_are_what_json_wrote(tmp_path: Path) -> None:
    objects = [
        {"prompt": prompt.prompt}
        | ({} if prompt.negative is None else {"negative": prompt.negative})
        | ({} if prompt.seed is None else {"seed": prompt.seed})
        for prompt in PROMPTS
    ]
    for ascii_only in (True, False):
        text = "\n\n".join(json.dumps(each, ensure_ascii=ascii_only) for each in objects)
        assert read_prompts(written(tmp_path, "p.jsonl", text)) == PROMPTS


def test_a_separator_in_json_text_is_no_end_of_line(tmp_path: Path) -> None:
    text = '{"prompt": "one\u2028two", "negative": null}\n{"prompt": "three", "negative": "", "seed": null}'
    assert read_prompts(written(tmp_path, "p.jsonl", text)) == [Prompt("one\u2028two"), Prompt("three", "")]


@pytest.mark.parametrize("columns", [("prompt", "negative", "seed"), ("seed", "prompt", "negative")])
def test_csv_is_what_csv_wrote(tmp_path: Path, columns: tuple[str, ...]) -> None:
    path = tmp_path / "p.csv"
    with path.open("w", newline="", encoding="utf-8-sig") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        for prompt in PROMPTS:
            writer.writerow({key: getattr(prompt, key) for key in columns})
    assert read_prompts(path) == PROMPTS
    assert read_prompts(written(tmp_path, "q.csv", "prompt\n\na red circle\n\n")) == [Prompt("a red circle")]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("p.yaml", "a red circle", r"p\.yaml, expected a \.txt, \.jsonl or \.csv file"),
        ("p", "a red circle", r"expected a \.txt"),
        ("p.txt", "", "p.txt holds no prompts"),
        ("p.txt", "\n  \n", "holds no prompts"),
        ("p.jsonl", "", "holds no prompts"),
        ("p.csv", "prompt,seed\n", "holds no prompts"),
        ("p.csv", "", "holds no prompts"),
        ("p.txt", b"one\ntwo\n\xff\xfe\n", r"line 3: .*UTF-8"),
        ("p.jsonl", "a red circle\n".encode("utf-16"), r"line 1: .*UTF-8"),
        ("p.jsonl", '{"prompt": "a"}\n\n{"prompt": "b"', r"line 3: not JSON \(.*\), expected an object with prompt"),
        ("p.jsonl", '{"prompt": "a"}\n"b"', r"line 2: JSON is '\"b\"', expected an object"),
        ("p.jsonl", "[" * 100_000, "line 1: not JSON"),
        ("p.jsonl", '{"prompt": "a", "seed": ' + "9" * 5000 + "}", "line 1: not JSON"),
        ("p.jsonl", "{}", r"line 1: no prompt among the keys \(none\)"),
        ("p.jsonl", '{"promt": "a"}', "line 1: no prompt among the keys promt"),
        (
            "p.jsonl",
            '{"prompt": "a", "sede": 1}',
            "line 1: 'sede' is unknown or twice, expected prompt, negative, seed",
        ),
        ("p.jsonl", '{"prompt": " "}', "line 1: prompt is ' ', expected text"),
        ("p.jsonl", '{"prompt": null}', "line 1: prompt is None, expected text"),
        ("p.jsonl", '{"prompt": ["a"]}', r"line 1: prompt is \['a'\], expected text"),
        ("p.jsonl", '{"prompt": "a", "negative": 0}', "line 1: negative is 0, expected text"),
        ("p.jsonl", '{"prompt": "a \\ud800"}', "line 1: prompt is .* half of a surrogate pair"),
        ("p.jsonl", '{"prompt": "a", "seed": "1"}', "line 1: seed is '1', expected a whole number"),
        ("p.jsonl", '{"prompt": "a", "seed": true}', "line 1: seed is True, expected a whole number"),
        ("p.jsonl", '{"prompt": "a", "seed": 1.5}', r"line 1: seed is 1\.5, expected a whole number"),
        ("p.jsonl", '{"prompt": "a", "seed": -1}', "line 1: seed is -1, expected 0 to 4294967295"),
        ("p.jsonl", '{"prompt": "a", "seed": 4294967296}', "line 1: seed is 4294967296, expected 0 to 4294967295"),
        ("p.csv", "a red circle\n", "line 1: no prompt among the keys a red circle"),
        ("p.csv", "prompt,prompt\na,b\n", "line 1: 'prompt' is unknown or twice"),
        ("p.csv", "prompt,steps\na,5\n", "line 1: 'steps' is unknown or twice, expected prompt, negative, seed"),
        ("p.csv", "prompt,seed\na,1\nb, big,2\n", "line 3: 3 cells, expected 2: prompt, seed; text with a comma needs"),
        ("p.csv", "prompt,seed\na\n", "line 2: 1 cells, expected 2"),
        ("p.csv", "prompt,seed\na,1\n,2\n", "line 3: prompt is '', expected text"),
        ("p.csv", "prompt,seed\n\n\na,one\n", "line 4: seed is 'one', expected a whole number"),
        ("p.csv", "prompt,seed\na,-1\n", "line 2: seed is '-1', expected a whole number"),
        ("p.csv", 'prompt,seed\n"two\nlines",1\nb,99999999999\n', "line 4: seed is 99999999999, expected 0 to"),
        ("p.csv", 'prompt\n"two\nlines', "line 2: not CSV"),
    ],
)
def test_what_is_wrong_is_named_with_its_line(tmp_path: Path, name: str, text: str | bytes, message: str) -> None:
    path = written(tmp_path, name, text)
    with pytest.raises(ValueError, match=message) as error:
        read_prompts(path)
    assert name in str(error.value)
    assert not re.search(r"line [0-9]+.*line [0-9]+,", str(error.value))


def test_missing_file_and_folder_are_named(tmp_path: Path) -> None:
    (tmp_path / "folder.txt").mkdir()
    for name in ("nowhere.txt", "folder.txt"):
        with pytest.raises(FileNotFoundError, match=f"{name} is no file, expected one of prompts"):
            read_prompts(tmp_path / name)
