"""Schedules on SDXL's eleven attention blocks, and the FLOPs that their plans leave, counted by hand."""

from __future__ import annotations

import pickle
from dataclasses import replace
from fractions import Fraction
from itertools import pairwise

import pytest

from atedm import DENSE, PRESETS, BlockPlan, Merging, Pruning, Reduction, Schedule, Site, SiTo, ToDo, TokenPlan
from tests.atedm.sites import DEPTHS, NAMES, PRUNE_LESS, SDXL

AT_EDM, DAGGER, TOME = (PRESETS[name].schedule for name in ("at-edm", "at-edm-dagger", "tome"))
ENDS = ["down.1.0", "down.2.0", "up.2.2", "up.1.2"]


def saved_flops(plan: TokenPlan) -> float:
    """FLOPs (2 x multiply-accumulates) that pruning once saves of one 1024 px call, by counting a layer's products."""
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

        ((index, layer_plan),) = plan[block.name].layers
        assert layer_plan.pruning is not None
        kept = round(tokens * (1 - layer_plan.pruning.ratio))
        saved += (block.depth - 1 - index) * (layer(tokens) - layer(kept))
    return saved


def test_normal_plan_prunes_every_block_after_its_first_layer() -> None:
    plan = AT_EDM.plan(15, 50, SDXL)
    assert list(plan) == NAMES
    assert set(plan.values()) == {BlockPlan.pruning(Pruning(0.63), after=(0,))}


def test_prune_less_plan_spares_first_of_down_and_last_of_up() -> None:
    plan = AT_EDM.plan(14, 50, SDXL)
    assert list(plan) == PRUNE_LESS
    assert list(AT_EDM.plan(14, 50, reversed(SDXL))) == PRUNE_LESS[::-1]


def test_dagger_leaves_the_second_feature_level_alone() -> None:
    assert list(DAGGER.plan(49, 50, SDXL)) == [block.name for block in SDXL if block.level == 2]
    assert list(DAGGER.plan(0, 50, SDXL)) == ["down.2.1", "mid", "up.2.0", "up.2.1"]


def test_merging_is_in_all_layers_of_all_blocks() -> None:
    for step in (0, 49):
        plan = TOME.plan(step, 50, SDXL)
        assert dict(plan) == {name: BlockPlan.merging(Merging(0.5), DEPTHS[name]) for name in NAMES}
    shallow = [Site("mid", 0, 0, depth=1)]
    assert dict(TOME.plan(0, 50, shallow)) == {"mid": BlockPlan.merging(Merging(0.5), 1)}


def test_merging_under_dsap() -> None:
    schedule = PRESETS["tome-dsap"].schedule
    assert list(schedule.plan(14, 50, SDXL)) == PRUNE_LESS
    assert schedule.plan(15, 50, SDXL) == TOME.plan(15, 50, SDXL)


def test_flops_of_the_plans() -> None:
    dense = 6.76e12
    calls = [dense - saved_flops(AT_EDM.plan(step, 50, SDXL)) for step in range(50)]
    found = {
        "steady": calls[-1],
        "prune-less": calls[0],
        "average": sum(calls) / 50,
        "dagger": dense - saved_flops(DAGGER.plan(49, 50, SDXL)),
        "rho 0.75": dense - saved_flops(Schedule("b", Pruning(0.75)).plan(49, 50, SDXL)),
        "rho 0.94": dense - saved_flops(Schedule("a", Pruning(0.94)).plan(49, 50, SDXL)),
    }
    counted = {"steady": 4.06, "prune-less": 4.99, "average": 4.34, "dagger": 4.44, "rho 0.75": 3.59, "rho 0.94": 2.88}
    for name, flops in found.items():
        print(f"{name}: {flops / 1e12:.3f} T, counted {counted[name]} T")
        assert flops / 1e12 == pytest.approx(counted[name], rel=5e-3)


@pytest.mark.parametrize(
    ("tau", "steps", "expected"),
    [
        *((15, steps, early) for steps, early in {1: 0, 2: 1, 4: 1, 8: 2, 10: 3, 20: 6, 25: 8, 50: 15}.items()),
        *((15, steps, early) for steps, early in {3: 1, 5: 2, 6: 2, 15: 5, 35: 11}.items()),  # 5, 15, 35: halves
        *((0, 50, 0), (50, 7, 7), (10, 1000, 200)),
    ],
)
@pytest.mark.parametrize("method", [Pruning(0.5), Merging(0.5)], ids=["pruning", "merging"])
def test_early_steps(method: Pruning | Merging, tau: int, steps: int, expected: int) -> None:
    schedule = Schedule("test", method, tau=tau)
    assert schedule.early_steps(steps) == expected
    lengths = [len(schedule.plan(step, steps, SDXL)) for step in range(steps)]
    assert lengths == [7] * expected + [11] * (steps - expected)


def test_early_steps_are_the_nearest_share_and_never_fewer_for_more_steps() -> None:
    counts = [AT_EDM.early_steps(steps) for steps in range(1, 1001)]
    for steps, early in enumerate(counts, start=1):
        assert -Fraction(1, 2) < early - Fraction(15 * steps, 50) <= Fraction(1, 2)
    assert all(0 <= later - sooner <= 1 for sooner, later in pairwise(counts))


def test_prune_more_leaves_the_later_steps_less_pruned() -> None:
    less, more = Schedule("less", Pruning(0.5)), Schedule("more", Pruning(0.5), early="more")
    for early, late in ((0, 15), (14, 49)):
        assert list(more.plan(early, 50, SDXL)) == NAMES
        assert list(more.plan(late, 50, SDXL)) == PRUNE_LESS
        assert more.plan(early, 50, SDXL) == less.plan(late, 50, SDXL)
        assert more.plan(late, 50, SDXL) == less.plan(early, 50, SDXL)
    without = Schedule("without", Pruning(0.5), tau=0, early="more")  # no early steps to tell from later ones
    assert {len(without.plan(step, 50, SDXL)) for step in range(50)} == {11}


def test_other_ends() -> None:
    schedule = Schedule("test", Pruning(0.5), ends=("mid", "up.1.1"))
    assert list(schedule.plan(0, 50, SDXL)) == [name for name in NAMES if name not in ("mid", "up.1.1")]
    assert list(schedule.plan(15, 50, SDXL)) == NAMES
    none = Schedule("test", Pruning(0.5), ends=())
    assert list(none.plan(0, 50, SDXL)) == NAMES
    assert Schedule("test", Pruning(0.5), ends=tuple(ENDS)).plan(0, 50, SDXL) == AT_EDM_HALF.plan(0, 50, SDXL)


AT_EDM_HALF = Schedule("at-edm", Pruning(0.5))


@pytest.mark.parametrize("step", [0, 49])
def test_spared_blocks_are_never_touched(step: int) -> None:
    schedule = Schedule("test", Pruning(0.5), spared=("mid", "up.1.2"))
    left = AT_EDM_HALF.plan(step, 50, SDXL)
    assert list(schedule.plan(step, 50, SDXL)) == [name for name in left if name not in ("mid", "up.1.2")]
    both = Schedule("test", Pruning(0.5), spared=("mid",), spare_largest=True)
    assert list(both.plan(49, 50, SDXL)) == [block.name for block in SDXL if block.level == 2 and block.name != "mid"]


def test_ratios_of_single_blocks() -> None:
    schedule = Schedule("test", Pruning(0.5, ranking="one-vote"), ratios=(("mid", 0.9), ("up.2.2", 0.1)))
    plan = schedule.plan(49, 50, SDXL)
    for name in NAMES:
        ratio = {"mid": 0.9, "up.2.2": 0.1}.get(name, 0.5)
        assert plan[name] == BlockPlan.pruning(Pruning(ratio, ranking="one-vote"))
    assert list(schedule.plan(0, 50, SDXL)) == PRUNE_LESS
    merging = Schedule("test", Merging(0.5), ratios=(("mid", 0.7),)).plan(49, 50, SDXL)
    assert merging["mid"] == BlockPlan.merging(Merging(0.7), 10)
    assert merging["up.2.0"] == BlockPlan.merging(Merging(0.5), 10)


def test_repeated_pruning_goes_as_far_as_each_block_has_layers() -> None:
    plan = Schedule("test", Pruning(0.3), layers=(0, 1, 8)).plan(49, 50, SDXL)
    for name in NAMES:
        assert plan[name] == BlockPlan.pruning(Pruning(0.3), (0,) if DEPTHS[name] == 2 else (0, 1, 8))
    later = Schedule("test", Pruning(0.3), layers=(1,)).plan(49, 50, SDXL)
    assert list(later) == [name for name in NAMES if DEPTHS[name] == 10]
    plan.check(SDXL)
    later.check(SDXL)


def test_before_the_feed_forward() -> None:
    plan = Schedule("test", Pruning(0.3), layers=(0, 1), before_feed_forward=True).plan(49, 50, SDXL)
    for name in NAMES:
        layers = (0,) if DEPTHS[name] == 2 else (0, 1)
        assert plan[name] == BlockPlan.pruning(Pruning(0.3), layers, before_feed_forward=True)
    plan.check(SDXL)


@pytest.mark.parametrize("before_feed_forward", [False, True])
def test_blocks_without_a_following_layer_are_not_pruned(before_feed_forward: bool) -> None:
    shallow = [Site("down", 1, 0, depth=1), Site("mid", 1, 0, depth=2), Site("up", 1, 0, depth=1)]
    schedule = Schedule("test", Pruning(0.5), before_feed_forward=before_feed_forward)
    assert list(schedule.plan(49, 50, shallow)) == ["mid"]


@pytest.mark.parametrize("preset", PRESETS)
def test_plans_of_all_presets_fit_and_are_few(preset: str) -> None:
    """Compiled graphs see one for each kind of step."""
    schedule = PRESETS[preset].schedule
    plans = {schedule.plan(step, 50, SDXL) for step in range(50)}
    several = {"random": 50, "moving-grid": 8, "tome": 1, "todo": 1, "sito": 4, "toma": 1}
    assert len(plans) == several.get(preset, 2)  # random tokens are drawn anew at every step
    for plan in plans:
        plan.check(SDXL)


def test_a_grid_moves_from_step_to_step_and_comes_round() -> None:
    plans = [PRESETS["moving-grid"].schedule.plan(step, 50, SDXL) for step in range(20, 28)]
    assert plans[:4] == plans[4:]
    assert len(set(plans)) == 4


def test_a_plan_that_reduces_nothing_is_refused() -> None:
    one_level = [block for block in SDXL if block.level == 1]
    with pytest.raises(
        ValueError, match=r"at-edm-dagger with ratio 0\.63 would reduce no tokens at step 49: .*up\.1\.2"
    ):
        DAGGER.plan(49, 50, one_level)
    with pytest.raises(ValueError, match=r"would reduce no tokens at step 0"):
        AT_EDM.plan(0, 50, [SDXL[0]])
    with pytest.raises(ValueError, match="would reduce no tokens"):
        AT_EDM.plan(49, 50, [])
    with pytest.raises(ValueError, match="would reduce no tokens"):
        AT_EDM.plan(49, 50, [Site("mid", 0, 0, depth=1)])
    with pytest.raises(ValueError, match="would reduce no tokens"):
        Schedule("test", Merging(0.5), spared=tuple(NAMES)).plan(49, 50, SDXL)
    zeros = tuple((name, 0.0) for name in NAMES)
    with pytest.raises(ValueError, match=r"test with ratio 0\.5 would reduce no tokens at step 49"):
        Schedule("test", Pruning(0.5), ratios=zeros).plan(49, 50, SDXL)
    only_an_end = Schedule("test", Pruning(0.0), ratios=(("down.1.0", 0.4),))
    assert only_an_end.plan(49, 50, SDXL)["down.1.0"] == BlockPlan.pruning(Pruning(0.4))
    with pytest.raises(ValueError, match=r"test with ratio 0\.4 would reduce no tokens at step 0"):
        only_an_end.plan(0, 50, SDXL)
    assert Schedule("off", Pruning(0.0), spare_largest=True).plan(49, 50, one_level) == DENSE


def test_names_of_no_block_are_refused() -> None:
    for schedule in (
        Schedule("test", Pruning(0.5), ends=("up.7.0", "mid")),
        Schedule("test", Pruning(0.5), spared=("up.7.0",)),
        Schedule("test", Merging(0.5), ratios=(("up.7.0", 0.5),)),
        Schedule("test", Pruning(0.5), tau=0, ends=("up.7.0",)),  # even where they play no part
    ):
        with pytest.raises(ValueError, match=r"test names up\.7\.0, expected attention blocks out of down\.1\.0, .*up"):
            schedule.plan(49, 50, SDXL)
    with pytest.raises(ValueError, match=r"test names a, b, expected"):
        Schedule("test", Pruning(0.5), ends=("b",), spared=("a",)).plan(49, 50, SDXL)


@pytest.mark.parametrize("method", [Pruning(0.5), ToDo(0.5)], ids=["pruning", "ToDo"])
def test_levels_that_are_reduced(method: Pruning | Reduction) -> None:
    plan = Schedule("test", method, tau=0, levels=(1,)).plan(49, 50, SDXL)
    assert set(plan) == {site.name for site in SDXL if site.level == 1}
    assert set(Schedule("test", method, tau=0, levels=(2, 1)).plan(49, 50, SDXL)) == set(NAMES)


def test_levels_without_attention_are_refused() -> None:
    """Such as the largest one of SD 1.5: nothing would happen there."""
    for levels in ((0,), (1, 0)):
        with pytest.raises(ValueError, match=r"test names level 0, expected .* or levels with attention out of 1, 2$"):
            Schedule("test", ToDo(0.75), levels=levels).plan(49, 50, SDXL)
    with pytest.raises(ValueError, match=r"test spares mid, expected no other ratio there"):
        Schedule("test", ToDo(0.75), levels=(1,), ratios=(("mid", 0.5),)).plan(49, 50, SDXL)
    with pytest.raises(ValueError, match=r"test with ratio 0\.75 would reduce no tokens at step 0"):
        Schedule("test", ToDo(0.75), levels=(1,), spare_largest=True).plan(0, 50, SDXL)


def test_noise_of_sito_differs_between_blocks_and_steps_and_few_plans_do() -> None:
    schedule = PRESETS["sito"].schedule
    plans = [schedule.plan(step, 50, SDXL) for step in range(50)]
    assert len(set(plans)) == 4
    assert plans[3] == plans[47]
    methods = {layer.merging for plan in plans for block in plan.values() for _, layer in block.layers}
    assert len(methods) == 4 * 5  # blocks of level 1
    assert len({replace(how, seed=0) for how in methods if isinstance(how, SiTo)}) == 1


def test_layers_of_no_block_are_refused() -> None:
    for layers in ((9,), (0, 9), (50,)):
        schedule = Schedule("test", Pruning(0.5), layers=layers)
        with pytest.raises(
            ValueError, match=rf"test prunes in layer {layers[-1]}, expected 0 to 8: .* up to 10 layers"
        ):
            schedule.plan(49, 50, SDXL)


def test_a_spared_block_has_no_ratio() -> None:
    with pytest.raises(ValueError, match=r"test spares mid, expected no other ratio there"):
        Schedule("test", Pruning(0.5), spared=("mid",), ratios=(("mid", 0.5),)).plan(49, 50, SDXL)
    with pytest.raises(ValueError, match=r"test spares up\.1\.0, expected no other ratio there"):
        Schedule("test", Pruning(0.5), spare_largest=True, ratios=(("up.1.0", 0.5),)).plan(49, 50, SDXL)


@pytest.mark.parametrize("step", [-1, 50])
def test_step_out_of_range(step: int) -> None:
    with pytest.raises(ValueError, match=f"step is {step}, expected 0 to 49"):
        AT_EDM.plan(step, 50, SDXL)


def test_schedules_are_values() -> None:
    schedule = Schedule("test", Pruning(0.5), ratios=(("mid", 0.4),))
    assert schedule == Schedule("test", Pruning(0.5), ratios=(("mid", 0.4),))
    assert hash(schedule) == hash(Schedule("test", Pruning(0.5), ratios=(("mid", 0.4),)))
    assert schedule != Schedule("test", Pruning(0.5), ratios=(("mid", 0.3),))
    assert pickle.loads(pickle.dumps(schedule)) == schedule


def test_numbers_out_of_range() -> None:
    for tau in (-1, 51):
        with pytest.raises(ValueError, match=f"tau is {tau}, expected 0 to 50"):
            Schedule("test", Pruning(0.5), tau=tau)
    with pytest.raises(ValueError, match="early is 'fewer', expected one of less, more"):
        Schedule("test", Pruning(0.5), early="fewer")
    for layers in ((), (0, 0), (0, -1)):
        with pytest.raises(
            ValueError, match=r"layers is \(.*\), expected one or more different layers, counted from 0"
        ):
            Schedule("test", Pruning(0.5), layers=layers)
    with pytest.raises(ValueError, match=r"rho is 1\.5, expected 0 <= rho < 1"):
        Schedule("test", Pruning(0.5), ratios=(("mid", 1.5),))
    with pytest.raises(ValueError, match=r"r is 0\.9, expected 0 to 0\.75"):
        Schedule("test", Merging(0.5), ratios=(("mid", 0.9),))
    with pytest.raises(ValueError, match="expected each block at most once"):
        Schedule("test", Pruning(0.5), ratios=(("mid", 0.5), ("mid", 0.6)))


def test_merging_has_no_place_to_choose() -> None:
    with pytest.raises(ValueError, match="test merges tokens in all layers"):
        Schedule("test", Merging(0.5), layers=(1,))
    with pytest.raises(ValueError, match="test merges tokens in all layers"):
        Schedule("test", Merging(0.5), before_feed_forward=True)


def test_random_keeps_other_tokens_in_every_block_and_step() -> None:
    schedule = PRESETS["random"].schedule
    seeds = [
        layer.pruning.seed
        for step in range(50)
        for block in schedule.plan(step, 50, SDXL).values()
        for _, layer in block.layers
        if layer.pruning is not None
    ]
    assert len(set(seeds)) == len(seeds) == 15 * len(PRUNE_LESS) + 35 * len(SDXL)
    assert schedule.plan(40, 50, SDXL) == schedule.plan(40, 50, SDXL)
