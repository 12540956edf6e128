"""The pictures that options and prompt files ask for: names, seeds, batches, and what does not go together."""

from __future__ import annotations

import argparse
import json
import os
import re
from pathlib import Path
from typing import Any

import pytest

from minisdxl.cli.jobs import Job, batches, find_jobs
from minisdxl.cli.previews import preview_path
from minisdxl.config import SHAPES

WIDE = "\N{DESERET CAPITAL LETTER LONG I}" * 80  # a letter of four bytes


def options(*prompts: str, **changes: Any) -> argparse.Namespace:
    """The options of ``minisdxl.sample``, settled."""
    defaults: dict[str, Any] = {
        "prompts": list(prompts),
        "file": None,
        "images_per_prompt": 1,
        "seed": 0,
        "negative": "",
        "out": Path("out"),
        "compare": False,
        "prune": None,
        "skip": None,
        "guide": None,
        "refiner_start": None,
        "preview": None,
        "budget": None,
        "strength": None,
        "sampling": "euler",
        "steps": 4,
        "cfg": 3.0,
        "size": (64, 64),
    }
    return argparse.Namespace(**{**defaults, **changes})


def jobs(*prompts: str, **changes: Any) -> list[Job]:
    return find_jobs(options(*prompts, **changes), SHAPES)


def from_file(folder: Path, text: str, **changes: Any) -> list[Job]:
    path = folder / "p.txt"
    path.write_text(text)
    return jobs(file=path, **changes)


def test_prompts_of_a_file_have_their_own_settings(tmp_path: Path) -> None:
    made = from_file(tmp_path, "a\nb --w 128 --d 9\nc --h 32 --l 1\nd --s 2 --n ugly")
    assert [(job.size, job.steps, job.cfg, job.seed, job.negative) for job in made] == [
        ((64, 64), 4, 3.0, 0, ""),
        ((128, 64), 4, 3.0, 9, ""),
        ((64, 32), 4, 1.0, 2, ""),
        ((64, 64), 2, 3.0, 3, "ugly"),
    ]


@pytest.mark.parametrize(
    ("line", "changes", "message"),
    [
        ("b --w 100", {}, "picture width is 100 pixels, expected a multiple of 8"),
        ("b --h 100000", {}, "picture height is 100000 pixels"),
        ("b --s 0", {}, "number of sampling steps is 0, expected 1 to 1000"),
        ("b --s 60", {"sampling": "lcm"}, "steps is 60"),
        ("b --s 1", {"strength": 0.5}, "strength 0.5 leaves none of 1 steps"),
        ("b --s 9", {"budget": "60%"}, "--budget is 60%, which is for pictures of one size and number of steps"),
    ],
)
def test_settings_that_do_not_fit_are_named_with_their_line(
    tmp_path: Path, line: str, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=rf"p\.txt, line 2: .*{re.escape(message)}"):
        from_file(tmp_path, f"a\n{line}", **changes)


def test_a_batch_shares_all_but_the_prompt(tmp_path: Path) -> None:
    made = from_file(tmp_path, "a\nb\nc --w 128\nd --w 128\ne --s 2\nf --s 2 --l 1\ng --s 2 --l 1 --n x\nh")
    groups = list(batches(made, 4, lambda job: 77))
    assert ["".join(job.prompt for job in group) for group in groups] == ["ab", "cd", "e", "f", "g", "h"]
    assert all(len({job.shared for job in group}) == 1 for group in groups)


def test_a_batch_has_one_context_length(tmp_path: Path) -> None:
    made = from_file(tmp_path, "a\nb\ncc\ndd\ne")
    groups = list(batches(made, 4, lambda job: 77 * len(job.prompt)))
    assert ["".join(job.prompt for job in group) for group in groups] == ["ab", "ccdd", "e"]


def test_a_random_seed_is_drawn_once_and_counted_up(tmp_path: Path) -> None:
    drawn = [jobs("a", "b", seed=-1, images_per_prompt=2) for _ in range(8)]
    assert all([job.seed - made[0].seed for job in made] == [0, 1, 2, 3] for made in drawn)
    assert len({made[0].seed for made in drawn}) == 8
    assert all(0 <= made[0].seed < 2**32 for made in drawn)
    assert len({job.seed for job in from_file(tmp_path, "a --d -1\n" * 8)}) == 8


def test_seeds_have_64_bits() -> None:
    assert [job.seed for job in jobs("a", "b", seed=2**64 - 2)] == [2**64 - 2, 2**64 - 1]
    with pytest.raises(ValueError, match="seed is 18446744073709551616, expected 0 to 18446744073709551615"):
        jobs("a", "b", seed=2**64 - 1)
    with pytest.raises(ValueError, match="seed is -2"):
        jobs("a", seed=-2)


def test_an_empty_prompt_is_a_prompt() -> None:
    (job,) = jobs("")
    assert (job.prompt, job.target.name) == ("", "0-untitled-dense.png")
    with pytest.raises(ValueError, match="there is no prompt"):
        jobs()


@pytest.mark.parametrize("name", ["pictures.v2", "tmp.Xq3Zb", "run.png", "2024.01"])
def test_a_folder_may_have_a_dot_in_its_name(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    made = jobs("a", "b", out=tmp_path / name)
    assert [job.target for job in made] == [
        tmp_path / name / f"{seed}-{word}-dense.png" for seed, word in ((0, "a"), (1, "b"))
    ]


def test_out_is_a_file_by_its_suffix(tmp_path: Path) -> None:
    assert jobs("a", out=tmp_path / "x.PNG")[0].target == tmp_path / "x.PNG"
    assert jobs("a", out=tmp_path / "new.v2")[0].target.parent == tmp_path / "new.v2"
    for suffix in ("jpeg", "jpg", "webp", "GIF", "tiff", "avif"):
        with pytest.raises(ValueError, match=rf"--out is .*x\.{suffix}, expected a \.png file or a folder"):
            jobs("a", out=tmp_path / f"x.{suffix}")


@pytest.mark.parametrize("prompt", [WIDE, "a" * 500, "wörter " * 80, "🙂" * 80, "漢" * 300], ids=ascii)
def test_names_fit_into_the_file_system(tmp_path: Path, prompt: str) -> None:
    changes: dict[str, Any] = {"seed": 2**64 - 12, "prune": "at-edm:rho=0.5," * 20, "out": tmp_path}
    for target in (job.target for job in jobs(*[prompt] * 12, **changes)):
        target.touch()
        longest = preview_path(target.with_stem(f"{target.stem}-11-pruned"), 1000)
        longest.touch()
        assert len(os.fsencode(longest.name)) <= 255
    assert len(list(tmp_path.iterdir())) == 24


@pytest.mark.parametrize(("letters", "changes"), [(252, {}), (252, {"preview": 2}), (240, {"preview": 2})])
def test_a_name_that_is_too_long_is_refused_before_sampling(
    tmp_path: Path, letters: int, changes: dict[str, Any]
) -> None:
    out = tmp_path / "new" / f"{'x' * letters}.png"
    with pytest.raises(ValueError, match=r"a name of 2[5-7]\d bytes.*, expected at most 255"):
        jobs("a", out=out, **changes)
    assert jobs("a", out=out.with_name("x" * 230 + ".png"))


def test_web_ui_syntax_is_named_once(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"drawn as words: \{red\|blue\}, <lora:x:1>, AND$") as caught:
        jobs("a {red|blue} cat", "a (cat:1.3) AND a dog", negative="<lora:x:1>", images_per_prompt=3)
    assert len(caught) == 1


def test_json_prompts_go_the_same_way(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text(json.dumps({"prompt": "a", "width": 128, "steps": 2.0, "cfg": "1.5", "seed": -1}))
    (job,) = jobs(file=path)
    assert (job.size, job.steps, job.cfg) == ((128, 64), 2, 1.5)
