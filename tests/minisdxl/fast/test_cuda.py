"""What runs on a GPU only: shapes are checked on the meta device, numbers where there is a GPU."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from minisdxl.fast import cuda


def test_the_operator_hands_over_a_log_sum_exp_for_each_row() -> None:
    """torch keeps this operator to itself: should its arguments or results change, it shows here."""
    q, k = torch.empty(2, 5, 30, 64, device="meta").bfloat16(), torch.empty(2, 5, 77, 64, device="meta").bfloat16()
    attended, log_sum_exp = cuda.attention(q, k, k, 0.125)
    assert (attended.shape, attended.dtype) == (q.shape, torch.bfloat16)
    assert (log_sum_exp.shape, log_sum_exp.dtype) == (q.shape[:3], torch.float32)


def test_a_cpu_does_not_go_this_way() -> None:
    assert not cuda.usable(torch.ones(1, 1, 1, 64, dtype=torch.bfloat16))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_attention_on_a_gpu(dtype: torch.dtype) -> None:  # pragma: no cover
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 10, n, 64, device="cuda", dtype=dtype) for n in (1024, 77, 77))
    with torch.no_grad():
        assert cuda.usable(q)
        attended, log_sum_exp = cuda.attention(q, k, v, 0.125)
    wanted = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), scale=0.125)
    rows = ((q.double() * 0.125) @ k.double().mT).logsumexp(dim=-1)
    error, off = (attended - wanted).abs().max().item(), (log_sum_exp - rows).abs().max().item()
    print(f"{dtype}: max error of attention {error:.2e}, of log-sum-exp {off:.2e}")
    assert error <= 2e-2
    assert off <= 1e-3
