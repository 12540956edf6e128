"""Faster implementations of the operators of ``minisdxl.operators``, and the only place where they are chosen.

The choice depends on device, dtype, sizes and gradients. ``cpu``, ``winograd`` and ``cuda`` have the implementations.
This folder can be deleted, with its import and the decorators in ``operators``: the program is then slower, and its
output is the same up to rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, ParamSpec, TypeVar

from torch import Tensor

from minisdxl.fast import cpu, cuda, winograd

P = ParamSpec("P")
R = TypeVar("R")


def faster(plain: Callable[P, R]) -> Callable[P, R]:
    """Decorates an operator of ``minisdxl.operators``: runs faster code where there is some for its arguments."""
    choose = CHOICES[plain.__name__]

    @wraps(plain)
    def operator(*args: P.args, **kwargs: P.kwargs) -> R:
        result: R | None = choose(*args, **kwargs)
        return plain(*args, **kwargs) if result is None else result

    return operator


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor | None] | None:
    """Returns ``None``, as all functions below, where there is no faster code for these arguments."""
    if cpu.attends(q):
        return cpu.attention(q, k, v, scale)
    return cuda.attention(q, k, v, scale) if cuda.usable(q) else None


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor | None:
    """By MKL or oneDNN, whichever is faster on this CPU."""
    return cpu.linear(x, weight, bias) if cpu.usable(x) else None


def geglu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor | None:
    """Projection, GELU and product in one pass."""
    return cpu.geglu(x, weight, bias) if cpu.usable(x) else None


def conv3x3(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor | None:
    """By Winograd's algorithm, if there are enough channels and pixels."""
    return winograd.convolve(x, weight, bias) if cpu.usable(x) and winograd.pays(x, weight) else None


CHOICES: dict[str, Callable[..., Any]] = {each.__name__: each for each in (attention, linear, geglu, conv3x3)}
