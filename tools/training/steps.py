"""Shared parts of all trainings: learning rates, noise levels, loss balance, optimizer, saved states and logs."""

from __future__ import annotations

import csv
import os
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim._muon import DEFAULT_A, DEFAULT_B, DEFAULT_C, DEFAULT_NS_STEPS, EPS, _zeropower_via_newtonschulz


def warm_then_decay(step: int, steps: int, warm: int, decay: float) -> float:
    """Learning-rate factor: linear warm-up, plateau, and linear decay to 0 over the last ``decay`` of the steps."""
    return min((step + 1) / warm, 1.0, (steps - step) / (steps * decay))


class Balance:
    """Divides every error by the typical error of its noise level, so that all levels count the same.

    Otherwise the error of the predicted noise gives weight to low noise alone, and the error of the predicted latent to
    the highest noise alone, where the caption does not determine the picture. Objects get their outlines in between.
    Karras et al. 2024 (EDM2) learn the typical error with a small network. Here it is a running geometric mean in
    ``BANDS`` bands of noise levels.
    """

    BANDS = 20
    RATE = 0.03  # weight of a new error in the mean of its band
    LEAST = 1e-8  # an error of 0 has no logarithm; a model that is its own teacher has it

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.typical = torch.full((self.BANDS,), torch.nan, device=device)  # logarithms; nan before the first error

    def __call__(self, errors: Tensor, share: Tensor) -> Tensor:
        """Balanced errors (B,). ``share`` (B,) in [0, 1) is the position of each in the noise levels, lowest first."""
        bands = (share * self.BANDS).long()
        ones = torch.ones_like(errors)
        count = torch.zeros(self.BANDS, device=errors.device).index_add(0, bands, ones)
        logarithms = errors.detach().clamp_min(self.LEAST).log()
        mean = torch.zeros_like(count).index_add(0, bands, logarithms) / count  # nan where there is none
        before = torch.where(self.typical.isnan(), mean, self.typical)
        # The new mean has the weight that its errors would have one after the other.
        now = before.lerp(mean, 1 - (1 - self.RATE) ** count)
        self.typical.copy_(torch.where(count > 0, now, self.typical))
        return errors / self.typical[bands].exp()


def noise_levels(count: int) -> Tensor:
    """Positions (count,) in [0, 1) among the noise levels, evenly spread, in random order.

    One in eight lies in the lowest quarter, where pictures are nearly finished and little is left to learn.
    """
    share = (torch.randperm(count) + torch.rand(count)) / count
    return torch.where(share < 1 / 8, 2 * share, 0.25 + (share - 1 / 8) * (6 / 7))


class Muon(torch.optim.Optimizer):
    """``torch.optim.Muon`` for many small matrices: those of one shape are orthogonalized together.

    Its learning rate may be a tensor (), as a CUDA graph needs it.
    """

    MOMENTUM = 0.95

    def __init__(self, matrices: list[nn.Parameter], lr: float, weight_decay: float) -> None:
        super().__init__(matrices, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # torch's take a function
        """One step. A matrix moves as much as AdamW would move it (``match_rms_adamw``: Liu et al. 2025, section 2)."""
        for group in self.param_groups:
            matrices = [matrix for matrix in group["params"] if matrix.grad is not None]
            gradients = [matrix.grad for matrix in matrices]
            momenta = [self._momentum(matrix) for matrix in matrices]
            torch._foreach_lerp_(momenta, gradients, 1 - self.MOMENTUM)
            moves = list(torch._foreach_lerp(gradients, momenta, self.MOMENTUM))
            for shape in {matrix.shape for matrix in matrices}:
                here = [index for index, matrix in enumerate(matrices) if matrix.shape == shape]
                stacked = torch.stack([moves[index] for index in here])
                together = 0.2 * max(shape) ** 0.5 * torch.vmap(_orthogonal)(stacked).to(stacked.dtype)
                for index, move in zip(here, together, strict=True):
                    moves[index] = move
            torch._foreach_mul_(matrices, 1 - group["lr"] * group["weight_decay"])
            torch._foreach_sub_(matrices, torch._foreach_mul(moves, group["lr"]))

    def _momentum(self, matrix: Tensor) -> Tensor:
        state = self.state[matrix]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(matrix)
        momentum: Tensor = state["momentum_buffer"]
        return momentum


def _orthogonal(matrix: Tensor) -> Tensor:
    """The nearest orthogonal matrix, about, as torch's Muon has it."""
    return _zeropower_via_newtonschulz(matrix, (DEFAULT_A, DEFAULT_B, DEFAULT_C), DEFAULT_NS_STEPS, EPS)


class Optimizer:
    """An optimizer: Muon for matrices of transformer layers, where it needs fewer steps, and AdamW for the rest.

    ``attention_rate`` scales the learning rate of the query and key maps of self-attention. A step can be recorded as a
    CUDA graph.
    """

    def __init__(self, model: nn.Module, attention_rate: float = 1.0) -> None:
        named = dict(model.named_parameters())
        matrices = {n: p for n, p in named.items() if p.ndim == 2 and re.search(r"transformer_blocks|\.layers\.", n)}
        likeness = [p for n, p in matrices.items() if re.search(r"\.attn1\.to_[qk]\.", n)]
        matrices = {n: p for n, p in matrices.items() if not re.search(r"\.attn1\.to_[qk]\.", n)}
        chosen = {id(p) for p in (*matrices.values(), *likeness)}
        others = [p for p in named.values() if id(p) not in chosen]
        self.parameters = [*matrices.values(), *likeness, *others]
        self.parts: list[torch.optim.Optimizer] = [
            Muon(group, lr=rate, weight_decay=0.01)
            for group, rate in ((list(matrices.values()), 2e-3), (likeness, attention_rate * 2e-3))
            if group
        ]
        betas, on_gpu = (0.9, 0.99), others[0].is_cuda
        self.parts.append(torch.optim.AdamW(others, lr=1e-3, betas=betas, weight_decay=0.01, capturable=on_gpu))
        self.rates = [part.param_groups[0]["lr"] for part in self.parts]

    def step(self, loss: Tensor, share: Tensor | float) -> None:
        """One step down the gradient of ``loss``, clipped to norm 1, at a ``share`` of the learning rates."""
        for part, rate in zip(self.parts, self.rates, strict=True):
            part.param_groups[0]["lr"] = rate * share
            part.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        for part in self.parts:
            part.step()

    def state(self) -> list[dict[str, Any]]:
        """The state of the optimizer, for :meth:`load_state`."""
        return [part.state_dict() for part in self.parts]

    def load_state(self, state: list[dict[str, Any]]) -> None:
        """Restores a :meth:`state`, perhaps of another device. Learning rates stay as they are here."""
        for part, saved in zip(self.parts, state, strict=True):
            part.load_state_dict(saved | {"param_groups": part.state_dict()["param_groups"]})


def save_state(path: Path, state: dict[str, Any]) -> None:
    """Writes a training state whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(".part")
    torch.save(state, beside)
    os.replace(beside, path)


def log(path: Path, **values: float) -> None:
    """Prints one line, and appends one row to a CSV file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    print(path.stem, " ".join(f"{name} {value:.4g}" for name, value in values.items()), flush=True)
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.writer(file)
        if new:
            writer.writerow(values)
        writer.writerow(f"{value:.6g}" for value in values.values())
