"""Pictures made while hooks watch the attention blocks, and how uniform their self-attention maps are."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from atedm.graph.dense import DenseGraph
from atedm.schedule import Schedule
from minisdxl.pipeline import SDXL
from minisdxl.transformer import AttentionBlock

Settings = dict[str, Any]  # arguments of SDXL.generate that all pictures of a figure share; there is one prompt
Hook = Callable[[str, nn.Module, Any, Any], None]  # (attention block, module in it that has run, inputs, output)


def make(
    sdxl: SDXL, settings: Settings, schedule: Schedule | None, see: Hook = lambda *_: None, part: str = ""
) -> tuple[Image.Image, Tensor]:
    """The picture and its latent (4, h, w). ``see`` is a hook on each transformer layer, or on the ``part`` of each."""
    print(f"{settings['steps']} steps, {'dense' if schedule is None else schedule.method}", flush=True)
    latents: list[Tensor] = []
    with ExitStack() as stack:
        for block in (module for module in sdxl.unet.modules() if isinstance(module, AttentionBlock)):
            for layer in block.transformer_blocks:
                stack.enter_context(layer.get_submodule(part).register_forward_hook(partial(see, block.name)))
        images = sdxl.generate(**settings, prune=schedule, on_step=lambda _, x: latents.append(x[0]))
    return images[0], latents[-1]


def attention_spread(sdxl: SDXL, settings: Settings) -> NDArray[np.float64]:
    """Variance and entropy of the dense model's self-attention maps: (2, attention blocks, steps).

    The variance is that of N A[i, j] over the N x N entries of a map (0 to N - 1), the entropy that of its rows as a
    share of ln N. Both are averaged over layers, heads and both halves of guidance. Raises ``ValueError`` if a block
    has one token.
    """
    seen: dict[str, list[tuple[float, float]]] = defaultdict(list)

    def see(name: str, _: nn.Module, __: Any, output: Any) -> None:
        graph = DenseGraph.from_qk(*output[1][:3])
        tokens = graph.shape[-1]
        if tokens < 2:
            raise ValueError(f"attention block {name} has 1 token, expected 2 or more; ask for a larger --size")
        # Rows sum to one, so N A[i, j] averages 1 over every map: the variance over all maps is the mean of theirs.
        variance, entropy = (graph.map * tokens).var(correction=0), graph.entropy().mean() / np.log(tokens)
        seen[name].append((variance.item(), entropy.item()))

    make(sdxl, settings, None, see, "attn1")
    # Each layer runs once a step, so a block's list has its layers of step 1, then those of step 2, and so on.
    means = [np.reshape(values, (settings["steps"], -1, 2)).mean(axis=1) for values in seen.values()]
    return np.moveaxis(np.array(means), -1, 0)
