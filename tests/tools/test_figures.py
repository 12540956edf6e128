"""What the figures show, computed again by other means, and the files that the commands leave."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image
from torch import Tensor

import atedm.pruning
from atedm.presets import parse_preset
from atedm.ranking import kept_count, top_k
from minisdxl.config import SDXL_BASE, SHAPES
from minisdxl.cost import Kind, count, summary
from minisdxl.fast import cpu
from minisdxl.pipeline import SDXL
from tools.evaluation.attention_maps import Settings, attention_spread
from tools.figures import (
    BOUNDARIES,
    TAUS,
    compare,
    darkened,
    flops_by_block,
    kept_tokens,
    main,
    tau_schedules,
)

QUICK = ("--steps", "2", "--size", "64x64")
COMMANDS = (
    ("flops",),
    ("flops", "--prune", "at-edm:a", "--size", "1536x640"),
    ("flops", "--model", "shapes", "--prune", "tome"),
    ("variance", *QUICK),
    ("masks", "--steps", "3", "--size", "72x40"),
    ("recoveries", *QUICK, "--prompt", "a circle that costs $5 or $6, " + "far, " * 50),
    ("tau", *QUICK, "--budget", "90%"),
)


@pytest.fixture(autouse=True)
def loaded_once(monkeypatch: pytest.MonkeyPatch, load_once: Callable[..., SDXL]) -> None:
    monkeypatch.setattr("tools.figures.load", load_once)


def settings(**changes: Any) -> Settings:
    prompt = "a small red circle above a big blue square on a white background"
    return {"prompts": [prompt], "steps": 2, "cfg": 3.0, "seed": 0, "size": (64, 64), **changes}


def hooks(shapes: SDXL) -> int:
    return sum(len(module._forward_hooks) for module in shapes.unet.modules())


# Figure 2


@pytest.mark.parametrize("prune", [None, "at-edm", "tome"])
def test_rows_of_blocks_add_up_to_the_call(prune: str | None) -> None:
    schedule = parse_preset(prune) if prune else None
    calls = summary(SDXL_BASE, 128, 128, schedule, 50)
    rows = flops_by_block(SDXL_BASE, calls["blocks"])
    assert sum(row.total() for row in rows.values()) == calls["steady"]
    assert all(row.total() > 0 and Kind.RANKING not in row for row in rows.values())
    names = [site.name for site in SDXL_BASE.unet.attention_sites()]
    assert list(rows)[:11] == names
    if prune is None:
        attention = sum(rows[name].total() for name in names)
        print(f"attention blocks {attention:.4g} FLOPs, the paper's breakdown counted by hand 5.14e12")
        assert attention == pytest.approx(5.14e12, rel=0.005)


# Figure 5


def spread_by_hand(query: Tensor, key: Tensor, scale: float) -> tuple[float, float]:
    """Variance of N A over each map, and entropy over ln N of each row: means over (B, heads, N, d), by loops."""
    variances, entropies = [], []
    for q, k in zip(query.flatten(0, 1).double().numpy(), key.flatten(0, 1).double().numpy(), strict=True):
        entries = []
        for row in q:
            weights = [math.exp(scale * float(row @ other)) for other in k]
            shares = [weight / math.fsum(weights) for weight in weights]
            entries += [len(k) * share for share in shares]
            entropies.append(-math.fsum(share * math.log(share) for share in shares) / math.log(len(k)))
        mean = math.fsum(entries) / len(entries)
        variances.append(math.fsum((entry - mean) ** 2 for entry in entries) / len(entries))
    return math.fsum(variances) / len(variances), math.fsum(entropies) / len(entropies)


def test_spread_of_attention_equals_brute_force(shapes: SDXL, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    fused = cpu.attention

    def spy(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor | None]:
        if q.shape == k.shape:  # not of texts
            seen.append(spread_by_hand(q, k, scale))
        return fused(q, k, v, scale)

    monkeypatch.setattr(cpu, "attention", spy)
    found = attention_spread(shapes, settings())
    sites = list(shapes.config.unet.attention_sites())
    assert found.shape == (2, len(sites), 2)
    maps = iter(seen)
    for step in range(2):
        for block, site in enumerate(sites):
            layers = [next(maps) for _ in range(site.depth)]
            expected = np.mean(layers, axis=0)
            error = np.abs(found[:, block, step] / expected - 1).max()
            print(f"step {step} {site.name}: variance {expected[0]:.4f}, relative error at most {error:.1e}")
            assert error < 1e-5
    assert next(maps, None) is None


def test_hooks_are_gone_afterwards_also_after_an_error(shapes: SDXL) -> None:
    attention_spread(shapes, settings(steps=1))
    assert hooks(shapes) == 0
    with pytest.raises(ValueError, match=r"down\.2\.0 has 1 token"):
        attention_spread(shapes, settings(size=(16, 16)))
    assert hooks(shapes) == 0


def test_the_paper_places_each_tau_in_a_region_of_its_own() -> None:
    edges = [0.0, *BOUNDARIES, 50.0]
    for (start, end), tau in zip(pairwise(edges), TAUS[1:], strict=True):
        assert start < tau < end


# Figure 8


@pytest.mark.parametrize("preset", ["at-edm:tau=25", "ca-wpr:rho=0.4,tau=25", "at-edm:layers=0+1,tau=25"])
@pytest.mark.parametrize("cfg", [1.0, 3.0])
def test_masks_show_what_was_kept(shapes: SDXL, monkeypatch: pytest.MonkeyPatch, preset: str, cfg: float) -> None:
    chosen: list[Tensor] = []

    def spy(scores: Tensor, k: int) -> Tensor:
        chosen.append(top_k(scores, k)[-1])
        return top_k(scores, k)

    monkeypatch.setattr(atedm.pruning, "top_k", spy)
    schedule = parse_preset(preset)
    image, masks = kept_tokens(shapes, settings(cfg=cfg), schedule)
    assert image.size == (64, 64)
    sites, picks = list(shapes.config.unet.attention_sites()), iter(chosen)
    for step in range(2):
        plan = schedule.plan(step, 2, sites)
        for site in sites:
            side = 16 // 2**site.level
            expected = torch.arange(side * side)
            for layer in range(site.depth) if site.name in plan else ():
                pruning = plan[site.name].layer(layer).pruning
                if pruning is not None:
                    kept = kept_count(len(expected), pruning.ratio)
                    expected = expected[next(picks)]
                    assert len(expected) == kept
            mask = masks[site.name][step]
            assert mask.shape == (side, side)
            assert np.flatnonzero(mask).tolist() == expected.tolist()
    assert next(picks, None) is None
    assert hooks(shapes) == 0


def test_darkened_cells_follow_the_grid() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (10, 14, 3), dtype=np.uint8)
    kept = np.array([[True, False, True, False], [False, False, True, True], [True, True, False, False]])
    found = darkened(Image.fromarray(pixels), kept, 4)
    for y in range(10):
        for x in range(14):
            same = found[y, x].tolist() == pixels[y, x].tolist()
            assert same == kept[y // 4, x // 4]
            if not same:
                assert found[y, x].sum() <= pixels[y, x].sum() // 4 + 48 + 24 + 72


# Figures 9 and 10


def test_pictures_and_distances_are_those_of_separate_runs(shapes: SDXL) -> None:
    schedules = {"nothing": parse_preset("at-edm:rho=0"), "zeros": parse_preset("zeros")}
    made = compare(shapes, settings(), schedules)
    assert list(made) == ["dense", "nothing", "zeros"]
    assert made["dense"][1] == made["nothing"][1] == 0
    latents: dict[str | None, Tensor] = {}
    for prune in (None, "zeros"):
        images = shapes.generate(**settings(), prune=prune, on_step=lambda _, x, p=prune: latents.update({p: x}))  # type: ignore[misc]
        assert images[0].tobytes() == made[prune or "dense"][0].tobytes()
    squares = [float(a - b) ** 2 for a, b in zip(latents[None].flatten(), latents["zeros"].flatten(), strict=True)]
    assert made["zeros"][1] == pytest.approx(math.fsum(squares) / len(squares), rel=1e-5)
    assert made["zeros"][1] > 0


def test_every_tau_meets_the_same_budget_with_the_smallest_ratio() -> None:
    steps, side = 50, 64
    schedules = tau_schedules(SHAPES, parse_preset("at-edm"), settings(steps=steps, size=(256, 256)), "85%")
    assert tuple(schedule.tau for schedule in schedules) == TAUS
    sites, budget = list(SHAPES.unet.attention_sites()), 0.85 * count(SHAPES, side, side).total
    for schedule in schedules:
        plans = [schedule.plan(step, steps, sites) for step in range(steps)]
        costs = {plan: count(SHAPES, side, side, plan).total for plan in set(plans)}
        share = sum(costs[plan] for plan in plans) / steps / budget
        print(f"tau {schedule.tau}: rho {schedule.method.ratio:.3f}, {share:.3%} of the budget")
        assert 0.995 < share <= 1
    ratios = [schedule.method.ratio for schedule in schedules]
    assert ratios == sorted(set(ratios))  # the fewer steps prune everywhere, the more each must


# The commands


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Figure, dict[Text, None]]]:
    """Every figure that is saved, with the texts in it that are really drawn."""
    figures: list[tuple[Figure, dict[Text, None]]] = []
    save, draw = Figure.savefig, Text.draw

    def spy_on_text(self: Text, *arguments: Any, **options: Any) -> None:
        if figures and self.get_visible() and self.get_text().strip():
            figures[-1][1][self] = None
        draw(self, *arguments, **options)

    def spy_on_figure(self: Figure, *arguments: Any, **options: Any) -> None:
        figures.append((self, {}))
        save(self, *arguments, **options)

    monkeypatch.setattr(Text, "draw", spy_on_text)
    monkeypatch.setattr(Figure, "savefig", spy_on_figure)
    return figures


@pytest.mark.parametrize("arguments", COMMANDS, ids=lambda arguments: "-".join(arguments)[:40])
def test_command_draws_a_readable_figure(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    drawn: list[tuple[Figure, dict[Text, None]]],
    arguments: tuple[str, ...],
) -> None:
    file = tmp_path / "new" / "figure.png"
    main([*arguments, "--out", str(file)])
    assert capsys.readouterr().out.splitlines()[-1] == str(file)
    assert list(file.parent.iterdir()) == [file]
    image = Image.open(file)
    assert image.width == 1200
    assert 200 <= image.height <= 2000
    assert np.asarray(image.convert("L")).std() > 10

    [(figure, texts)] = drawn
    boxes = {text: text.get_window_extent() for text in texts}
    page = figure.bbox.padded(1)
    for text, box in boxes.items():
        assert page.x0 <= box.x0 and box.x1 <= page.x1 and page.y0 <= box.y0 and box.y1 <= page.y1, text.get_text()
        assert float(text.get_fontsize()) >= 7, text.get_text()
    for (first, box), (second, other) in combinations(boxes.items(), 2):
        assert not box.padded(-1).overlaps(other.padded(-1)), (first.get_text(), second.get_text())


@pytest.mark.parametrize("arguments", [("flops", "--prune"), ("variance", *QUICK)], ids=lambda a: a[0])
def test_same_arguments_same_file(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    files = [tmp_path / name for name in ("one.png", "two.png")]
    for file in files:
        main([*arguments, "--out", str(file)])
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ([], "FIGURE"),
        (["pie"], "pie"),
        (["flops", "--model", "sd-1"], "sd-1"),
        (["flops", "--prune", "nonesuch"], "nonesuch"),
        (["flops", "--steps", "0"], "steps is 0"),
        (["variance", "--size", "100x64"], "100"),
        (["variance", "--size", "16x16", "--steps", "1"], "1 token"),
        (["variance", *QUICK, "--steps", "1001"], "1001"),
        (["variance", *QUICK, "--prune", "at-edm"], "--prune"),
        (["masks", *QUICK, "--prune", "tome"], "ranking=gwpr"),
        (["masks", *QUICK, "--device", "abacus"], "abacus"),
        (["recoveries", *QUICK, "--prune", "at-edm:recovery=zeros"], "twice"),
        (["recoveries", "--weights", "nowhere.safetensors"], "nowhere.safetensors"),
        (["tau", *QUICK, "--budget", "10%"], "out of reach"),
        (["tau", *QUICK, "--budget", "cheap"], "cheap"),
        (["tau", *QUICK, "--out", "figure.pdf"], "figure.pdf"),
        (["flops", "--out", "folder.png"], "folder.png"),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else "",
)
def test_bad_input_is_one_line(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    named: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    error = capsys.readouterr().err
    print(error, end="")
    assert error.count("\n") == 1
    assert named in error
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_interrupted_command_leaves_no_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(SDXL, "generate", interrupt)
    with pytest.raises(SystemExit) as stop:
        main(["recoveries", "--out", str(tmp_path / "figure.png")])
    assert stop.value.code == 130
    assert "no partial figure" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
