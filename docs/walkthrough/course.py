"""What the lessons share: both kinds of weights, a drawn picture with noise on it, and how things are shown.

Shapes: a latent is (1, 4, h, w); N tokens of an attention block lie on its grid (H, W).
"""

from __future__ import annotations

import random
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

import minisdxl
from atedm import DENSE, AttentionInputs, BlockPlan, LayerPlan, Restore, TokenPlan, TokenSet
from minisdxl.images import to_image
from minisdxl.pipeline import SDXL
from minisdxl.preconditioning import discrete_sigmas, preconditioner
from minisdxl.sampler import denoise
from minisdxl.settings import micro_conditioning
from minisdxl.unet import PromptKV

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))  # `tools` is not installed: it lies beside the documents

from tools.drawn.painting import draw, object_mask  # noqa: E402
from tools.drawn.world import Place, Scene, Thing, random_scene  # noqa: E402

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SIDE = 256  # pixels of a drawn picture, the model's own size
SCENE = Scene(
    "white",
    (Thing("small", "red", "circle"), Thing("big", "blue", "square")),
    "above",
    places=(Place(0.5, 0.25, 0.1), Place(0.5, 0.66, 0.2)),
)


def load(weights: str = "included") -> SDXL:
    """The ``"included"`` model, or the one in training whose attention looks for ``"similar"`` tokens."""
    if weights == "included":
        return minisdxl.load("shapes")
    if weights == "similar":
        file = ROOT / "weights/training/similar-attention.safetensors"
        return minisdxl.load(file, tokenizer=ROOT / "weights/shapes/tokenizer")
    raise ValueError(f"weights is {weights!r}, expected 'included' or 'similar'")


@dataclass(frozen=True)
class Example:
    """A drawn picture, where its objects are (H, W), its latent, and its caption as the U-Net reads it."""

    pixels: NDArray[np.uint8]
    objects: NDArray[np.bool_]
    latent: Tensor
    text: PromptKV
    vector: Tensor


@torch.no_grad()
def example(sdxl: SDXL, scene: Scene = SCENE, side: int = SIDE) -> Example:
    """A picture of ``scene``, drawn by the program that the model learned from, of ``side`` pixels."""
    pixels = draw(scene, side)
    latent = sdxl.vae.encode(torch.from_numpy(pixels).permute(2, 0, 1)[None].float().div(127.5).sub(1))
    text = sdxl.text.encode([scene.caption], sdxl.tokenizer)
    vector = text.vector(
        torch.tensor([micro_conditioning((side, side), None, (0, 0), None)]), sdxl.config.size_channels
    )
    return Example(pixels, object_mask(scene, side), latent, sdxl.unet.project_context(text.context), vector)


def examples(sdxl: SDXL, number: int, side: int = SIDE) -> list[Example]:
    """Pictures of captions that the model was not trained on, the same ones every time."""
    rng = random.Random(0)
    return [example(sdxl, random_scene(rng, "test"), side) for _ in range(number)]


@dataclass(frozen=True)
class Call:
    """What one U-Net call gave: the predicted noise, the latent D(x; sigma) that it heads for, and the noise in x."""

    predicted: Tensor
    denoised: Tensor
    noise: Tensor

    @property
    def error(self) -> float:
        """Squared error of the predicted noise."""
        return (self.predicted - self.noise).square().mean().item()


@torch.no_grad()
def call(sdxl: SDXL, picture: Example, timestep: int, plan: TokenPlan = DENSE, seed: int = 0) -> Call:
    """Adds noise of ``timestep`` (0 to 999) to the picture, and runs the U-Net once. A ``seed`` is always one noise."""
    sigma = float(discrete_sigmas(sdxl.config.noise)[timestep])
    noise = torch.randn(picture.latent.shape, generator=torch.Generator().manual_seed(1000 * seed + timestep))
    seen: list[Tensor] = []

    def network(scaled: Tensor, c_noise: Tensor) -> Tensor:
        seen.append(sdxl.unet(scaled, c_noise, picture.text, picture.vector, plan))
        return seen[-1]

    x = picture.latent + sigma * noise
    denoised = denoise(network, x, sigma, preconditioner(sdxl.config.noise))
    return Call(seen[0], denoised, noise)


@dataclass(frozen=True)
class Seen:
    """The first layer of an attention block: its tokens, and its attention to tokens and to words."""

    tokens: TokenSet
    attention: AttentionInputs
    to_words: AttentionInputs

    @property
    def map(self) -> Tensor:
        """Self-attention (heads, N, N): row i is what token i attends to."""
        _, _, scale, _ = self.attention
        return (scale * self.attention.query[0] @ self.attention.key[0].mT).softmax(dim=-1)


@dataclass(frozen=True)
class WatchedLayer(LayerPlan):
    """A layer plan that puts what it sees into ``seen``. It changes nothing."""

    seen: dict[str, Seen] = field(kw_only=True, compare=False)
    block: str = field(kw_only=True)

    def prune(
        self,
        tokens: TokenSet,
        self_attention: AttentionInputs,
        cross_attention: AttentionInputs,
        *,
        before_feed_forward: bool,
    ) -> tuple[TokenSet, list[Restore]]:
        """As :meth:`LayerPlan.prune`. A layer asks before its feed-forward and after; afterwards the paper prunes."""
        if not before_feed_forward:
            self.seen[self.block] = Seen(tokens, self_attention, cross_attention)
        return super().prune(tokens, self_attention, cross_attention, before_feed_forward=before_feed_forward)


def watch(sdxl: SDXL, picture: Example, timestep: int) -> dict[str, Seen]:
    """What the first layer of each attention block sees in a dense call, by the block's name."""
    seen: dict[str, Seen] = {}
    names = [site.name for site in sdxl.config.unet.attention_sites()]
    call(sdxl, picture, timestep, TokenPlan({n: BlockPlan(((0, WatchedLayer(seen=seen, block=n)),)) for n in names}))
    return seen


@torch.no_grad()
def decode(sdxl: SDXL, latent: Tensor) -> Image.Image:
    """The picture of a latent."""
    return to_image(sdxl.vae.decode(latent)[0])


def show(pictures: Mapping[str, Any] | Sequence[Any], columns: int = 6, side: float = 1.9, **style: Any) -> None:
    """Shows pictures or maps (H, W) in rows of ``columns``, each under its name. ``style`` goes to ``imshow``."""
    named = list(pictures.items()) if isinstance(pictures, Mapping) else [("", each) for each in pictures]
    columns = min(columns, len(named))
    rows = -(-len(named) // columns)
    _, axes = plt.subplots(rows, columns, figsize=(side * columns, (side + 0.25) * rows), squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for axis, (name, each) in zip(axes.flat, named, strict=False):
        axis.imshow(each, interpolation="nearest", **style)
        axis.set_title(name, fontsize=9)
    plt.tight_layout()
    plt.show()


def grid_on(axis: Axes, picture: Any, grid: tuple[int, int]) -> None:
    """Draws a picture with the borders of its tokens; token (row, column) then covers a unit square."""
    rows, columns = grid
    axis.imshow(picture, extent=(0, columns, rows, 0))
    axis.set_xticks(range(columns + 1), [""] * (columns + 1))
    axis.set_yticks(range(rows + 1), [""] * (rows + 1))
    axis.grid(color="gray", linewidth=0.4)
    axis.tick_params(length=0)
