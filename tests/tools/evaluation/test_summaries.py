"""Summaries of rows and verdicts on claims, of rows whose numbers are known."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tools.evaluation.rows import Row
from tools.evaluation.summaries import judge, markdown_table, summarize


def row(preset: str, number: int, obeyed: bool, error: float, held_out: bool = True) -> Row:
    caption = f"a big {'cyan' if number < 10 else 'red'} triangle on a gray background"
    judged = caption, obeyed, held_out, 1, ""
    return Row(preset, number, number, 50, 3.0, *judged, 20 + error, 0.5, error, 0.8, 2.0 + error, "m")


def test_captions_of_both_kinds_and_lost_objects_are_counted_apart() -> None:
    dense = [row("dense", i, True, 0.0) for i in range(40)]
    pruned = [row("at-edm", i, i >= 10, 0.1) for i in range(40)]
    for rows in (dense, pruned):
        rows[:20] = [replace(each, caption="a big triangle on a gray background") for each in rows[:20]]
    dense[5] = replace(dense[5], objects=0)
    pruned[4:8] = [replace(each, objects=0) for each in pruned[4:8]]  # the second of them is lost in dense, too
    first, second = summarize({"dense": dense, "at-edm": pruned}, None)
    assert first.lost is None
    assert second.lost is not None and second.plain is not None and second.open is not None
    assert (second.lost.value, second.plain.value, second.open.value) == (3 / 40, 1, 0.5)
    table = markdown_table([first, second], None)
    print(table)
    assert "| plain captions | open captions | objects lost |" in table
    assert "7.5 % (" in table.splitlines()[-1]


def test_summaries_and_verdicts_of_known_rows() -> None:
    dense = [row("dense", i, True, 0.0, held_out=i % 2 == 0) for i in range(40)]
    good = [row("at-edm:rho=0.6", i, i >= 10, 0.1 + 0.01 * (i % 3), held_out=i % 2 == 0) for i in range(40)]
    bad = [row("zeros:rho=0.6", i, i >= 30, 0.3 + 0.01 * (i % 2), held_out=i % 2 == 0) for i in range(40)]
    rows = {each[0].preset: each for each in (dense, good, bad)}
    first, second, third = summarize(rows, "at-edm:rho=0.6")
    assert (first.obeyed is not None and first.obeyed.value, first.over_dense, first.over_baseline) == (1, None, None)
    assert second.over_dense is not None
    assert second.over_dense.value == -0.25
    assert second.held_out is not None and second.seen is not None
    assert (second.held_out.value, second.seen.value) == (0.75, 0.75)
    assert second.new_pairs is not None
    assert second.new_pairs.value == 0  # the ten that fail
    assert third.over_baseline is not None and third.error_over_baseline is not None
    assert third.over_baseline.value == -0.5
    assert third.error_over_baseline.value == pytest.approx(0.305 - 0.10975, abs=1e-9)
    assert third.time_ratio == pytest.approx(2.305 / 2)
    found = judge("", good, bad)
    assert (found.obeyed_verdict, found.error_verdict) == ("confirmed", "confirmed")
    found = judge("", bad, good)
    assert (found.obeyed_verdict, found.error_verdict) == ("not", "not")
    found = judge("", good[:1], bad[:1])
    assert found.obeyed_verdict == "undecided"
    with pytest.raises(ValueError, match="tome"):
        summarize(rows, "tome")
