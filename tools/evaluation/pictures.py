"""Pictures of the same captions from the same noise, dense and under presets, with a row of measures for each."""

from __future__ import annotations

import hashlib
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from atedm.presets import parse_preset
from minisdxl.budget import preset_within
from minisdxl.checkpoint.modules import open_source
from minisdxl.cli.prompt_files import read_prompts
from minisdxl.cli.reports import hardware
from minisdxl.config import ModelConfig
from minisdxl.cost import summary
from minisdxl.loading import weights_path
from minisdxl.pipeline import SDXL
from minisdxl.settings import Settings
from minisdxl.steps.plan import StepPlan
from tools.drawn.detector import check
from tools.drawn.world import distinct_captions, held_out, mixed_captions, parse_caption, random_scene
from tools.evaluation.coco import coco_captions
from tools.evaluation.methods import Method, parse_method, picture_flops, settings_of
from tools.evaluation.metrics import latent_error, psnr, ssim
from tools.evaluation.rows import DENSE, Folder, Row

SPLITS = {"test": "test", "all": None}  # values of random_scene's split: captions that training never saw, or all


@dataclass(frozen=True)
class Captions:
    """Captions; caption i has seed i. ``drawn`` ones are of the drawn world, so the detector can check them."""

    texts: tuple[str, ...]
    drawn: bool

    def __len__(self) -> int:
        return len(self.texts)


def drawn_captions(count: int, split: str = "test", world: str = "plain") -> Captions:
    """``count`` different captions of the drawn world, the same ones every time.

    ``split`` is one of ``SPLITS``, and ``world`` one of ``WORLDS``. Raises ``ValueError`` for a ``count`` that is too
    small, or too large as ``distinct_captions`` says.
    """
    if count < 1:
        raise ValueError(f"--captions is {count}, expected 1 or more")
    part = SPLITS[split]
    if world == "mixed":
        return Captions(mixed_captions(count, part), drawn=True)
    return Captions(distinct_captions(random.Random("evaluate"), random_scene, count, part), drawn=True)


def file_captions(path: Path, count: int) -> Captions:
    """The first ``count`` prompts of a file, or those of an annotation file (:func:`coco_captions`).

    Raises as ``read_prompts``, and ``ValueError`` for too few prompts, or for one with its own seed or negative prompt,
    because all captions of an evaluation have the same settings.
    """
    if path.suffix.lower() == ".json":
        texts = coco_captions(path)
        if len(texts) < count:
            raise ValueError(f"{path} has {len(texts)} pictures, expected {count} or more; or fewer --captions")
        return Captions(tuple(texts[:count]), drawn=False)
    prompts = read_prompts(path)
    if len(prompts) < count:
        raise ValueError(f"{path} has {len(prompts)} prompts, expected {count} or more; or fewer --captions")
    for prompt in prompts[:count]:
        if (prompt.negative, prompt.seed) != (None, None):
            raise ValueError(f"{path} has a seed or negative for {prompt.prompt!r}, expected captions alone")
    return Captions(tuple(prompt.prompt for prompt in prompts[:count]), drawn=False)


def weights_sha256(weights: str, dtype: torch.dtype) -> str:
    """The sha256 of all weight files that are read, one after the other."""
    digest = hashlib.sha256()
    for path in open_source(weights_path(weights), dtype).files:
        with path.open("rb") as file:
            hashlib.file_digest(file, lambda: digest)
    return digest.hexdigest()


def solve(
    config: ModelConfig, size: tuple[int, int], presets: Sequence[str], steps: int, share: float | None, measure: str
) -> dict[str, str]:
    """Each preset's text with the ratio for ``share`` of the dense FLOPs, to 0.01 %; unchanged for a share of ``None``.

    ``measure`` is ``average`` or ``steady``. Raises ``ValueError`` for presets that do not exist, have a ratio of their
    own, or cannot reach that share, and for a share outside (0, 1].
    """
    if share is None:
        for preset in presets:
            parse_method(preset)
        return {preset: preset for preset in presets}
    if not 0 < share <= 1:
        raise ValueError(f"share is {share}, expected more than 0 and at most 1: of the FLOPs of the dense model")
    budget = f"{100 * share:.2f}%"
    return {
        preset: preset if preset == DENSE else preset_within(config, size, preset, steps, budget, measure)
        for preset in presets
    }


def average_share(config: ModelConfig, size: tuple[int, int], preset: str, steps: int) -> float:
    """FLOPs of a U-Net call, averaged over all steps, as a share of the dense model's."""
    f = config.vae.downscale
    calls = summary(config, size[1] // f, size[0] // f, None if preset == DENSE else parse_preset(preset), steps)
    return float(calls["average"] / calls["dense"])


def parse_shard(text: str) -> tuple[int, int]:
    """(i, n) of ``i/n``. Raises ``ValueError`` unless 1 <= i <= n."""
    index, slash, count = text.partition("/")
    if not (slash and index.isdecimal() and count.isdecimal() and 1 <= int(index) <= int(count)):
        raise ValueError(f"shard is {text!r}, expected i/n with i from 1 to n, as 2/4")
    return int(index), int(count)


@dataclass(frozen=True)
class Evaluation:
    """Makes the pictures and rows of one folder, all with the same model and settings.

    Batches are the same in every run, and a shard is every n-th batch. So with the same settings a row is the same to
    the last bit, whether a run was stopped, sharded, or neither.
    """

    sdxl: SDXL
    captions: Captions
    folder: Folder
    steps: int
    cfg: float
    size: tuple[int, int]
    batch: int
    sampling: str = "euler"

    def __post_init__(self) -> None:
        if self.batch < 1 or not self.captions.texts:
            raise ValueError(f"batch is {self.batch} of {len(self.captions)} captions, expected 1 or more of both")
        if self.captions.drawn and (self.size[0] != self.size[1] or self.size[0] < 64):
            raise ValueError("size is {}x{}, expected a square of 64 or more pixels: drawn scenes".format(*self.size))

    def run(self, presets: Sequence[str], shard: tuple[int, int] = (1, 1)) -> None:
        """Makes the missing pictures of this shard, and prints a line for each batch.

        Dense pictures come first in every batch, because the others are compared with them. Raises as
        ``SDXL.generate``.
        """
        index, count = shard
        file = "rows.csv" if count == 1 else f"rows-{index}-of-{count}.csv"
        starts = range(0, len(self.captions), self.batch)[index - 1 :: count]
        kinds = [DENSE, *(preset for preset in presets if preset != DENSE)]
        for start in starts:
            for preset in kinds:
                numbers = range(start, min(start + self.batch, len(self.captions)))
                missing = [number for number in numbers if not self.folder.has(preset, number)]
                if missing:
                    rows = self.make(preset, numbers, missing)
                    self.folder.add(file, rows)
                    print(f"captions {numbers[0]} to {numbers[-1]}, {preset}: {_progress(rows)}", flush=True)

    def missing(self, presets: Sequence[str]) -> int:
        """The number of missing rows."""
        kinds = {DENSE, *presets}
        return sum(not self.folder.has(kind, number) for kind in kinds for number in range(len(self.captions)))

    def make(self, preset: str, numbers: range, wanted: Sequence[int]) -> list[Row]:
        """Makes one batch of a preset, and returns the rows that are wanted. Dense ones must be there already."""
        return list(self._make(preset, numbers, wanted))

    def _make(self, preset: str, numbers: range, wanted: Sequence[int]) -> Iterator[Row]:
        """Makes the whole batch, so that rounding is the same in every run, and yields the rows that are wanted."""
        captions, last = self.captions.texts[numbers.start : numbers.stop], dict[str, Tensor]()
        settings = settings_of(parse_method(preset), self.sampling, self.steps, self.cfg, self.size)
        realized = list[Sequence[StepPlan]]()
        began = time.perf_counter()
        images = self.sdxl.generate(
            captions, settings, seed=numbers.start, on_step=lambda _, x: last.update(x=x), realized=realized
        )
        seconds = (time.perf_counter() - began) / len(numbers)
        shares = [self._share(settings, plans) for plans in realized] or [self._share(settings)] * len(numbers)
        made = zip(numbers, captions, images, last["x"].cpu(), shares, strict=True)
        for number, caption, image, latent, share in made:
            if number not in wanted:
                continue
            self.folder.save_picture(preset, number, image)
            if preset == DENSE:
                self.folder.save_latent(number, latent)
            pixels, dense = np.asarray(image), self.folder.picture(DENSE, number)
            yield Row(
                preset=preset,
                number=number,
                seed=number,
                steps=self.steps,
                cfg=self.cfg,
                caption=caption,
                **_caption_check(pixels, caption, self.captions.drawn),
                psnr=psnr(pixels, dense),
                ssim=ssim(pixels, dense),
                latent_error=latent_error(latent, self.folder.latent(number)),
                flops_share=share,
                seconds=seconds,
                machine=hardware(self.sdxl.device),
            )

    def _share(self, settings: Settings, realized: Sequence[StepPlan] | None = None) -> float:
        """FLOPs of a picture as a share of the dense model's."""
        config = self.sdxl.config
        dense = settings_of(Method(), self.sampling, self.steps, self.cfg, self.size)
        return picture_flops(config, settings, realized) / picture_flops(config, dense)


def _caption_check(pixels: Any, caption: str, drawn: bool) -> dict[str, Any]:
    if not drawn:
        return {"obeyed": None, "held_out": None, "objects": None, "reasons": ""}
    found = check(pixels, caption)
    reasons = "; ".join(found.reasons)
    objects, unseen = len(found.found.objects), held_out(parse_caption(caption))
    return {"obeyed": found.right, "held_out": unseen, "objects": objects, "reasons": reasons}


def _progress(rows: Sequence[Row]) -> str:
    right = sum(row.obeyed is True for row in rows)
    judged = "" if rows[0].obeyed is None else f"{right} of {len(rows)} right, "
    return f"{judged}{rows[0].seconds:.1f} s each"
