"""Texts of methods that an evaluation compares, and what they cost."""

from __future__ import annotations

import pytest

from minisdxl.config import SHAPES
from minisdxl.cost import count
from tools.evaluation.experiment_specs import EXPERIMENTS
from tools.evaluation.methods import Method, parse_method, picture_flops, settings_of


@pytest.mark.parametrize(
    ("text", "method"),
    [
        ("dense", Method()),
        ("at-edm:rho=0.5,tau=10", Method("at-edm:rho=0.5,tau=10")),
        ("skip=deepcache:every=2 guide=interval:0.28-5.42", Method(None, "deepcache:every=2", "interval:0.28-5.42")),
        ("prune=tome skip=zeus", Method("tome", "zeus")),
        ("steps=17", Method(steps=17)),
    ],
)
def test_texts(text: str, method: Method) -> None:
    assert parse_method(text) == method


def test_every_experiment_has_methods_that_exist() -> None:
    for experiment in EXPERIMENTS.values():
        for preset in experiment.presets:
            parse_method(preset)
    assert parse_method("fast=faithful").skip is not None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("skip=sleep", "unknown skip method 'sleep'"),
        ("fast=most", "unknown composed preset 'most', expected one of faithful"),
        ("skip=zeus cfg=3", "has cfg, expected prune, skip, guide, steps, or fast"),
        ("nothing", "unknown preset 'nothing'"),
    ],
)
def test_bad_texts(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_method(text)


def test_flops_of_a_picture() -> None:
    """Fewer steps cost as many calls less; guidance at half of the steps a quarter less."""
    dense = 50 * 2 * count(SHAPES, 64, 64).total
    for text, share in (("dense", 1.0), ("steps=25", 0.5), ("guide=alternate", 0.75)):
        found = picture_flops(SHAPES, settings_of(parse_method(text), "euler", 50, 4.0, (256, 256)))
        print(f"{text}: {found / dense:.4f} of dense")
        assert found == pytest.approx(share * dense)
