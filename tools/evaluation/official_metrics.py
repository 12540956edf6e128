"""FID and CLIP score as papers report them, by torchmetrics (the extra "evaluate") from local weight files.

Nothing is downloaded. torchmetrics is imported when a metric is constructed.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from minisdxl.cli.picture_files import read_picture
from tools.evaluation.metrics import Picture

PICTURES = (".png", ".jpg", ".jpeg", ".webp")
FEATURES = 2048  # channels of Inception's last pooling layer, on which FID is defined


def find_pictures(folder: Path) -> list[Path]:
    """The pictures in a folder, by name. Raises ``ValueError`` for fewer than two, ``OSError`` for no folder."""
    found = sorted(path for path in folder.iterdir() if path.suffix.lower() in PICTURES)
    if len(found) < 2:
        raise ValueError(f"{folder} has {len(found)} pictures, expected 2 or more: {', '.join(PICTURES)}")
    return found


class Fid:
    """Fréchet Inception distance (Heusel et al. 2017) to the pictures in the files ``references``.

    ``network`` is the file of Inception's weights that torch-fidelity reads (pt_inception-2015-12-05-6726825d.pth or
    its re-release), or any network of pictures (1, 3, H, W) uint8 to features (1, D).

    Raises ``ValueError`` for a file that holds anything else than tensors, ``OSError``, and ``ModuleNotFoundError``.
    """

    def __init__(self, network: Path | nn.Module, references: Sequence[Path], device: torch.device) -> None:
        from torchmetrics.image.fid import FrechetInceptionDistance

        if isinstance(network, nn.Module):
            metric = FrechetInceptionDistance(feature=network, reset_real_features=False)
        else:
            _check_tensors(network)
            metric = FrechetInceptionDistance(
                FEATURES, reset_real_features=False, feature_extractor_weights_path=str(network)
            )
        self.metric: Any = metric.to(device)
        for path in references:
            self.metric.update(_pixels(read_pixels(path)).to(device), real=True)

    @torch.no_grad()
    def features(self, pictures: Iterable[Picture]) -> Tensor:
        """Inception's features of one or more pictures (n, D), float64."""
        pixels = (_pixels(picture).to(self.metric.device) for picture in pictures)
        return torch.cat([self.metric.inception(each).double().cpu() for each in pixels])

    def __call__(self, pictures: Iterable[Picture]) -> float:
        """The distance of two or more pictures."""
        self.metric.reset()
        for picture in pictures:
            self.metric.update(_pixels(picture).to(self.metric.device), real=False)
        return float(self.metric.compute())


class ClipFeatures(nn.Module):
    """A CLIP model of transformers that returns tensors, as torchmetrics needs; transformers 5 wraps them."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.config = model.config

    def get_image_features(self, pixel_values: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, D)."""
        features: Tensor = self.model.get_image_features(pixel_values).pooler_output
        return features

    def get_text_features(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """(B, T), (B, T) -> (B, D)."""
        features: Tensor = self.model.get_text_features(input_ids, attention_mask).pooler_output
        return features


class ClipScore:
    """CLIP score (Hessel et al. 2021, without its factor 2.5): 100 times the mean cosine of picture and caption.

    The value 0.3284 of the AT-EDM paper is 32.84 here. ``folder`` holds a CLIP model in the layout of transformers,
    with its tokenizer and preprocessor. Raises ``OSError`` for another folder, and ``ModuleNotFoundError``.
    """

    def __init__(self, folder: Path, device: torch.device) -> None:
        from torchmetrics.multimodal.clip_score import CLIPScore
        from transformers import CLIPModel, CLIPProcessor

        if not folder.is_dir():
            raise NotADirectoryError(f"{folder} is no folder, expected one with a CLIP model and its processor")
        model = CLIPModel.from_pretrained(folder, local_files_only=True).eval()
        processor = CLIPProcessor.from_pretrained(folder, local_files_only=True)
        self.metric: Any = CLIPScore(model_name_or_path=lambda: (ClipFeatures(model), processor)).to(device)

    @torch.no_grad()
    def cosine(self, picture: Picture, caption: str) -> float:
        """100 times the cosine of one picture and its caption, which may be below 0."""
        self.metric.reset()
        self.metric.update(_pixels(picture).to(self.metric.device), [caption])
        return float(self.metric.score)

    @torch.no_grad()
    def __call__(self, pictures: Iterable[Picture], captions: Iterable[str]) -> float:
        """The score of one or more pictures, each with its caption."""
        self.metric.reset()
        for picture, caption in zip(pictures, captions, strict=True):
            self.metric.update(_pixels(picture).to(self.metric.device), [caption])
        return float(self.metric.compute())


def read_pixels(path: Path) -> Picture:
    """A picture file as (H, W, 3) uint8. Raises as :func:`minisdxl.cli.picture_files.read_picture`."""
    return np.asarray(read_picture(path).image.convert("RGB"))


def _pixels(picture: Picture) -> Tensor:
    """(1, 3, H, W) uint8."""
    return torch.from_numpy(picture.copy()).permute(2, 0, 1)[None]


def _check_tensors(path: Path) -> None:
    """Raises ``ValueError`` unless the file has only tensors: torch-fidelity would run any code that a pickle names."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(f"{path} is not a file of tensors alone, expected Inception's weights") from error
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{path} is not a file of named tensors, expected Inception's weights")
