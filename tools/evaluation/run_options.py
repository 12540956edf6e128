"""Command-line options that say which model makes the pictures, and the settings that are recorded with them."""

from __future__ import annotations

import argparse
from typing import Any

from minisdxl.cli.options import DTYPES, Parser, add_device, parse_size
from minisdxl.config import ModelConfig
from minisdxl.loading import weights_path
from minisdxl.samplings import SAMPLINGS
from tools.evaluation.pictures import parse_shard, weights_sha256


def model_options(parser: Parser, *, weights: str, out: str) -> None:
    """Adds the options of the model, the captions, sampling and output."""
    add = parser.add_argument
    add("--weights", default=weights, help="the bundled 'shapes', a checkpoint file or a folder (default: %(default)s)")
    add("--tokenizer", metavar="DIR", help="vocabulary folder (default: 'tokenizer' by the weights, else CLIP's)")
    add(
        "--captions",
        type=int,
        default=200,
        metavar="N",
        help="number of captions, seeds 0 to N - 1 (default: %(default)s)",
    )
    add("--size", type=parse_size, metavar="WxH", help="in pixels (default: the model's own)")
    add("--sampling", choices=SAMPLINGS, help="(default: the model's best)")
    add("--batch", type=int, default=8, help="pictures at a time (default: %(default)s)")
    add("--dtype", choices=DTYPES, default="fp32", help="of the weights (default: %(default)s)")
    add_device(parser)
    add("--shard", type=parse_shard, default=(1, 1), metavar="i/n", help="make the i-th of n parts of the pictures")
    add("--table", action="store_true", help="make no pictures, only report on those that are there")
    add(
        "--out",
        default=out,
        metavar="FOLDER",
        help="a folder, or what fsspec reads, as s3://BUCKET/FOLDER (default: %(default)s)",
    )


def settings_of(
    options: argparse.Namespace, config: ModelConfig, size: tuple[int, int], steps: int, cfg: float, captions: str
) -> dict[str, Any]:
    """The settings that all rows of a folder share; ``captions`` describes the captions."""
    return {
        "model": config.name,
        "weights": weights_path(options.weights).name,
        "sha256": weights_sha256(options.weights, DTYPES[options.dtype]),
        "captions": captions,
        "sampling": options.sampling,
        "steps": steps,
        "cfg": cfg,
        "size": "{}x{}".format(*size),
        "dtype": options.dtype,
        "batch": options.batch,
    }
