"""The tables of the documents are those that the commands beside them print."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tools.doc_tables import main
from tools.evaluation.paired_statistics import Estimate
from tools.evaluation.rows import Row
from tools.evaluation.summaries import as_json, judge, summarize

DOCS = Path(__file__).parents[2] / "docs"
COMMANDS = [
    (document, command)
    for document in ("results.md", "better-method.md")
    for command in re.findall(r"^ *python -m tools\.doc_tables (.+)$", (DOCS / document).read_text(), re.MULTILINE)
]


@pytest.mark.parametrize(("document", "command"), COMMANDS)
def test_documents_have_what_the_command_prints(
    document: str, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    main([*command.split(), "--results", str(DOCS / "results")])
    printed = capsys.readouterr().out
    assert printed.count("\n") > 4
    assert printed in (DOCS / document).read_text()


def test_both_documents_have_such_tables() -> None:
    assert {document for document, _ in COMMANDS} == {"results.md", "better-method.md"}


CAPTION = "a big red circle on a gray background"


def row(preset: str, number: int, obeyed: bool, latent_error: float) -> Row:
    share, quality = (1.0, float("inf")) if preset == "dense" else (0.5, 20.0)
    return Row(
        preset, number, number, 50, 4.0, CAPTION, obeyed, True, 1, "", quality, 1.0, latent_error, share, 1.0, "m"
    )


def test_numbers_are_those_of_the_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kinds = {
        "dense": [row("dense", n, True, 0.0) for n in range(10)],
        "at-edm": [row("at-edm", n, n < 5, 0.02) for n in range(10)],
        "tome": [row("tome", n, True, 0.01) for n in range(10)],
    }
    verdicts = [judge(f"one beats the other: {part}", kinds["at-edm"], kinds["tome"]) for part in ("a", "b")]
    report = {
        "presets": [as_json(each) for each in summarize(kinds, "at-edm")],
        "verdicts": [as_json(each) for each in verdicts],
    }
    (tmp_path / "rankings.json").write_text(json.dumps(report))
    main(["table", "rankings", "--results", str(tmp_path)])
    lines = capsys.readouterr().out.splitlines()
    assert lines[2].startswith("| `dense` | 100.0% | 100.0 % (72.2 to 100.0) | 0.0000 (0.0000 to 0.0000) |  | equal |")
    assert lines[4].endswith("| -0.0100 (-0.0100 to -0.0100) | 20.00 (20.00 to 20.00) |")
    main(["claims", "rankings", "--results", str(tmp_path)])
    cells = capsys.readouterr().out.splitlines()[2].split(" | ")
    assert cells[0] == "| one beats the other"
    assert cells[1] == "<br>".join(["not: +0.0100 (+0.0100 to +0.0100)"] * 2)
    obeyed = verdicts[0].obeyed
    assert isinstance(obeyed, Estimate)
    assert cells[2].startswith(f"not: -50 ({100 * obeyed.low:.0f} to {100 * obeyed.high:.0f})<br>")
    assert cells[3] == "[rankings](results/rankings.md) |"


def test_a_page_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["table", "rankings", "--results", str(tmp_path)])
    assert stopped.value.code == 2
    assert "rankings.json" in capsys.readouterr().err
