"""Prompts from files: every form gives the same prompts, and what is wrong is named with its line."""

from __future__ import annotations

import csv
import json
import re
import warnings
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minisdxl.cli.prompt_files import RANDOM, Prompt, read_prompts


def written(folder: Path, name: str, text: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_lines_of_text(tmp_path: Path) -> None:
    lines = [
        "a red circle, big",
        "",
        "  a blue square ",
        "\t",
        'ein "grünes" Dreieck',
        "# a comment",
        " 1 🙂 # 2 -- no option",
    ]
    wanted = [Prompt(lines[index].strip()) for index in (0, 2, 4, 6)]
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


def test_options_of_sd_scripts(tmp_path: Path) -> None:
    """As the documentation of kohya-ss/sd-scripts has them for sample prompts."""
    text = """# one with everything
a lighthouse, (stormy sea), oil on canvas --n blurry, low quality,text --w 768 --h 512 --d 1 --l 7.5 --s 28

# and others
a quiet street --n --l 1 --D 18446744073709551615
--s 3
a cat --d -1
"""
    first, second, third, fourth = read_prompts(written(tmp_path, "p.txt", text))
    assert first == Prompt(
        "a lighthouse, (stormy sea), oil on canvas",
        "blurry, low quality,text",
        seed=1,
        width=768,
        height=512,
        steps=28,
        cfg=7.5,
    )
    assert first.place == f"{tmp_path / 'p.txt'}, line 2"
    assert second == Prompt("a quiet street", "", seed=2**64 - 1, cfg=1.0)
    assert third == Prompt("", steps=3)
    assert fourth == Prompt("a cat", seed=RANDOM)


FOREIGN = {
    "GenEval": (
        "p.jsonl",
        '{"tag": "two_object", "include": [{"class": "bench", "count": 1}], "prompt": "a photo of a bench"}\n'
        '{"tag": "color_attr", "include": [], "exclude": [], "prompt": "a photo of a cow"}',
        [Prompt("a photo of a bench"), Prompt("a photo of a cow")],
        "tag, include, exclude",
    ),
    "PartiPrompts": (
        "p.tsv",
        'Prompt\tCategory\tChallenge\tNote\na bench\tAbstract\tBasic\t\na sign that says "Deep, Learning"\tArts\t\t\n',
        [Prompt("a bench"), Prompt('a sign that says "Deep, Learning"')],
        "Category, Challenge, Note",
    ),
    "DrawBench": ("p.csv", "Prompts,Category\nA red cat.,Colors\n", [Prompt("A red cat.")], "Category"),
    "pandas": (
        "p.csv",
        ",id,prompt,negative_prompt,seed\n0,a7,a bench,ugly,42.0\n1,a8,,,\n",
        [Prompt("a bench", "ugly", 42), Prompt("")],
        "one without a name, id",
    ),
    "diffusers": (
        "p.jsonl",
        '{"id": 3, "prompt": "", "negative_prompt": null, "seed": 42.0, "guidance_scale": 5, "num_inference_steps": 9}',
        [Prompt("", seed=42, cfg=5.0, steps=9)],
        "id",
    ),
    "size": (
        "p.csv",
        "Prompt,Width,Height,CFG Scale,Steps,Negative Prompt,sampler\na bench,512,768,3.5,20,bad,k_lms\n",
        [Prompt("a bench", "bad", width=512, height=768, cfg=3.5, steps=20)],
        "sampler",
    ),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_columns_of_others_are_named_once(tmp_path: Path, name: str) -> None:
    file, text, prompts, unused = FOREIGN[name]
    path = written(tmp_path, file, text)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert read_prompts(path) == prompts
    assert [str(each.message) for each in caught] == [f"{path} has columns that are not used: {unused}"]


def test_an_empty_prompt_is_a_prompt(tmp_path: Path) -> None:
    assert read_prompts(written(tmp_path, "p.jsonl", '{"prompt": ""}\n{"prompt": " "}')) == [Prompt(""), Prompt(" ")]
    assert read_prompts(written(tmp_path, "p.csv", 'seed,prompt\n1,\n2,""\n')) == [
        Prompt("", seed=1),
        Prompt("", seed=2),
    ]
    assert read_prompts(written(tmp_path, "q.csv", 'prompt\n""\n\n')) == [Prompt("")]


@pytest.mark.parametrize("seed", ["0", "-1", "42", "42.0", "42.", "4294967296", "18446744073709551615"])
def test_seeds_of_every_spelling(tmp_path: Path, seed: str) -> None:
    expected = [Prompt("a", seed=int(seed.partition(".")[0]))]
    assert read_prompts(written(tmp_path, "p.csv", f"prompt,seed\na,{seed}\n")) == expected
    assert read_prompts(written(tmp_path, "p.txt", f"a --d {seed}")) == expected
    assert read_prompts(written(tmp_path, "p.jsonl", json.dumps({"prompt": "a", "seed": seed}))) == expected
    if not seed.endswith("."):
        assert read_prompts(written(tmp_path, "p.jsonl", f'{{"prompt": "a", "seed": {seed}}}')) == expected


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("p.yaml", "a red circle", r"p\.yaml, expected a \.txt, \.jsonl, \.csv or \.tsv file"),
        ("p", "a red circle", r"expected a \.txt"),
        ("p.txt", "", "p.txt holds no prompts"),
        ("p.txt", "\n  \n", "holds no prompts"),
        ("p.jsonl", "", "holds no prompts"),
        ("p.csv", "prompt,seed\n", "holds no prompts"),
        ("p.csv", "", "holds no prompts"),
        ("p.txt", b"one\ntwo\n\xff\xfe\n", r"line 3: .*UTF-8"),
        ("p.jsonl", "a red circle\n".encode("utf-16"), r"line 1: .*UTF-8"),
        ("p.jsonl", '{"prompt": "a"}\n\n{"prompt": "b"', r"line 3: not JSON \(.*\), expected an object with a prompt"),
        ("p.jsonl", '{"prompt": "a"}\n"b"', r"line 2: JSON is '\"b\"', expected an object"),
        ("p.jsonl", "[" * 100_000, "line 1: not JSON"),
        ("p.jsonl", '{"prompt": "a", "seed": ' + "9" * 5000 + "}", "line 1: not JSON"),
        ("p.jsonl", "{}", r"line 1: no prompt among the keys \(none\)"),
        ("p.jsonl", '{"promt": "a"}', "line 1: no prompt among the keys promt"),
        (
            "p.jsonl",
            '{"prompt": "a", "Prompts": "b"}',
            "line 1: 'prompt' and 'Prompts' are both the prompt, expected one",
        ),
        ("p.jsonl", '{"prompt": null}', "line 1: prompt is None, expected text"),
        ("p.jsonl", '{"prompt": ["a"]}', r"line 1: prompt is \['a'\], expected text"),
        ("p.jsonl", '{"prompt": "a", "negative": 0}', "line 1: negative is 0, expected text"),
        ("p.jsonl", '{"prompt": "a \\ud800"}', "line 1: prompt is .* half of a surrogate pair"),
        ("p.jsonl", '{"prompt": "a", "seed": "one"}', "line 1: seed is 'one', expected a whole number"),
        ("p.jsonl", '{"prompt": "a", "seed": NaN}', "line 1: seed is nan, expected a whole number"),
        ("p.jsonl", '{"prompt": "a", "seed": 1e19}', r"line 1: seed is 1e\+19, expected a whole number"),
        ("p.jsonl", '{"prompt": "a", "seed": [7]}', r"line 1: seed is \[7\], expected a whole number"),
        ("p.jsonl", '{"prompt": "a", "cfg": "x"}', "line 1: cfg is 'x', expected a finite number"),
        ("p.jsonl", '{"prompt": "a", "cfg": Infinity}', "line 1: cfg is inf, expected a finite number"),
        ("p.jsonl", '{"prompt": "a", "cfg": true}', "line 1: cfg is True, expected a finite number"),
        ("p.jsonl", '{"prompt": "a", "steps": 2.5}', "line 1: steps is 2.5, expected a whole number"),
        (
            "p.txt",
            "a cat\na dog --ar 16:9 --v 5",
            "line 2: --ar 16:9 is no option of a prompt here, expected some of --n",
        ),
        ("p.txt", "a dog --ss euler_a", "line 1: --ss euler_a is no option of a prompt here"),
        ("p.txt", "a dog --w 512 --W 64", "line 1: 'a dog --w 512 --W 64' has an option twice"),
        ("p.txt", "a dog --w big", "line 1: width is 'big', expected a whole number"),
        ("p.txt", "a dog --d", "line 1: seed is '', expected a whole number"),
        ("p.txt", "# nothing\n", "holds no prompts"),
        ("p.jsonl", '{"prompt": "a", "seed": true}', "line 1: seed is True, expected a whole number"),
        ("p.jsonl", '{"prompt": "a", "seed": 1.5}', r"line 1: seed is 1\.5, expected a whole number"),
        (
            "p.jsonl",
            '{"prompt": "a", "seed": -2}',
            "line 1: seed is -2, expected 0 to 18446744073709551615, or -1 for a random",
        ),
        (
            "p.jsonl",
            '{"prompt": "a", "seed": 18446744073709551616}',
            "line 1: seed is 18446744073709551616, expected 0 to",
        ),
        ("p.csv", "a red circle\n", "line 1: no prompt among the keys a red circle"),
        ("p.csv", "prompt,prompt\na,b\n", "line 1: 'prompt' and 'prompt' are both the prompt"),
        ("p.csv", "prompt,cfg,cfg_scale\na,5,5\n", "line 1: 'cfg' and 'cfg_scale' are both the cfg"),
        ("p.csv", "prompt,seed\na,1\nb, big,2\n", "line 3: 3 cells, expected 2: prompt, seed; text with a comma needs"),
        ("p.csv", "prompt,seed\na\n", "line 2: 1 cells, expected 2"),
        ("p.csv", "prompt,seed\n\n\na,one\n", "line 4: seed is 'one', expected a whole number"),
        ("p.csv", "prompt,seed\na,-7\n", "line 2: seed is -7, expected 0 to"),
        (
            "p.csv",
            'prompt,seed\n"two\nlines",1\nb,99999999999999999999\n',
            "line 4: seed is 99999999999999999999, expected",
        ),
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


# What means something in one of the formats.
SIGNS = (
    "--n ",
    " --w 64",
    " --d -1",
    "--",
    "#",
    '"',
    ",",
    "\t",
    "\n",
    "\r",
    "{",
    "}",
    "[",
    "]",
    ":",
    "\0",
    "\u2028",
    "\ufeff",
)
WORDS = ("prompt", "seed", "cfg", '"seed": 7', '{"prompt": "a"}', "1e999", "-0.0", "NaN", "42.0", "null", "true", "é")
PIECES = st.sampled_from(SIGNS + WORDS) | st.text(max_size=6)
BEGINNINGS = {".txt": "a\n", ".jsonl": '{"prompt": "a"}\n', ".csv": "prompt\n", ".tsv": "prompt\n"}


@pytest.mark.parametrize("suffix", BEGINNINGS)
def test_any_text_is_read_or_refused_in_one_line(tmp_path: Path, suffix: str) -> None:
    path, outcomes = tmp_path / f"p{suffix}", Counter[bool]()

    @settings(max_examples=200, deadline=None, derandomize=True, database=None)
    @given(st.sampled_from(["", BEGINNINGS[suffix]]), st.lists(PIECES, max_size=20).map("".join))
    def check(beginning: str, rest: str) -> None:
        path.write_bytes((beginning + rest).encode("utf-8", "surrogatepass"))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            try:
                outcomes[len(read_prompts(path)) > 0] += 1
            except ValueError as error:
                assert str(path) in str(error)
                assert len(str(error).split("\n")) == 1
                outcomes[False] += 1

    check()
    print(f"{suffix}: {outcomes[True]} texts read, {outcomes[False]} refused")
    assert outcomes[True]
    assert outcomes[False]
