"""``minisdxl.sample --workers`` with a worker in this process instead of Ray's: what is made, kept and refused."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem
from PIL import Image

from minisdxl.pipeline import SDXL
from minisdxl.sample import main
from minisdxl.scale import pictures
from minisdxl.scale.cluster import Lost, Placement
from minisdxl.scale.folder import FAILURES, MANIFEST, PICTURES, RESULTS
from minisdxl.scale.store import Store
from minisdxl.scale.worker import PictureWorker, Task, Unit
from minisdxl.settings import Settings

pytestmark = pytest.mark.scale
URL = "memory://bucket/run"
COMMAND = ["a red circle", "a blue square", "--images-per-prompt", "2", "--steps", "1", "--size", "64x64"]
AT_SCALE = [*COMMAND, "--workers", "2", "--out", URL]
NAMES = [f"{seed}-a-red-circle-dense.png" for seed in (0, 1)] + [f"{seed}-a-blue-square-dense.png" for seed in (2, 3)]


class Killed(BaseException):
    """Stands for the end of the process."""


def in_process(placement: Placement, worker: type, task: Task, units: Sequence[Unit]) -> Iterator[Any]:
    """What ``answers`` of Ray gives, in another order, by one worker in this process."""
    made = worker(task)
    return (made.make(unit) for unit in reversed(units))


@pytest.fixture(autouse=True)
def engine(monkeypatch: pytest.MonkeyPatch, load_once: Callable[..., SDXL]) -> Iterator[None]:
    monkeypatch.setattr("minisdxl.cli.models.load", load_once)
    monkeypatch.setattr(pictures, "connected", lambda address: nullcontext())
    monkeypatch.setattr(pictures, "place", lambda *_: Placement(2, "cpu", torch.get_num_threads()))
    monkeypatch.setattr(pictures, "answers", in_process)
    yield
    MemoryFileSystem.store.clear()


@pytest.fixture
def instant(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures of noise instead of the model's, for what does not depend on how they look."""

    def generate(self: SDXL, prompts: Sequence[str], settings: Settings, **_: object) -> list[Image.Image]:
        noise = np.random.default_rng(settings.seed)
        return [Image.fromarray(noise.integers(0, 256, (64, 64, 3), dtype=np.uint8)) for _ in prompts]

    monkeypatch.setattr(SDXL, "generate", generate)


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The last line of a command that must fail with exit code 2."""
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    line = capsys.readouterr().err.splitlines()[-1]
    print(line)
    return line


def opened(data: bytes) -> tuple[Any, dict[str, Any]]:
    image = Image.open(BytesIO(data))
    return np.asarray(image), json.loads(image.info["minisdxl"])


def test_pictures_are_those_of_the_plain_command(tmp_path: Path) -> None:
    main([*COMMAND, "--out", str(tmp_path)])
    main(AT_SCALE)
    store = Store(URL)
    assert store.names() == {MANIFEST, PICTURES, RESULTS, *NAMES}
    for name in NAMES:
        pixels, record = opened(store.read(name))
        plain, expected = opened((tmp_path / name).read_bytes())
        assert np.array_equal(pixels, plain)
        assert record == {**expected, "threads": torch.get_num_threads()}
    rows = [json.loads(line) for line in store.read(RESULTS).splitlines()]
    assert [row["path"] for row in rows] == NAMES
    assert all(row["seconds"] > 0 and row["machine"] and row["host"] for row in rows)


def test_the_plans_of_a_run_are_recorded_and_no_setting(tmp_path: Path) -> None:
    """They are in each picture's file, as of the plain command; the next run finds all pictures there."""
    skipping = ["--steps", "8", "--sampling", "euler", "--skip", "easycache:threshold=0.5"]
    main([*COMMAND, *skipping, "--out", str(tmp_path)])
    main([*AT_SCALE, *skipping])
    store = Store(URL)
    names = sorted(name for name in store.names() if name.endswith(".png"))
    assert len(names) == 4
    for name in names:
        _, record = opened(store.read(name))
        _, expected = opened((tmp_path / name).read_bytes())
        assert record["realized"] == expected["realized"]
    report = tmp_path / "report.json"
    main([*AT_SCALE, *skipping, "--json", str(report)])
    found = json.loads(report.read_text())
    assert (found["there"], found["made"]) == (4, 0)


@pytest.mark.usefixtures("instant")
def test_a_run_that_is_killed_at_any_write_ends_complete(monkeypatch: pytest.MonkeyPatch) -> None:
    main(AT_SCALE)
    store = Store(URL)
    undisturbed = {name: store.read(name) for name in NAMES}
    write = Store.write
    for last in range(12):  # the write at which the process ends, counted from 0: a run makes 11
        MemoryFileSystem.store.clear()
        left, early = last, last % 2 == 1

        def killed(self: Store, name: str, data: bytes, early: bool = early) -> None:
            nonlocal left
            if left == 0 and early:  # before the file appears, or after it
                raise Killed
            write(self, name, data)
            if left == 0:
                raise Killed
            left -= 1

        monkeypatch.setattr(Store, "write", killed)
        with pytest.raises(Killed):
            for _ in range(2):
                main(AT_SCALE)
        monkeypatch.setattr(Store, "write", write)
        main(AT_SCALE)
        assert store.names() == {MANIFEST, PICTURES, RESULTS, *NAMES}
        assert {name: store.read(name) for name in NAMES} == undisturbed
        assert [json.loads(line)["path"] for line in store.read(RESULTS).splitlines()] == NAMES


@pytest.mark.usefixtures("instant")
def test_only_what_is_missing_is_made(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    main(AT_SCALE)
    store, made = Store(URL), list[str]()
    before = {name: store.read(name) for name in NAMES}
    store.remove(NAMES[1:2])
    store.write(NAMES[3], before[NAMES[3]][:-5])  # cut
    make = PictureWorker.make

    def watched(self: PictureWorker, unit: Unit) -> Any:
        made.extend(unit.wanted)
        return make(self, unit)

    monkeypatch.setattr(PictureWorker, "make", watched)
    report = tmp_path / "report.json"
    main([*AT_SCALE, "--json", str(report)])
    assert sorted(made) == sorted([NAMES[1], NAMES[3]])
    assert {name: store.read(name) for name in NAMES} == before
    found = json.loads(report.read_text())
    assert (found["pictures"], found["there"], found["made"], found["failed"]) == (4, 2, 2, 0)


def test_batches_are_those_of_the_whole_run(capsys: pytest.CaptureFixture[str]) -> None:
    """With --batch a picture that is made later has the bits that it had, because its whole batch is made again."""
    command = [*AT_SCALE, "--batch", "2"]
    main(command)
    store = Store(URL)
    before = {name: store.read(name) for name in NAMES}
    store.remove([NAMES[1], NAMES[2]])
    main(command)
    assert {name: store.read(name) for name in NAMES} == before
    assert "has batch 2, not 1" in refused(capsys, *AT_SCALE)


def test_a_picture_that_fails_does_not_stop_the_others(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompts = tmp_path / "prompts.jsonl"
    lines = [{"prompt": "a red circle"}, {"prompt": "a blue square", "cfg": 1e38}, {"prompt": "a green triangle"}]
    prompts.write_text("".join(json.dumps(line) + "\n" for line in lines))
    command = ["--prompts", str(prompts), *COMMAND[-4:], "--workers", "2", "--out", URL]
    line = refused(capsys, *command)
    assert "1 of 3 pictures failed" in line and "1-a-blue-square-dense.png (ArithmeticError" in line
    store = Store(URL)
    assert {name for name in store.names() if name.endswith(".png")} == {
        "0-a-red-circle-dense.png",
        "2-a-green-triangle-dense.png",
    }
    (failure,) = (json.loads(line) for line in store.read(FAILURES).splitlines())
    assert (failure["prompt"], failure["cfg"]) == ("a blue square", 1e38)


@pytest.mark.usefixtures("instant")
def test_lost_units_are_failures(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def losing(placement: Placement, worker: type, task: Task, units: Sequence[Unit]) -> Iterator[Any]:
        yield Lost(units[0], "the process died")
        yield from in_process(placement, worker, task, units[1:])

    monkeypatch.setattr(pictures, "answers", losing)
    assert f"the first of them {NAMES[0]} (the process died)" in refused(capsys, *AT_SCALE)
    monkeypatch.setattr(pictures, "answers", in_process)
    main(AT_SCALE)
    assert set(NAMES) < Store(URL).names()


@pytest.mark.usefixtures("instant")
def test_what_changed_is_refused_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(AT_SCALE)
    before = dict(MemoryFileSystem.store)
    changes = {
        ("--steps", "2"): "has steps 1, not 2",
        ("--prune",): "has prune None, not 'moving-grid'",
        ("--dtype", "bf16"): "has dtype 'fp32', not 'bf16'",
        ("--negative", "red"): "picture 1 in memory://bucket/run has negative '', not 'red'",
        ("--seed", "1"): "picture 1 in memory://bucket/run has path '0-a-red-circle-dense.png', not '1-a",
        ("a fox",): "was begun with 4 pictures, not 6",
    }
    for options, line in changes.items():
        assert line in refused(capsys, *AT_SCALE, *options)
    assert MemoryFileSystem.store.keys() == before.keys()


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (["--preview", "1"], "--preview is for one process"),
        (["--low-memory"], "--low-memory is for one process"),
        (["--seed", "-1"], "seed is -1, a random one, with --workers"),
        (["--out", "here.png"], "--out is the file here.png with --workers, expected a folder"),
        (["--out", "nosuch://bucket"], "nosuch"),
        (["--workers", "0"], "--workers is 0, expected 1 or more"),
        (["--threads", "0"], "--threads is 0, expected 1 or more"),
    ],
)
def test_what_does_not_go_with_workers_is_refused(
    options: list[str], line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert line in refused(capsys, *AT_SCALE, *options)


def test_ray_is_not_imported_without_workers() -> None:
    code = "import sys, minisdxl.sample; sys.exit('ray' in sys.modules or 'minisdxl.scale' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_workers_without_ray_are_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("minisdxl.cli.workers.find_spec", lambda name: None)
    assert "--workers needs Ray, expected it installed: pip install 'minisdxl[scale]'" in refused(capsys, *AT_SCALE)


@pytest.mark.usefixtures("instant")
def test_a_worker_that_does_not_see_the_folder_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def elsewhere(placement: Placement, worker: type, task: Task, units: Sequence[Unit]) -> Iterator[Any]:
        MemoryFileSystem.store.clear()  # another process has its own
        return in_process(placement, worker, task, units)

    monkeypatch.setattr(pictures, "answers", elsewhere)
    assert f"does not see the folder {URL}" in refused(capsys, *AT_SCALE)


@pytest.mark.usefixtures("instant")
def test_a_worker_with_another_torch_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def elsewhere(placement: Placement, worker: type, task: Task, units: Sequence[Unit]) -> Iterator[Any]:
        monkeypatch.setattr(torch, "__version__", "1.0")
        return in_process(placement, worker, task, units)

    here = torch.__version__
    monkeypatch.setattr(pictures, "answers", elsewhere)
    assert f"has torch 1.0, expected {here}" in refused(capsys, *AT_SCALE)
