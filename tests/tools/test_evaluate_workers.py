"""``tools.evaluate --workers``: the rows and metrics of the plain command, whatever worker made which part."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from minisdxl.pipeline import SDXL
from minisdxl.scale import cluster
from minisdxl.scale.cluster import Lost, Placement
from tests.tools.test_evaluate import QUICK, ROOT, Colors, timeless, write_clip, write_pictures
from tools.evaluate import main
from tools.evaluation import at_scale
from tools.evaluation.official_metrics import Fid
from tools.evaluation.pictures import Evaluation
from tools.evaluation.rows import Row, read_rows

pytestmark = pytest.mark.scale


def in_process(placement: Placement, worker: type, task: object, units: Sequence[object]) -> Iterator[Any]:
    """What ``answers`` of Ray gives, in another order, by two workers in this process."""
    workers = [worker(task), worker(task)]
    return (workers[number % 2].make(unit) for number, unit in reversed(list(enumerate(units))))


@pytest.fixture(autouse=True)
def engine(monkeypatch: pytest.MonkeyPatch, load_once: Callable[..., SDXL]) -> None:
    monkeypatch.setattr("tools.evaluation.set_metrics.REFERENCES", 10)
    monkeypatch.setattr("tools.evaluation.at_scale.REFERENCES", 10)
    monkeypatch.setattr("tools.evaluate.load", load_once)
    monkeypatch.setattr("tools.evaluation.worker.load", load_once)
    monkeypatch.setattr(cluster, "connected", lambda address: nullcontext())
    monkeypatch.setattr(cluster, "place", lambda *_: Placement(2, "cpu", torch.get_num_threads()))
    monkeypatch.setattr(at_scale, "answers", in_process)
    monkeypatch.setattr(at_scale, "PART", 2)
    monkeypatch.setattr(at_scale, "FILES", 3)


def evaluate(out: Path, *arguments: str) -> Any:
    """The presets of the report."""
    main([*QUICK, "--batch", "2", "--out", str(out), *arguments])
    return json.loads((out / "summary.json").read_text())["presets"]


def same(presets: Any, expected: Any) -> None:
    """Equal summaries but for time; metrics of sets to what torchmetrics' float32 state allows."""
    assert len(presets) == len(expected)
    for each, other in zip(presets, expected, strict=True):
        for name in each["crowd"].keys() | other["crowd"].keys():
            print(f"{each['preset']}: {name} {each['crowd'][name]}, plain {other['crowd'][name]}")
            assert each["crowd"][name] == pytest.approx(other["crowd"][name], rel=1e-4, abs=1e-5)
        timed = {"crowd": None, "seconds": None, "time_ratio": None}
        assert each | timed == other | timed


def test_workers_report_what_one_process_reports(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    expected = evaluate(tmp_path / "plain", "--captions", "5")
    plain = capsys.readouterr().out.splitlines()
    found = evaluate(tmp_path / "workers", "--captions", "5", "--workers", "2")
    assert capsys.readouterr().out.splitlines()[-1] == plain[-1]  # the distance of other drawn pictures
    same(found, expected)
    rows = [timeless(read_rows(tmp_path / name / "rows.csv")) for name in ("plain", "workers")]
    assert rows[0] == rows[1]
    assert [path.name for path in (tmp_path / "workers").glob("rows*.csv")] == ["rows.csv"]
    for file in (tmp_path / "plain").rglob("*/*"):
        if file.is_file():
            made = tmp_path / "workers" / file.relative_to(tmp_path / "plain")
            assert made.read_bytes() == file.read_bytes()


def test_fid_and_clip_score_come_from_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stand_in(_: Path, references: list[Path], device: torch.device) -> Fid:
        return Fid(Colors(), references, device)

    for module in ("tools.evaluate", "tools.evaluation.worker"):
        monkeypatch.setattr(f"{module}.Fid", stand_in)
    write_pictures(tmp_path / "references", 7, 0)
    (tmp_path / "captions.txt").write_text("a red thing\nfour blue birds\ngreen\na dog\na big cat\n")
    options = ["--captions", "5", "--prompts", str(tmp_path / "captions.txt"), "--inception", "some.pth"]
    options += ["--references", str(tmp_path / "references"), "--clip", str(write_clip(tmp_path / "clip"))]
    expected = evaluate(tmp_path / "plain", *options)
    found = evaluate(tmp_path / "workers", *options, "--workers", "2")
    assert [sorted(each["crowd"]) for each in found] == [["CLIP", "FID"]] * 2
    same(found, expected)


def test_a_stopped_evaluation_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = evaluate(tmp_path / "straight", "--captions", "4", "--workers", "2")
    made = list[str]()

    def stopped(placement: Placement, worker: type, task: object, units: Sequence[object]) -> Iterator[Any]:
        """Ends after the first unit that makes rows of the preset."""
        for answer in in_process(placement, worker, task, units):
            yield answer
            if getattr(units[0], "preset", "dense") != "dense":
                raise KeyboardInterrupt

    make = Evaluation.make

    def watched(self: Evaluation, preset: str, numbers: range, wanted: Sequence[int]) -> list[Row]:
        made.append(f"{preset} {numbers.start}")
        return make(self, preset, numbers, wanted)

    monkeypatch.setattr(Evaluation, "make", watched)
    monkeypatch.setattr(at_scale, "answers", stopped)
    with pytest.raises(SystemExit) as stop:
        evaluate(tmp_path / "stopped", "--captions", "4", "--workers", "2")
    assert stop.value.code == 130
    monkeypatch.setattr(at_scale, "answers", in_process)
    (tmp_path / "stopped" / "features" / "dense" / "00000.npz").unlink()  # made again without its picture
    same(evaluate(tmp_path / "stopped", "--captions", "4", "--workers", "2"), expected)
    assert len(made) == len(set(made)) == 4  # two batches of two kinds, each made once


def test_what_workers_cannot_make_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def losing(placement: Placement, worker: type, task: object, units: Sequence[object]) -> Iterator[Any]:
        return (Lost(unit, "its worker died") for unit in units)

    monkeypatch.setattr(at_scale, "answers", losing)
    for options, line in {
        ("--shard", "1/2"): "--shard is 1/2 with --workers, expected one of them",
        (): "1 of the batches failed, the first: its worker died; the same command tries them again",
    }.items():
        with pytest.raises(SystemExit) as stop:
            evaluate(tmp_path / "out", "--captions", "2", "--workers", "2", *options)
        assert stop.value.code == 2
        assert line in capsys.readouterr().err.splitlines()[-1]


def test_ray_makes_the_same_rows(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tools.evaluate", *QUICK, "--captions", "2", "--batch", "1"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for name, more in {"plain": [], "workers": ["--workers", "2"]}.items():
        subprocess.run([*command, *more, "--out", str(tmp_path / name)], cwd=ROOT, env=environment, check=True)
    rows = [timeless(read_rows(tmp_path / name / "rows.csv")) for name in ("plain", "workers")]
    assert rows[0] == rows[1]
