"""The graphs on what a trained model attends to: the bundled one, while it draws a picture."""

from __future__ import annotations

from contextlib import ExitStack

import pytest
import torch
from torch import Tensor

from atedm import AttentionInputs, ByHeadGraph, gwpr, kept_count, rank, top_k
from atedm.graph.by_head import SUBSAMPLING_STRIDE
from minisdxl.pipeline import SDXL

RHO = 0.63
TIE = 1e-4  # relative difference of scores that are a tie for float32


@pytest.fixture(scope="module")
def attention(shapes: SDXL) -> dict[str, AttentionInputs]:
    """Self-attention of the first layer of each attention block, at the first and the last of three steps."""
    seen: dict[str, list[AttentionInputs]] = {}

    def keep(name: str, output: tuple[Tensor, AttentionInputs]) -> None:
        seen.setdefault(name, []).append(output[1])

    with ExitStack() as hooks:
        for name, module in shapes.unet.named_modules():
            if name.endswith("transformer_blocks.0.attn1"):
                hooks.enter_context(module.register_forward_hook(lambda *call, name=name: keep(name, call[-1])))
        shapes.generate(["a small red circle above a big blue square on a white background"], steps=3, cfg=7.0, seed=0)
    return {f"{name}, step {step}": calls[step] for name, calls in seen.items() for step in (0, 2)}


def kept_by(scores: Tensor) -> Tensor:
    return top_k(scores, kept_count(scores.shape[1], RHO))


def overlap(ours: Tensor, theirs: Tensor) -> float:
    """Share of kept tokens that are the same."""
    same = sum(len(set(x) & set(y)) for x, y in zip(ours.tolist(), theirs.tolist(), strict=True))
    return same / ours.numel()


def assert_same_but_for_ties(ours: Tensor, theirs: Tensor, scores: Tensor) -> None:
    """The same tokens, but for some whose ``scores`` are as good as the lowest that was kept."""
    for x, y, row in zip(ours.tolist(), theirs.tolist(), scores.tolist(), strict=True):
        lowest = min(row[i] for i in y)
        assert all(abs(row[i] - lowest) <= TIE * lowest for i in set(x) ^ set(y))


def without(kept: Tensor, count: int) -> Tensor:
    return torch.tensor([[i for i in range(count) if i not in set(row)] for row in kept.tolist()])


def test_streamed_graph_keeps_and_recovers_the_same(attention: dict[str, AttentionInputs]) -> None:
    """In float32. Scores of the two differ by rounding, which may decide between tokens that are a tie for it."""
    worst = 0.0
    for inputs in attention.values():
        held, streamed = inputs.graph("by-head"), inputs.graph("streamed")
        scores = gwpr(held)
        kept = kept_by(scores)
        worst = max(worst, ((gwpr(streamed) - scores).abs() / scores).max().item())
        assert_same_but_for_ties(kept_by(gwpr(streamed)), kept, scores)
        pruned = without(kept, scores.shape[1])
        sources = streamed.argmax_query(kept, pruned), held.argmax_query(kept, pruned)
        assert (sources[0] == sources[1]).float().mean() > 0.999
    print(f"float32 scores, streamed against held: largest relative difference {worst:.1e}")
    assert len(attention) == 14
    assert worst < TIE


def test_float32_keeps_what_float64_keeps(attention: dict[str, AttentionInputs]) -> None:
    for inputs in attention.values():
        exact = AttentionInputs(inputs.query.double(), inputs.key.double(), inputs.scale).graph()
        scores = gwpr(exact)
        assert_same_but_for_ties(kept_by(gwpr(inputs.graph())), kept_by(scores), scores)


def test_cheaper_rankings_and_what_they_agree_on(attention: dict[str, AttentionInputs]) -> None:
    """Printed for whoever chooses: share of the tokens that exact G-WPR keeps at rho 0.63, and its iterations."""
    strides = (2, 3, 4, SUBSAMPLING_STRIDE, 8, 9, 16)
    print("\nkept tokens shared with G-WPR; sketches by stride" + "".join(f"{stride:>7}" for stride in strides), end="")
    print("  1 vote 3 votes  iterations")
    sketches, three_votes = [], []
    for name, inputs in attention.items():
        graph = inputs.graph()
        ranking = rank(graph)
        exact = kept_by(ranking.scores)
        shares = [overlap(kept_by(gwpr(ByHeadGraph.from_qk(*inputs[:3], stride))), exact) for stride in strides] + [
            overlap(kept_by(gwpr(graph, eps=0.0, max_iterations=votes)), exact) for votes in (1, 3)
        ]
        print(f"{name:>49}" + "".join(f"{share:7.3f}" for share in shares) + f"{ranking.iterations.max():>11}")
        sketches.append(shares[strides.index(SUBSAMPLING_STRIDE)])
        three_votes.append(shares[-1])
    # Loose, since they depend on the weights: random sets of this size share 0.37.
    assert min(sketches) > 0.5
    assert sum(sketches) / len(sketches) > 0.8
    assert min(three_votes) > 0.37
    assert sum(three_votes) / len(three_votes) > 0.8
