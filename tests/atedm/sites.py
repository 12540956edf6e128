"""SDXL's eleven attention blocks, written out by hand: what plans and schedules are tried on."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Block:
    name: str
    stage: str
    level: int
    index: int
    depth: int


SDXL = [
    Block("down.1.0", "down", 1, 0, 2),
    Block("down.1.1", "down", 1, 1, 2),
    Block("down.2.0", "down", 2, 0, 10),
    Block("down.2.1", "down", 2, 1, 10),
    Block("mid", "mid", 2, 0, 10),
    Block("up.2.0", "up", 2, 0, 10),
    Block("up.2.1", "up", 2, 1, 10),
    Block("up.2.2", "up", 2, 2, 10),
    Block("up.1.0", "up", 1, 0, 2),
    Block("up.1.1", "up", 1, 1, 2),
    Block("up.1.2", "up", 1, 2, 2),
]
NAMES = [block.name for block in SDXL]
DEPTHS = {block.name: block.depth for block in SDXL}
PRUNE_LESS = ["down.1.1", "down.2.1", "mid", "up.2.0", "up.2.1", "up.1.0", "up.1.1"]
