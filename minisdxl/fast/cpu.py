"""Attention and linear maps on a CPU, faster than torch's default ones. ``tools.bench`` measures by how much.

Linear maps run in MKL, as torch's do, on Intel's CPUs and on others with AVX2 alone. On all else they run in oneDNN,
since MKL leaves AVX-512 unused on CPUs that are not Intel's. Attention is torch's fused operator, called in a way that
also returns the log-sum-exp; to few keys it is not fused. There are no gradients.
"""

from __future__ import annotations

import platform
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

FEW_KEYS = 80  # a prompt of SDXL has 77 tokens


def attends(x: Tensor) -> bool:
    """Whether :func:`attention` can run for ``x``: on a CPU, without gradients, autocast or a compiler."""
    return (
        not torch.compiler.is_compiling()  # first: the compiler cannot trace what follows
        and x.device.type == "cpu"
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
    )


def usable(x: Tensor) -> bool:
    """Whether linear maps and convolutions of ``x`` can run here: as :func:`attends`, and in fp32."""
    return (
        attends(x) and x.dtype == torch.float32 and bool(torch.backends.mkldnn.is_available())  # type: ignore[no-untyped-call]
    )


@cache
def mkl_pays() -> bool:
    """Whether MKL's matrix products are the faster ones: on Intel's CPUs, and on others with AVX2 alone."""
    cpus = Path("/proc/cpuinfo")  # on Linux platform.processor() is empty
    of_intel = "GenuineIntel" in (cpus.read_text() if cpus.exists() else platform.processor())
    return of_intel or torch.backends.cpu.get_cpu_capability() == "AVX2"


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """(..., C) -> (..., C'), as ``torch.nn.functional.linear``, which runs in MKL."""
    if mkl_pays():
        return F.linear(x, weight, bias)
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def geglu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """(..., C) -> (..., hidden): oneDNN applies GELU and the product to each block of the result while it is in cache.

    ``weight`` is (2 hidden, C), with the gate in its second half.
    """
    (value, gate), (value_bias, gate_bias) = weight.chunk(2), bias.chunk(2)
    gated = torch.ops.mkldnn._linear_pointwise(x, gate, gate_bias, "gelu", [], "none")
    return torch.ops.mkldnn._linear_pointwise.binary(x, gated, value, value_bias, "mul")


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor | None]:
    """Fused attention (B, h, n, d), bit for bit that of torch, and its log-sum-exp (B, h, n).

    From many queries to few keys, in fp32, the map is small and unfused operators are faster. Their result differs from
    torch's by rounding, and comes without the log-sum-exp.
    """
    if k.shape[2] <= FEW_KEYS < q.shape[2] and usable(q):
        return (q @ (scale * k).mT).softmax(dim=-1) @ v, None
    attended, log_sum_exp = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, scale=scale)
    return attended, log_sum_exp
