"""One thread for each process of ``make test``, one per core; Triton without a GPU; one copy of the bundled model."""

from __future__ import annotations

import os

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"  # read when torch is imported

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported

from collections.abc import Callable
from typing import Any

import minisdxl
from minisdxl.checkpoint.layouts import PARTS
from minisdxl.pipeline import SDXL


@pytest.fixture(scope="session")
def shapes() -> SDXL:
    """The bundled model on the CPU in fp32. All tests share it: none may change it."""
    return minisdxl.load("shapes")


@pytest.fixture(scope="session")
def load_once(shapes: SDXL) -> Callable[..., SDXL]:
    """Stands in for ``load`` in commands: the shared model where the bundled one is asked for as it is."""

    def load(weights: str = "shapes", **options: Any) -> SDXL:
        none: dict[str, Any] = dict.fromkeys((*PARTS, "tokenizer", "refiner", "prediction")) | {
            "loras": [],
            "embeddings": [],
        }
        as_it_is = {"device": "cpu", "dtype": torch.float32, **none}
        either = {"vae_encoder"}  # the shared model has it, which does for both
        asked = {name: value for name, value in options.items() if name not in either and value != as_it_is[name]}
        return shapes if weights == "shapes" and not asked else minisdxl.load(weights, **options)

    return load
