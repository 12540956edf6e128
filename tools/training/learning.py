"""One step of learning: errors, gradients, a step of the optimizer, a step of the average."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from tools.training.lessons import Lesson
from tools.training.model import Model
from tools.training.steps import Balance, Optimizer
from tools.training.teacher import Teacher


class ProductAttention(TorchFunctionMode):
    """A context in which attention with a small map runs as two matrix products and a softmax.

    It is for training on a CPU, where the backward pass of the fused bfloat16 kernel is up to five times slower.
    """

    LARGEST_MAP = 512 * 512  # queries x keys; larger maps do not fit the caches, and the fused kernel is faster

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if function is F.scaled_dot_product_attention and kwargs.keys() == {"scale"}:
            q, k, v = args
            if q.shape[-2] * k.shape[-2] <= self.LARGEST_MAP:
                return (q @ k.transpose(-1, -2) * kwargs["scale"]).softmax(dim=-1) @ v
        return function(*args, **kwargs)


class Learner:
    """What a model does in a step of training, from a lesson's inputs to new weights and their moving average."""

    def __init__(
        self,
        lesson: Lesson,
        model: Model,
        average: Model,
        teacher: Teacher | None,
        optimizer: Optimizer,
        balance: Balance,
        bf16: bool,
    ) -> None:
        self.lesson, self.model, self.average, self.teacher = lesson, model, average, teacher
        self.optimizer, self.balance, self.bf16 = optimizer, balance, bf16

    def __call__(self, rate: Tensor, weight: Tensor, *inputs: Tensor) -> Tensor:
        """Learns from ``inputs`` of the lesson. Returns the mean error ().

        ``rate`` () is the share of the learning rates, and ``weight`` () that of the new weights in the average.
        """
        on_cpu = inputs[0].device.type == "cpu"
        precision = torch.autocast(inputs[0].device.type, torch.bfloat16, enabled=self.bf16)
        with ProductAttention() if on_cpu else nullcontext(), precision:
            graded = self.lesson.grade(*inputs)
        loss = self.balance(graded.errors, graded.share).mean() + graded.beside
        if self.teacher is not None:
            loss = loss + Teacher.HINT * self.teacher.hint()
        self.optimizer.step(loss, rate)
        with torch.no_grad():
            kept, fresh = ([*each.parameters()] for each in (self.average, self.model))
            moves = torch._foreach_sub(fresh, kept)  # type: ignore[arg-type]  # torch's types miss these overloads
            torch._foreach_add_(kept, torch._foreach_mul(moves, weight))  # type: ignore[arg-type]
        return graded.errors.detach().mean()


class RecordedLearner(Learner):
    """A learner on a GPU, which records a step as a CUDA graph and repeats it with other inputs.

    A step of the small model has thousands of kernels. They take the GPU less time than the CPU needs to start
    them one by one.
    """

    EAGER = 3  # steps before the recording: they make the optimizer's state, and cuDNN chooses its kernels

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.shapes: list[torch.Size] = []
        self.eager = 0
        self.stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]

    def __call__(self, rate: Tensor, weight: Tensor, *inputs: Tensor) -> Tensor:
        """As :meth:`Learner.__call__`. Inputs of other shapes than before are recorded again."""
        given = (rate, weight, *inputs)
        shapes = [each.shape for each in given]
        if shapes != self.shapes:
            self.shapes, self.eager = shapes, self.EAGER
        if self.eager:
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                error = super().__call__(*given)
            torch.cuda.current_stream().wait_stream(self.stream)
            self.eager -= 1
            if not self.eager:
                self._record(given)
            return error
        for kept, fresh in zip(self.given, given, strict=True):
            kept.copy_(fresh)
        self.graph.replay()
        return self.error.clone()

    def _record(self, given: tuple[Tensor, ...]) -> None:
        self.given = tuple(each.clone() for each in given)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):  # runs nothing yet
            self.error = super().__call__(*self.given)
