"""The wheel: what is in it, and that it works from an empty folder without the repository."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from PIL import Image

import minisdxl

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("wheel")]  # one process builds it, for all tests
ROOT = Path(__file__).parents[1]
PROMPT = "a small red circle on a white background"
DATA = {
    "downloads.json",
    "clip/LICENSE",
    "clip/README.md",
    "clip/merges.txt",
    "shapes/shapes.safetensors",
    "shapes/tokenizer/merges.txt",
    "shapes/tokenizer/vocab.json",
}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # Built from a copy: a build writes into its source, and takes over what an earlier one left there.
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("minisdxl", "atedm", "weights", "tools", "tests"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    pip("wheel", "--no-build-isolation", "--wheel-dir", target, source)
    (built,) = target.iterdir()
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel's contents alone."""
    folder = tmp_path_factory.mktemp("installed")
    pip("install", "--target", folder, wheel)
    return folder


def pip(command: str, *arguments: object) -> None:
    options = ["--quiet", "--no-deps", "--no-index"]
    result = subprocess.run(
        [sys.executable, "-m", "pip", command, *options, *map(str, arguments)], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr


def run(installed: Path, folder: Path, *arguments: object) -> str:
    """What Python prints in ``folder``, with the wheel before everything else that is installed."""
    result = subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(installed)},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_it_holds_both_packages_whole_with_their_data_and_nothing_else(wheel: Path) -> None:
    about = f"minisdxl-{minisdxl.__version__}.dist-info"
    with zipfile.ZipFile(wheel) as archive:
        found = {name for name in archive.namelist() if not name.startswith(f"{about}/")}
        metadata = archive.read(f"{about}/METADATA").decode()
    code = {path.relative_to(ROOT).as_posix() for name in ("minisdxl", "atedm") for path in (ROOT / name).rglob("*.py")}
    page = {f"minisdxl/inspector/{name}" for name in ("page.html", "page.css", "data.js", "page.js")}
    assert found == code | page | {f"minisdxl/weights/{name}" for name in DATA | {"__init__.py"}}
    assert "License-Expression: MIT\n" in metadata
    assert "License-File: LICENSE\n" in metadata and "License-File: weights/clip/LICENSE\n" in metadata


def test_python_imports_it_and_loads_the_bundled_model(installed: Path, tmp_path: Path) -> None:
    code = (
        "import atedm, minisdxl, minisdxl.weights; "
        "print(atedm.__file__, minisdxl.__file__, minisdxl.weights.__file__, sep='\\n'); "
        "print(minisdxl.__version__, minisdxl.load('shapes').config.name)"
    )
    *files, last = run(installed, tmp_path, "-c", code).splitlines()
    assert files == [str(installed / name / "__init__.py") for name in ("atedm", "minisdxl", "minisdxl/weights")]
    assert last == f"{minisdxl.__version__} shapes"


def test_sample_draws_a_picture(installed: Path, tmp_path: Path) -> None:
    said = run(installed, tmp_path, "-m", "minisdxl.sample", PROMPT, "--steps", 2)
    (picture,) = (tmp_path / "out").iterdir()
    assert said.startswith(f"{picture.relative_to(tmp_path)}  seed 0  ")
    with Image.open(picture) as image:
        assert image.size == (256, 256)


def test_inspect_writes_a_page(installed: Path, tmp_path: Path) -> None:
    said = run(installed, tmp_path, "-m", "minisdxl.inspect", PROMPT, "--steps", 1, "--size", "64x64")
    assert said.startswith("inside.html  seed 0  ")
    assert (tmp_path / "inside.html").read_text(encoding="utf-8").startswith("<!doctype html>")


def test_flops_counts(installed: Path, tmp_path: Path) -> None:
    assert "6.76 T" in run(installed, tmp_path, "-m", "minisdxl.flops")


def test_convert_writes_a_diffusers_folder(installed: Path, tmp_path: Path) -> None:
    run(installed, tmp_path, "-m", "minisdxl.convert", "shapes", "folder")
    assert json.loads((tmp_path / "folder" / "model_index.json").read_text())["_name_or_path"] == "shapes"
    merges = (tmp_path / "folder" / "tokenizer_2" / "merges.txt").read_bytes()
    assert merges == (ROOT / "weights" / "shapes" / "tokenizer" / "merges.txt").read_bytes()


def test_download_lists_what_there_is(installed: Path, tmp_path: Path) -> None:
    assert run(installed, tmp_path, "-m", "minisdxl.download", "list").startswith("sdxl-base ")
