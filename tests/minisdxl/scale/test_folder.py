"""The folder of a run as its state: what is done, what is refused, and what is left at the end."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from PIL import Image

from minisdxl.cli.picture_files import picture_bytes
from minisdxl.scale.folder import FAILURES, MANIFEST, PICTURES, RESULTS, RunFolder, whole_record, write_whole
from minisdxl.scale.store import Store

SETTINGS = {"steps": 2, "prune": None, "sha256": "ab"}
RECORDS: dict[str, dict[str, Any]] = {f"{seed}.png": {"prompt": "a fox — Füchse", "seed": seed} for seed in range(4)}


@pytest.fixture(params=["local", "memory"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[RunFolder]:
    url = str(tmp_path / "run") if request.param == "local" else "memory://run"
    yield RunFolder(Store(url), SETTINGS, RECORDS)
    MemoryFileSystem.store.clear()


def picture(name: str, **changes: Any) -> bytes:
    pixels = np.random.default_rng(RECORDS[name]["seed"]).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    return picture_bytes(Image.fromarray(pixels), {**SETTINGS, **RECORDS[name], **changes})


def write(folder: RunFolder, name: str) -> None:
    write_whole(folder.store, {"path": name, **RECORDS[name], "seconds": 1.5, "host": "here"}, picture(name))


def test_what_is_whole_is_done_and_stays_done(folder: RunFolder) -> None:
    manifest = folder.begin({"torch": "2"})
    assert folder.done() == set()
    for name in ("2.png", "0.png"):
        write(folder, name)
    assert folder.begin({"torch": "3"}) == manifest  # the same command again
    assert folder.done() == {"0.png", "2.png"}
    folder.finish([{"path": "1.png", "error": "ArithmeticError"}])
    assert folder.store.names() == {MANIFEST, PICTURES, RESULTS, FAILURES, "0.png", "2.png"}
    for name in ("3.png", "1.png"):
        write(folder, name)
    folder.finish([])
    assert folder.store.names() == {MANIFEST, PICTURES, RESULTS, *RECORDS}
    rows = [json.loads(line) for line in folder.store.read(RESULTS).splitlines()]
    assert [row["path"] for row in rows] == list(RECORDS)  # in the order of the run
    assert {row["host"] for row in rows} == {"here"}
    for row in rows:
        assert row["sha256"] == hashlib.sha256(folder.store.read(row["path"])).hexdigest()


def test_a_row_without_its_picture_is_no_result(folder: RunFolder) -> None:
    folder.begin({})
    write(folder, "1.png")
    write(folder, "2.png")
    folder.store.remove(["2.png"])  # killed between the two
    folder.finish([])
    assert [json.loads(line)["path"] for line in folder.store.read(RESULTS).splitlines()] == ["1.png"]


def test_a_cut_picture_is_not_done(folder: RunFolder) -> None:
    folder.begin({})
    whole = picture("1.png")
    folder.store.write("1.png", whole[:-1])
    assert folder.done() == set()
    folder.store.write("1.png", whole)
    assert folder.done() == {"1.png"}


def test_no_cut_and_no_flipped_bit_goes_unseen() -> None:
    whole, rng = picture("1.png"), random.Random(0)
    record = whole_record(whole)
    assert record == {**SETTINGS, **RECORDS["1.png"]}
    assert [end for end in range(len(whole)) if whole_record(whole[:end]) is not None] == []
    for _ in range(300):
        damaged = bytearray(whole)
        damaged[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
        assert whole_record(bytes(damaged)) is None


def test_other_settings_are_refused_by_name(folder: RunFolder) -> None:
    folder.begin({})
    other = RunFolder(folder.store, {**SETTINGS, "steps": 3}, RECORDS)
    with pytest.raises(ValueError, match=r"manifest.json in .* has steps 2, not 3: expected the same settings"):
        other.begin({})
    other = RunFolder(folder.store, {**SETTINGS, "deepcache": 3}, RECORDS)  # an option that came later
    with pytest.raises(ValueError, match="has deepcache unset, not 3"):
        other.begin({})


def test_other_prompts_are_refused_by_name(folder: RunFolder) -> None:
    folder.begin({})
    write(folder, "0.png")
    changed = {**RECORDS, "2.png": {"prompt": "a wolf", "seed": 2}}
    with pytest.raises(ValueError, match=r"picture 3 in .* has prompt 'a fox — Füchse', not 'a wolf'"):
        RunFolder(folder.store, SETTINGS, changed).begin({})
    fewer = {name: RECORDS[name] for name in list(RECORDS)[:3]}
    with pytest.raises(ValueError, match="was begun with 4 pictures, not 3"):
        RunFolder(folder.store, SETTINGS, fewer).begin({})
    assert folder.done() == {"0.png"}  # nothing is lost


def test_pictures_of_other_settings_are_refused(folder: RunFolder) -> None:
    folder.begin({})
    folder.store.write("3.png", picture("3.png", steps=50))
    with pytest.raises(ValueError, match=r"3\.png in .* has steps 50, not 2"):
        folder.done()


def test_a_damaged_manifest_is_named(folder: RunFolder) -> None:
    folder.begin({})
    folder.store.write(MANIFEST, b"{")
    with pytest.raises(ValueError, match=r"manifest\.json in .* is damaged"):
        folder.begin({})
