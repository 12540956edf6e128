"""What runs on a CPU in another way, beside the plain way, and where it stays away."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from minisdxl.fast import cpu
from minisdxl.operators import Linear
from minisdxl.transformer import GEGLU
from tests.minisdxl.tiny import SMALL_UNET, random_unet, unet_inputs

HAS_ONEDNN: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
needs_onednn = pytest.mark.skipif(not HAS_ONEDNN, reason="this torch has no oneDNN")


def relative_error(x: torch.Tensor, exact: torch.Tensor) -> float:
    return float((x.double() - exact).abs().max() / exact.abs().max())


@pytest.mark.parametrize(
    ("cpuinfo", "capability", "in_mkl"),
    [
        ("vendor_id : GenuineIntel", "AVX512", True),
        ("vendor_id : GenuineIntel", "AVX2", True),
        ("vendor_id : AuthenticAMD", "AVX512", False),
        ("vendor_id : AuthenticAMD", "AVX2", True),
        ("CPU implementer : 0x41", "DEFAULT", False),  # Arm, for which there is no MKL
    ],
)
def test_mkl_is_for_intel_and_for_avx2(
    cpuinfo: str, capability: str, in_mkl: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Path, "exists", lambda _: True)
    monkeypatch.setattr(Path, "read_text", lambda _: cpuinfo)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    assert cpu.mkl_pays.__wrapped__() is in_mkl


@needs_onednn
@pytest.mark.parametrize("in_mkl", [True, False], ids=["mkl", "onednn"])
@pytest.mark.parametrize("scale", [1.0, 1e-3], ids=["ordinary", "small"])
@pytest.mark.parametrize("shape", [(1, 200, 64), (3, 1, 64), (2, 77, 512)], ids=str)
@torch.no_grad()
def test_products_are_those_of_float64(
    shape: tuple[int, ...], scale: float, in_mkl: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu, "mkl_pays", lambda: in_mkl)
    generator = torch.Generator().manual_seed(0)
    x = scale * torch.randn(shape, generator=generator)
    weight, bias = torch.randn(96, shape[-1], generator=generator), scale * torch.randn(96, generator=generator)
    errors = []
    for b in (bias, None):
        exact = F.linear(x.double(), weight.double(), None if b is None else b.double())
        errors.append(relative_error(cpu.linear(x, weight, b), exact))
    value, gate = F.linear(x.double(), weight.double(), bias.double()).chunk(2, dim=-1)
    errors.append(relative_error(cpu.geglu(x, weight, bias), value * F.gelu(gate)))
    print(
        f"{shape}: errors with a bias, without, GEGLU: {', '.join(f'{error:.1e}' for error in errors)} of the largest"
    )
    assert max(errors) < 2e-6


@needs_onednn
@torch.no_grad()
def test_tokens_with_channels_outside_are_no_other_tokens() -> None:
    """A token set is a view of a feature map, which may have its channels outside."""
    x = torch.randn(2, 16, 5, 6, generator=torch.Generator().manual_seed(0)).flatten(2).mT
    assert not x.is_contiguous()
    linear, geglu = Linear(16, 24), GEGLU(16, 12)
    assert torch.equal(linear(x), linear(x.contiguous()))
    assert torch.equal(geglu(x), geglu(x.contiguous()))


@needs_onednn
@pytest.mark.parametrize("scale", [1.0, 1e-2], ids=["ordinary", "small"])
def test_the_unet_is_the_same_without_it(scale: float, monkeypatch: pytest.MonkeyPatch) -> None:
    unet, inputs = (
        random_unet(SMALL_UNET, torch.float32, scale),
        unet_inputs(SMALL_UNET, (16, 24), torch.float32, scale),
    )
    with torch.no_grad():
        assert cpu.usable(inputs[0])
        fast = unet(*inputs)
        monkeypatch.setattr(cpu, "usable", lambda _: False)
        plain = unet(*inputs)
    error = relative_error(fast, plain.double())
    print(f"oneDNN and plain products, scale {scale:g}: max error {error:.1e} of the largest")
    assert 0 < error < 1e-5


def test_it_stays_away_where_it_does_not_belong() -> None:
    x = torch.ones(2, 3, requires_grad=True)
    assert not cpu.usable(x)  # no gradient goes through it
    Linear(3, 4)(x).sum().backward()
    assert x.grad is not None
    with torch.no_grad():
        assert cpu.usable(x) == HAS_ONEDNN
        for other in (x.double(), x.bfloat16(), x.to("meta")):
            assert not cpu.usable(other)
        with torch.autocast("cpu", torch.bfloat16):
            assert not cpu.usable(x)
            assert Linear(3, 4)(x).dtype == torch.bfloat16


@needs_onednn
@torch.no_grad()
def test_attention_is_that_of_torch_and_knows_the_sums_of_rows() -> None:
    generator = torch.Generator().manual_seed(0)
    many = cpu.FEW_KEYS + 1
    q, k, v = (torch.randn(2, n, 3, 16, generator=generator).transpose(1, 2) for n in (40, many, many))
    attended, log_sum_exp = cpu.attention(q, k, v, 0.3)
    assert torch.equal(attended, F.scaled_dot_product_attention(q, k, v, scale=0.3))
    assert log_sum_exp is not None
    error = (log_sum_exp - (0.3 * q.double() @ k.double().mT).logsumexp(dim=-1)).abs().max()
    print(f"log-sum-exp: max error {error:.1e}")
    assert error < 1e-5


@needs_onednn
@pytest.mark.parametrize("spread", [1.0, 1e-3, 10.0], ids=["ordinary", "small", "large"])
@torch.no_grad()
def test_attention_to_few_keys_is_that_of_float64(spread: float) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (spread * torch.randn(2, n, 3, 16, generator=generator).transpose(1, 2) for n in (99, 77, 77))
    attended, log_sum_exp = cpu.attention(q, k, v, 0.3)
    exact = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), scale=0.3)
    fused = F.scaled_dot_product_attention(q, k, v, scale=0.3)
    error, of_torch = relative_error(attended, exact), relative_error(fused, exact)
    print(f"attention to 77 keys, spread {spread:g}: max error {error:.1e} of the largest, of torch's {of_torch:.1e}")
    assert log_sum_exp is None
    assert error < (2e-6 if spread <= 1 else 2e-5)  # of logits of 100, fp32 knows no more than five digits
    for stays in ((q.bfloat16(), k.bfloat16(), v.bfloat16()), (k, k, v)):  # in bf16, and few tokens among each other
        assert torch.equal(cpu.attention(*stays, 0.3)[0], F.scaled_dot_product_attention(*stays, scale=0.3))
        assert cpu.attention(*stays, 0.3)[1] is not None
