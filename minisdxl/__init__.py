"""minisdxl: Stable Diffusion XL from scratch, with token pruning as ordinary layers.

sdxl = minisdxl.load("shapes")
images = sdxl.generate(["a small red circle on a white background"], prune="at-edm")
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from minisdxl.pipeline import SDXL, load

__all__ = ["SDXL", "load"]


def __getattr__(name: str) -> Any:
    # Imported when first used: counting FLOPs has no need of the model.
    if name in __all__:
        from minisdxl import pipeline

        return getattr(pipeline, name)
    raise AttributeError(f"module 'minisdxl' has no attribute {name!r}")
