"""minisdxl: Stable Diffusion XL from scratch, with token pruning as ordinary layers.

sdxl = minisdxl.load("shapes")
images = sdxl.generate(["a small red circle on a white background"])
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from minisdxl.loading import load
    from minisdxl.pipeline import SDXL
    from minisdxl.settings import Settings

__version__ = "0.2.0"
__all__ = ["SDXL", "Settings", "__version__", "load"]


def __getattr__(name: str) -> Any:
    # Imported on first use: counting FLOPs does not need the model.
    homes = {"SDXL": "pipeline", "Settings": "settings", "load": "loading"}
    if name in homes:
        from importlib import import_module

        return getattr(import_module(f"minisdxl.{homes[name]}"), name)
    raise AttributeError(f"module 'minisdxl' has no attribute {name!r}")
