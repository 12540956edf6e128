"""The streamed graph: the answers of the held one, from loops and from its map, in a fraction of its memory."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from atedm import (
    AttentionGraph,
    AttentionInputs,
    DenseGraph,
    Pruning,
    StreamedGraph,
    TokenSet,
    parse_preset,
    prune,
    rank,
    top_k,
)

Shape = tuple[int, int, int, int]
PIECES = [1, 1000, 2**30]  # bytes: a row at a time, a few, all at once


def random_qk(queries: int, keys: int, spread: float = 2.0, batch: int = 2, heads: int = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    q, k = (spread * torch.randn(batch, heads, n, 4, generator=generator, dtype=torch.float64) for n in (queries, keys))
    return q, k


def random_scores(shape: tuple[int, ...], seed: int) -> Tensor:
    s = torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return s / s.sum(-1, keepdim=True)


def difference(x: Tensor, y: Tensor) -> float:
    assert x.shape == y.shape
    return (x - y).abs().max().item()


@pytest.mark.parametrize("piece_bytes", PIECES)
def test_by_loops(piece_bytes: int) -> None:
    q, k = random_qk(5, 7)
    graph: AttentionGraph = StreamedGraph.from_qk(q, k, 0.3, piece_bytes=piece_bytes)
    s_q, s_k = random_scores((2, 3, 5), 1), random_scores((2, 3, 7), 2)
    votes, gathered, entropy = graph.rmatvec(s_q), graph.matvec(s_k), graph.entropy()
    worst = 0.0
    for b in range(2):
        for h in range(3):
            a = []
            for i in range(5):
                row = [math.exp(0.3 * sum(x * y for x, y in zip(q[b, h, i].tolist(), key, strict=True)))
                       for key in k[b, h].tolist()]  # fmt: skip
                a.append([weight / sum(row) for weight in row])
            for j in range(7):
                expected = sum(a[i][j] * s_q[b, h, i].item() for i in range(5))
                worst = max(worst, abs(votes[b, h, j].item() - expected))
            for i in range(5):
                expected = sum(a[i][j] * s_k[b, h, j].item() for j in range(7))
                worst = max(worst, abs(gathered[b, h, i].item() - expected))
                expected = -sum(weight * math.log(weight) for weight in a[i])
                worst = max(worst, abs(entropy[b, h, i].item() - expected))
    print(f"streamed by loops, pieces of {piece_bytes} bytes: max error {worst:.1e}")
    assert graph.shape == (2, 3, 5, 7)
    assert worst < 1e-14


@pytest.mark.parametrize("piece_bytes", PIECES)
@pytest.mark.parametrize("spread", [1e-2, 2.0, 5.0])
@pytest.mark.parametrize("keys", [31, 9])
def test_answers_of_the_held_graph(piece_bytes: int, spread: float, keys: int) -> None:
    q, k = random_qk(31, keys, spread)
    held = DenseGraph.from_qk(q, k, 0.5)
    streamed = StreamedGraph.from_qk(q, k, 0.5, piece_bytes=piece_bytes)
    s_q, s_k = random_scores((2, 3, 31), 1), random_scores((2, 3, keys), 2)
    s_q[:, 1, ::3] = 0
    assert streamed.shape == held.shape
    assert torch.equal(streamed.uniform(), held.uniform())
    error = max(
        difference(streamed.rmatvec(s_q), held.rmatvec(s_q)),
        difference(streamed.matvec(s_k), held.matvec(s_k)),
        difference(streamed.entropy(), held.entropy()),
        difference(rank(streamed, cross=True).heads, rank(held, cross=True).heads),
    )
    print(f"spread {spread}, {keys} keys, pieces of {piece_bytes} bytes: max error {error:.1e}")
    assert error < 1e-10
    among, targets = torch.arange(0, 31, 2).expand(2, -1), torch.arange(1, keys, 3).expand(2, -1)
    assert torch.equal(streamed.argmax_query(among, targets), held.argmax_query(among, targets))


def test_ties_and_empty_targets() -> None:
    q = torch.zeros(1, 2, 6, 4)
    streamed = StreamedGraph.from_qk(q, q, 1.0)
    assert streamed.argmax_query(torch.tensor([[1, 3, 5]]), torch.tensor([[0, 2, 4]])).tolist() == [[0, 0, 0]]
    assert streamed.argmax_query(torch.tensor([[1]]), torch.empty(1, 0, dtype=torch.int64)).shape == (1, 0)


def test_log_sum_exp_may_be_given() -> None:
    q, k = random_qk(12, 9)
    given = ((0.5 * q) @ k.mT).logsumexp(-1)
    ours, computed = StreamedGraph.from_qk(q, k, 0.5, given), StreamedGraph.from_qk(q, k, 0.5)
    assert ours.log_sum_exp is given
    assert difference(computed.log_sum_exp, given) < 1e-14
    assert difference(ours.rmatvec(ours.uniform()), computed.rmatvec(ours.uniform())) < 1e-14
    with pytest.raises(ValueError, match=r"log_sum_exp is \(2, 3, 9\), expected \(2, 3, 12\)"):
        StreamedGraph.from_qk(q, k, 0.5, given[:, :, :9])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_kept_sets_in_float32(dtype: torch.dtype) -> None:
    q, k = (x.to(dtype) for x in random_qk(200, 200))
    held, streamed = (AttentionInputs(q, k, 0.5).graph(kind) for kind in ("by-head", "streamed"))
    kept = top_k(rank(held).scores, 74)
    assert streamed.uniform().dtype == torch.float32
    assert torch.equal(top_k(rank(streamed).scores, 74), kept)
    others = torch.tensor([[i for i in range(200) if i not in row] for row in kept.tolist()])
    assert torch.equal(streamed.argmax_query(kept, others), held.argmax_query(kept, others))


class LiveTensors(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Follows all tensors that operators make: ``largest`` of them and ``peak`` of those alive together, in bytes."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self.largest = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        inputs = {x.untyped_storage()._cdata for x in torch.utils._pytree.tree_leaves(args) if isinstance(x, Tensor)}
        out = func(*args, **(kwargs or {}))
        for x in torch.utils._pytree.tree_leaves(out):
            if isinstance(x, Tensor) and x.untyped_storage()._cdata not in inputs:
                size = x.untyped_storage().nbytes()
                reference = StorageWeakRef(x.untyped_storage())  # type: ignore[no-untyped-call]
                self.alive[x.untyped_storage()._cdata] = (reference, size)
                self.largest = max(self.largest, size)
        gone = [key for key, (reference, _) in self.alive.items() if reference.expired()]  # type: ignore[no-untyped-call]
        for key in gone:
            del self.alive[key]
        self.peak = max(self.peak, sum(size for _, size in self.alive.values()))
        return out


def ask_everything(graph: AttentionGraph) -> None:
    batch, _, queries, _ = graph.shape
    graph.entropy()
    graph.matvec(graph.rmatvec(graph.uniform()))
    order = torch.arange(queries, device=graph.uniform().device).expand(batch, -1)
    graph.argmax_query(order[:, : queries // 3], order[:, queries // 3 :])


def split_heads(count: int, device: str) -> Tensor:
    """(1, 10, count, 64), as attention layers split heads: a view."""
    return torch.randn(1, count, 10, 64, generator=None if device == "meta" else torch.Generator().manual_seed(0),
                       device=device).transpose(1, 2)  # fmt: skip


@pytest.mark.parametrize("kind", ["dense", "streamed"])
def test_memory_at_4096_tokens(kind: str) -> None:
    """The largest map of SDXL at 1024 px. The meta device makes the same tensors without contents."""
    q, k = split_heads(4096, "meta"), split_heads(4096, "meta")
    of_map = 4096 * 4096 * 10 * 4
    with LiveTensors() as live:
        ask_everything(AttentionInputs(q, k, 0.125).graph(kind))
    print(f"{kind}: peak {live.peak / 2**20:.0f} MiB, largest tensor {live.largest / 2**20:.0f} MiB, "
          f"map {of_map / 2**20:.0f} MiB")  # fmt: skip
    if kind == "dense":
        assert live.peak > of_map  # the instrument sees a map where there is one
    else:
        assert live.peak < of_map / 10
        assert live.largest < of_map / 40


def test_memory_that_is_really_allocated() -> None:
    """Operators' own temporaries included: a piece, queries and keys, those that recovery picks, and their indices."""
    q, k = split_heads(768, "cpu"), split_heads(768, "cpu")
    budget = 2**20
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        ask_everything(StreamedGraph.from_qk(q, k, 0.125, piece_bytes=budget))
    changes = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    live = peak = 0
    for change in sorted(changes, key=lambda event: event.start_ns()):
        live += change.nbytes()
        peak = max(peak, live)
    rows = 768 * 10 * 64 * 4  # bytes of all queries, and of all keys
    print(f"allocated {peak / 2**20:.1f} MiB: map {768 * 768 * 40 / 2**20:.1f} MiB, queries {rows / 2**20:.1f} MiB")
    assert peak < budget + 4 * rows


@pytest.mark.parametrize("preset", ["at-edm", "at-edm-subsampled", "dissimilarity"])
def test_memory_of_pruning_never_grows_with_the_square(preset: str) -> None:
    """Four times the tokens, as on twice the side, whose map has 16 times as many numbers: 5 GiB a head."""
    how = parse_preset(f"{preset}:iterations=2").method
    assert isinstance(how, Pruning)
    peaks = []
    for side in (96, 192):
        q, text = (torch.empty(1, 1, count, 64, device="meta") for count in (side**2, 77))
        tokens = TokenSet(torch.empty(1, side**2, 64, device="meta"), (side, side))
        with LiveTensors() as live:
            kept, restore = prune(tokens, AttentionInputs(q, q, 0.125), AttentionInputs(q, text, 0.125), how)
            restore(kept)
        peaks.append(live.peak)
    print(f"{preset}: {peaks[0] / 2**20:.0f} MiB, with four times the tokens {peaks[1] / 2**20:.0f} MiB")
    assert peaks[1] < 5 * peaks[0]
