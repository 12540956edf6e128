"""A trained model that another one learns from."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.utils import convert_conv2d_weight_memory_format

from minisdxl.checkpoint.modules import load
from minisdxl.config import SHAPES
from minisdxl.transformer import AttentionBlock
from minisdxl.unet import UNet


class Teacher:
    """A trained model whose predictions are the student's target instead of the noise (Hinton et al. 2015).

    Unlike the noise, this target has no randomness. The student starts from the teacher's weights, with some replaced:
    here self-attention starts from a similarity kernel. :meth:`hint` also compares the outputs of the attention blocks
    (Romero et al. 2015, "FitNets").
    """

    HINT = 10.0  # weight of :meth:`hint` in the loss

    def __init__(self, path: Path, student: UNet, device: torch.device | str) -> None:
        taught = load(path, device)[1]
        convert_conv2d_weight_memory_format(taught.unet, torch.channels_last)
        self.unet, self.text = taught.unet.requires_grad_(False), taught.text.requires_grad_(False)
        self.features = {"student": list[Tensor](), "teacher": list[Tensor]()}
        for who, unet in (("student", student), ("teacher", self.unet)):
            for block in unet.modules():
                if isinstance(block, AttentionBlock):
                    block.register_forward_hook(partial(self._see, who))

    def _see(self, who: str, _block: nn.Module, _inputs: object, output: Tensor) -> None:
        self.features[who].append(output.float())

    def hint(self) -> Tensor:
        """How far the student's attention blocks are from the teacher's, since the last call.

        Squared error of each block's output over the variance of the teacher's, mean over blocks and pictures.
        """
        student, teacher = self.features["student"], self.features["teacher"]
        errors = [
            ((ours - theirs).square().mean(dim=(1, 2, 3)) / theirs.var(dim=(1, 2, 3))).mean()
            for ours, theirs in zip(student, teacher, strict=True)
        ]
        self.forget()
        return torch.stack(errors).mean()

    def forget(self) -> None:
        """Leaves the calls so far out of the next :meth:`hint`."""
        for features in self.features.values():
            features.clear()

    @torch.no_grad()
    def __call__(self, x: Tensor, timestep: Tensor, ids: Tensor, ids_2: Tensor, drop: Tensor, sizes: Tensor) -> Tensor:
        """The teacher's prediction (B, 4, h, w) for the same noisy latents and captions."""
        words = self.text(ids, ids_2).zeroed(drop)
        predicted: Tensor = self.unet(x, timestep, words.context, words.vector(sizes, SHAPES.size_channels))
        return predicted.float()
