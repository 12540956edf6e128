"""What is recorded of a run: that it changes nothing, and that it is what happened."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import minisdxl
import minisdxl.inspector.session as session
from atedm import AttentionInputs, TokenSet, parse_preset
from atedm.merging import Merging
from atedm.pruning import Pruning, prune
from atedm.recovery import Restore
from minisdxl.cost import count
from minisdxl.inspector.recorder import Recorder
from minisdxl.inspector.session import RecordedRun, Recording, check_attention_steps
from minisdxl.pipeline import SDXL
from minisdxl.settings import Settings, check_settings
from minisdxl.steps.cost import picture_cost
from minisdxl.steps.plan import StepPlan, describe
from tests.minisdxl.tiny import TINY, VOCABULARY, tiny_file

PROMPT = "a small red circle above a big blue square on a white background"
SETTINGS: dict[str, Any] = {"steps": 4, "cfg": 3.0, "seed": 5, "size": (32, 32)}


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory: pytest.TempPathFactory) -> SDXL:
    return minisdxl.load(tiny_file(tmp_path_factory.mktemp("tiny") / "tiny.safetensors"), tokenizer=VOCABULARY)


def recording(sdxl: SDXL, monkeypatch: pytest.MonkeyPatch, **settings: Any) -> Recording:
    """What the page is made from."""
    seen: list[Recording] = []
    monkeypatch.setattr(session, "page", seen.append)
    sdxl.inspect(PROMPT, **{**SETTINGS, **settings})
    return seen[0]


@pytest.mark.parametrize(
    ("prune", "sampling", "cfg"),
    [
        ("at-edm", "euler", 3.0),
        ("at-edm:graph=dense,place=before-ff", "heun", 1.0),
        ("ca-wpr", "euler-ancestral", 3.0),
        ("tome", "dpm++-2m", 3.0),
        ("moving-grid", "euler", 1.0),
        ("sito", "euler", 3.0),
        ("todo", "euler", 3.0),
        ("toma", "euler", 1.0),
    ],
)
def test_recording_changes_no_number(sdxl: SDXL, prune: str, sampling: str, cfg: float) -> None:
    settings = {**SETTINGS, "steps": 2, "sampling": sampling, "cfg": cfg}
    found = sdxl.inspect(PROMPT, prune=prune, **settings)
    assert list(found.pictures) == ["dense", prune]
    for name, image in found.pictures.items():
        expected = sdxl.generate([PROMPT], prune=None if name == "dense" else name, **settings)[0]
        assert image.tobytes() == expected.tobytes(), name


@pytest.mark.parametrize(
    ("name", "method"),
    [
        ("deepcache:every=2", {"skip": "deepcache:every=2"}),
        ("fast", {"skip": "spaced:share=0.22"}),
        ("tgate:gate=12,warm=2", {"skip": "tgate:gate=12,warm=2"}),
        ("easycache:start=0.2", {"skip": "easycache:start=0.2"}),
        ("interval:0.28-5.42", {"guide": "interval:0.28-5.42"}),
        ("at-edm + deepcache + interval", {"prune": "at-edm", "skip": "deepcache", "guide": "interval"}),
        ("moving-grid:recovery=own-change-linear", {"prune": "moving-grid:recovery=own-change-linear"}),
    ],
)
def test_recording_step_plans_changes_no_number(
    sdxl: SDXL, monkeypatch: pytest.MonkeyPatch, name: str, method: dict[str, str]
) -> None:
    """The same pictures, and plans and costs as a run without a recorder has them."""
    settings: dict[str, Any] = {"steps": 10, "cfg": 3.0, "seed": 5, "size": (32, 32), **method}
    found = recording(sdxl, monkeypatch, **settings)
    run, realized = found.runs[1], list[Sequence[StepPlan]]()
    expected = sdxl.generate([PROMPT], realized=realized, **settings)[0]
    assert run.name == name and run.image.tobytes() == expected.tobytes()
    assert run.plans == realized[0] and len(run.costs) == len(run.steps) == 10
    cost = picture_cost(sdxl.config, 8, 8, realized[0], 77, 3.0, [1] * 10)
    print(f"{name}: {describe(run.plans)}, {cost.flops} FLOPs")
    assert sum(each.total for each in run.costs) == cost.flops
    assert sum(each.ranking for each in run.costs) == cost.ranking
    for plan, step, each in zip(run.plans, run.steps, run.costs, strict=True):
        assert any(each.blocks.values()) == plan.runs or plan.unet == "shallow"
        assert plan.runs or not step.reductions


def test_attention_is_recorded_at_the_next_step_that_has_all_maps(sdxl: SDXL, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = {site.name for site in TINY.unet.attention_sites()}
    steps = recording(sdxl, monkeypatch, skip="deepcache", attention_steps=[2, 3]).runs[1].steps
    assert [set(step.attention) for step in steps] == [set(), set(), set(), whole]
    steps = recording(sdxl, monkeypatch, skip="deepcache:every=2").runs[1].steps  # the last step is shallow
    assert [set(step.attention) for step in steps] == [whole, set(), whole, set()]
    runs = recording(sdxl, monkeypatch, skip="deepcache", against="at-edm", steps=9).runs  # both at the same steps
    recorded = [[step.number for step in run.steps if step.attention] for run in runs]
    assert recorded[1] == [0, 3, 6] and recorded[2] == [0, 3, 6]  # whole steps; 3 is the first after DSAP's early ones


def test_a_token_with_a_history_is_its_own_source(sdxl: SDXL, monkeypatch: pytest.MonkeyPatch) -> None:
    preset = "moving-grid:recovery=own-change-linear"
    run = recording(sdxl, monkeypatch, prune=preset).runs[1]
    stayed: dict[str, torch.Tensor] = {}
    for step in run.steps:
        for name, (found,) in step.reductions.items():
            assert found.sources is not None
            before = stayed.get(name, torch.zeros_like(found.kept))
            itself = found.sources[:, 0] == torch.arange(len(found.kept))
            assert torch.equal(itself, found.kept | before)
            assert found.kept[found.sources[~itself]].all()
            stayed[name] = before | found.kept
    assert any(each.any() for each in stayed.values())


def test_modules_are_left_as_they_were(sdxl: SDXL) -> None:
    before = {name: (type(module), set(vars(module))) for name, module in sdxl.unet.named_modules()}
    sdxl.inspect(PROMPT, prune="at-edm", **SETTINGS)
    assert {name: (type(module), set(vars(module))) for name, module in sdxl.unet.named_modules()} == before
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in sdxl.unet.modules())


class Spy:
    """Sees each pruning from inside ``atedm``, in the order in which they happen."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seen: list[tuple[TokenSet, TokenSet, Restore]] = []
        monkeypatch.setattr("atedm.plan.prune", self)

    def __call__(self, tokens: TokenSet, ours: AttentionInputs, text: AttentionInputs, how: Pruning) -> Any:
        kept, restore = prune(tokens, ours, text, how)
        self.seen.append((tokens, kept, restore))
        return kept, restore


SOURCED = ("similarity", "similarity-change", "nearest", "nearest-change", "nearest-two-change")

RANKED = dict.fromkeys([*SOURCED, "zeros", "bicubic", "direct"], "gwpr") | {
    "nearest": "ca-wpr",
    "nearest-change": "moving-grid",
}


@pytest.mark.parametrize(("recovery", "sharpness"), [*((name, 1.0) for name in RANKED), ("similarity", 4.0)])
def test_reductions_are_what_happened(
    sdxl: SDXL, monkeypatch: pytest.MonkeyPatch, recovery: str, sharpness: float
) -> None:
    """Masks against the token sets that pruning returned; sources by what the restore copies from numbered tokens."""
    spy = Spy(monkeypatch)
    how = Pruning(0.6, ranking=RANKED[recovery], recovery=recovery, sharpness=sharpness)
    schedule = replace(parse_preset("at-edm"), method=how)
    run = recording(sdxl, monkeypatch, prune=schedule, steps=2).runs[1]
    reductions = [each for step in run.steps for blocks in step.reductions.values() for each in blocks]
    assert len(reductions) == len(spy.seen) > 4
    for found, (tokens, kept, restore) in zip(reductions, spy.seen, strict=True):
        assert kept.positions is not None
        stayed = kept.positions[-1]
        assert found.kept.nonzero().flatten().tolist() == stayed.tolist() and found.held.all()
        assert found.scores is not None
        order = sorted(range(tokens.size), key=lambda i: (-found.scores[i], i))  # type: ignore[index]
        assert sorted(order[: kept.count]) == stayed.tolist()
        if recovery not in SOURCED:
            assert found.sources is None
            continue
        assert found.sources is not None
        assert torch.equal(found.sources[stayed, 0], stayed)
        now = torch.randn(*kept.values.shape, dtype=torch.float64)
        before = tokens.values.double()
        expected = restore(kept.with_values(now)).values[-1] if not recovery.endswith("change") else None
        of = torch.full((tokens.size,), -1).index_copy(0, stayed, torch.arange(kept.count))[found.sources]  # (N, m)
        if expected is not None:
            assert torch.equal(now[-1][of[:, 0]], expected)
        else:
            changed = restore(kept.with_values(kept.values + now.to(kept.values.dtype))).values[-1] - before[-1]
            error = (now[-1][of].mean(dim=1) - changed).abs().max().item()
            print(f"max error {error:.2e}")
            assert error < 1e-5


def test_repeated_pruning_is_recorded_layer_by_layer(shapes: SDXL, monkeypatch: pytest.MonkeyPatch) -> None:
    schedule = replace(parse_preset("at-edm:rho=0.3"), layers=(0, 1))
    found = recording(shapes, monkeypatch, prune=schedule, steps=2, size=(64, 64)).runs[1].steps[-1]
    first, second = found.reductions["mid"]
    assert (first.layer, second.layer) == (0, 1)
    assert torch.equal(second.held, first.kept) and (second.kept <= second.held).all()
    assert first.scores is not None and not first.scores.isnan().any()
    assert second.scores is not None and torch.equal(second.scores.isnan(), ~second.held)
    assert second.sources is not None and torch.equal((second.sources < 0).all(dim=1), ~second.held)


def test_merging_is_recorded(sdxl: SDXL, monkeypatch: pytest.MonkeyPatch) -> None:
    run = recording(sdxl, monkeypatch, prune="tome").runs[1]
    how = parse_preset("tome").method
    assert isinstance(how, Merging)
    for step in run.steps:
        assert set(step.reductions) == {site.name for site in TINY.unet.attention_sites()}
        for (found,) in step.reductions.values():
            assert found.scores is None and found.sources is not None
            assert int((~found.kept).sum()) == how.removed(len(found.kept))
            assert found.kept[found.sources].all()  # all are part of a token that stayed
            stayed = found.kept.nonzero().flatten()
            assert torch.equal(found.sources[stayed, 0], stayed)


def test_blocks_that_dsap_spares_are_not_reduced(sdxl: SDXL, monkeypatch: pytest.MonkeyPatch) -> None:
    run = recording(sdxl, monkeypatch, prune="at-edm").runs[1]
    sites = list(TINY.unet.attention_sites())
    for step in run.steps:
        plan = parse_preset("at-edm").plan(step.number, 4, sites)
        assert set(step.reductions) == set(plan)
        assert run.plans[step.number] == StepPlan(plan)
    assert len(run.steps[0].reductions) < len(run.steps[1].reductions)


@pytest.mark.parametrize("sampling", ["euler", "heun"])
def test_steps_and_their_costs(sdxl: SDXL, monkeypatch: pytest.MonkeyPatch, sampling: str) -> None:
    found = recording(sdxl, monkeypatch, prune="at-edm", sampling=sampling)
    for run in found.runs:
        check_costs(run, sdxl, found, calls=[2, 2, 2, 1] if sampling == "heun" else [1] * 4)
        assert [step.sigma for step in run.steps] == found.run.sigmas[:-1].tolist()
    final = found.runs[0].steps[-1].denoised
    (expected,) = latents(sdxl, sampling)
    error = (final - expected).abs().max().item()
    print(f"max error {error:.2e}")
    assert error < 1e-4 * expected.abs().max().item()  # the last step goes to sigma 0, where the denoised latent is


def check_costs(run: RecordedRun, sdxl: SDXL, found: Recording, calls: list[int]) -> None:
    for step, cost, times in zip(run.steps, run.costs, calls, strict=True):
        flops = count(sdxl.config, 8, 8, run.plans[step.number].tokens, 77)
        assert cost.total == 2 * times * flops.total
        for site in sdxl.config.unet.attention_sites():
            works = [work.flops for work in flops.works if work.name == site.name and "ranking" not in work.kind]
            assert cost.blocks[site.name] == 2 * times * sum(works)


def latents(sdxl: SDXL, sampling: str) -> list[torch.Tensor]:
    seen: list[torch.Tensor] = []
    sdxl.generate([PROMPT], sampling=sampling, on_step=lambda _, x: seen.append(x[0]), **SETTINGS)
    return seen[-1:]


def test_attention_is_recorded_at_the_chosen_steps(sdxl: SDXL, monkeypatch: pytest.MonkeyPatch) -> None:
    names = {site.name for site in TINY.unet.attention_sites()}
    runs = recording(sdxl, monkeypatch, prune="at-edm", attention_steps=[2, 4], against="tome").runs
    assert [set(step.attention) for step in runs[1].steps] == [set(), names, set(), names]
    assert [set(step.attention) for step in runs[2].steps] == [set(), names, set(), names]
    assert not any(step.attention for step in runs[0].steps)
    alone = recording(sdxl, monkeypatch, attention_steps=[1]).runs
    assert [set(step.attention) for step in alone[0].steps] == [names, set(), set(), set()]


@pytest.mark.parametrize(
    ("prune", "steps", "expected"),
    [("at-edm", 50, {0, 15, 49}), ("tome", 50, {0, 49}), (None, 50, {0, 25, 49}), ("at-edm", 1, {0})],
)
def test_attention_is_recorded_before_and_after_the_early_steps(
    prune: str | None, steps: int, expected: set[int]
) -> None:
    run = check_settings(Settings(steps=steps, prune=prune), TINY)
    assert check_attention_steps(None, [run], [None if prune is None else parse_preset(prune)]) == expected


def test_a_picture_to_start_from(sdxl: SDXL, monkeypatch: pytest.MonkeyPatch) -> None:
    image = sdxl.generate([PROMPT], **SETTINGS)[0]
    found = recording(sdxl, monkeypatch, prune="at-edm", image=image, strength=0.5)
    assert [step.number for step in found.runs[1].steps] == [2, 3]
    assert len(found.runs[1].costs) == 2
    expected = sdxl.generate([PROMPT], prune="at-edm", image=image, strength=0.5, **SETTINGS)[0]
    assert found.runs[1].image.tobytes() == expected.tobytes()


def test_a_mask(sdxl: SDXL) -> None:
    image, mask = Image.new("RGB", (64, 64), "red"), Image.new("L", (64, 64))
    mask.paste(255, (0, 0, 32, 64))
    settings: dict[str, Any] = {**SETTINGS, "image": image, "mask": mask, "strength": 0.5}
    found = sdxl.inspect(PROMPT, prune="at-edm", **settings)
    expected = sdxl.generate([PROMPT], prune="at-edm", **settings)[0]
    assert found.pictures["at-edm"].tobytes() == expected.tobytes()


def test_progress_is_told(sdxl: SDXL) -> None:
    seen: list[tuple[str, int]] = []
    sdxl.inspect(PROMPT, prune="at-edm", on_step=lambda *what: seen.append(what), **{**SETTINGS, "steps": 2})
    assert seen == [("dense", 0), ("dense", 1), ("at-edm", 0), ("at-edm", 1)]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"against": "tome"}, "against is 'tome' without a method, expected both: two methods are compared"),
        ({"skip": "deepcache:every=2", "attention_steps": [4]}, "attention step is 4, expected 1 to 3: no later one"),
        ({"skip": "deepcash"}, "unknown skip method 'deepcash'"),
        ({"attention_steps": [0]}, "attention step is 0, expected 1 to 4"),
        ({"attention_steps": [5]}, "attention step is 5, expected 1 to 4"),
        ({"images_per_prompt": 2}, "images_per_prompt is 2, expected 1: the page shows one picture"),
        ({"prune": "at-edn"}, "unknown preset 'at-edn'"),
    ],
)
def test_bad_settings_are_refused(sdxl: SDXL, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sdxl.inspect(PROMPT, **{**SETTINGS, **settings})
    with pytest.raises(ValueError, match="has a refiner, expected none"):
        replace(sdxl, refiner=sdxl).inspect("a cat")
    with pytest.raises(ValueError, match="expected one string"):
        sdxl.inspect([PROMPT])  # type: ignore[arg-type]


def test_prompts_encoded_ahead(sdxl: SDXL, tmp_path: Path) -> None:
    ahead = sdxl.encode_ahead([PROMPT])
    assert ahead.inspect(PROMPT, **SETTINGS).html == sdxl.inspect(PROMPT, **SETTINGS).html


def test_the_recorder_stands_in_for_a_unet(sdxl: SDXL) -> None:
    recorder = Recorder(sdxl.unet, 0, (), ())
    assert recorder.dtype == sdxl.unet.dtype
