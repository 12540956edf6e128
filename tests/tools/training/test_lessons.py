"""Learning from a teacher along the student's own sampling: the sampler, the errors, and that a run goes on."""

from __future__ import annotations

import copy
import random
from argparse import Namespace
from typing import Any

import pytest
import torch
from torch import Tensor

from atedm import DENSE
from minisdxl.bundled import BUNDLED
from minisdxl.checkpoint.modules import load
from minisdxl.config import SHAPES
from minisdxl.preconditioning import discrete_sigmas
from minisdxl.sampler import UNetInputs, guided_denoiser
from minisdxl.solvers import euler_ancestral
from minisdxl.tokenizer import Tokenizer
from tools.train_shapes import TOKENIZER
from tools.training.batches import BatchSize
from tools.training.lessons import Graded, Lesson, OwnSampling
from tools.training.model import Model
from tools.training.teacher import Teacher
from tools.training.text import SeeingText

OPTIONS = Namespace(seed=3, cfg=4.0, world="plain", batch=4)
SIZE = BatchSize(2, SHAPES.size, SHAPES.size)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_directory(TOKENIZER, SHAPES.text)


@pytest.fixture(scope="module")
def model() -> Model:
    included = load(BUNDLED["shapes"])[1]
    model = Model(SeeingText())
    model.unet.load_state_dict(included.unet.state_dict())
    model.text.load_state_dict(included.text.state_dict())
    return model


@pytest.fixture
def own_sampling(model: Model, tokenizer: Tokenizer) -> OwnSampling:
    return OwnSampling(model, Teacher(BUNDLED["shapes"], model.unet, "cpu"), tokenizer, OPTIONS, steps=3)


def step(lesson: Lesson, number: int) -> Graded:
    return lesson.grade(*lesson.inputs(number, SIZE))


@torch.no_grad()
def test_it_samples_as_the_pipeline_does(own_sampling: OwnSampling, tokenizer: Tokenizer) -> None:
    step(own_sampling, 0)
    own_sampling.shifts[:] = 17
    before = own_sampling.x.clone()
    step(own_sampling, 1)

    text = own_sampling.teacher.text
    sizes = torch.tensor([[256, 256, 0, 0, 256, 256]])
    c, u = (
        UNetInputs(each.context, each.vector(sizes, SHAPES.size_channels))
        for each in (text.encode(own_sampling.captions, tokenizer), text.encode_negative([""], tokenizer))
    )
    denoiser = guided_denoiser(own_sampling.teacher.unet, c, u, 4.0, lambda _: DENSE, SHAPES.noise)
    levels = discrete_sigmas(SHAPES.noise)[[999 - 333 - 17, 999 - 666 - 17]]
    noise = torch.Generator().manual_seed(random.Random("own sampling 3 1").getrandbits(32))
    expected = next(iter(euler_ancestral(denoiser, before, levels, [noise])))
    error = float((own_sampling.x - expected).abs().max() / expected.abs().max())
    print(f"largest difference to the sampler {error:.1e} of the largest value")
    assert error < 3e-5


def test_a_model_makes_no_errors_beside_itself(own_sampling: OwnSampling) -> None:
    graded = step(own_sampling, 0)
    print(f"errors {graded.errors.tolist()}")
    assert graded.errors.detach().max() < 1e-10 and float(own_sampling.teacher.hint().detach()) < 1e-10
    assert graded.errors.requires_grad and graded.share.tolist() == pytest.approx([0.999])


@torch.no_grad()
def test_errors_are_of_both_predictions_and_of_their_guidance(
    own_sampling: OwnSampling, monkeypatch: pytest.MonkeyPatch
) -> None:
    def higher(*arguments: Any) -> Tensor:
        return taught(*arguments) + torch.tensor([0.1, 0.3])[:, None, None, None]  # conditional, unconditional

    taught = own_sampling.model.forward
    monkeypatch.setattr(own_sampling.model, "forward", higher)
    guided = 0.3 + 4.0 * (0.1 - 0.3)
    expected = 0.1**2 + 0.3**2 + guided**2
    assert step(own_sampling, 0).errors.tolist() == pytest.approx([expected], rel=1e-4)


@torch.no_grad()
def test_a_run_goes_on_with_the_same_pictures(own_sampling: OwnSampling, model: Model, tokenizer: Tokenizer) -> None:
    step(own_sampling, 0)
    state = copy.deepcopy(own_sampling.state())
    step(own_sampling, 1)
    again = OwnSampling(model, own_sampling.teacher, tokenizer, OPTIONS, steps=3)
    again.load_state(state)
    step(again, 1)
    assert torch.equal(again.x, own_sampling.x) and again.captions == own_sampling.captions


@torch.no_grad()
def test_a_run_on_drawn_pictures_goes_on_with_own_sampling(own_sampling: OwnSampling) -> None:
    own_sampling.load_state(Lesson.state(own_sampling))
    assert len(step(own_sampling, 600).errors) == 1 and all(own_sampling.captions)


def test_places_are_spread_and_all_timesteps_are_met(model: Model, tokenizer: Tokenizer) -> None:
    options = Namespace(**{**vars(OPTIONS), "batch": 20})
    teacher = Teacher(BUNDLED["shapes"], model.unet, "cpu")
    lesson = OwnSampling(model, teacher, tokenizer, options, steps=25)
    assert lesson.offsets.tolist() == [0, 5, 10, 15, 20]
    met = set()
    for shift in range(lesson.stride):
        lesson.shifts[:] = shift
        met |= {int(t) for place in range(25) for t in lesson._timesteps(torch.full((5,), place))}
    assert met == {999} | set(range(960))
