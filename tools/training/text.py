"""Trains the bundled model's text encoders before the U-Net: the second part of ``tools.train_shapes``.

From a caption alone they learn to predict a thumbnail: the average over all pictures that the caption describes. A
U-Net needs this at the highest noise, but takes thousands of steps to teach it to the text encoders. Without this part
the embeddings did not tell where objects are. SDXL's own text encoders were trained on pictures too, as CLIP.
"""

from __future__ import annotations

import argparse
import time

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from minisdxl.checkpoint.modules import load
from minisdxl.config import SHAPES
from minisdxl.text import TextEmbeddings, TextEncoders
from minisdxl.tokenizer import Tokenizer
from tools.training.batches import BatchSize, DrawnBatches, draw_ahead, to_images
from tools.training.steps import Optimizer, log, save_state, warm_then_decay

SIDE = 8  # pixels of a thumbnail


class Thumbnails(nn.Module):
    """Two predictions of a thumbnail (B, 3, 8, 8): one by attention to the context, one from the pooled embedding.

    The first has the form of a U-Net's cross-attention: each pixel attends to the words to find its color.
    """

    def __init__(self, context_channels: int, pooled_channels: int, width: int = 128) -> None:
        super().__init__()
        self.positions = nn.Parameter(0.5 * torch.randn(SIDE * SIDE, width))
        self.attention = nn.MultiheadAttention(width, 4, kdim=context_channels, vdim=context_channels, batch_first=True)
        self.of_position = _two_layers(width, 3)
        self.of_pooled = _two_layers(pooled_channels, 3 * SIDE * SIDE)

    def forward(self, words: TextEmbeddings) -> tuple[Tensor, Tensor]:
        """Both predictions, for pixels in [-1, 1]."""
        positions = self.positions.expand(len(words.context), -1, -1)
        found, _ = self.attention(positions, words.context, words.context, need_weights=False)
        by_position = rearrange(self.of_position(positions + found), "b (h w) c -> b c h w", h=SIDE)
        return by_position, rearrange(self.of_pooled(words.pooled), "b (c h w) -> b c h w", c=3, h=SIDE)

    def loss(self, words: TextEmbeddings, images: Tensor) -> Tensor:
        """Squared error of both predictions, for pictures (B, 3, H, W) in [-1, 1]."""
        target = F.adaptive_avg_pool2d(images, SIDE)
        by_position, by_pooled = self(words)
        return F.mse_loss(by_position.float(), target) + F.mse_loss(by_pooled.float(), target)


def _two_layers(channels: int, out: int) -> nn.Sequential:
    return nn.Sequential(nn.LayerNorm(channels), nn.Linear(channels, 256), nn.GELU(), nn.Linear(256, out))


class SeeingText(nn.Module):
    """Text encoders, with the thumbnail predictions that train them."""

    def __init__(self) -> None:
        super().__init__()
        self.text = TextEncoders(SHAPES.text)
        pooled = SHAPES.text[1].projection
        assert pooled is not None
        self.thumbnails = Thumbnails(sum(each.width for each in SHAPES.text), pooled)


def train_text(options: argparse.Namespace, tokenizer: Tokenizer) -> SeeingText:
    """Trains text encoders on captions and thumbnails, or returns those of a finished run.

    They start from ``options.init``, if it is given.
    """
    state_file = options.run / "text.pt"
    torch.manual_seed(options.seed)
    model = SeeingText().to(options.device)
    if options.init is not None:
        model.text.load_state_dict(load(options.init)[1].text.state_dict())
    optimizer = Optimizer(model)
    step = 0
    if state_file.exists():
        state = torch.load(state_file, weights_only=True, map_location=options.device)
        model.load_state_dict(state["model"])
        optimizer.load_state(state["optimizer"])
        step = state["step"]
    began = time.time()
    sizes = [BatchSize(2 * options.batch, 4 * SIDE, 4 * SIDE)] * options.text_steps
    for pictures, captions in draw_ahead(DrawnBatches("text", options.seed, sizes), step, options.workers):
        ids, ids_2 = (each.to(options.device) for each in tokenizer(captions))
        loss = model.thumbnails.loss(model.text(ids, ids_2), to_images(pictures, options.device))
        optimizer.step(loss, warm_then_decay(step, options.text_steps, warm=30, decay=0.3))
        step += 1
        if step % 25 == 0 or step == options.text_steps:
            log(options.run / "text.csv", step=step, loss=loss.item(), seconds=time.time() - began)
        if step % 100 == 0 or step == options.text_steps:
            save_state(state_file, {"model": model.state_dict(), "optimizer": optimizer.state(), "step": step})
    return model
