"""The solver for budgets, against the costs that its answers have; the numbers of facts; what is refused."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from atedm import PRESETS, Schedule, parse_preset
from minisdxl.budget import parse_budget, with_budget
from minisdxl.cli.presets import list_presets
from minisdxl.config import SDXL_BASE, SHAPES, ModelConfig
from minisdxl.cost import count

DENSE = count(SDXL_BASE, 128, 128).total


def cost(config: ModelConfig, size: tuple[int, int], schedule: Schedule, steps: int, measure: str) -> float:
    """FLOPs of the last step, or the mean over all, step by step."""
    sites = list(config.unet.attention_sites())
    plans = [schedule.plan(step, steps, sites) for step in range(steps)]
    calls = [count(config, *size, plan, config.text[0].context_length).total for plan in plans]
    return calls[-1] if measure == "steady" else sum(calls) / steps


def with_ratio(schedule: Schedule, ratio: float) -> Schedule:
    return replace(schedule, method=replace(schedule.method, ratio=ratio))


@pytest.mark.parametrize(
    ("preset", "budget", "measure", "ratio"),
    [
        ("at-edm", "4.1T", "average", 0.70),  # what the paper's "average FLOPs per step" would have needed
        ("at-edm", "4.1T", "steady", 0.625),
        ("at-edm", "4.34T", "average", 0.63),
        ("at-edm", "3.59T", "steady", 0.75),
        ("at-edm", "2.88T", "steady", 0.94),
        ("at-edm-dagger", "4.44T", "steady", 0.63),
        ("at-edm:tau=0", "4.06T", "average", 0.63),
        ("tome", "4.07T", "average", 0.50),
        ("tome", "2.87T", "steady", 0.75),
        ("tome-dsap", "4.57T", "steady", 0.40),
    ],
)
def test_budgets_of_the_paper(preset: str, budget: str, measure: str, ratio: float) -> None:
    found = with_budget(SDXL_BASE, 128, 128, parse_preset(preset), 50, budget, measure)
    print(f"{preset} for {budget} ({measure}): ratio {found.method.ratio}, expected about {ratio}")
    assert found.method.ratio == pytest.approx(ratio, abs=0.008)
    assert found == with_ratio(parse_preset(preset), found.method.ratio)  # nothing else changes


@pytest.mark.parametrize("measure", ["average", "steady"])
@pytest.mark.parametrize(
    ("preset", "budget", "config", "size", "steps"),
    [
        ("at-edm", "61%", SDXL_BASE, (128, 128), 50),
        ("at-edm-dagger", "75%", SDXL_BASE, (128, 96), 50),
        ("at-edm", "90%", SDXL_BASE, (33, 21), 20),
        ("tome", "60.5%", SDXL_BASE, (96, 128), 10),
        ("tome-dsap", "75%", SHAPES, (64, 64), 50),
        ("at-edm:layers=0+1", "85%", SHAPES, (64, 64), 7),
        ("at-edm:place=before-ff,ratios=0.3@mid", "88%", SHAPES, (25, 18), 1),
        ("zeros:early=more", "88%", SHAPES, (64, 64), 20),
    ],
)
def test_the_smallest_ratio_within_the_budget(
    preset: str, budget: str, config: ModelConfig, size: tuple[int, int], steps: int, measure: str
) -> None:
    """From below, and not by more than a token: ratios are finer than one token in all blocks that have as many."""
    found = with_budget(config, *size, parse_preset(preset), steps, budget, measure)
    dense = count(config, *size, context_length=config.text[0].context_length).total
    target = dense * float(budget[:-1]) / 100
    within = cost(config, size, found, steps, measure)
    beyond = cost(config, size, with_ratio(found, found.method.ratio - 2e-5), steps, measure)
    print(f"{preset} for {budget} ({measure}): ratio {found.method.ratio}, {1 - within / target:.3%} below the budget")
    assert within <= target < beyond


def test_average_and_steady() -> None:
    at_edm = PRESETS["at-edm"].schedule
    average, steady = (
        with_budget(SDXL_BASE, 128, 128, at_edm, 50, "4.1T", measure) for measure in ("average", "steady")
    )
    assert with_budget(SDXL_BASE, 128, 128, at_edm, 50, "4.1T") == average
    assert average.method.ratio > steady.method.ratio
    without = [
        with_budget(SDXL_BASE, 128, 128, replace(at_edm, tau=0), 50, "4.1T", measure)
        for measure in ("average", "steady")
    ]
    assert without[0] == without[1] == replace(steady, tau=0)


def test_the_whole_of_dense_reduces_nothing() -> None:
    for preset in ("at-edm", "tome-dsap"):
        assert with_budget(SDXL_BASE, 128, 128, parse_preset(preset), 50, "100%").method.ratio == 0


@pytest.mark.parametrize("measure", ["average", "steady"])
@pytest.mark.parametrize("preset", ["at-edm", "at-edm-dagger", "tome", "tome-dsap"])
def test_out_of_reach_is_refused_with_the_range(preset: str, measure: str) -> None:
    schedule = parse_preset(preset)
    most = 0.75 if "tome" in preset else 0.999
    cheapest, dearest = (cost(SDXL_BASE, (128, 128), with_ratio(schedule, r), 50, measure) for r in (most, 0.0))
    assert dearest == DENSE
    for budget in ("1T", "6.77T", "0%", "999999999999T"):
        with pytest.raises(ValueError, match=f"budget {re.escape(budget)} is out of reach of {preset}: its ") as error:
            with_budget(SDXL_BASE, 128, 128, schedule, 50, budget, measure)
    reachable = re.search(rf"its {measure} U-Net call costs ([0-9.]+ T) to 6\.76 T$", str(error.value))
    assert reachable is not None
    lowest, highest = reachable[1], "6.76 T"  # as people will type them
    assert cheapest <= parse_budget(lowest, DENSE) < cheapest + 1e10
    found = [with_budget(SDXL_BASE, 128, 128, schedule, 50, end, measure).method.ratio for end in (lowest, highest)]
    assert most - 0.03 < found[0] <= most
    assert 0 < found[1] < 1e-3


def test_units() -> None:
    for text, flops in {
        "4.1T": 4.1e12,
        "4100G": 4.1e12,
        "500 M": 5e8,
        ".5T": 5e11,
        "61%": 0.61e12,
        "100 %": 1e12,
    }.items():
        assert parse_budget(text, 1e12) == pytest.approx(flops, rel=1e-12)
    assert parse_budget("100%", DENSE) == DENSE


@pytest.mark.parametrize(
    "text", ["", "4.1", "T", "%", "4,1T", "-4T", "4.1TB", "4.1t", "1e12", "4..1T", "٤T", "nanT", "4.1T\n"]
)
def test_unreadable_budgets(text: str) -> None:
    with pytest.raises(
        ValueError, match=r"^budget is .*, expected FLOPs of one U-Net call, as 4\.1T, or a share of dense"
    ):
        parse_budget(text, 1e12)


def test_unknown_measure() -> None:
    with pytest.raises(ValueError, match="budget measure is 'median', expected one of average, steady"):
        with_budget(SHAPES, 64, 64, PRESETS["at-edm"].schedule, 50, "90%", "median")


def test_list_of_presets() -> None:
    head, *lines = list_presets(SDXL_BASE, 50).splitlines()
    assert [line.split()[0] for line in lines] == list(PRESETS)
    shares = {line.split()[0]: [float(word.rstrip("%")) for word in line.split()[1:3]] for line in lines}
    for name, flops in {"at-edm": (4.06, 4.34), "tome": (4.07, 4.07)}.items():
        assert shares[name] == pytest.approx([100 * n / 6.76 for n in flops], rel=5e-3)
    assert "sdxl-base, 50 steps" in head
    assert all(preset.about in line for preset, line in zip(PRESETS.values(), lines, strict=True))
    assert lines[0].endswith("budgets at-edm:a, at-edm:b, at-edm:c, at-edm:d")
