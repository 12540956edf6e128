"""A step of learning: nothing in it waits for a GPU, a recorded one learns as any other, and Muon is torch's."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from minisdxl.bundled import BUNDLED
from minisdxl.checkpoint.modules import load
from minisdxl.config import SHAPES
from minisdxl.tokenizer import Tokenizer
from minisdxl.vae import VAE
from tools.train_shapes import TOKENIZER, parse_options
from tools.training.batches import BatchSize, DrawnBatches, draw_ahead
from tools.training.learning import Learner, RecordedLearner
from tools.training.lessons import Lesson, NoisyPictures, OwnSampling
from tools.training.model import Model
from tools.training.steps import Balance, Muon, Optimizer
from tools.training.teacher import Teacher
from tools.training.text import SeeingText

SIZE = BatchSize(2, SHAPES.size, SHAPES.size)
LESSONS = ("noisy pictures", "own sampling")


def learner(lesson: str, device: str, kind: type[Learner] = Learner) -> Learner:
    """One that goes on from the included model; for its own sampling that is its teacher, too."""
    torch.manual_seed(0)
    model = Model(SeeingText())
    included = load(BUNDLED["shapes"])[1]
    model.unet.load_state_dict(included.unet.state_dict())
    model.text.load_state_dict(included.text.state_dict())
    model.to(device)
    average = copy.deepcopy(model).requires_grad_(False)
    tokenizer = Tokenizer.from_directory(TOKENIZER, SHAPES.text)
    options = parse_options(
        ["--device", device, "--batch", "8", "--own-sampling", "--teacher", "x", "--stages", "256:9"]
    )
    teacher: Teacher | None = None
    taught: Lesson
    if lesson == "own sampling":
        teacher = Teacher(BUNDLED["shapes"], model.unet, device)
        taught = OwnSampling(model, teacher, tokenizer, options, steps=3)
    else:
        drawn = draw_ahead(DrawnBatches("test", 0, [SIZE] * 9), 0, 0)
        taught = NoisyPictures(model, None, included.vae.to(device).requires_grad_(False), tokenizer, drawn)
    return kind(taught, model, average, teacher, Optimizer(model, 0.1), Balance(device), device == "cuda")


def learn(learner: Learner, steps: int) -> list[float]:
    device = next(learner.model.parameters()).device
    errors = []
    for step in range(steps):
        rate, weight = torch.tensor([0.1 * (1 - step / steps), 0.5], device=device)
        errors.append(float(learner(rate, weight, *learner.lesson.inputs(step, SIZE))))
    return errors


class Crossings(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """A context that sees operations between the device ``meta``, in place of a GPU, and the CPU."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = function(*args, **(kwargs or {}))
        devices = {each.device for each in tree_leaves((args, kwargs, output)) if isinstance(each, Tensor)}
        if devices - {torch.device("meta")}:
            self.seen.append(str(function))
        return output


@pytest.fixture
def no_autocast(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())  # the device meta has none
    yield


@pytest.mark.usefixtures("no_autocast")
@pytest.mark.parametrize("lesson", LESSONS)
def test_no_part_of_a_step_waits_for_a_gpu(lesson: str) -> None:
    """Reading a number raises on this device; any other touch of the CPU is listed. AdamW's are left to ``gpu``."""
    made = learner(lesson, "cpu")
    inputs = tuple(each.to("meta") for each in made.lesson.inputs(0, SIZE))
    for part in (made.model, made.average, *([made.teacher.unet, made.teacher.text] if made.teacher else [])):
        part.to("meta")
    if isinstance(made.lesson, NoisyPictures):
        assert isinstance(made.lesson.vae, VAE)
        made.lesson.vae.to("meta")
        made.lesson.levels = made.lesson.levels.to("meta")
    if isinstance(made.lesson, OwnSampling):
        made.lesson.x, made.lesson.device = made.lesson.x.to("meta"), torch.device("meta")
    made.optimizer, made.balance = Optimizer(made.model, 0.1), Balance("meta")
    for parts in (made.optimizer.parts, made.optimizer.rates):
        del parts[-1]
    rate, weight = torch.empty(2, device="meta")
    made(rate, weight, *inputs)
    with Crossings() as crossings:
        made(rate, weight, *inputs)
    assert not crossings.seen


def test_muon_moves_matrices_as_torchs_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.Tensor, "bfloat16", lambda matrix: matrix)  # in which both orthogonalize
    torch.manual_seed(0)
    shapes = [(64, 64)] * 3 + [(64, 192)] * 2 + [(256, 64)] * 2
    ours = [nn.Parameter(torch.randn(shape, dtype=torch.float64)) for shape in shapes]
    theirs = copy.deepcopy(ours)
    before = copy.deepcopy(ours)
    batched = Muon(ours, lr=2e-3, weight_decay=0.01)
    peer = torch.optim.Muon(theirs, lr=2e-3, weight_decay=0.01, adjust_lr_fn="match_rms_adamw")
    for _ in range(5):
        for one, other in zip(ours, theirs, strict=True):
            one.grad = torch.randn_like(one)
            other.grad = one.grad.clone()
        batched.step()
        peer.step()  # type: ignore[no-untyped-call]
    for one, other, start in zip(ours, theirs, before, strict=True):
        off, moved = float((one - other).detach().norm()), float((other - start).detach().norm())
        print(f"{tuple(one.shape)}: off by {off / moved:.1e} of the way")
        assert off < 1e-10 * moved


@pytest.mark.parametrize("lesson", LESSONS)
def test_rate_0_changes_no_weight_and_weight_1_is_no_average(lesson: str) -> None:
    made = learner(lesson, "cpu")
    before = copy.deepcopy(made.model.state_dict())
    made(torch.tensor(0.0), torch.tensor(1.0), *made.lesson.inputs(0, SIZE))
    assert all(torch.equal(before[name], tensor) for name, tensor in made.model.state_dict().items())
    made(torch.tensor(0.1), torch.tensor(1.0), *made.lesson.inputs(1, SIZE))
    pairs = zip(made.average.parameters(), made.model.parameters(), strict=True)
    off = max(float((kept - fresh).detach().abs().max()) for kept, fresh in pairs)
    moved = max(float((before[name] - tensor).abs().max()) for name, tensor in made.model.state_dict().items())
    print(f"largest move {moved:.1e}, average off by {off:.1e}")
    assert off < 1e-6 < moved


@pytest.mark.gpu
@pytest.mark.parametrize("lesson", LESSONS)
def test_a_recorded_step_learns_as_any_other(lesson: str) -> None:  # pragma: no cover
    torch.backends.cudnn.benchmark = True
    plain, recorded = learner(lesson, "cuda"), learner(lesson, "cuda", RecordedLearner)
    errors = [learn(each, 8) for each in (plain, recorded)]
    print(f"errors {errors[0]}, recorded {errors[1]}")
    assert errors[1] == pytest.approx(errors[0], rel=0.05)  # bfloat16, and sums in any order
    for one, other in zip(plain.average.parameters(), recorded.average.parameters(), strict=True):
        assert (one - other).abs().max() < 5e-3
