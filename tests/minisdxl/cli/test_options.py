"""How a command ends when something goes wrong."""

from __future__ import annotations

import pytest

from minisdxl.cli.options import Parser


@pytest.mark.parametrize(
    ("raised", "code", "line"),
    [
        (ValueError("rho is 2,\n  expected 0 <= rho < 1"), 2, "name: error: rho is 2, expected 0 <= rho < 1\n"),
        (FileNotFoundError(2, "No such file", "a.png"), 2, "name: error: [Errno 2] No such file: 'a.png'\n"),
        (ModuleNotFoundError("No module named 'x'"), 2, "name: error: No module named 'x'\n"),
        (RuntimeError("asked for as one more"), 2, "name: error: asked for as one more\n"),
        (KeyboardInterrupt(), 130, "interrupted: all is kept\n"),
    ],
)
def test_failures_are_one_line(raised: BaseException, code: int, line: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop, Parser(prog="name").one_line("all is kept", RuntimeError):
        raise raised
    assert stop.value.code == code
    assert capsys.readouterr().err == line


def test_mistakes_of_ours_are_not_hidden() -> None:
    with pytest.raises(RuntimeError, match="not asked for"), Parser().one_line("nothing"):
        raise RuntimeError("not asked for")
    with Parser().one_line("nothing"):
        done = True
    assert done
