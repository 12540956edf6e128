"""Learning from a teacher: what is compared, and how far apart two models are."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from minisdxl.bundled import BUNDLED
from minisdxl.checkpoint.modules import load
from minisdxl.config import SHAPES
from minisdxl.unet import UNet
from tools.training.lessons import size_numbers
from tools.training.teacher import Teacher


@pytest.fixture
def student() -> UNet:
    return load(BUNDLED["shapes"])[1].unet


def inputs(count: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Noisy latents, timesteps, ids for both text encoders, and which captions are dropped."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.full((count, 77), 639)
    return (
        torch.randn(count, 4, 16, 16, generator=generator),
        torch.arange(count) * 300,
        ids,
        ids,
        torch.ones(count) > 0,
    )


@torch.no_grad()
def test_a_model_is_no_way_from_itself(student: UNet) -> None:
    teacher = Teacher(BUNDLED["shapes"], student, "cpu")
    x, timestep, *_ = given = inputs(2)
    told = teacher(*given, size_numbers(64, 2))
    nothing = torch.zeros(2, 77, SHAPES.unet.context_channels)
    vector = torch.zeros(2, SHAPES.unet.vector_channels)
    vector[:, 128:] = (
        teacher.text(*given[2:4])
        .zeroed(given[4])
        .vector(torch.tensor([[64, 64, 0, 0, 64, 64]]).expand(2, -1), SHAPES.size_channels)[:, 128:]
    )
    assert torch.equal(student(x, timestep, nothing, vector), told)
    assert teacher.hint() == 0


@torch.no_grad()
def test_a_hint_is_the_error_of_blocks_in_units_of_their_variance(student: UNet) -> None:
    teacher = Teacher(BUNDLED["shapes"], student, "cpu")
    teacher(*inputs(2), size_numbers(64, 2))
    outputs = [each.double() for each in teacher.features["teacher"]]
    assert len(outputs) == len(list(SHAPES.unet.attention_sites()))
    teacher.features["student"] += [output.float() for output in outputs[:-1]]
    shift = torch.full_like(outputs[-1], 0.5)
    teacher.features["student"].append((outputs[-1] + shift).float())
    expected = sum(0.25 / float(row.var()) for row in outputs[-1]) / 2 / len(outputs)
    found = float(teacher.hint())
    print(f"hint {found:.6f}, by hand {expected:.6f}")
    assert found == pytest.approx(expected, rel=1e-5)
    assert not teacher.features["student"] and not teacher.features["teacher"]
