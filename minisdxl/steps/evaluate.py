"""One call of the U-Net under a step plan: parts of it may take what an earlier call has kept.

:func:`evaluate` runs the blocks of ``minisdxl/unet.py`` in their order. Tensors that are kept go in and come out as a
dictionary, so that nothing is remembered in modules and the call can be compiled.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from atedm.graph import AttentionInputs
from atedm.plan import Attended, BlockPlan, LayerPlan, TokenPlan
from atedm.pruning import WITH_HISTORY, prune
from atedm.recovery import Restore
from atedm.tokens import TokenSet
from minisdxl.embedding import sinusoidal_embedding
from minisdxl.steps.own_change import OwnChange
from minisdxl.steps.plan import SHALLOW, StepPlan
from minisdxl.unet import PromptKV, UNet

Tensors = dict[str, Tensor]


def evaluate(
    unet: UNet,
    plan: StepPlan,
    x: Tensor,
    c_noise: Tensor,
    text: PromptKV,
    vector: Tensor,
    kept: Mapping[str, Tensor],
    *,
    watched: Callable[[TokenPlan], TokenPlan] = lambda tokens: tokens,
) -> tuple[Tensor, Tensors]:
    """The U-Net's output for ``x`` (b, C, H, W), and the tensors that ``plan`` says to keep.

    ``kept`` are those of earlier calls with as many latents b. A shallow call runs the ``branch`` + 1 outermost blocks
    on both ways, and takes what came up to them from below in an earlier call (DeepCache, arXiv:2312.00858).
    ``watched`` may replace the token plan by one that does the same and records it.
    """
    plan.tokens.check(unet.config.attention_sites())
    new: Tensors = {}
    tokens = watched(_layer_plans(unet, plan, kept, new))
    embedding = unet.time_embed(sinusoidal_embedding(c_noise, unet.config.model_channels).to(x.dtype))
    embedding = embedding + unet.label_emb(vector.to(x.dtype))
    blocks = len(unet.input_blocks)
    outer = blocks if plan.branch is None else plan.branch + 1
    skips = []
    for block in unet.input_blocks[: outer if plan.unet == SHALLOW else blocks]:
        x = block(x, embedding, text, tokens, x.shape[-2:])
        skips.append(x)
    if plan.unet != SHALLOW:
        x = unet.middle_block(x, embedding, text, tokens, x.shape[-2:])
    for left, block in zip(range(blocks, 0, -1), unet.output_blocks, strict=True):
        if left > len(skips):
            continue  # below the branch of a shallow call
        if left == outer and plan.unet == SHALLOW:
            x = kept[f"below {plan.branch}"]
        elif left == outer and plan.branch is not None:
            new[f"below {plan.branch}"] = x
        skip = skips.pop()
        next_size = skips[-1].shape[-2:] if skips else x.shape[-2:]
        x = block(torch.cat([x, skip], dim=1), embedding, text, tokens, next_size)
    return unet.out(x), new


@runtime_checkable
class Evaluator(Protocol):
    """A U-Net that has its own way to run :func:`evaluate`, such as a compiled one."""

    def evaluate(self, plan: StepPlan, *inputs: Any) -> tuple[Tensor, Tensors]:
        """The output, and the tensors to keep, for the other arguments of :func:`evaluate`."""


def evaluator(unet: object) -> Callable[..., tuple[Tensor, Tensors]]:
    """:func:`evaluate` of that U-Net, in its own way if it has one.

    Raises ``ValueError`` for what can run no step plans.
    """
    if isinstance(unet, UNet):
        return partial(evaluate, unet)
    if isinstance(unet, Evaluator):
        return unet.evaluate
    raise ValueError(f"a {type(unet).__name__} runs no step plans, expected a U-Net, compiled or not")


def _layer_plans(unet: UNet, plan: StepPlan, kept: Mapping[str, Tensor], new: Tensors) -> TokenPlan:
    """The token plan, with blocks that reuse attention where the step plan says so.

    A block whose tokens are reduced computes its attention: what is kept has a value for every token.
    """
    states = {"self": plan.self_attention, "cross": plan.cross_attention}
    tokens = TokenPlan({name: _with_history(name, block, kept, new) for name, block in plan.tokens.items()})
    if set(states.values()) == {"computed"}:
        return tokens
    blocks = {
        site.name: BlockPlan(
            tuple(
                (index, KeepingLayer(name=f"{site.name} {index}", states=states, kept=kept, new=new))
                for index in range(site.depth)
            )
        )
        for site in unet.config.attention_sites()
    }
    return TokenPlan({**blocks, **tokens})


def _with_history(name: str, block: BlockPlan, kept: Mapping[str, Tensor], new: Tensors) -> BlockPlan:
    """A block plan whose recovery, if it is one of ``WITH_HISTORY``, finds what earlier steps have kept."""
    return BlockPlan(
        tuple(
            (index, layer)
            if layer.pruning is None or layer.pruning.recovery not in WITH_HISTORY
            else (index, RecoveringLayer(layer.pruning, layer.before_feed_forward, None, f"{name} {index}", kept, new))
            for index, layer in block.layers
        )
    )


@dataclass(frozen=True)
class RecoveringLayer(LayerPlan):
    """A layer plan that prunes, with a recovery by each token's own history."""

    name: str = ""
    kept: Mapping[str, Tensor] = field(default_factory=dict)
    new: Tensors = field(default_factory=dict)

    def prune(
        self,
        tokens: TokenSet,
        self_attention: AttentionInputs,
        cross_attention: AttentionInputs,
        *,
        before_feed_forward: bool,
    ) -> tuple[TokenSet, list[Restore]]:
        """See :meth:`LayerPlan.prune`."""
        if self.pruning is None or before_feed_forward != self.before_feed_forward:
            return tokens, []
        how = replace(self.pruning, recovery="nearest-change")
        held, neighbours = prune(tokens, self_attention, cross_attention, how)
        if held.count == tokens.count:
            return held, [neighbours]
        if tokens.positions is not None or held.positions is None:
            raise ValueError(f"recovery {self.pruning.recovery} is for one pruning in a block, expected one of layers")
        linear = self.pruning.recovery == "own-change-linear"
        return held, [OwnChange(tokens, held.positions, neighbours, linear, self.name, self.kept, self.new)]


@dataclass(frozen=True)
class KeepingLayer(LayerPlan):
    """A layer plan whose attention is kept in ``new``, or taken from ``kept`` (T-GATE, arXiv:2404.02747)."""

    name: str = ""
    states: Mapping[str, str] = field(default_factory=dict)  # "self" and "cross" -> one of ATTENTION
    kept: Mapping[str, Tensor] = field(default_factory=dict)
    new: Tensors = field(default_factory=dict)

    def attend(self, kind: str, attention: Callable[[], Attended]) -> Attended:
        """See :meth:`LayerPlan.attend`."""
        state, name = self.states[kind], f"{kind} {self.name}"
        if state == "reused":
            return self.kept[name], NOTHING
        attended, inputs = attention()
        if state != "computed":
            self.new[name] = torch.stack(attended.chunk(2)).mean(dim=0) if state == "averaged" else attended
        return attended, inputs


# In place of the inputs of an attention map that was not computed. No layer that reuses attention ranks its tokens.
NOTHING = AttentionInputs(torch.empty(0), torch.empty(0), 1.0, None)
