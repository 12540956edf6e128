"""Batches of drawn pictures: repeatable, of training captions, the same however they are drawn."""

from __future__ import annotations

import random

import numpy as np
import torch

from tools.drawn.world import held_out, parse_caption
from tools.training.batches import BatchSize, DrawnBatches, draw_ahead, draw_batch, to_images


def test_pictures_are_of_training_captions_and_repeatable() -> None:
    pictures, captions = draw_batch(random.Random(3), BatchSize(40, 64, 64))
    again, _ = draw_batch(random.Random(3), BatchSize(40, 64, 64))
    images = to_images(pictures)
    assert images.shape == (40, 3, 64, 64)
    assert (images.min().item(), images.max().item()) == (-1, 1)
    assert np.array_equal(pictures, again)
    scenes = [parse_caption(caption) for caption in captions]
    assert not any(map(held_out, scenes))
    assert 0 < sum(scene.open for scene in scenes) < 40


def test_images_are_pictures_channels_first() -> None:
    pictures, _ = draw_batch(random.Random(4), BatchSize(2, 64, 64))
    images = to_images(pictures)
    assert torch.equal(((images + 1) * 127.5).round().byte(), torch.from_numpy(pictures).permute(0, 3, 1, 2))


def test_parts_are_cut_out_of_whole_pictures() -> None:
    parts, captions = draw_batch(random.Random(5), BatchSize(30, 64, 256))
    assert parts.shape == (30, 64, 64, 3) and len(captions) == 30
    whole, _ = draw_batch(random.Random(5), BatchSize(1, 256, 256))
    places = np.lib.stride_tricks.sliding_window_view(whole[0], (64, 64, 3))[:, :, 0]
    assert (places == parts[0]).all(axis=(2, 3, 4)).any()


def test_a_worker_draws_the_same_batches_in_order_and_go_on_in_the_middle() -> None:
    drawn = DrawnBatches("test", 1, [BatchSize(2, 64, 64), BatchSize(3, 64, 64), BatchSize(2, 64, 128)] * 2)
    here, ahead, later = (list(draw_ahead(drawn, first, workers)) for first, workers in ((0, 0), (0, 1), (4, 0)))
    assert [len(captions) for _, captions in here] == [2, 3, 2, 2, 3, 2]
    for (pictures, captions), (others, other_captions) in zip(here, ahead, strict=True):
        assert np.array_equal(pictures, others) and captions == other_captions
    assert [captions for _, captions in later] == [captions for _, captions in here[4:]]
    assert here[0][1] != here[3][1]
