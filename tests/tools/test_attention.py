"""Statistics of attention, computed again from the weights of the maps, and what the command leaves."""

from __future__ import annotations

import csv
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from minisdxl.pipeline import SDXL
from minisdxl.transformer import AttentionBlock
from tests.atedm.reference import algorithm_1, root_mean_square
from tools.attention import main, score_variance, table
from tools.evaluation.attention_maps import attention_spread
from tools.evaluation.pictures import drawn_captions

SETTINGS = {
    "prompts": ["a small red circle on a white background", "a big blue square on a black background"],
    "steps": 2,
    "cfg": 4.0,
    "seed": 0,
    "size": (64, 64),
}


@pytest.fixture(autouse=True)
def loaded_once(monkeypatch: pytest.MonkeyPatch, load_once: Callable[..., SDXL]) -> None:
    monkeypatch.setattr("tools.attention.load", load_once)


def test_variance_of_scores_equals_brute_force(shapes: SDXL) -> None:
    expected: dict[str, list[float]] = defaultdict(list)

    def watch(name: str, output: Any) -> None:
        query, key, scale, _ = output[1]
        maps = (query.double() @ key.double().mT * scale).softmax(dim=-1).tolist()
        scores = [np.array(root_mean_square([algorithm_1(head)[0] for head in each])) for each in maps]
        expected[name].append(float(np.mean([(each / each.mean()).var() for each in scores])))

    handles = [
        block.transformer_blocks[0]
        .get_submodule("attn1")
        .register_forward_hook(lambda *call, name=block.name: watch(name, call[-1]))
        for block in shapes.unet.modules()
        if isinstance(block, AttentionBlock)
    ]
    shapes.generate(**SETTINGS)  # type: ignore[arg-type]
    for handle in handles:
        handle.remove()
    found = score_variance(shapes, SETTINGS)
    assert list(expected) == [site.name for site in shapes.config.unet.attention_sites()]
    truth = np.array(list(expected.values()))
    error = np.abs(found / truth - 1).max()
    print(f"variances {truth.min():.4f} to {truth.max():.4f}, largest relative error {error:.1e}")
    assert found.shape == (7, 2)
    assert error < 1e-3


def test_table_shows_moments_and_growth() -> None:
    measured = np.ones((3, 2, 4)) * np.array([1.0, 2.0, 3.0, 5.0])
    head, _, *lines = table(["down.1.0", "mid"], measured).splitlines()
    assert head.count("late / early") == 3
    assert [line.split(" | ")[0] for line in lines] == ["| down.1.0", "| mid", "| mean"]
    assert lines[0].split(" | ")[1:5] == ["1", "3", "5", f"{8 / 3:.2f}"]


def test_command_leaves_numbers_and_a_plot(shapes: SDXL, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "new" / "attention.png"
    main(["--captions", "1", "--steps", "2", "--size", "64x64", "--out", str(out)])
    assert capsys.readouterr().out.splitlines()[-1] == str(out)
    with out.with_suffix(".csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 7 * 2
    settings = {**SETTINGS, "prompts": list(drawn_captions(1).texts)}
    spread = attention_spread(shapes, settings)
    for measure, values in zip(("map_variance", "entropy"), spread, strict=True):
        assert [float(row[measure]) for row in rows] == values.flatten().tolist()
    assert np.asarray(Image.open(out).convert("L")).std() > 5


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--captions", "0"], "--captions is 0"),
        (["--out", "x.pdf"], "x.pdf"),
        (["--weights", "nowhere.safetensors"], "nowhere.safetensors"),
        (["--size", "16x16", "--steps", "1", "--captions", "1"], "1 token"),
    ],
)
def test_bad_input_is_one_line(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    named: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    error = capsys.readouterr().err
    print(error, end="")
    assert (stop.value.code, error.count("\n")) == (2, 1)
    assert named in error
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
