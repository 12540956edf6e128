"""Kinds of changes of a weight, each with its tensors: their shapes, and the change that they make.

A weight is W (out, in, ...), where ... is the window of a convolution, nothing for a linear map.

| kind | tensors | change |
| --- | --- | --- |
| LoRA (Hu et al. 2021, section 4.1) | down, up | up @ down |
| LoCon in Tucker form | and mid (rank, rank, ...) | mid, with up and down on its two ranks |
| LoHa (Hyeon-Woo et al. 2022, FedPara) | hada_w1_a, ... | (w1_a @ w1_b) * (w2_a @ w2_b) |
| LoKr (Yeh et al. 2024, LyCORIS) | lokr_w1, lokr_w2, or matrices that make them | their Kronecker product |
| whole | diff | itself |
| IA3 (Liu et al. 2022) | weight, for the inputs or the outputs | W * weight |

The first four count by alpha / rank. DoRA (Liu et al. 2024, equation 5) goes with each of them, see :func:`rescale`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from minisdxl.checkpoint.tensorfile import Shape

Shapes = Mapping[str, Shape]  # by roles, which are the names of tensors without what differs between trainers
Tensors = Mapping[str, Tensor]


@dataclass(frozen=True)
class Kind:
    """One way to store a change."""

    roles: tuple[str, ...]  # of its tensors; those of ``start`` tell where it is
    start: tuple[str, ...]
    shapes: Callable[[Shape, Shapes], dict[str, Shape]]  # of a weight's shape and what a file has, to what it needs
    product: Callable[[Tensors, Tensor], Tensor]  # of its tensors and the weight, to the change
    rank: Callable[[Shapes], int | None] | None = None  # by which alpha is divided; ``None`` where it has no effect
    reads_weight: bool = False


def kind_of(roles: Collection[str]) -> Kind | None:
    """The kind of a change with these roles; ``None`` where they are of none."""
    return next((kind for kind in KINDS if any(role in roles for role in kind.start)), None)


def _size(shapes: Shapes, *places: tuple[str, int]) -> int:
    """A size by role and axis, of the first that is there; 1 where none is, and for 0, which is mis-shaped."""
    return next((shapes[role][axis] for role, axis in places if axis < len(shapes.get(role, ()))), 1) or 1


def _tucker(core: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """A core (r, s, ...) with matrices on its first axes, up (out, r) and down (s, in): (out, in, ...)."""
    return torch.einsum("rs...,or,si->oi...", core, up, down)


def _lora_rank(shapes: Shapes) -> int:
    return _size(shapes, ("down", 0), ("up", 1))


def _lora_shapes(weight: Shape, found: Shapes) -> dict[str, Shape]:
    out, inner, *window = weight
    rank, ones = _lora_rank(found), [1] * len(window)
    up = (out, rank, *ones)
    if "mid" in found:
        return {"down": (rank, inner, *ones), "mid": (rank, rank, *window), "up": up}
    return {"down": (rank, inner, *window), "up": up}


def _lora(tensors: Tensors, weight: Tensor) -> Tensor:
    up, down = tensors["up"].flatten(1), tensors["down"].flatten(1)
    return _tucker(tensors["mid"], up, down) if "mid" in tensors else up @ down


def _loha_rank(shapes: Shapes) -> int:
    return _size(shapes, ("hada_w1_b", 0), ("hada_w2_b", 0))


def _loha_shapes(weight: Shape, found: Shapes) -> dict[str, Shape]:
    out, inner, *window = weight
    rank, wanted = _loha_rank(found), dict[str, Shape]()
    for n in "12":
        if "hada_t1" in found or "hada_t2" in found:
            wanted |= {f"hada_t{n}": (rank, rank, *window), f"hada_w{n}_a": (rank, out), f"hada_w{n}_b": (rank, inner)}
        else:
            wanted |= {f"hada_w{n}_a": (out, rank), f"hada_w{n}_b": (rank, inner * math.prod(window))}
    return wanted


def _loha(tensors: Tensors, weight: Tensor) -> Tensor:
    first, second = (_matrix(tensors, f"hada_w{n}", f"hada_t{n}") for n in "12")
    return first * second


def _matrix(tensors: Tensors, name: str, core: str = "") -> Tensor:
    """The product of two matrices, with a core between them if it is there; the first is transposed then."""
    a, b = tensors[f"{name}_a"], tensors[f"{name}_b"]
    return _tucker(tensors[core], a.T, b) if core in tensors else a @ b


def _lokr_rank(shapes: Shapes) -> int | None:
    """``None`` where both are whole matrices: LyCORIS takes no notice of alpha then."""
    if "lokr_w1_b" not in shapes and "lokr_w2_b" not in shapes:
        return None
    return _size(shapes, ("lokr_w2_b", 0), ("lokr_w1_b", 0))


def _lokr_shapes(weight: Shape, found: Shapes) -> dict[str, Shape]:
    out, inner, *window = weight
    rank = _lokr_rank(found) or 1
    # The sides of the first matrix, which divide those of the weight, leave those of the second.
    a = math.gcd(out, _size(found, ("lokr_w1", 0), ("lokr_w1_a", 0)))
    c = math.gcd(inner, _size(found, ("lokr_w1", 1), ("lokr_w1_b", 1)))
    b, d = out // a, inner // c
    wanted: dict[str, Shape] = {"lokr_w1_a": (a, rank), "lokr_w1_b": (rank, c)}
    if "lokr_w1" in found:
        wanted = {"lokr_w1": (a, c)}
    if "lokr_w2" in found:
        return wanted | {"lokr_w2": (b, d, *window)}
    if "lokr_t2" in found:
        return wanted | {"lokr_t2": (rank, rank, *window), "lokr_w2_a": (rank, b), "lokr_w2_b": (rank, d)}
    return wanted | {"lokr_w2_a": (b, rank), "lokr_w2_b": (rank, d * math.prod(window))}


def _lokr(tensors: Tensors, weight: Tensor) -> Tensor:
    first = tensors["lokr_w1"] if "lokr_w1" in tensors else _matrix(tensors, "lokr_w1")
    second = tensors["lokr_w2"] if "lokr_w2" in tensors else _matrix(tensors, "lokr_w2", "lokr_t2")
    window = second.reshape(len(second), weight.shape[1] // first.shape[1], -1)
    return torch.einsum("ac,bdk->abcdk", first, window)


def _ia3_shapes(weight: Shape, found: Shapes) -> dict[str, Shape]:
    """For inputs or outputs, which a number says that is read later; for convolutions LyCORIS has (1, n, 1, 1)."""
    shape = found.get("weight", ())
    forms = [form for n in weight[:2] for form in ((n,), (1, n, *[1] * len(weight[2:])))]
    return {"weight": shape if shape in forms else (weight[0],), "on_input": ()}


def _ia3(tensors: Tensors, weight: Tensor) -> Tensor:
    axis, vector = (1, tensors["inputs"]) if "inputs" in tensors else (0, tensors["outputs"])
    return weight * _along(vector, axis, weight)


def _along(vector: Tensor, axis: int, weight: Tensor) -> Tensor:
    """As many numbers as a weight has on an axis, in a shape that multiplies along it."""
    return vector.reshape([-1 if each == axis else 1 for each in range(weight.ndim)])


LOKR = ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2")
LOHA = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2")
KINDS = (
    Kind(("down", "up", "mid"), ("down", "up"), _lora_shapes, _lora, _lora_rank),
    Kind(LOHA, LOHA, _loha_shapes, _loha, _loha_rank),
    Kind(LOKR, LOKR, _lokr_shapes, _lokr, _lokr_rank),
    Kind(("diff",), ("diff",), lambda weight, _: {"diff": weight}, lambda tensors, _: tensors["diff"]),
    Kind(("weight", "on_input"), ("weight", "on_input"), _ia3_shapes, _ia3, reads_weight=True),
)
MAGNITUDES = ("dora_scale", "magnitude")  # of LyCORIS, and of PEFT


def magnitude_shapes(weight: Shape) -> dict[str, list[Shape]]:
    """The shapes that a DoRA's lengths may have, by their role.

    ``dora_scale`` has an axis of one number for each output, (out, 1, ...), or for each input, (1, in, ...); PEFT's
    ``lora_magnitude_vector`` always has one for each output, (out,) or for convolutions (1, out, 1, 1).
    """
    out, inner, *window = weight
    ones = [1] * len(window)
    by_output: list[Shape] = [(out, 1, *ones), (out,)]
    return {"dora_scale": [*by_output, (1, inner, *ones)], "magnitude": [*by_output, (1, out, *ones)]}


def rescale(weight: Tensor, lengths: Tensor, role: str) -> Tensor:
    """A weight whose rows, or columns, have the given lengths (DoRA, equation 5); those of length 0 stay so.

    Args:
        weight: (out, in, ...), with the change in it.
        lengths: in one of the shapes of :func:`magnitude_shapes`.
        role: one of ``MAGNITUDES``.
    """
    axis = 0 if role == "magnitude" or len(lengths) == len(weight) else 1
    others, tiny = [each for each in range(weight.ndim) if each != axis], torch.finfo(weight.dtype).tiny
    direction = weight / weight.abs().amax(dim=others, keepdim=True).clamp(min=tiny)  # whose squares cannot overflow
    norms = torch.linalg.vector_norm(direction, dim=others, keepdim=True)
    return direction / norms.clamp(min=tiny) * _along(lengths, axis, weight)
