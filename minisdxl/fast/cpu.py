"""Operators that are faster on a CPU than torch's plain ones. ``tools.bench`` measures by how much.

Linear maps go through oneDNN, as torch's convolutions do, except on Intel's CPUs, where MKL is faster. Fused attention
is torch's own, with the log-sum-exp that torch computes and drops; to few keys attention is not fused. No gradients.
"""

from __future__ import annotations

import platform
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

FEW_KEYS = 80  # a text of SDXL has 77 tokens


def attends(x: Tensor) -> bool:
    """Whether :func:`attention` can have ``x``: on a CPU, with nothing to be differentiated or compiled."""
    return (
        not torch.compiler.is_compiling()  # first: the compiler cannot trace what follows
        and x.device.type == "cpu"
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
    )


def usable(x: Tensor) -> bool:
    """Whether linear maps of ``x`` can go this way: as :func:`attends`, and in fp32."""
    return (
        attends(x) and x.dtype == torch.float32 and bool(torch.backends.mkldnn.is_available())  # type: ignore[no-untyped-call]
    )


@cache
def of_intel() -> bool:
    """Whether this CPU is one of Intel's."""
    cpus = Path("/proc/cpuinfo")  # of Linux, where Python's own answer is empty
    return "GenuineIntel" in (cpus.read_text() if cpus.exists() else platform.processor())


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """(..., C) -> (..., C') as ``torch.nn.functional.linear``, which is the faster one on a CPU of Intel's."""
    if of_intel():
        return F.linear(x, weight, bias)
    y: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return y


def geglu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """(..., C) -> (..., hidden): one half of the map times the exact GELU of the other, both taken while in cache.

    ``weight`` is (2 hidden, C), the gate in its second half.
    """
    (value, gate), (value_bias, gate_bias) = weight.chunk(2), bias.chunk(2)
    gated = torch.ops.mkldnn._linear_pointwise(x, gate, gate_bias, "gelu", [], "none")
    y: Tensor = torch.ops.mkldnn._linear_pointwise.binary(x, gated, value, value_bias, "mul")
    return y


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor | None]:
    """Fused attention (B, h, n, d), bit for bit that of torch, and the log-sum-exp (B, h, n) that torch keeps back.

    From many queries to few keys, in fp32, the map is small, and plain operators are faster: those of torch but for
    rounding, without the log-sum-exp.
    """
    if k.shape[2] <= FEW_KEYS < q.shape[2] and usable(q):
        return (q @ (scale * k).mT).softmax(dim=-1) @ v, None
    attended, log_sum_exp = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, scale=scale)
    return attended, log_sum_exp
