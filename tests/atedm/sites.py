"""SDXL's eleven attention blocks, written out by hand: what plans and schedules are tried on."""

from __future__ import annotations

from atedm import Site

SDXL = [
    Site("down", 1, 0, depth=2),
    Site("down", 1, 1, depth=2),
    Site("down", 2, 0, depth=10),
    Site("down", 2, 1, depth=10),
    Site("mid", 2, 0, depth=10),
    Site("up", 2, 0, depth=10),
    Site("up", 2, 1, depth=10),
    Site("up", 2, 2, depth=10),
    Site("up", 1, 0, depth=2),
    Site("up", 1, 1, depth=2),
    Site("up", 1, 2, depth=2),
]
NAMES = [
    *("down.1.0", "down.1.1", "down.2.0", "down.2.1"),
    "mid",
    *("up.2.0", "up.2.1", "up.2.2", "up.1.0", "up.1.1", "up.1.2"),
]
DEPTHS = dict(zip(NAMES, (site.depth for site in SDXL), strict=True))
PRUNE_LESS = ["down.1.1", "down.2.1", "mid", "up.2.0", "up.2.1", "up.1.0", "up.1.1"]
