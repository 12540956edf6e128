"""``python -m minisdxl.inspect``: the page it writes, and one line with exit code 2 for bad input."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from minisdxl.inspect import main
from minisdxl.pipeline import SDXL

PROMPT = "a small red circle above a big blue square on a white background"
QUICK = ["--steps", "2", "--size", "64x64"]
FAST = ["--sampling", "euler", "--fast", "faithful"]


@pytest.fixture(autouse=True)
def loaded_once(monkeypatch: pytest.MonkeyPatch, load_once: Callable[..., SDXL]) -> None:
    monkeypatch.setattr("minisdxl.cli.models.load", load_once)


def data_of(path: Path) -> dict[str, Any]:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', path.read_text(), re.DOTALL)
    assert found is not None
    return json.loads(found[1])


def test_it_writes_a_page_and_says_its_size(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "new" / "inside.html"
    main([PROMPT, *QUICK, "--prune", "at-edm", "--against", "tome", "--attention-steps", "2", "--out", str(out)])
    said = capsys.readouterr()
    assert said.out == f"{out}  seed 0  {out.stat().st_size / 1e6:.1f} MB  dense, at-edm, tome\n"
    assert said.err.startswith("note: at-edm gets 0 of 48 captions right on this model")
    data = data_of(out)
    assert [run["name"] for run in data["runs"]] == ["dense", "at-edm", "tome"]
    assert data["settings"]["steps"] == 2 and data["words"] == PROMPT.split()
    assert [list(block) for block in data["runs"][1]["attention"].values()] == [["1"]] * 7


def test_methods_over_steps(tmp_path: Path) -> None:
    out = tmp_path / "inside.html"
    main([PROMPT, "--size", "64x64", "--steps", "8", *FAST, "--against", "at-edm", "--out", str(out)])
    data = data_of(out)
    assert [run["name"] for run in data["runs"]] == ["dense", "faithful", "at-edm"]
    idle = [did.startswith("forecast (") for did in data["runs"][1]["did"]]
    totals = [data["runs"][1]["costs"][number]["total"] for number in data["runs"][1]["cost"]]
    assert [total == 0 for total in totals] == idle and 3 < sum(idle) < 8
    assert set(data["runs"][0]["did"]) == set(data["runs"][2]["did"]) == {""}


def test_dense_alone_and_with_little_memory(tmp_path: Path, shapes: SDXL) -> None:
    pages = [tmp_path / name for name in ("plain.html", "little.html")]
    for page, more in zip(pages, ([], ["--low-memory"]), strict=True):
        main([PROMPT, *QUICK, "--out", str(page), *more])
    plain, little = map(data_of, pages)
    assert [run["name"] for run in plain["runs"]] == ["dense"]
    for data in (plain, little):
        del data["runs"][0]["pictures"]  # equal up to rounding
    assert plain == little


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ([], "there is no prompt, expected one"),
        ([PROMPT, "--out", "a.png"], "--out is a.png, expected an .html file"),
        ([PROMPT, "--against", "tome"], "against is 'tome' without a method, expected both: two methods are compared"),
        ([PROMPT, "--fast", "fastest"], "unknown composed preset 'fastest', expected one of faithful, fast"),
        ([PROMPT, "--fast", "fast", "--skip", "zeus"], "--fast fast sets --skip, expected one of them"),
        ([PROMPT, "--skip", "tgate"], "tgate would change nothing"),
        ([PROMPT, "--prune", "at-edm", "--against", "tom"], "unknown preset 'tom', expected one of at-edm, "),
        ([PROMPT, "--attention-steps", "3"], "attention step is 3, expected 1 to 2"),
        ([PROMPT, "--attention-steps", "1;2"], "steps are '1;2', expected numbers from 1 with commas, such as 1,16,50"),
        ([PROMPT, "--prune", "at-edm:rho=2"], "setting rho of at-edm is '2'"),
        (["(a:99)"], "prompt weight of 'a' is 99, expected -10 to 10"),
        ([PROMPT, "--weights", "nowhere"], "nowhere"),
        ([PROMPT, "--strength", "0.5"], "--strength is 0.5 without --image, expected both"),
        ([PROMPT, "--seed", "-2"], "seed"),
        ([PROMPT, "--compile"], "unrecognized arguments: --compile"),
    ],
)
def test_bad_input_is_one_line(
    arguments: list[str], line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        main([*QUICK, *arguments])
    said = capsys.readouterr().err
    print(said)
    assert stop.value.code == 2
    assert said.startswith("python -m minisdxl.inspect: error: ") and said.count("\n") == 1 and line in said
    assert list(tmp_path.iterdir()) == []


def test_lists_are_printed(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--sampling", "list"])
    assert "dpm++-2m" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stop:
        main(["--prune", "list"])
    assert not stop.value.code and "moving-grid" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stop:
        main(["--skip", "list"])
    assert not stop.value.code and "--skip deepcache" in capsys.readouterr().out
