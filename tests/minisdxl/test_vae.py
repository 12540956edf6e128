"""The VAE against diffusers' AutoencoderKL with the same weights, and its names against the official manifest."""

from __future__ import annotations

import pytest
import torch

from minisdxl.config import SDXL_BASE
from minisdxl.vae import VAE
from tests.manifest import official_shapes
from tests.minisdxl.peers import diffusers_vae
from tests.minisdxl.tiny import SMALL_VAE, scale_weights


@pytest.mark.parametrize("scale", [1.0, 1e-2], ids=["ordinary", "small"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("size", [(32, 48), (37, 29)], ids=["even", "odd"])
@torch.no_grad()
def test_parity_with_diffusers(scale: float, dtype: torch.dtype, size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    vae = VAE(SMALL_VAE).to(dtype).eval()
    scale_weights(vae, scale)
    peer = diffusers_vae(vae)
    images = torch.rand(2, 3, *size, dtype=dtype).mul(2).sub(1) * scale
    moments = peer.encode(images).latent_dist
    ours = vae.moments(images)
    latents = torch.randn(2, 4, size[0] // 4, size[1] // 4, dtype=dtype) * scale
    pairs = {
        "mean": (ours[0], moments.mean),
        "log-variance": (ours[1], moments.logvar),
        "latent": (vae.encode(images), moments.mean * SMALL_VAE.scale_factor),
        "picture": (vae.decode(latents), peer.decode(latents / SMALL_VAE.scale_factor).sample),
    }
    for name, (mine, theirs) in pairs.items():
        error = (mine - theirs).abs()
        bound = 1e-9 if dtype == torch.float64 else 1e-5 * theirs.abs().max().item()
        print(f"{name}: max error {error.max():.2e}, mean {error.mean():.2e}, bound {bound:.2e}")
        assert error.max() <= bound


def test_names_and_shapes_are_official() -> None:
    with torch.device("meta"):
        ours = {name: tuple(value.shape) for name, value in VAE(SDXL_BASE.vae).state_dict().items()}
    official = official_shapes("first_stage_model.")
    assert len(official) == 248
    assert ours == official
