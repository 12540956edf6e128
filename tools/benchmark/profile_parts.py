"""Time of a U-Net call by part (convolution, attention, ranking, ...), measured with torch's profiler."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

from atedm import fills, merging, pruning, recovery, sito, toma
from atedm.tokens import TokenSet
from minisdxl.fast import cpu, winograd
from tools.benchmark.bench_models import Contender

# Parts by torch operator. The outermost of nested operators counts.
OPERATORS = {
    "aten::conv2d": "convolution",
    "aten::linear": "projections",
    "mkldnn::_linear_pointwise": "projections",
    "aten::scaled_dot_product_attention": "attention",
    "aten::_scaled_dot_product_flash_attention_for_cpu": "attention",
    "aten::group_norm": "normalization",
    "aten::layer_norm": "normalization",
}
# Parts by Python function, where several operators make one part: Winograd convolution, attention to few keys, and all
# that a token plan adds to the layers.
LABELS: tuple[tuple[Any, str, str], ...] = (
    (winograd, "convolve", "convolution"),
    (cpu, "attention", "attention"),
    (pruning, "scores", "ranking"),
    (pruning, "top_k", "ranking"),
    (merging, "match_tokens", "ranking"),
    (sito.SiTo, "match", "ranking"),
    (toma.ToMA, "match", "ranking"),
    (TokenSet, "keep", "gather"),
    (merging.Matching, "merge", "gather"),
    (sito.Without, "merge", "gather"),
    (toma.Assignment, "merge", "gather"),
    (pruning, "recover", "recovery"),
    (recovery.Copy, "__call__", "recovery"),
    (fills.Fill, "__call__", "recovery"),
    (merging.Matching, "unmerge", "recovery"),
    (sito.Without, "unmerge", "recovery"),
    (toma.Assignment, "unmerge", "recovery"),
)
PARTS = (*dict.fromkeys(OPERATORS.values()), "ranking", "gather", "recovery", "rest")


@contextmanager
def labelled() -> Iterator[None]:
    """A context in which the profiler records the functions in ``LABELS`` as parts."""

    def mark(function: Callable[..., Any], part: str) -> Callable[..., Any]:
        @functools.wraps(function)
        def marked(*arguments: Any, **named: Any) -> Any:
            with record_function(part):
                return function(*arguments, **named)

        return marked

    with ExitStack() as stack:
        for owner, name, part in LABELS:
            stack.enter_context(patch.object(owner, name, mark(getattr(owner, name), part)))
        yield


def spent(contender: Contender, device: torch.device) -> dict[str, float]:
    """Milliseconds of one call for each of ``PARTS``; on a GPU the time of the kernels."""
    cuda = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    with labelled(), torch.no_grad(), profile(activities=activities) as profiler:
        contender.call()
        if cuda:
            torch.cuda.synchronize(device)
    total = dict.fromkeys(PARTS, 0.0)
    for event in profiler.events():
        if event.device_type == DeviceType.CPU and event.name not in PARTS:
            own = event.self_device_time_total if cuda else event.self_cpu_time_total
            total[_part(event)] += own / 1000
    return total


def _part(event: Any) -> str:
    part = "rest"
    while event is not None:
        part = event.name if event.name in PARTS else OPERATORS.get(event.name, part)
        event = event.cpu_parent
    return part
