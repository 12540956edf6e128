"""The command that says what self-attention does."""

from __future__ import annotations

import pytest

from tools.training.likeness import TIMESTEPS
from tools.watch import main, table


def test_a_row_for_each_model_and_kind(capsys: pytest.CaptureFixture[str]) -> None:
    main(["shapes", "--pictures", "1"])
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert [line.split(" | ")[:2] for line in lines[2:]] == [["| `shapes`", "plain"], ["| `shapes`", "open"]]
    error, uniform, source, likest = map(float, lines[2].split(" | ")[2:6])
    print(f"error {error}, with uniform attention {uniform} times, cosine {source} of {likest}")
    assert 0 < error < 0.01 and uniform > 1 and -1 <= source <= likest <= 1


def test_numbers_stand_under_their_heads() -> None:
    names = ["error", "uniform", "source", "likest", "entropy", "objects", "rest", *(f"change_{t}" for t in TIMESTEPS)]
    figures = {f"{kind}_{name}": place + 0.25 for kind in ("plain", "open") for place, name in enumerate(names)}
    head, _, row, _ = table({"m": figures}).splitlines()
    cells = dict(zip(head.strip("| ").split(" | "), row.strip("| ").split(" | "), strict=True))
    assert (cells["source cosine"], cells["best possible"], cells["rest kept"]) == ("2.25", "3.25", "6.25")
    assert cells["`at-edm` change at t = 200"] == "9.25"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [(["shapes", "--pictures", "0"], "--pictures is 0, expected 1 or more"), (["nowhere"], "nowhere")],
)
def test_bad_input_is_one_line(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    error = capsys.readouterr().err
    assert (stopped.value.code, error.count("\n")) == (2, 1) and said in error
