"""Flash attention on a GPU that also returns the log-sum-exp, which ranking needs. There are no gradients."""

from __future__ import annotations

import torch
from torch import Tensor


def usable(x: Tensor) -> bool:
    """Whether attention of queries ``x`` (B, h, n, d) can run here: half precision, a GPU with flash attention."""
    return (
        x.is_cuda
        and x.dtype in (torch.float16, torch.bfloat16)
        and x.shape[-1] % 8 == 0
        and torch.cuda.get_device_capability(x.device) >= (8, 0)
        and torch.version.hip is None
        and not torch.is_grad_enabled()
    )


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Flash attention (B, h, n, d), and its log-sum-exp (B, h, n) in float32."""
    attended, log_sum_exp, *_ = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, scale=scale)
    return attended, log_sum_exp
