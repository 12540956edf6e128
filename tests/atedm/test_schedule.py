"""Schedules and plans on SDXL's eleven attention blocks, written out by hand, and the FLOPs that the plans leave."""

from __future__ import annotations

import pickle
from dataclasses import dataclass

import pytest

from atedm import DENSE, PRESETS, BlockPlan, Schedule, TokenPlan, parse_preset


@dataclass(frozen=True)
class Block:
    name: str
    stage: str
    level: int
    index: int
    depth: int


SDXL = [
    Block("down.1.0", "down", 1, 0, 2),
    Block("down.1.1", "down", 1, 1, 2),
    Block("down.2.0", "down", 2, 0, 10),
    Block("down.2.1", "down", 2, 1, 10),
    Block("mid", "mid", 2, 0, 10),
    Block("up.2.0", "up", 2, 0, 10),
    Block("up.2.1", "up", 2, 1, 10),
    Block("up.2.2", "up", 2, 2, 10),
    Block("up.1.0", "up", 1, 0, 2),
    Block("up.1.1", "up", 1, 1, 2),
    Block("up.1.2", "up", 1, 2, 2),
]
PRUNE_LESS = ["down.1.1", "down.2.1", "mid", "up.2.0", "up.2.1", "up.1.0", "up.1.1"]


def saved_flops(plan: TokenPlan) -> float:
    """FLOPs (2 x multiply-accumulates) that the plan saves of one 1024 px call, by counting one layer's products."""
    saved = 0.0
    for block in SDXL:
        if block.name not in plan:
            continue
        tokens, channels = {1: (64 * 64, 640), 2: (32 * 32, 1280)}[block.level]

        def layer(n: int, c: int = channels) -> float:
            self_attention = 4 * n * c * c + 2 * n * n * c
            cross_attention = 2 * n * c * c + 2 * n * 77 * c  # keys and values come from the text
            feed_forward = n * c * 8 * c + n * 4 * c * c
            return 2 * (self_attention + cross_attention + feed_forward)

        kept = round(tokens * (1 - plan[block.name].ratio))
        following = block.depth - 1 - plan[block.name].after_layer
        saved += following * (layer(tokens) - layer(kept))
    return saved


def test_normal_plan_prunes_every_block_after_its_first_layer() -> None:
    plan = PRESETS["at-edm"].plan(15, 50, SDXL)
    assert list(plan) == [block.name for block in SDXL]
    assert set(plan.values()) == {BlockPlan(ratio=0.63, after_layer=0)}


def test_prune_less_plan_spares_first_of_down_and_last_of_up() -> None:
    plan = PRESETS["at-edm"].plan(14, 50, SDXL)
    assert list(plan) == PRUNE_LESS
    assert list(PRESETS["at-edm"].plan(14, 50, reversed(SDXL))) == PRUNE_LESS[::-1]


def test_dagger_leaves_the_second_feature_level_alone() -> None:
    dagger = PRESETS["at-edm-dagger"]
    assert list(dagger.plan(49, 50, SDXL)) == [block.name for block in SDXL if block.level == 2]
    assert list(dagger.plan(0, 50, SDXL)) == ["down.2.1", "mid", "up.2.0", "up.2.1"]


def test_flops_of_the_plans() -> None:
    dense = 6.76e12
    at_edm, dagger = PRESETS["at-edm"], PRESETS["at-edm-dagger"]
    calls = [dense - saved_flops(at_edm.plan(step, 50, SDXL)) for step in range(50)]
    found = {
        "steady": calls[-1],
        "prune-less": calls[0],
        "average": sum(calls) / 50,
        "dagger": dense - saved_flops(dagger.plan(49, 50, SDXL)),
        "rho 0.75": dense - saved_flops(Schedule("b", ratio=0.75).plan(49, 50, SDXL)),
        "rho 0.94": dense - saved_flops(Schedule("a", ratio=0.94).plan(49, 50, SDXL)),
    }
    counted = {"steady": 4.06, "prune-less": 4.99, "average": 4.34, "dagger": 4.44, "rho 0.75": 3.59, "rho 0.94": 2.88}
    for name, flops in found.items():
        print(f"{name}: {flops / 1e12:.3f} T, counted {counted[name]} T")
        assert flops / 1e12 == pytest.approx(counted[name], rel=5e-3)


@pytest.mark.parametrize(
    ("tau", "steps", "expected"),
    [(15, 50, 15), (15, 25, 8), (15, 20, 6), (15, 10, 3), (15, 1, 0), (0, 50, 0), (50, 7, 7), (10, 1000, 200)],
)
def test_prune_less_steps(tau: int, steps: int, expected: int) -> None:
    schedule = Schedule("test", tau=tau)
    assert schedule.prune_less_steps(steps) == expected
    lengths = [len(schedule.plan(step, steps, SDXL)) for step in range(steps)]
    assert lengths == [7] * expected + [11] * (steps - expected)


def test_blocks_without_a_following_layer_are_not_pruned() -> None:
    shallow = [Block("down.1.0", "down", 1, 0, 1), Block("mid", "mid", 1, 0, 2), Block("up.1.0", "up", 1, 0, 1)]
    assert list(PRESETS["at-edm"].plan(49, 50, shallow)) == ["mid"]


def test_a_plan_that_prunes_nothing_is_refused() -> None:
    one_level = [block for block in SDXL if block.level == 1]
    with pytest.raises(ValueError, match=r"at-edm-dagger with rho 0\.63 would prune nothing at step 49"):
        PRESETS["at-edm-dagger"].plan(49, 50, one_level)
    with pytest.raises(ValueError, match=r"would prune nothing at step 0"):
        PRESETS["at-edm"].plan(0, 50, [SDXL[0]])
    with pytest.raises(ValueError, match="would prune nothing"):
        PRESETS["at-edm"].plan(49, 50, [])
    assert Schedule("off", ratio=0.0, spare_largest=True).plan(49, 50, one_level) == DENSE


@pytest.mark.parametrize("step", [-1, 50])
def test_step_out_of_range(step: int) -> None:
    with pytest.raises(ValueError, match=f"step is {step}, expected 0 to 49"):
        PRESETS["at-edm"].plan(step, 50, SDXL)


def test_plans_are_values() -> None:
    plan = TokenPlan({"mid": BlockPlan(0.5), "up.1.0": BlockPlan(0.3, after_layer=1)})
    same = TokenPlan({"up.1.0": BlockPlan(0.3, after_layer=1), "mid": BlockPlan(0.5)})
    assert plan == same
    assert hash(plan) == hash(same)
    assert plan != TokenPlan({"mid": BlockPlan(0.5)})
    assert {plan: "compiled"}[same] == "compiled"
    assert pickle.loads(pickle.dumps(plan)) == plan
    assert plan.get("down.1.0") is None
    assert not DENSE
    assert len({PRESETS["at-edm"].plan(step, 50, SDXL) for step in range(50)}) == 2


def test_plans_do_not_change_with_their_source() -> None:
    blocks = {"mid": BlockPlan(0.5)}
    plan = TokenPlan(blocks)
    blocks["up.1.0"] = BlockPlan(0.5)
    assert list(plan) == ["mid"]


def test_describe() -> None:
    plan = TokenPlan({"mid": BlockPlan(0.63), "up.1.0": BlockPlan(0.5, after_layer=1)})
    assert plan.describe().splitlines() == [
        "mid: removes 63 % of its tokens after layer 0",
        "up.1.0: removes 50 % of its tokens after layer 1",
    ]
    assert DENSE.describe() == "every block runs dense"


def test_check_against_a_model() -> None:
    DENSE.check(SDXL)
    PRESETS["at-edm"].plan(49, 50, SDXL).check(SDXL)
    TokenPlan({"mid": BlockPlan(0.5, after_layer=8)}).check(SDXL)
    with pytest.raises(ValueError, match=r"'up\.3\.0', expected one of down\.1\.0, .*up\.1\.2"):
        TokenPlan({"up.3.0": BlockPlan(0.5)}).check(SDXL)
    with pytest.raises(ValueError, match=r"mid after layer 9 of its 10 \(0 to 9\), expected a layer before the last"):
        TokenPlan({"mid": BlockPlan(0.5, after_layer=9)}).check(SDXL)


def test_numbers_out_of_range() -> None:
    for ratio in (-0.1, 1.0, float("nan")):
        with pytest.raises(ValueError, match=f"rho is {ratio}"):
            Schedule("test", ratio=ratio)
        with pytest.raises(ValueError, match=f"rho is {ratio}"):
            BlockPlan(ratio)
    for tau in (-1, 51):
        with pytest.raises(ValueError, match=f"tau is {tau}, expected 0 to 50"):
            Schedule("test", tau=tau)
    with pytest.raises(ValueError, match="after_layer is -1"):
        BlockPlan(0.5, after_layer=-1)


def test_presets_of_the_paper() -> None:
    assert PRESETS["at-edm"] == Schedule("at-edm", ratio=0.63, tau=15)
    assert PRESETS["at-edm-dagger"] == Schedule("at-edm-dagger", ratio=0.63, tau=15, spare_largest=True)


def test_parse_preset() -> None:
    assert parse_preset("at-edm") == PRESETS["at-edm"]
    assert parse_preset("at-edm:rho=0.5,tau=10") == Schedule("at-edm", ratio=0.5, tau=10)
    assert parse_preset("at-edm-dagger:tau=0") == Schedule("at-edm-dagger", tau=0, spare_largest=True)
    assert parse_preset("at-edm:rho=0").ratio == 0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tome-plus", r"unknown preset 'tome-plus', expected one of at-edm, at-edm-dagger"),
        ("", r"unknown preset ''"),
        ("at-edm:", r"unknown setting '' of at-edm, expected one of rho, tau"),
        ("at-edm:ratio=0.5", r"unknown setting 'ratio=0.5' of at-edm, expected one of rho, tau"),
        ("at-edm:rho", r"setting rho of at-edm is '', expected a number"),
        ("at-edm:rho=much", r"setting rho of at-edm is 'much', expected a number"),
        ("at-edm:tau=2.5", r"setting tau of at-edm is '2.5', expected a whole number"),
        ("at-edm:rho=0.5,rho=0.6", r"setting rho of at-edm is given twice"),
        ("at-edm:rho=1", r"rho is 1.0, expected 0 <= rho < 1"),
        ("at-edm:rho=nan", r"rho is nan"),
        ("at-edm:tau=51", r"tau is 51, expected 0 to 50"),
    ],
)
def test_unusable_presets(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_preset(text)
