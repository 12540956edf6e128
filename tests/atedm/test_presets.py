"""The presets, their settings as people write them, and one clear line for each way to write them wrong."""

from __future__ import annotations

from dataclasses import replace

import pytest

from atedm import PRESETS, Merging, Pruning, Schedule, SiTo, ToDo, ToMA, parse_preset
from atedm.presets import current_spelling

# What table 1, sections 4.1 and 4.3, and figures 8 and 9 compare, written out.
PAPER = {
    "at-edm": Schedule("at-edm", Pruning(0.63, "gwpr", recovery="similarity"), tau=15, early="less"),
    "at-edm-dagger": Schedule("at-edm-dagger", Pruning(0.63), tau=15, spare_largest=True),
    "tome": Schedule("tome", Merging(0.5, True, True, True, stride=(2, 2)), tau=0),
    "tome-dsap": Schedule("tome-dsap", Merging(0.5), tau=15),
    "ca-wpr": Schedule("ca-wpr", Pruning(0.63, "ca-wpr"), tau=15),
    "zeros": Schedule("zeros", Pruning(0.63, recovery="zeros"), tau=15),
    "bicubic": Schedule("bicubic", Pruning(0.63, recovery="bicubic"), tau=15),
    "direct": Schedule("direct", Pruning(0.63, recovery="direct"), tau=15),
    "random": Schedule("random", Pruning(0.63, "random"), tau=15),
    "one-vote": Schedule("one-vote", Pruning(0.63, "one-vote"), tau=15),
}
OURS = {
    "at-edm-subsampled": Schedule("at-edm-subsampled", Pruning(0.63, graph="subsampled"), tau=15),
    "dissimilarity": Schedule(
        "dissimilarity", Pruning(0.63, "dissimilarity", recovery="nearest-change"), tau=15, early="less"
    ),
    "moving-grid": Schedule("moving-grid", Pruning(0.63, "moving-grid", recovery="nearest-change"), tau=15),
}
# Their papers' settings; the levels are SDXL's largest one with attention, where they name the largest one.
OTHERS = {
    "todo": Schedule("todo", ToDo(0.75), tau=0, levels=(1,)),
    "sito": Schedule("sito", SiTo(0.5, alpha=0.1, beta=1.0), tau=0, levels=(1,)),
    "toma": Schedule("toma", ToMA(0.5, tiles=64, scale=1000.0), tau=0),
}


def test_presets_of_the_papers_and_ours() -> None:
    assert {name: preset.schedule for name, preset in PRESETS.items()} == PAPER | OURS | OTHERS


def test_each_preset_has_a_line_of_its_own() -> None:
    lines = [preset.about for preset in PRESETS.values()]
    assert len(set(lines)) == len(lines)
    assert all(line and "\n" not in line and len(line) < 100 for line in lines)


@pytest.mark.parametrize(
    ("text", "schedule"),
    [
        *PAPER.items(),
        ("at-edm:rho=0.5,tau=10", Schedule("at-edm", Pruning(0.5), tau=10)),
        ("at-edm-dagger:tau=0", Schedule("at-edm-dagger", Pruning(0.63), tau=0, spare_largest=True)),
        ("at-edm:rho=0", Schedule("at-edm", Pruning(0.0))),
        ("tome:r=0.4", Schedule("tome", Merging(0.4), tau=0)),
        ("tome:r=0.4,tau=15", Schedule("tome", Merging(0.4), tau=15)),
        ("at-edm:early=more", Schedule("at-edm", Pruning(0.63), early="more")),
        ("at-edm:ends=mid+up.2.0", Schedule("at-edm", Pruning(0.63), ends=("mid", "up.2.0"))),
        ("at-edm:spare=mid", Schedule("at-edm", Pruning(0.63), spared=("mid",))),
        (
            "tome-dsap:ratios=0.3@mid+0.7@up.2.0",
            Schedule("tome-dsap", Merging(0.5), ratios=(("mid", 0.3), ("up.2.0", 0.7))),
        ),
        ("at-edm:layers=0+1+2", Schedule("at-edm", Pruning(0.63), layers=(0, 1, 2))),
        ("at-edm:place=before-ff", Schedule("at-edm", Pruning(0.63), before_feed_forward=True)),
        ("at-edm:place=after-ff", Schedule("at-edm", Pruning(0.63))),
        (
            "at-edm:ranking=one-vote,recovery=bicubic,graph=streamed,iterations=4",
            Schedule("at-edm", Pruning(0.63, "one-vote", "streamed", "bicubic", iterations=4)),
        ),
        ("at-edm:levels=2", Schedule("at-edm", Pruning(0.63), levels=(2,))),
        ("todo:r=0.9,levels=1+2", Schedule("todo", ToDo(0.9), tau=0, levels=(1, 2))),
        ("sito:r=0.7,alpha=0,beta=2,seed=7", Schedule("sito", SiTo(0.7, 0.0, 2.0, 7), tau=0, levels=(1,))),
        ("toma:r=0.25,tiles=16,scale=10,tau=15", Schedule("toma", ToMA(0.25, 16, 10.0), tau=15)),
        ("ca-wpr:graph=subsampled,rho=0.2", Schedule("ca-wpr", Pruning(0.2, "ca-wpr", "subsampled"))),
    ],
)
def test_parse_preset(text: str, schedule: Schedule) -> None:
    assert parse_preset(text) == schedule


def test_old_spellings_are_understood() -> None:
    assert parse_preset("at-edm-sketched:rho=0.5") == parse_preset("at-edm-subsampled:rho=0.5")
    for old, new in {"held": "by-head", "whole": "dense", "sketched": "subsampled"}.items():
        assert parse_preset(f"at-edm:tau=5,graph={old}") == parse_preset(f"at-edm:tau=5,graph={new}")
        assert current_spelling(f"at-edm:tau=5,graph={old}") == f"at-edm:tau=5,graph={new}"
    assert current_spelling("at-edm-sketched") == "at-edm-subsampled"
    assert current_spelling("tome:r=0.4") == "tome:r=0.4"


@pytest.mark.parametrize(
    ("preset", "ratios"),
    [
        ("at-edm", {"a": 0.94, "b": 0.75, "c": 0.63, "d": 0.52}),
        ("tome", {"a": 0.75, "b": 0.6, "c": 0.5, "d": 0.4}),
        ("tome-dsap", {"a": 0.75, "b": 0.6, "c": 0.5, "d": 0.4}),
    ],
)
def test_budgets_of_table_1_by_letter(preset: str, ratios: dict[str, float]) -> None:
    plain = PRESETS[preset].schedule
    for letter, ratio in ratios.items():
        assert parse_preset(f"{preset}:{letter}") == replace(plain, method=replace(plain.method, ratio=ratio))
    assert parse_preset(f"{preset}:tau=5,b").method.ratio == ratios["b"]
    assert parse_preset(f"{preset}:b,tau=5").tau == 5
    assert parse_preset(f"{preset}:c").method == plain.method


PRUNING_SETTINGS = (
    "rho, tau, early, ends, spare, ratios, levels, layers, place, ranking, recovery, graph, sharpness, iterations"
)
MERGING_SETTINGS = "r, tau, early, ends, spare, ratios, levels"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tome-plus", f"unknown preset 'tome-plus', expected one of {', '.join(PAPER | OURS | OTHERS)}"),
        ("at-edm:", f"unknown setting '' of at-edm, expected one of {PRUNING_SETTINGS} or a budget, a, b, c, d"),
        (
            "at-edm:color=red",
            f"unknown setting 'color=red' of at-edm, expected one of {PRUNING_SETTINGS} or a budget, a, b, c, d",
        ),
        ("zeros:a", f"unknown setting 'a' of zeros, expected one of {PRUNING_SETTINGS}"),
        (
            "tome:layers=0",
            f"unknown setting 'layers=0' of tome, expected one of {MERGING_SETTINGS} or a budget, a, b, c, d",
        ),
        ("todo:tiles=9", f"unknown setting 'tiles=9' of todo, expected one of {MERGING_SETTINGS}"),
        ("sito:rho=0.5", f"unknown setting 'rho=0.5' of sito, expected one of {MERGING_SETTINGS}, alpha, beta, seed"),
        ("toma:seed=1", f"unknown setting 'seed=1' of toma, expected one of {MERGING_SETTINGS}, tiles, scale"),
        ("todo:r=1", "setting r of todo is '1': ToDo's ratio r is 1.0, expected 0 to 0.999"),
        ("sito:r=0.8", "setting r of sito is '0.8': SiTo's ratio r is 0.8, expected 0 to 0.75"),
        ("sito:alpha=-1", "setting alpha of sito is '-1': alpha is -1.0, expected a finite number of 0 or more"),
        ("sito:seed=0.5", "setting seed of sito is '0.5': expected a whole number"),
        ("toma:tiles=60", "setting tiles of toma is '60': tiles is 60, expected a square number, such as 64"),
        ("toma:levels=", "setting levels of toma is '': expected a whole number"),
        ("at-edm:rho", "setting rho of at-edm is '': expected a number"),
        ("at-edm:tau=2.5", "setting tau of at-edm is '2.5': expected a whole number"),
        ("at-edm:rho=0.5,rho=0.6", "setting rho of at-edm is given twice"),
        ("at-edm:b,rho=0.6", "setting rho of at-edm is given twice"),
        ("at-edm:rho=1", "setting rho of at-edm is '1': pruning ratio rho is 1.0, expected 0 <= rho < 1"),
        ("at-edm:rho=nan", "setting rho of at-edm is 'nan': pruning ratio rho is nan, expected 0 <= rho < 1"),
        (
            "tome:r=0.8",
            "setting r of tome is '0.8': merging ratio r is 0.8, expected 0 to 0.75 with stride (2, 2)",
        ),
        ("at-edm:tau=51", "setting tau of at-edm is '51': tau is 51, expected 0 to 50: early steps of every 50"),
        ("at-edm:early=sooner", "setting early of at-edm is 'sooner': early is 'sooner', expected one of less, more"),
        ("at-edm:ends=", "setting ends of at-edm is '': expected names of attention blocks, as mid+up.2.0"),
        (
            "at-edm:ratios=0.3",
            "setting ratios of at-edm is '0.3': expected ratios at attention blocks, as 0.3@mid+0.8@up.2.0",
        ),
        (
            "at-edm:ratios=2@mid",
            "setting ratios of at-edm is '2@mid': pruning ratio rho is 2.0, expected 0 <= rho < 1",
        ),
        (
            "at-edm:ratios=0.2@mid+0.3@mid",
            "setting ratios of at-edm is '0.2@mid+0.3@mid': ratios is (('mid', 0.2), ('mid', 0.3)), "
            "expected each block at most once",
        ),
        (
            "at-edm:layers=1+1",
            "setting layers of at-edm is '1+1': layers is (1, 1), expected one or more different layers, "
            "counted from 0",
        ),
        ("at-edm:place=in-ff", "setting place of at-edm is 'in-ff': expected one of after-ff, before-ff"),
        (
            "at-edm:ranking=best",
            "setting ranking of at-edm is 'best': ranking is 'best', expected one of gwpr, ca-wpr, "
            "one-vote, lowest, random, grid, moving-grid, covered, dissimilarity",
        ),
        (
            "at-edm:recovery=none",
            "setting recovery of at-edm is 'none': recovery is 'none', "
            "expected one of similarity, zeros, bicubic, direct, similarity-change, nearest, nearest-change, "
            "nearest-two-change, own-change, own-change-linear",
        ),
        (
            "at-edm:graph=full",
            "setting graph of at-edm is 'full': graph is 'full', expected one of by-head, streamed, subsampled, dense",
        ),
        (
            "at-edm:iterations=0",
            "setting iterations of at-edm is '0': iterations is 0, "
            "expected 1 or more, or None: until the scores settle",
        ),
    ],
)
def test_unusable_presets_are_one_clear_line(text: str, message: str) -> None:
    with pytest.raises(ValueError) as error:
        parse_preset(text)
    assert str(error.value) == message
