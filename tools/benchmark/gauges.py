"""Time of one call and memory in use, on a CPU or a GPU."""

from __future__ import annotations

import time
from pathlib import Path

import torch

from tools.benchmark.bench_models import Contender


def memory(device: torch.device, field: str) -> int:
    """Bytes of memory: ``VmRSS`` in use now, ``VmHWM`` the peak since :func:`forget_peak`."""
    if device.type == "cuda":
        now = field == "VmRSS"
        return torch.cuda.memory_allocated(device) if now else torch.cuda.max_memory_allocated(device)
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def forget_peak(device: torch.device) -> None:
    """Resets the peak memory."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        Path("/proc/self/clear_refs").write_text("5")  # man 5 proc: resets VmHWM


def seconds(contender: Contender, device: torch.device) -> float:
    """Time of one call: by CUDA events on a GPU, by the wall clock on a CPU."""
    if device.type == "cuda":
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        began.record()
        contender.call()
        ended.record()
        torch.cuda.synchronize(device)
        return float(began.elapsed_time(ended)) / 1000
    start = time.perf_counter()
    contender.call()
    return time.perf_counter() - start
