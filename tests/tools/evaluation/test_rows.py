"""Rows of numbers in a file."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tools.evaluation.rows import Row, read_rows, rows_csv


def test_rows_survive_the_file(tmp_path: Path) -> None:
    row = Row("at-edm", 1, 1, 2, 7.5, 'a "b", c', None, True, None, "x; y", float("inf"), 1 / 3, 1e-17, 0.1, 2.0, "m")
    (tmp_path / "rows.csv").write_bytes(rows_csv([row, replace(row, obeyed=False, held_out=None, objects=3, number=2)]))
    assert read_rows(tmp_path / "rows.csv") == [row, replace(row, obeyed=False, held_out=None, objects=3, number=2)]
    text = (tmp_path / "rows.csv").read_text()
    (tmp_path / "torn.csv").write_text(text[:-20])
    with pytest.raises(ValueError, match=r"torn\.csv, line 3"):
        read_rows(tmp_path / "torn.csv")
