"""The fuzz test: some hundreds of its cases, and bugs put in on purpose, each of which it must find."""

from __future__ import annotations

import faulthandler
import os
import re
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from minisdxl import sample
from minisdxl.checkpoint import json_fields, modules, resolve, tensorfile
from tools import fuzz
from tools.fuzz import examine, main, place
from tools.fuzzing.damage import IN_TENSORS, IN_TEXTS, Case, make_case
from tools.fuzzing.forms import bytes_of, file_bytes, forms, tensors_of

ROOT = Path(__file__).resolve().parents[2]


def sound(form: str) -> Case:
    """A model that nothing was done to."""
    return Case(0, form, "none", "none", forms()[form].files, torch.float32, command=True, mapped=False)


def test_some_hundred_cases_are_refused_or_right(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--cases", "300", "--seed", "1"])
    output = capsys.readouterr().out
    print(output)
    assert re.search(r"^300 cases with seed 1: \d+ refused, \d+ loaded and right, 0 violations; ", output, re.MULTILINE)
    for damage in (*IN_TENSORS, *IN_TEXTS, "whole file", "several of these"):
        assert f"| {damage} | " in output


@pytest.mark.parametrize("form", forms())
def test_sound_models_are_loaded(form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the command draws a picture of them."""
    ends: list[None] = []
    put_in(sample, "main", lambda run, *given: ends.append(run(*given)))(monkeypatch)
    place(forms()[form].files, tmp_path, {})
    result = examine(sound(form), tmp_path)
    assert (result.message, result.violation) == (None, None)
    assert (ends == [None]) == (form != "fp8 file")  # some numbers of this one are NaN
    assert make_case(7, 3) == make_case(7, 3) != make_case(8, 3)


@pytest.mark.parametrize("damage", ["lost", "of another shape"])
def test_position_ids_are_not_read(damage: str, tmp_path: Path) -> None:
    """Whatever a file has for them, the model is the same: they are 0, 1, 2, ... always."""
    case = sound("official file")
    (path,) = (path for path in case.files if path.endswith(".safetensors"))
    tensors = tensors_of(bytes_of(case.files[path]))
    (name,) = (name for name in tensors if name.endswith("position_ids"))
    positions = tensors.pop(name)
    content = file_bytes(tensors if damage == "lost" else tensors | {name: positions.flatten()})
    files = {**case.files, path: content}
    place(files, tmp_path, {})
    result = examine(replace(case, files=files), tmp_path)
    assert (result.message, result.violation) == (None, None)


def put_in(target: Any, name: str, bug: Callable[..., Any]) -> Callable[[pytest.MonkeyPatch], None]:
    """Something that replaces a function by ``bug``, which gets the true one first."""
    true = getattr(target, name)
    return lambda monkeypatch: monkeypatch.setattr(target, name, lambda *given, **named: bug(true, *given, **named))


def shifted(read: Callable[..., None], file: Any, targets: dict[str, Tensor]) -> None:
    """Reads all numbers, those of one tensor from the wrong place."""
    read(file, targets)
    first = next(iter(targets.values()))
    first.copy_(first.flatten().roll(1).view(first.shape))


def crashing(load: Callable[..., Any], path: Path, **options: Any) -> Any:
    if path.name == "model":
        faulthandler.disable()  # pytest's, which would show where
        os.kill(os.getpid(), signal.SIGSEGV)
    return load(path, **options)


def greedy(load: Callable[..., Any], path: Path, **options: Any) -> Any:
    torch.empty(2 * fuzz.MEMORY, dtype=torch.uint8)
    return load(path, **options)


def busy(load: Callable[..., Any], path: Path, **options: Any) -> Any:
    while options:
        pass
    return load(path)


def waiting(load: Callable[..., Any], path: Path, **options: Any) -> Any:
    time.sleep(600)
    return load(path, **options)


def failing(find: Callable[..., Any], *given: Any) -> Any:
    if len(given[2]) == 1:
        raise IndexError("unlucky")
    return find(*given)


def anonymous(error: Callable[..., Any], *given: Any) -> Any:
    return error("something is wrong")


def many_lines(parse: Callable[..., Any], *given: Any) -> Any:
    try:
        return parse(*given)
    except ValueError as error:
        raise ValueError(f"the header\n{error}") from error


BUGS: dict[str, tuple[Callable[[pytest.MonkeyPatch], None], str]] = {
    "numbers from elsewhere": (put_in(tensorfile.TensorFile, "read_into", shifted), r"loaded \d+ other numbers"),
    "fields unread": (put_in(json_fields.Fields, "check", lambda *_: None), "ignored "),
    "names unread": (
        put_in(resolve, "misfits", lambda *_: ""),
        r"KeyError: |a tensor that is not of the model|of shape \[.*\], expected \[",
    ),
    "another exception": (put_in(modules, "find_source", failing), "IndexError: unlucky"),
    "refused without a name": (put_in(tensorfile, "CheckpointError", anonymous), "refused without the name "),
    "refused in two lines": (put_in(tensorfile, "_parse", many_lines), "refused in 2 lines"),
    "a crash": (put_in(fuzz, "load", crashing), "the process ended with SIGSEGV"),
    "memory": (put_in(fuzz, "load", greedy), "RuntimeError: .*memory"),
    "time": (put_in(fuzz, "load", busy), "took more than 1 s of the processor"),
    "waiting": (put_in(fuzz, "load", waiting), "no result in 1 s"),
}


@pytest.mark.parametrize("bug", BUGS)
def test_bugs_are_found(bug: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    put, expected = BUGS[bug]
    put(monkeypatch)
    monkeypatch.setattr(fuzz, "SECONDS", 1 if bug == "time" else 60)
    monkeypatch.setattr(fuzz, "PATIENCE", 1 if bug == "waiting" else 240)
    found = violation(capsys, "--cases", "400")
    assert re.search(expected, found)
    again = re.search(r"^python -m tools\.fuzz (--case \d+) (--seed 0)$", found, re.MULTILINE)
    assert again
    assert re.search(expected, violation(capsys, *again[1].split(), *again[2].split()))


def violation(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What the command says of the violation that it must find."""
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 1
    message = capsys.readouterr().err
    print(message)
    return message


def test_one_case_says_what_it_is(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    main(["--case", "0", "--seed", "2", "--folder", str(tmp_path)])
    case = make_case(0, 2)
    assert capsys.readouterr().out.startswith(f"{case}; ")
    assert [path.name for path in tmp_path.iterdir()] == [case.form]
    with pytest.raises(SystemExit) as stop:
        main(["--cases", "0"])
    assert stop.value.code == 2
