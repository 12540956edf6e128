"""Token plans as values: equality, printing, and what they refuse."""

from __future__ import annotations

import pickle

import pytest

from atedm import DENSE, BlockPlan, LayerPlan, Merging, Pruning, TokenPlan
from atedm.plan import UNTOUCHED
from tests.atedm.sites import NAMES, SDXL

HALF = Pruning(0.5)


def test_layers_not_named_do_nothing() -> None:
    plan = BlockPlan.pruning(HALF, after=(1, 3))
    assert [plan.layer(index) for index in range(4)] == [UNTOUCHED, LayerPlan(HALF)] * 2
    assert plan.layer(4) == UNTOUCHED
    assert BlockPlan.pruning(HALF) == BlockPlan(((0, LayerPlan(HALF)),))
    early = BlockPlan.pruning(HALF, before_feed_forward=True)
    assert early == BlockPlan(((0, LayerPlan(HALF, before_feed_forward=True)),))


def test_merging_is_in_all_layers() -> None:
    plan = BlockPlan.merging(Merging(0.5), depth=3)
    assert [plan.layer(index) for index in range(3)] == [LayerPlan(merging=Merging(0.5))] * 3


def test_plans_are_values() -> None:
    late = BlockPlan.pruning(Pruning(0.3), after=(1,))
    plan = TokenPlan({"mid": BlockPlan.pruning(HALF), "up.1.0": late})
    same = TokenPlan({"up.1.0": late, "mid": BlockPlan.pruning(Pruning(0.5))})
    assert plan == same
    assert hash(plan) == hash(same)
    assert plan != TokenPlan({"mid": BlockPlan.pruning(HALF)})
    assert plan != TokenPlan({**plan, "mid": BlockPlan.pruning(Pruning(0.5, graph="streamed"))})
    assert plan != TokenPlan({**plan, "mid": BlockPlan.merging(Merging(0.5), depth=1)})
    assert {plan: "compiled"}[same] == "compiled"
    assert pickle.loads(pickle.dumps(plan)) == plan
    assert plan.get("down.1.0") is None
    assert not DENSE


def test_plans_do_not_change_with_their_source() -> None:
    blocks = {"mid": BlockPlan.pruning(HALF)}
    plan = TokenPlan(blocks)
    blocks["up.1.0"] = BlockPlan.pruning(HALF)
    assert list(plan) == ["mid"]


def test_describe() -> None:
    plan = TokenPlan(
        {
            "mid": BlockPlan.pruning(Pruning(0.63), after=(0, 2), before_feed_forward=True),
            "up.1.0": BlockPlan.merging(Merging(0.4), depth=2),
        }
    )
    mid, up = plan.describe().splitlines()
    assert mid.startswith("mid: layer 0: Pruning(ratio=0.63, ")
    assert mid.count(" before the feed-forward") == 2
    assert "; layer 2: Pruning(ratio=0.63, " in mid
    assert up.startswith("up.1.0: layer 0: Merging(ratio=0.4, ")
    assert "; layer 1: Merging(ratio=0.4, " in up
    assert "feed-forward" not in up
    assert DENSE.describe() == "every block runs dense"


def test_check_against_a_model() -> None:
    DENSE.check(SDXL)
    TokenPlan({name: BlockPlan.pruning(HALF) for name in NAMES}).check(SDXL)
    TokenPlan({"mid": BlockPlan.pruning(HALF, after=(0, 8))}).check(SDXL)
    TokenPlan({"mid": BlockPlan.merging(Merging(0.5), depth=10)}).check(SDXL)
    with pytest.raises(ValueError, match=r"'up\.3\.0', expected one of down\.1\.0, .*up\.1\.2"):
        TokenPlan({"up.3.0": BlockPlan.pruning(HALF)}).check(SDXL)
    with pytest.raises(ValueError, match=r"plan names layer 10 of mid, expected 0 to 9"):
        TokenPlan({"mid": BlockPlan.merging(Merging(0.5), depth=11)}).check(SDXL)
    with pytest.raises(ValueError, match=r"plan names layer 2 of up\.1\.0, expected 0 to 1"):
        TokenPlan({"up.1.0": BlockPlan.pruning(HALF, after=(2,))}).check(SDXL)


@pytest.mark.parametrize("before_feed_forward", [False, True])
def test_the_last_layer_never_prunes(before_feed_forward: bool) -> None:
    """Section 3.1, step 5, speaks of the layer as a whole, so also where it would prune before its feed-forward."""
    plan = TokenPlan({"mid": BlockPlan.pruning(HALF, (0, 9), before_feed_forward)})
    with pytest.raises(ValueError, match=r"mid in layer 9 of its 10 \(0 to 9\), expected a layer before the last"):
        plan.check(SDXL)


def test_impossible_plans() -> None:
    with pytest.raises(ValueError, match="plan names the transformer layer -1, expected 0 or more"):
        BlockPlan.pruning(HALF, after=(-1,))
    with pytest.raises(ValueError, match="plan names the transformer layers 2, 0, 2, expected each at most once"):
        BlockPlan.pruning(HALF, after=(2, 0, 2))
    with pytest.raises(ValueError, match=r"Pruning\(.*Merging\(.*expected one of them"):
        LayerPlan(HALF, merging=Merging(0.5))
