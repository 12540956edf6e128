"""The models that are compared: one model with one set of weights."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from minisdxl.config import ModelConfig
from minisdxl.unet import UNet
from tests.minisdxl.tiny import BENCH_MODEL
from tools.benchmark import bench_models
from tools.benchmark.bench_models import PEERS, blocks, unets
from tools.benchmark.profile_parts import spent

CPU = torch.device("cpu")
pytestmark = pytest.mark.filterwarnings("ignore")


@torch.no_grad()
def test_all_contenders_are_one_model_with_one_set_of_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[nn.Module] = []
    build = bench_models.diffusers_unet

    def remember(unet: UNet, config: ModelConfig, plain: dict[Tensor, Tensor] | None) -> nn.Module:
        built.append(build(unet, config, plain))
        return built[-1]

    monkeypatch.setattr(bench_models, "diffusers_unet", remember)
    made = list(unets(BENCH_MODEL, 128, 2, ["dense", "at-edm"], PEERS, CPU, torch.float32))
    assert [contender.name for contender in made] == ["dense", "at-edm", *PEERS]
    dense, pruned, *peers = (contender.call() for contender in made)
    errors = [float((output - dense).abs().max() / dense.abs().max()) for output in (*peers, pruned)]
    print("off the dense output: " + ", ".join(f"{error:.1e}" for error in errors))
    assert max(errors[:2]) < 1e-5
    assert min(errors[2:]) > 1e-3  # tomesd merges tokens, and at-edm prunes them
    ordinary, inside, merged = (dict(peer.named_parameters()) for peer in built)
    for name, weight in ordinary.items():
        assert weight.data_ptr() == merged[name].data_ptr()
        apart = weight.ndim == 4 and min(weight.shape[1], weight.shape[2]) > 1
        assert (weight.data_ptr() != inside[name].data_ptr()) == apart, name
        assert weight.is_contiguous()
        assert not apart or inside[name].is_contiguous(memory_format=torch.channels_last)


@torch.no_grad()
def test_a_block_alone() -> None:
    dense, pruned = blocks(BENCH_MODEL, "down.1.1", 128, 1, ["dense", "at-edm"], CPU, torch.float32)
    assert dense.call().shape == pruned.call().shape == (1, 64, 8, 8)
    assert not torch.allclose(dense.call(), pruned.call())
    assert spent(pruned, CPU)["ranking"] > 0
