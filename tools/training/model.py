"""What the last part of the training trains: the U-Net with the text encoders."""

from __future__ import annotations

from torch import Tensor, nn

from minisdxl.config import SHAPES
from minisdxl.text import TextEmbeddings
from minisdxl.transformer import AttentionBlock
from minisdxl.unet import ResBlock, UNet
from tools.training.text import SeeingText


def zero(module: nn.Module) -> None:
    """Sets all weights of a module to 0."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)


class Model(nn.Module):
    """The U-Net and the text encoders, which the last part trains together."""

    def __init__(self, seeing: SeeingText) -> None:
        super().__init__()
        self.unet = UNet(SHAPES.unet)
        self.text, self.thumbnails = seeing.text, seeing.thumbnails
        for module in self.unet.modules():  # official initialization: every residual branch starts at 0
            if isinstance(module, ResBlock):
                zero(module.out_layers[3])
            elif isinstance(module, AttentionBlock):
                zero(module.proj_out)
        zero(self.unet.out[2])

    def forward(self, latents: Tensor, timestep: Tensor, words: TextEmbeddings, sizes: Tensor) -> Tensor:
        """Predicts the noise in latents (B, 4, h, w) of pictures with the size numbers ``sizes`` (B, 6)."""
        predicted: Tensor = self.unet(latents, timestep, words.context, words.vector(sizes, SHAPES.size_channels))
        return predicted
