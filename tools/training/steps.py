"""Shared parts of all trainings: learning rates, noise levels, loss balance, optimizer, saved states and logs."""

from __future__ import annotations

import csv
import os
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


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

    def __init__(self) -> None:
        self.typical = torch.full((self.BANDS,), torch.nan)  # logarithms; nan before the first error

    def __call__(self, errors: Tensor, share: Tensor) -> Tensor:
        """Balanced errors (B,). ``share`` (B,) in [0, 1) is the position of each in the noise levels, lowest first."""
        bands = (share * self.BANDS).long()
        ones = torch.ones_like(errors)
        count = torch.zeros(self.BANDS, device=errors.device).index_add(0, bands, ones)
        logarithms = errors.detach().clamp_min(self.LEAST).log()
        mean = torch.zeros_like(count).index_add(0, bands, logarithms) / count  # nan where there is none
        self.typical = self.typical.to(errors.device)
        before = torch.where(self.typical.isnan(), mean, self.typical)
        # The new mean has the weight that its errors would have one after the other.
        self.typical = torch.where(count > 0, before.lerp(mean, 1 - (1 - self.RATE) ** count), self.typical)
        return errors / self.typical[bands].exp()


def noise_levels(count: int) -> Tensor:
    """Positions (count,) in [0, 1) among the noise levels, evenly spread, in random order.

    One in eight lies in the lowest quarter, where pictures are nearly finished and little is left to learn.
    """
    share = (torch.randperm(count) + torch.rand(count)) / count
    return torch.where(share < 1 / 8, 2 * share, 0.25 + (share - 1 / 8) * (6 / 7))


class Optimizer:
    """An optimizer: Muon for matrices of transformer layers, where it needs fewer steps, and AdamW for the rest.

    ``attention_rate`` scales the learning rate of the query and key maps of self-attention.
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
            torch.optim.Muon(group, lr=rate, weight_decay=0.01, adjust_lr_fn="match_rms_adamw")
            for group, rate in ((list(matrices.values()), 2e-3), (likeness, attention_rate * 2e-3))
            if group
        ]
        self.parts.append(torch.optim.AdamW(others, lr=1e-3, betas=(0.9, 0.99), weight_decay=0.01))
        self.rates = [part.param_groups[0]["lr"] for part in self.parts]

    def step(self, loss: Tensor, factor: float) -> None:
        """One step down the gradient of ``loss``, clipped to norm 1, at ``factor`` times the learning rates."""
        for part, rate in zip(self.parts, self.rates, strict=True):
            part.param_groups[0]["lr"] = rate * factor
            part.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        for part in self.parts:
            part.step()

    def state(self) -> list[dict[str, Any]]:
        """The state of the optimizer, for :meth:`load_state`."""
        return [part.state_dict() for part in self.parts]

    def load_state(self, state: list[dict[str, Any]]) -> None:
        """Restores a :meth:`state`."""
        for part, saved in zip(self.parts, state, strict=True):
            part.load_state_dict(saved)


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
