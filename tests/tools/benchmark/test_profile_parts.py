"""Time by parts of the model."""

from __future__ import annotations

import pytest
import torch

from tests.minisdxl.tiny import BENCH_MODEL
from tools.benchmark.bench_models import unets
from tools.benchmark.profile_parts import PARTS, spent

CPU = torch.device("cpu")
pytestmark = pytest.mark.filterwarnings("ignore")


@torch.no_grad()
def test_parts_add_up_to_what_is_spent() -> None:
    for contender in unets(BENCH_MODEL, 128, 1, ["dense", "at-edm", "dissimilarity", "tome"], [], CPU, torch.float32):
        parts = spent(contender, CPU)
        print(contender.name, {part: f"{ms:.2f} ms" for part, ms in parts.items()})
        assert tuple(parts) == PARTS
        for part in ("convolution", "projections", "attention", "normalization"):
            assert parts[part] > 0
        for part in ("ranking", "gather", "recovery"):
            assert (parts[part] > 0) == (contender.name != "dense")
