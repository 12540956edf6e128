"""The documents against the program: what they mark to run runs, and what they name exists.

A fenced block that follows the line ``<!-- run -->`` is run. Blocks of one document share an empty folder, in order.
"""

from __future__ import annotations

import argparse
import os
import pkgutil
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from atedm.graph import GRAPHS
from atedm.presets import METHOD_SETTINGS, OLD_SPELLINGS, PRESETS, SETTINGS
from atedm.ranking import RANKINGS
from atedm.recovery import RECOVERIES
from minisdxl.config import SDXL_BASE
from minisdxl.cost import format_flops, summary
from minisdxl.settings import Settings, check_settings
from minisdxl.steps.cost import picture_cost
from minisdxl.steps.plan import WHOLE
from minisdxl.steps.presets import FAST

ROOT = Path(__file__).parents[1]
FILES = (
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").glob("*.md")),
    *(ROOT / "docs").glob("*/README.md"),
    *(ROOT / "weights").glob("*/README.md"),
)
TEXTS = {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for path in FILES}

FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
MARKED = re.compile(r"^<!-- run -->\n```(sh|python)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LOOP = re.compile(r"^for (\w+) in (.+?); do$(.*?)^done$", re.MULTILINE | re.DOTALL)
TREE_LINE = re.compile(r"^    ( *)(\S+)(?: {2,}\S.*)?$", re.MULTILINE)


def code(text: str) -> Iterator[str]:
    """The fenced blocks of a document, its indented lines, and its code spans, each on one line."""
    yield from (LOOP.sub(unroll, block.replace("\\\n", " ")) for _, block in FENCE.findall(text))
    prose = FENCE.sub("", text)
    for line in prose.splitlines():
        if line.startswith("    "):
            yield line
    for span in re.findall(r"`([^`]+)`", prose):
        yield " ".join(span.split())


def unroll(loop: re.Match[str]) -> str:
    """The commands of a shell's ``for``, one after the other."""
    variable, values, body = loop.groups()
    return "".join(body.replace(f"${variable}", value) for value in values.split())


def commands(text: str) -> Iterator[tuple[str, list[str]]]:
    """Module and arguments of every ``python -m``."""
    for piece in code(text):
        for module, rest in re.findall(r"python -m ([\w.]+)([^\n]*)", piece):
            yield module, shlex.split(rest, comments=True)


COMMANDS = sorted(
    {(name, module, tuple(rest)) for name, text in TEXTS.items() for module, rest in commands(text)}, key=str
)


LONG = pytest.mark.timeout(900)  # seconds; a document starts up to ten programs, which all import torch


def run_marked_blocks(document: str, folder: Path) -> None:
    paths = {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    for language, block in MARKED.findall(TEXTS[document]):
        program = [sys.executable, "-c"] if language == "python" else ["bash", "-euo", "pipefail", "-c"]
        ran = subprocess.run([*program, block], cwd=folder, env={**os.environ, **paths}, capture_output=True, text=True)
        assert ran.returncode == 0, f"{document}:\n{block}\n{ran.stdout}{ran.stderr}"


@LONG
@pytest.mark.slow
def test_the_example_of_the_readme_draws_what_it_says(tmp_path: Path) -> None:
    run_marked_blocks("README.md", tmp_path)
    (caption,) = re.findall(r'generate\(\["(.+)"\]\)', TEXTS["README.md"])
    detector = [sys.executable, "-m", "tools.check_shapes", str(tmp_path / "circle.png"), caption]
    found = subprocess.run(detector, cwd=ROOT, capture_output=True, text=True)
    print(found.stdout)
    assert found.returncode == 0, found.stdout + found.stderr


@LONG
@pytest.mark.slow
@pytest.mark.parametrize("document", [name for name in TEXTS if name != "README.md" and MARKED.search(TEXTS[name])])
def test_marked_blocks_run(document: str, tmp_path: Path) -> None:
    run_marked_blocks(document, tmp_path)


def test_every_mark_is_read() -> None:
    for name, text in TEXTS.items():
        assert len(MARKED.findall(text)) == text.count("<!-- run -->"), name
    assert len([name for name in TEXTS if MARKED.search(TEXTS[name])]) >= 5


class Parsed(Exception):
    """Raised in place of the run of a command whose arguments were accepted."""


@pytest.mark.parametrize(("document", "module", "arguments"), COMMANDS)
def test_commands_accept_their_arguments(
    document: str, module: str, arguments: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    def only(parse: Callable[..., Any]) -> Callable[..., Any]:
        def stop(self: argparse.ArgumentParser, *args: Any) -> None:
            parse(self, *args)
            raise Parsed

        return stop

    for name in ("parse_args", "parse_intermixed_args"):
        monkeypatch.setattr(argparse.ArgumentParser, name, only(getattr(argparse.ArgumentParser, name)))
    monkeypatch.setattr(sys, "argv", [module, *arguments])
    assert find_spec(module) is not None, f"{document} has python -m {module}, which is no module"
    if module.startswith(("minisdxl.", "tools.")):
        with pytest.raises(Parsed):
            import_module(module).main()


def test_commands_are_found() -> None:
    assert {"minisdxl.sample", "minisdxl.flops", "tools.bench", "tools.experiments"} <= {each[1] for each in COMMANDS}


@pytest.mark.parametrize("document", TEXTS)
def test_named_files_exist(document: str) -> None:
    for piece in code(TEXTS[document]):
        for path in re.findall(r"(?<![\w/.-])((?:minisdxl|atedm|tools|tests|docs|weights|log)/[\w./-]*\w)", piece):
            places = [folder / path for folder in (ROOT, (ROOT / document).parent)]
            assert "NAME" in path or any(place.exists() for place in places), f"{document} names {path}"


@pytest.mark.parametrize("document", TEXTS)
def test_named_objects_exist(document: str) -> None:
    for piece in code(TEXTS[document]):
        if re.fullmatch(r"(minisdxl|atedm|tools)(\.\w+)+", piece):
            pkgutil.resolve_name(piece)  # raises where there is none


@pytest.mark.parametrize("document", TEXTS)
def test_named_tests_exist(document: str) -> None:
    for piece in code(TEXTS[document]):
        for path, name in re.findall(r"(tests/[\w/]+\.py)::(\w+)", piece):
            assert f"\ndef {name}(" in (ROOT / path).read_text(), f"{document} names {path}::{name}"


@pytest.mark.parametrize("document", TEXTS)
def test_links_lead_somewhere(document: str) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", FENCE.sub("", TEXTS[document])):
        path, _, anchor = link.partition("#")
        if not path.startswith("https://"):
            target = (ROOT / document).parent / path if path else ROOT / document
            assert target.exists(), f"{document} links to {link}"
            assert not anchor or anchor in headings(target.read_text(encoding="utf-8")), f"{document} links to {link}"


def headings(text: str) -> list[str]:
    """The anchors that GitHub gives the headings of a document."""
    titles = re.findall(r"^#+ (.+)$", FENCE.sub("", text), re.MULTILINE)
    return [re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles]


def test_the_readme_is_short() -> None:
    words = len(TEXTS["README.md"].split())
    print(f"README.md has {words} words")
    assert words < 900


def test_the_readme_has_the_flops_that_the_program_counts() -> None:
    table = TEXTS["README.md"].partition("| average of 50 |\n")[2].partition("\n\n")[0]
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[1:]]
    composed = {label: cells for label, *cells in lines if "--fast" in label}
    rows = [(label.split()[0].strip("`"), *cells) for label, *cells in lines if label not in composed]
    assert [name for name, *_ in rows] == ["dense", "at-edm", "at-edm-dagger", "tome", "tome-dsap"]
    assert len(composed) == len(FAST)
    for label, cells in composed.items():
        name, whole = re.fullmatch(r"`--fast (\w+)` \((\d+) of 50 steps\)", label).groups()  # type: ignore[union-attr]
        made = FAST[name]
        settings = Settings(sampling="euler", steps=50, cfg=7.0, prune=made.prune, skip=made.skip, guide=made.guide)
        planner = check_settings(settings, SDXL_BASE).planner
        assert planner is not None
        assert sum(plan.unet == WHOLE for plan in planner.base) == int(whole)
        spent = picture_cost(SDXL_BASE, 128, 128, planner.base, 77, settings.cfg or 0, [1] * 50).flops
        assert cells == ["", "", format_flops(spent / 100)], label  # 50 calls for both branches of guidance
    for name, *cells in rows:
        calls = summary(SDXL_BASE, 128, 128, PRESETS[name].schedule if name in PRESETS else None, 50)
        steady, pruneless, average = (format_flops(calls[kind]) for kind in ("steady", "pruneless", "average"))
        assert cells == [steady, "" if pruneless == steady else pruneless, average], name


def test_presets_and_settings_are_all_documented() -> None:
    text = TEXTS["docs/presets.md"]
    own = [setting for settings in METHOD_SETTINGS.values() for setting in settings]
    names = [*PRESETS, *SETTINGS, *own, *RANKINGS, *RECOVERIES, *GRAPHS, *OLD_SPELLINGS]
    assert [name for name in names if f"`{name}`" not in text] == []
    assert re.findall(r"^\| `([\w-]+)` \|", text.partition("## ")[0], re.MULTILINE) == list(PRESETS)


def test_the_tree_of_files_is_the_one_on_disk() -> None:
    tree = TEXTS["docs/architecture.md"].partition("## Files\n")[2].partition("## ")[0]
    named, folders = set[str](), list[str]()
    for indent, name in TREE_LINE.findall(tree):
        folders[len(indent) // 2 :] = [name] if name.endswith("/") else []
        if name.endswith(".py"):
            named.add("".join([*folders, name]))
    packages = ("atedm", "minisdxl", "tools")
    files = {str(path.relative_to(ROOT)) for package in packages for path in (ROOT / package).rglob("*.py")}
    assert named == {path for path in files if not path.endswith("__init__.py")}
