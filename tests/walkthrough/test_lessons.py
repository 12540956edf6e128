"""The lessons of docs/walkthrough: what they are made of, and that they run from top to bottom."""

from __future__ import annotations

import resource
import time
from pathlib import Path

import pytest

from tests.walkthrough.lessons import LESSONS, WALKTHROUGH, code_cells, exercises, load_module, solution

SCREEN = 25  # lines
CPU_SECONDS = 110  # of a lesson: less than a minute on two cores, and the same on a machine that others use as well


def named(lesson: Path) -> str:
    return lesson.stem


@pytest.mark.parametrize("lesson", LESSONS, ids=named)
def test_a_cell_fits_on_a_screen(lesson: Path) -> None:
    longest = max(code_cells(lesson), key=lambda code: code.count("\n"))
    assert longest.count("\n") < SCREEN, longest


@pytest.mark.parametrize("lesson", LESSONS, ids=named)
def test_a_lesson_ends_in_exercises_with_checkers_and_solutions(lesson: Path) -> None:
    number, found = lesson.stem[0], exercises(lesson)
    checkers = load_module(f"checks.lesson_{number}").CHECKERS
    assert found == list(checkers)
    assert 2 <= len(found) <= 3
    assert code_cells(lesson)[-1].splitlines()[-1].startswith(f'check("{found[-1]}"')
    assert all(solution(exercise) is not None for exercise in found)


def test_the_readme_lists_all_lessons() -> None:
    readme = (WALKTHROUGH / "README.md").read_text(encoding="utf-8")
    assert [lesson.name for lesson in LESSONS if f"]({lesson.name})" not in readme] == []


def cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)  # of processes that have ended
    return used.ru_utime + used.ru_stime


@pytest.mark.teach
@pytest.mark.timeout(900)
@pytest.mark.parametrize("lesson", LESSONS, ids=named)
def test_a_lesson_runs_from_top_to_bottom(lesson: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import jupytext
    from nbclient import NotebookClient

    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")  # threads that wait for others on a busy machine take no time
    notebook = jupytext.read(lesson)
    before, start = cpu_seconds(), time.perf_counter()
    where = {"metadata": {"path": str(WALKTHROUGH)}}
    NotebookClient(notebook, kernel_name="python3", timeout=600, resources=where).execute()
    used = cpu_seconds() - before
    print(f"{lesson.stem}: {used:.1f} s of processor time, {time.perf_counter() - start:.1f} s")
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert [output for output in outputs if output.get("name") == "stderr"] == []
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 1
    verdicts = [output.data["text/plain"] for output in outputs if "text/plain" in output.get("data", {})]
    said = [text for text in verdicts if text.startswith("Exercise ")]
    assert [text.split()[1].strip(",") for text in said] == exercises(lesson)
    assert not [text for text in said if not text.endswith(("there is no answer yet.", "returns nothing yet."))], said
    assert 1 < used < CPU_SECONDS
