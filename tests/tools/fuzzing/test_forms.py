"""The model that the fuzz test damages."""

from __future__ import annotations

import torch

from tools.fuzzing.forms import weights


def test_every_number_of_the_model_is_different() -> None:
    numbers = torch.cat([tensor.flatten() for tensor in weights().values()])
    assert len(set(numbers.tolist())) == len(numbers)
    assert numbers.isfinite().all()
    assert numbers.all()
