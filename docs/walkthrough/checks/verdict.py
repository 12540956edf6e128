"""How an answer is checked, and what is said about it."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Checker = Callable[[Any], str | None]  # an answer to what is off about it; None: nothing


@dataclass(frozen=True)
class Verdict:
    """Whether an answer is right, and a sentence about it. A notebook shows the sentence."""

    right: bool
    message: str

    def __repr__(self) -> str:
        return self.message


class Wrong(Exception):
    """Raised by a checker as soon as it knows what is off."""


def check(exercise: str, answer: Any) -> Verdict:
    """Checks the ``answer`` to an exercise, such as ``"3.1"``: a function or a value, as the exercise asks.

    Raises ``ValueError`` for an exercise that there is not.
    """
    lesson = exercise.partition(".")[0]
    try:
        checkers: Mapping[str, Checker] = importlib.import_module(f"checks.lesson_{lesson}").CHECKERS
    except ModuleNotFoundError as error:
        raise ValueError(f"exercise is {exercise!r}, but there is no lesson {lesson!r}") from error
    if exercise not in checkers:
        raise ValueError(f"exercise is {exercise!r}, expected one of {', '.join(checkers)}")
    if answer is None or answer is ...:
        return Verdict(False, f"Exercise {exercise} is open: there is no answer yet.")
    try:
        off = checkers[exercise](answer)
    except Wrong as wrong:
        off = str(wrong)
    if off is not None:
        return Verdict(False, f"Exercise {exercise}, not yet: {off}")
    return Verdict(True, f"Exercise {exercise}: right.")


def run(function: Any, *arguments: Any) -> Any:
    """What the answer's function returns. Raises :class:`Wrong` if it is no function, fails or returns nothing."""
    if not callable(function):
        raise Wrong(f"this is {function!r}, expected a function.")
    try:
        found = function(*arguments)
    except Exception as error:  # an answer may fail in any way
        raise Wrong(f"your function raises {type(error).__name__}: {error}") from error
    if found is None or found is ...:
        raise Wrong("your function returns nothing yet.")
    return found


def number(answer: Any) -> float:
    """A number. Raises :class:`Wrong` for anything else."""
    try:
        return float(answer)
    except (TypeError, ValueError):
        raise Wrong(f"this is {answer!r}, expected a number.") from None


def compare(found: Any, right: Tensor, mistakes: Mapping[str, Tensor] | None = None) -> str | None:
    """What is off about the numbers ``found``; ``None`` if they are the ``right`` ones, to 1e-6 of the largest.

    ``mistakes`` are what known mistakes give: where one of them fits, its sentence is the answer.
    """
    try:
        given = torch.as_tensor(found).double()
    except (TypeError, ValueError, RuntimeError):
        raise Wrong(f"this is {found!r:.60}, expected numbers of shape {tuple(right.shape)}.") from None
    for sentence, wrong in (mistakes or {}).items():
        if _equal(given, wrong) and not _equal(given, right):
            return sentence
    if given.shape != right.shape:
        return f"the shape is {tuple(given.shape)}, expected {tuple(right.shape)}."
    if _equal(given, right):
        return None
    error = (given - right.double()).abs().nan_to_num(nan=torch.inf)
    at = int(error.argmax())
    where = f" at number {at}" if error.numel() > 1 else ""
    return f"the numbers differ{where}: {given.flatten()[at]:.6g}, expected {right.flatten()[at]:.6g}."


def _equal(given: Tensor, other: Tensor) -> bool:
    if given.shape != other.shape:
        return False
    scale = max(1e-12, float(other.double().abs().max())) if other.numel() else 1.0
    return bool(((given - other.double()).abs() <= 1e-6 * scale).all())
