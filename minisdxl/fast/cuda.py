"""What a GPU does beyond torch's plain way of asking. No gradient goes through any of this."""

from __future__ import annotations

import torch
from torch import Tensor


def usable(x: Tensor) -> bool:
    """Whether queries (B, h, n, d) can go this way: in half precision, on a GPU with flash attention."""
    return (
        x.is_cuda
        and x.dtype in (torch.float16, torch.bfloat16)
        and x.shape[-1] % 8 == 0
        and torch.cuda.get_device_capability(x.device) >= (8, 0)
        and torch.version.hip is None
        and not torch.is_grad_enabled()
    )


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Flash attention (B, h, n, d), and the log-sum-exp (B, h, n) in float32 that torch keeps back."""
    attended, log_sum_exp, *_ = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, scale=scale)
    return attended, log_sum_exp
