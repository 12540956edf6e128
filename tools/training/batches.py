"""Batches of drawn pictures, drawn while training needs them, by worker processes for a GPU.

A batch depends only on the training's name, a seed and its step. So it does not matter which process draws it, and a
run that was stopped continues with the same batches.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from tools.drawn.painting import Picture, draw
from tools.drawn.world import WORLDS

Batch = tuple[Picture, list[str]]  # pictures (count, side, side, 3), and their captions


@dataclass(frozen=True)
class BatchSize:
    """``count`` pictures of ``side`` pixels, each a random crop of a picture of ``whole`` pixels."""

    count: int
    side: int
    whole: int


def draw_batch(rng: random.Random, size: BatchSize, split: str = "train", world: str = "mixed") -> Batch:
    """New pictures of a world, one of ``WORLDS``, and the captions of the whole pictures."""
    pictures, captions = [], []
    for _ in range(size.count):
        scene = WORLDS[world](rng, split)
        top, left = (rng.randint(0, size.whole - size.side) for _ in range(2))
        pictures.append(draw(scene, size.whole)[top : top + size.side, left : left + size.side])
        captions.append(scene.caption)
    return np.stack(pictures), captions


def to_images(pictures: Picture | Tensor, device: torch.device | str | None = None) -> Tensor:
    """Pictures (B, side, side, 3) to tensors (B, 3, side, side) in [-1, 1]."""
    images = torch.as_tensor(pictures, device=device).permute(0, 3, 1, 2).float().div(127.5).sub(1)
    return images.contiguous(memory_format=torch.channels_last)


class DrawnBatches(Dataset[Batch]):
    """The batches of the training ``name``: batch ``step`` has size ``sizes[step]`` and shows a world of ``WORLDS``."""

    def __init__(self, name: str, seed: int, sizes: Sequence[BatchSize], world: str = "mixed") -> None:
        self.name, self.seed, self.sizes, self.world = name, seed, sizes, world

    def __getitem__(self, step: int) -> Batch:
        return draw_batch(random.Random(f"{self.name} {self.seed} {step}"), self.sizes[step], world=self.world)


def draw_ahead(batches: DrawnBatches, first: int, workers: int) -> Iterator[Batch]:
    """The batches from step ``first`` on, drawn ahead by ``workers`` processes (0: drawn here, when asked for)."""
    # Batches are sent as arrays through pipes. Tensors would need more shared memory than containers have.
    return iter(
        DataLoader(
            batches,
            batch_size=None,
            sampler=range(first, len(batches.sizes)),
            num_workers=workers,
            collate_fn=_as_it_is,
        )
    )


def _as_it_is(batch: Any) -> Any:
    return batch
