"""Captions, shards and presets at equal FLOPs."""

from __future__ import annotations

import pytest

from atedm.presets import parse_preset
from minisdxl.config import SHAPES
from minisdxl.cost import summary
from tools.drawn.world import held_out, parse_caption
from tools.evaluation.pictures import average_share, drawn_captions, parse_shard, solve


def test_captions_are_unseen_different_and_always_the_same() -> None:
    captions = drawn_captions(60)
    assert len(set(captions.texts)) == 60
    assert all(held_out(parse_caption(caption)) for caption in captions.texts)
    assert drawn_captions(20).texts == captions.texts[:20]
    assert {held_out(parse_caption(caption)) for caption in drawn_captions(60, "all").texts} == {True, False}
    mixed = drawn_captions(60, world="mixed")
    kinds = [parse_caption(caption).open for caption in mixed.texts]
    assert kinds == 20 * [False, True, True] and mixed.texts[::3] == captions.texts[:20]
    for count, said in (
        (0, "--captions is 0, expected 1 or more"),
        (2000, "2000 captions are asked for, expected 1 to"),
    ):
        with pytest.raises(ValueError, match=said):
            drawn_captions(count)


def test_shards_are_read_and_refused() -> None:
    assert parse_shard("2/4") == (2, 4)
    for text in ("0/2", "3/2", "2", "a/b", "1/2/3"):
        with pytest.raises(ValueError, match="expected i/n"):
            parse_shard(text)


def test_equal_flops_are_equal() -> None:
    presets = ("dense", "at-edm", "tome", "at-edm:place=before-ff,tau=5")
    solved = solve(SHAPES, (256, 256), presets, 50, 0.8, "average")
    assert list(solved) == list(presets)
    for name, preset in solved.items():
        share = average_share(SHAPES, (256, 256), preset, 50)
        print(f"{name}: {preset} costs {share:.4%} of dense")
        assert share == 1 if name == "dense" else 0.798 < share <= 0.8
    plain = average_share(SHAPES, (256, 256), "at-edm", 20)
    calls = summary(SHAPES, 64, 64, parse_preset("at-edm"), 20)
    assert plain == calls["average"] / calls["dense"]
