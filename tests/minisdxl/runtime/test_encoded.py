"""Prompts encoded ahead: the same pictures, without text encoders in memory."""

from __future__ import annotations

import gc
from typing import Any

import numpy as np
import pytest
from PIL import Image
from torch import Tensor, nn

import minisdxl
from minisdxl.pipeline import SDXL
from minisdxl.text import TextEncoders

PROMPT = "a small red circle above a big blue square on a white background"


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(np.float64) / 255


def test_prompts_encoded_ahead_give_the_same_pictures(shapes: SDXL) -> None:
    prompts = [PROMPT, "a big green triangle on a black background"]
    settings: dict[str, Any] = {"negative": "blue", "steps": 4, "size": (64, 64)}
    ahead = shapes.encode_ahead([*prompts, "a cat"], ["blue", ""])
    with_encoders, without = shapes.generate(prompts, **settings), ahead.generate(prompts, **settings)
    error = max(np.abs(pixels(a) - pixels(b)).max() for a, b in zip(with_encoders, without, strict=True))
    print(f"max error {error:.1e}")
    assert error <= 1.01 / 255
    alone = shapes.generate(prompts[1:], steps=2, size=(64, 64))[0]
    assert np.array_equal(pixels(alone), pixels(ahead.generate(prompts[1:], steps=2, size=(64, 64))[0]))
    fewer = ahead.encode_ahead(prompts[:1])
    with pytest.raises(ValueError, match=r"prompt 'a big green triangle .*' was not encoded ahead"):
        fewer.generate(prompts, steps=1, size=(64, 64))
    with pytest.raises(ValueError, match="negative prompt 'blue' was not encoded ahead"):
        fewer.generate(prompts[:1], negative="blue", steps=1, size=(64, 64))


@pytest.mark.parametrize("prompts", [[], "one string"])
def test_there_must_be_prompts_to_encode_ahead(shapes: SDXL, prompts: Any) -> None:
    with pytest.raises(ValueError, match=r"there are no prompts in it; expected a list"):
        shapes.encode_ahead(prompts)
    with pytest.raises(ValueError, match=r"there are no prompts in it; expected a list"):
        shapes.encode_ahead([PROMPT], prompts)


def living_bytes() -> int:
    """Bytes of all tensors in memory, counting what is shared once; nothing is collected first."""
    tensors = [found for found in gc.get_objects() if type(found) in (Tensor, nn.Parameter) and found.is_cpu]
    return sum({tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}.values())


def test_text_encoders_leave_memory() -> None:
    model = minisdxl.load("shapes")
    assert isinstance(model.text, TextEncoders)
    model.generate([PROMPT], steps=1, size=(64, 64))
    gc.collect()
    gc.disable()  # what leaves must need no collecting: the next thing to come may be large
    try:
        before, encoders = living_bytes(), sum(weight.nbytes for weight in model.text.parameters())
        model = model.encode_ahead([PROMPT])
        after = living_bytes()
    finally:
        gc.enable()
    # Context and pooled text in fp32: of the prompt, of the negative one, and of the empty one that pads long prompts.
    encoded = 3 * (77 * 192 + 128) * 4
    print(f"tensors: {before:,} bytes before, of which text encoders {encoders:,}; {after:,} after")
    assert before - after >= encoders - encoded
