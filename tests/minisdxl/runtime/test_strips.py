"""Decoding in strips: exact against decoding at once, without seams, in less memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.utils import convert_conv2d_weight_memory_format
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from minisdxl.config import SDXL_BASE
from minisdxl.runtime.strips import decode_in_strips
from minisdxl.vae import VAE
from tests.minisdxl.tiny import SMALL_VAE, random_vae


@pytest.mark.parametrize("scale", [1.0, 1e-2], ids=["ordinary", "small"])
@pytest.mark.parametrize("rows", [1, 3, 13, 100])
@torch.no_grad()
def test_decoding_in_strips_is_exact(rows: int, scale: float) -> None:
    vae = random_vae(torch.float64, scale)
    latents = torch.randn(2, 4, 13, 7, dtype=torch.float64) * scale
    whole = vae.decode(latents)
    error = (decode_in_strips(vae, latents, rows) - whole).abs().max() / whole.std()
    print(f"strips of {rows} of 13 rows, in float64: max error / deviation {error:.1e}")
    assert error < 1e-12


# In steps of the picture's 8 bits: rounding cannot be seen in fp32, and is that of bf16 itself in bf16.
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-3), (torch.bfloat16, 10)], ids=str)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@torch.no_grad()
def test_strips_show_no_seam(dtype: torch.dtype, bound: float, memory_format: torch.memory_format) -> None:
    vae = random_vae(dtype, 1.0)
    convert_conv2d_weight_memory_format(vae, memory_format)
    latents = torch.randn(1, 4, 20, 12, dtype=dtype)
    whole = vae.decode(latents).float()
    exact = vae.double().decode(latents.double()).float()
    strips = decode_in_strips(vae.to(dtype), latents, 4).float()
    error = (strips - whole).abs()[0] * 127.5
    rows = error.amax(dim=(0, 2))
    seams = torch.stack([rows[16 * cut - 1 : 16 * cut + 1].max() for cut in range(1, 5)]).max()
    rounding = (whole - exact).abs().max() * 127.5
    print(
        f"{dtype}, in steps of 8 bits: max error {error.max():.1e}, at the seams {seams:.1e}, mean {error.mean():.1e}; "
        f"whole against float64 {rounding:.1e}"
    )
    assert error.max() <= bound
    assert error.max() <= 3 * rounding


@torch.no_grad()
def test_a_picture_in_strips_does_not_depend_on_its_batch() -> None:
    vae = random_vae(torch.float32, 1.0)
    latents = torch.randn(3, 4, 5, 6)
    assert torch.equal(decode_in_strips(vae, latents, 2)[1:2], decode_in_strips(vae, latents[1:2], 2))


@pytest.mark.parametrize("rows", [0, -8])
def test_a_strip_without_rows_is_refused(rows: int) -> None:
    with pytest.raises(ValueError, match=f"strip_rows is {rows}, expected 1 or more rows"):
        decode_in_strips(VAE(SMALL_VAE), torch.zeros(1, 4, 8, 8), rows)


class Peak(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """The most bytes that the tensors made under it have had at a time; workspaces of the operators are not seen."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak = 0
        self._alive: dict[int, tuple[Any, int]] = {}  # by address: a weak reference, and bytes

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = func(*args, **(kwargs or {}))
        for result in tree_leaves(results):
            if isinstance(result, Tensor):
                storage = result.untyped_storage()
                reference = StorageWeakRef(storage)  # type: ignore[no-untyped-call]
                self._alive[storage._cdata] = reference, storage.nbytes()
        self._alive = {key: value for key, value in self._alive.items() if not value[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self._alive.values()))
        return results


@torch.no_grad()
def test_memory_of_decoding_at_the_official_size() -> None:
    """Counted without computing, for 1024 x 1024 pixels in fp32, the largest map of which has 1 GiB."""
    with FakeTensorMode():
        vae = VAE(SDXL_BASE.vae).eval()
        convert_conv2d_weight_memory_format(vae, torch.channels_last)
        with Peak() as whole:
            vae.decode(torch.empty(1, 4, 128, 128))
        with Peak() as strips:
            decode_in_strips(vae, torch.empty(1, 4, 128, 128), 8)
    print(f"all at once {whole.peak / 2**30:.2f} GiB, in strips of 8 rows {strips.peak / 2**30:.2f} GiB")
    assert 2.9 < whole.peak / 2**30 < 3.1
    assert strips.peak / 2**30 < 1.4
