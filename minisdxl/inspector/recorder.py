"""Records what the U-Net does with its tokens, through the token plans that it is given.

A recorded plan does what the plan does that it was made from, and shows a :class:`Recorder` what came out. Modules are
not touched, and no number of the picture changes. Of a batch, the last row is recorded: the prompt's half of guidance,
except in steps that run without the prompt. Shapes: N tokens of an attention block's feature map.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from atedm.fills import Fill
from atedm.graph import AttentionInputs, lazy_graphs
from atedm.plan import UNTOUCHED, Attended, BlockPlan, LayerPlan, TokenPlan
from atedm.pruning import Pruning
from atedm.ranking import scores
from atedm.recovery import Copy, Restore
from atedm.reduction import Merge
from atedm.tokens import TokenSet
from minisdxl.inspector.groups import Groups, groups_of
from minisdxl.inspector.maps import AttentionMaps, attention_maps
from minisdxl.sampler import Denoiser
from minisdxl.steps.evaluate import Tensors, evaluate
from minisdxl.steps.own_change import OwnChange
from minisdxl.steps.plan import WHOLE, StepPlan
from minisdxl.unet import PromptKV, UNet


@dataclass(frozen=True)
class Reduction:
    """What a transformer layer did with the N grid positions of its block, for one picture.

    ``held`` (N,) says which of them were tokens when the layer began, ``kept`` (N,) which stayed. ``scores`` (N,) are
    NaN where there was no token; ``None`` for merging, which ranks no tokens. ``sources`` (N, m) are the positions that
    a token takes its later value or change from, its own if it stayed, -1 where there was no token; ``None`` if the
    recovery reads no kept token.
    """

    layer: int
    held: Tensor
    kept: Tensor
    scores: Tensor | None
    sources: Tensor | None


@dataclass
class Step:
    """What one denoising step did: its number from 0, its noise level, and D(x; sigma) as (4, h, w)."""

    number: int
    sigma: float
    denoised: Tensor
    reductions: dict[str, list[Reduction]]  # by attention block; blocks that kept all tokens are not in it
    attention: dict[str, AttentionMaps]  # by attention block, in the steps that were chosen


def has_all_maps(plan: StepPlan) -> bool:
    """Whether every block computes its attention anew at this step, and for the prompt."""
    reuses = "reused" in (plan.self_attention, plan.cross_attention)
    return plan.unet == WHOLE and not reuses and plan.guidance != "unconditional"


class Recorder:
    """Stands in for a U-Net and watches its denoiser; ``steps`` are the steps recorded so far.

    ``attention_steps`` are the steps of which attention is recorded. Where one of them does not compute all attention
    maps, the next step that does is recorded instead. ``words`` are the positions of each word's tokens in the context,
    and ``first`` is the first step that is run.
    """

    def __init__(self, unet: UNet, first: int, attention_steps: Collection[int], words: Sequence[Sequence[int]]):
        self.unet, self.first, self.words = unet, first, words
        self.steps: list[Step] = []
        self._waiting = set(attention_steps)
        self._current = self._new_step(first, 0.0)

    @property
    def dtype(self) -> torch.dtype:
        """As :attr:`UNet.dtype`."""
        return self.unet.dtype

    def project_context(self, context: Tensor) -> PromptKV:
        """As :meth:`UNet.project_context`."""
        return self.unet.project_context(context)

    def __call__(self, x: Tensor, c_noise: Tensor, text: PromptKV, vector: Tensor, plan: TokenPlan) -> Tensor:
        """As :meth:`UNet.forward`, with the keys and values of :meth:`project_context`."""
        return self.unet(x, c_noise, text, vector, self._recorded(StepPlan(plan), plan))

    def evaluate(self, plan: StepPlan, *inputs: Any) -> tuple[Tensor, Tensors]:
        """As :func:`minisdxl.steps.evaluate.evaluate`, of this U-Net."""
        return evaluate(self.unet, plan, *inputs, watched=lambda tokens: self._recorded(plan, tokens))

    def watch(self, denoiser: Denoiser) -> Denoiser:
        """The same denoiser, which tells the recorder of each call. Of a step with several, the first is recorded."""

        def watched(x: Tensor, sigma: float, step: int) -> Tensor:
            self._current = self._new_step(self.first + step, sigma)
            denoised = denoiser(x, sigma, step)
            if not self.steps or self.steps[-1].number < self._current.number:
                self._current.denoised = denoised[-1].cpu().clone()
                self.steps.append(self._current)
            return denoised

        return watched

    @staticmethod
    def _new_step(number: int, sigma: float) -> Step:
        return Step(number, sigma, torch.empty(0), {}, {})

    def _recorded(self, step: StepPlan, plan: TokenPlan) -> TokenPlan:
        """The plan with every layer recorded that it names, and the first layer of each block."""
        due = {number for number in self._waiting if number <= self._current.number and has_all_maps(step)}
        self._waiting -= due
        blocks = {}
        for site in self.unet.config.attention_sites():
            layers = dict(plan[site.name].layers) if site.name in plan else {}
            blocks[site.name] = BlockPlan(
                tuple(
                    (index, self._recorded_layer(site.name, index, layers.get(index, UNTOUCHED), bool(due)))
                    for index in sorted({0, *layers})
                )
            )
        return TokenPlan(blocks)

    def _recorded_layer(self, block: str, index: int, plan: LayerPlan, attention: bool) -> RecordedLayer:
        watcher = LayerWatcher(self._current, block, index, self.words if attention and index == 0 else None)
        return RecordedLayer(plan.pruning, plan.before_feed_forward, plan.merging, watched=plan, watcher=watcher)


@dataclass(frozen=True)
class RecordedLayer(LayerPlan):
    """Does what the layer plan ``watched`` does, and shows its ``watcher`` what came out."""

    watched: LayerPlan = field(kw_only=True)
    watcher: LayerWatcher = field(kw_only=True, compare=False)

    def merges(self, tokens: TokenSet) -> tuple[Merge, Merge, Merge]:
        """As :meth:`LayerPlan.merges`."""
        merges = self.watched.merges(tokens)
        self.watcher.merged(tokens, merges)
        return merges

    def attend(self, kind: str, attention: Callable[[], Attended]) -> Attended:
        """As :meth:`LayerPlan.attend`."""
        return self.watched.attend(kind, attention)

    def prune(
        self,
        tokens: TokenSet,
        self_attention: AttentionInputs,
        cross_attention: AttentionInputs,
        *,
        before_feed_forward: bool,
    ) -> tuple[TokenSet, list[Restore]]:
        """As :meth:`LayerPlan.prune`."""
        kept, restores = self.watched.prune(
            tokens, self_attention, cross_attention, before_feed_forward=before_feed_forward
        )
        if before_feed_forward:  # each layer asks twice, here first
            self.watcher.attended(tokens, self_attention, cross_attention, self.pruning)
        if self.pruning is not None:
            for restore in restores:
                self.watcher.pruned(tokens, kept, restore, self.pruning, self_attention, cross_attention)
        return kept, restores


@dataclass
class LayerWatcher:
    """Takes down what one layer does in one step; with ``words``, its attention too."""

    step: Step
    block: str
    layer: int
    words: Sequence[Sequence[int]] | None
    groups: Groups | None = None  # of the tokens, around the sub-layers that merge

    def merged(self, tokens: TokenSet, merges: Sequence[Merge]) -> None:
        """Records what the first layer merges. Later layers match anew."""
        groups = next((found for found in map(groups_of, merges) if found is not None), None)
        if groups is None or self.layer > 0:
            return
        self.groups = groups
        kept = torch.zeros(tokens.count, dtype=torch.bool, device=groups.places.device).scatter(0, groups.places, True)
        self._add(Reduction(0, torch.ones_like(kept), kept, None, groups.sources()))

    def pruned(
        self,
        tokens: TokenSet,
        kept: TokenSet,
        restore: Restore,
        how: Pruning,
        self_attention: AttentionInputs,
        cross_attention: AttentionInputs,
    ) -> None:
        """Records a pruning. The scores are computed again, on the whole batch, so they are those that decided."""
        if kept.positions is None or kept.count == tokens.count:
            return
        graphs = lazy_graphs(self_attention, cross_attention, how.graph, how.sharpness)
        ranked = scores(how.ranking, tokens, *graphs, how.iterations, how.seed)[-1].cpu().double()
        positions = torch.arange(tokens.size) if tokens.positions is None else tokens.positions[-1].cpu()
        stayed = kept.positions[-1].cpu()
        sources = sources_of(restore)
        if sources is not None:
            nowhere = torch.full((tokens.size, sources.shape[1]), -1)
            sources = nowhere.index_copy(0, positions, stayed[sources.cpu()])
        if isinstance(restore, OwnChange) and sources is not None:  # a token that has stayed before copies itself
            sources = torch.where(restore.has_history()[-1].cpu()[:, None], positions[:, None], sources)
        nothing = torch.zeros(tokens.size, dtype=torch.bool)
        self._add(
            Reduction(
                self.layer,
                nothing.index_fill(0, positions, True),
                nothing.index_fill(0, stayed, True),
                torch.full((tokens.size,), torch.nan, dtype=torch.float64).index_copy(0, positions, ranked),
                sources,
            )
        )

    def attended(
        self,
        tokens: TokenSet,
        self_attention: AttentionInputs,
        cross_attention: AttentionInputs,
        pruning: Pruning | None,
    ) -> None:
        """Records the attention, if it is asked for."""
        if self.words is None:
            return
        ranked_by_text = pruning is not None and pruning.ranking == "ca-wpr"
        sharpness = 1.0 if pruning is None else pruning.sharpness
        self.step.attention[self.block] = attention_maps(
            tokens.grid, self_attention, cross_attention, self.words, self.groups, ranked_by_text, sharpness
        )

    def _add(self, reduction: Reduction) -> None:
        on_cpu = (None if x is None else x.cpu() for x in (reduction.scores, reduction.sources))
        reduction = Reduction(reduction.layer, reduction.held.cpu(), reduction.kept.cpu(), *on_cpu)
        self.step.reductions.setdefault(self.block, []).append(reduction)


def sources_of(restore: Restore) -> Tensor | None:
    """Which of the kept tokens each of n tokens is recovered from, (n, m) indices; ``None`` if from none of them."""
    if isinstance(restore, OwnChange):
        return sources_of(restore.neighbours)
    if isinstance(restore, Copy):
        return restore.source[-1].unsqueeze(-1)
    return restore.sources[-1] if isinstance(restore, Fill) and restore.sources is not None else None
