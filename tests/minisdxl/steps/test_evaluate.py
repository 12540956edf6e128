"""Calls of the U-Net that reuse earlier ones, against the DeepCache and T-GATE packages on diffusers' U-Net."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from DeepCache import DeepCacheSDHelper
from diffusers import UNet2DConditionModel
from tgate.tgate_utils import register_forward, tgate_scheduler
from torch import Tensor

from atedm import BlockPlan, Merging, TokenPlan, parse_preset
from minisdxl.runtime.compiled import CompiledUNet
from minisdxl.steps.evaluate import evaluate
from minisdxl.steps.kept import Kept
from minisdxl.steps.methods import DeepCache, RunFacts, TGate
from minisdxl.steps.plan import SHALLOW, StepPlan
from minisdxl.unet import UNet
from tests.minisdxl.test_unet import peer_with_vector
from tests.minisdxl.tiny import SHALLOW_UNET, SMALL_UNET, random_unet, unet_inputs

STEPS = 9
FACTS = RunFacts(STEPS, 0, tuple(float(STEPS - step) for step in range(STEPS + 1)), 7.0, False)


@dataclass
class Parity:
    """A U-Net, its peer, and the inputs of both branches at each step."""

    unet: UNet
    peer: UNet2DConditionModel
    steps: list[Tensor]  # (1, 4, h, w)
    times: list[int]
    context: Tensor  # (2, T, c): unconditional, conditional
    vector: Tensor


@pytest.fixture
def parity() -> Parity:
    torch.manual_seed(0)
    unet = random_unet(SMALL_UNET, torch.float64, 1.0)
    x, _, context, vector = unet_inputs(SMALL_UNET, (13, 19), torch.float64, 1.0)
    context, vector = context[:2], vector[:2].mean(0, keepdim=True).expand(2, -1)
    steps = [x[:1] + 0.05 * step * torch.randn_like(x[:1]) for step in range(STEPS)]
    times = list(range(900, 900 - 50 * STEPS, -50))
    return Parity(unet, peer_with_vector(unet, vector[:1]), steps, times, context, vector)


def ours(parity: Parity, plans: list[StepPlan]) -> list[Tensor]:
    """What our U-Net predicts at each step, in the branches that run."""
    kept, found = Kept(), []
    for x, time, plan in zip(parity.steps, parity.times, plans, strict=True):
        rows = {"both": [0, 1], "conditional": [1], "unconditional": [0], "kept": [1]}[plan.guidance]
        branches = tuple(("unconditional", "conditional")[row] for row in rows)
        text = parity.unet.project_context(parity.context[rows])
        inputs = torch.cat([x] * len(rows)), torch.full((len(rows),), time), text, parity.vector[rows]
        predicted, new = evaluate(parity.unet, plan, *inputs, kept.take(branches))
        averaged = [kind for kind in ("self", "cross") if getattr(plan, f"{kind}_attention") == "averaged"]
        kept.put(new, branches, frozenset(averaged))
        found.append(predicted)
    return found


def error(found: list[Tensor], expected: list[Tensor]) -> float:
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("branch", [0, 2, 4, 7])
@torch.no_grad()
def test_deepcache_equals_its_package(parity: Parity, branch: int) -> None:
    scheduler = SimpleNamespace(timesteps=parity.times)
    helper = DeepCacheSDHelper(pipe=SimpleNamespace(unet=parity.peer, scheduler=scheduler))
    helper.set_params(cache_interval=3, cache_branch_id=branch)
    helper.enable()
    theirs = [
        parity.peer(torch.cat([x] * 2), torch.tensor(time), parity.context, return_dict=False)[0]
        for x, time in zip(parity.steps, parity.times, strict=True)
    ]
    helper.disable()
    plans = DeepCache(every=3, branch=branch).plans([StepPlan()] * STEPS, FACTS)
    found = error(ours(parity, plans), theirs)
    moved = error(ours(parity, [StepPlan()] * STEPS), theirs)
    print(f"branch {branch}: error {found:.1e}, to dense {moved:.1e}")
    assert found < 1e-10
    assert moved > 1e-4


@pytest.mark.parametrize(("gate", "every"), [(6, 4), (1, 5)])
@torch.no_grad()
def test_tgate_equals_its_package(parity: Parity, gate: int, every: int) -> None:
    theirs = []
    for step, (x, time) in enumerate(zip(parity.steps, parity.times, strict=True)):
        cross, own, keep_shape = tgate_scheduler(step, gate_step=gate, sp_interval=every, fi_interval=1, warm_up=2)
        register_forward(parity.peer, "Attention", ca_kward=cross, sa_kward=own, keep_shape=keep_shape)
        rows = [0, 1] if step < gate else [0]
        batch = torch.cat([x] * len(rows)), torch.tensor(time), parity.context[rows]
        theirs.append(parity.peer(*batch, return_dict=False)[0])
    plans = TGate(gate=gate, warm=2, every=every).plans([StepPlan()] * STEPS, FACTS)
    found = error(ours(parity, plans), theirs)
    print(f"gate {gate}, every {every}: error {found:.1e}")
    assert found < 1e-10


@torch.no_grad()
def test_a_reduced_block_computes_its_attention(parity: Parity) -> None:
    """Under a plan that reduces all blocks, reusing attention changes nothing; a shallow step is as without it."""
    sites = SMALL_UNET.attention_sites()
    tokens = TokenPlan({site.name: BlockPlan.merging(Merging(0.5), site.depth) for site in sites})
    plain = ours(parity, [StepPlan(tokens)] * STEPS)
    first, later = (StepPlan(tokens, cross_attention=state) for state in ("kept", "reused"))
    assert error(ours(parity, [first] + [later] * (STEPS - 1)), plain) == 0


@torch.no_grad()
def test_plans_of_tokens_hold_in_whole_and_shallow_calls(parity: Parity) -> None:
    """A shallow call at the deepest branch runs every attention block but those of the middle."""
    sites = list(SMALL_UNET.attention_sites())
    plan = parse_preset("at-edm:rho=0.5,tau=0").plan(0, 1, sites)
    whole = ours(parity, [StepPlan(plan)] * STEPS)
    with_branch = ours(parity, [StepPlan(plan, branch=0)] * STEPS)
    assert error(with_branch, whole) == 0
    first = StepPlan(plan, branch=0)
    shallow = ours(parity, [first, StepPlan(plan, SHALLOW, branch=0)] + [first] * (STEPS - 2))
    assert error(shallow[2:], whole[2:]) == 0
    assert error(shallow[1:2], whole[1:2]) > 1e-4


@pytest.mark.slow
@torch.no_grad()
def test_compiled_each_plan_is_one_graph() -> None:
    """Nothing is read back from the device in a step, and the results are those of the plain U-Net."""
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, _: object) -> Callable[..., object]:
        graphs.append(graph)
        return graph.forward

    unet = random_unet(SHALLOW_UNET, torch.float32, 1.0)
    x, time, context, vector = unet_inputs(SHALLOW_UNET, (8, 8), torch.float32, 1.0)
    text = unet.project_context(context)
    compiled = CompiledUNet(unet, backend=backend)  # type: ignore[arg-type]
    kept: dict[str, Tensor] = {}
    plans = [
        StepPlan(branch=0, self_attention="kept", cross_attention="kept"),
        StepPlan(unet=SHALLOW, branch=0),
        StepPlan(self_attention="reused", cross_attention="reused"),
    ]
    for plan in (*plans, *plans):
        found, new = compiled.evaluate(plan, x, time, text, vector, kept)
        expected, _ = evaluate(unet, plan, x, time, text, vector, kept)
        kept |= new
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    print(f"{len(graphs)} graphs for {len(plans)} plans")
    assert len(graphs) == len(plans)
