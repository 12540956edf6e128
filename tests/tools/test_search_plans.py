"""The search for step plans: what it finds costs what it says, and a stopped search goes on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from minisdxl.config import SHAPES
from minisdxl.pipeline import SDXL
from tools.evaluation.methods import Method, picture_flops, settings_of
from tools.evaluation.pictures import drawn_captions
from tools.search_plans import EVALUATED, main, search_captions

RUN: dict[str, Any] = {"sampling": "euler", "steps": 8, "size": (256, 256), "cfg": 4.0}
BUDGET = 0.6


def test_plans_within_the_budget_are_found_kept_and_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, shapes: SDXL
) -> None:
    monkeypatch.setattr("tools.search_plans.load", lambda *_, **__: shapes)
    journal, report = tmp_path / "search.journal", tmp_path / "plans.json"
    asked = ["--budget", str(BUDGET), "--captions", "1", "--steps", "8", "--out", str(journal), "--json", str(report)]
    main([*asked, "--trials", "2"])
    assert capsys.readouterr().out.count("Method(") == 2
    main([*asked, "--trials", "3"])
    output = capsys.readouterr().out
    assert output.count("Method(") == 1  # the third, since two are in the journal
    assert output.count("x fewer FLOPs") == 3
    plans = json.loads(report.read_text())["plans"]
    dense = picture_flops(SHAPES, settings_of(Method(), **RUN))
    for plan in plans:
        method = Method(plan["prune"], plan["skip"], plan["guide"])
        share = picture_flops(SHAPES, settings_of(method, **RUN)) / dense
        print(f"{share:.3f} of dense, {plan['psnr']:.1f} dB: {method}")
        assert share == plan["share"] <= BUDGET
    assert [plan["psnr"] for plan in plans] == sorted((plan["psnr"] for plan in plans), reverse=True)


def test_no_evaluation_uses_the_captions() -> None:
    used = set(drawn_captions(EVALUATED).texts)
    found = search_captions(50)
    assert len(found) == 50
    assert not used & set(found)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--budget", "1.5"], "--budget is 1.5, expected a share of dense"), (["--trials", "0"], "--trials is 0")],
)
def test_bad_options_are_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
