"""Trains the bundled model ``shapes`` from scratch on drawn pictures: the VAE, the text encoders, then the U-Net.

    python -m tools.train_shapes                 # everything; continues a run that was stopped, from runs/shapes

Pictures are drawn while they are needed, a third of them plain (``tools.drawn.world``), so there is no data set and no
epoch. The text encoders are trained alone first (``tools.training.text``), then together with the U-Net
(``tools.training.unet``). The U-Net gets small latents first and 64x64 ones (256 px) last. Most words are learned at
small sizes, where steps are cheap. SDXL's size conditioning tells the sizes apart.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

import torch

from minisdxl.config import SHAPES
from minisdxl.tokenizer import Tokenizer
from tools.drawn.world import COLORS, WORLDS
from tools.training.likeness import NOISE, SHARPNESS
from tools.training.text import train_text
from tools.training.unet import train_unet
from tools.training.vae import train_vae

TOKENIZER = Path(__file__).parents[1] / "weights" / "shapes" / "tokenizer"


def parse_stages(text: str) -> list[tuple[int, int]]:
    """(side, steps) of each stage. Raises ``ValueError``."""
    stages = [(int(side), int(steps)) for side, _, steps in (stage.partition(":") for stage in text.split(","))]
    for side, steps in stages:
        SHAPES.picture_size((side, side))
        if steps < 0:
            raise ValueError(f"stage of {side} px has {steps} steps, expected 0 or more")
    return stages


def parse_options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parses the command line and fills in defaults that depend on other options. Exits with code 2 on bad input."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--run", type=Path, default=Path("runs/shapes"), help="folder of training state, logs and grids"
    )
    parser.add_argument(
        "--out", type=Path, help="checkpoint to write at the end, such as weights/shapes/shapes.safetensors"
    )
    parser.add_argument(
        "--init",
        type=Path,
        help="checkpoint to start from if the run has no state; keeps the encoder of its VAE, except with --teach",
    )
    parser.add_argument(
        "--teach",
        choices=(*COLORS, "open"),
        metavar="WHAT",
        help="with --init: also train the VAE's encoder, on this new color or on open scenes ('open')",
    )
    parser.add_argument(
        "--teacher", type=Path, metavar="FILE", help="U-Net: learn the predictions of this model instead of the noise"
    )
    parser.add_argument(
        "--own-sampling",
        action="store_true",
        help="U-Net: learn from the teacher on what the model itself samples, instead of on noisy drawn pictures",
    )
    parser.add_argument(
        "--world",
        choices=WORLDS,
        default="mixed",
        help="U-Net: plain and open scenes, or plain ones (default: mixed)",
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--workers", type=int, help="processes that draw pictures (default: none on a CPU; for a GPU all cores but two)"
    )
    parser.add_argument(
        "--bf16",
        action=argparse.BooleanOptionalAction,
        help="U-Net: bfloat16 autocast (default: on a GPU, and on a CPU with AVX512-BF16; others take up to ten times "
        "as long with it)",
    )
    parser.add_argument("--vae-steps", type=int, default=1600, help="(default: %(default)s)")
    parser.add_argument("--text-steps", type=int, default=800, help="of the text encoders alone (default: %(default)s)")
    parser.add_argument(
        "--stages",
        type=parse_stages,
        default="64:400,128:300,256:3000",
        metavar="SIDE:STEPS,...",
        help="U-Net steps at each picture side in pixels (default: %(default)s)",
    )
    parser.add_argument(
        "--batch",
        type=int,
        default=32,
        help="pictures in a step; half as many at full size, a quarter with --own-sampling",
    )
    parser.add_argument(
        "--rate",
        type=float,
        default=1.0,
        help="factor of all learning rates; less than 1 after --init",
    )
    parser.add_argument("--cfg", type=float, default=4.0, help="guidance scale of samples (default: %(default)s)")
    parser.add_argument(
        "--sharpness",
        type=float,
        metavar="S2",
        help="start all self-attention from a similarity kernel with this s^2 (tools/training/likeness.py), 0: do not "
        f"(default: {SHARPNESS:g}, with --init 0)",
    )
    parser.add_argument(
        "--kernel-noise", type=float, default=NOISE, metavar="A", help="the kernel's a (default: %(default)s)"
    )
    parser.add_argument(
        "--attention-rate",
        type=float,
        default=1.0,
        metavar="SHARE",
        help="factor of the learning rate for query and key maps of self-attention (default: %(default)s)",
    )
    parser.add_argument(
        "--watch-every", type=int, default=200, help="U-Net steps between two measurements of self-attention, 0: none"
    )
    parser.add_argument(
        "--watch-pictures", type=int, default=8, help="plain and as many open pictures of a measurement"
    )
    parser.add_argument(
        "--save-every", type=int, default=100, help="U-Net steps between two saved states (default: %(default)s)"
    )
    parser.add_argument("--grid-every", type=int, default=200, help="U-Net steps between two sample grids, 0: none")
    parser.add_argument("--grid-pictures", type=int, default=16, help="pictures of a grid, in rows of four")
    options = parser.parse_args(arguments)
    if options.teach is not None and options.init is None:
        parser.error(f"--teach is {options.teach} without --init, expected both: without --init all colors are learned")
    if options.own_sampling:
        if options.teacher is None:
            parser.error("--own-sampling is given without --teacher, expected both: the noise of a sample is not known")
        if any(side != SHAPES.size for side, _ in options.stages):
            parser.error(f"--stages has a side other than {SHAPES.size} beside --own-sampling, expected {SHAPES.size}")
    if options.sharpness is None:
        options.sharpness = SHARPNESS if options.init is None else 0.0
    on_gpu = torch.device(options.device).type == "cuda"
    if options.bf16 is None:
        options.bf16 = on_gpu or torch.cpu.get_capabilities().get("avx512_bf16", False)
    if options.workers is None:
        options.workers = max(1, (os.cpu_count() or 1) - 2) if on_gpu else 0
    return options


def main() -> None:
    """Parses the command line and trains."""
    options = parse_options()
    if torch.device(options.device).type == "cuda":
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.benchmark = True
    tokenizer = Tokenizer.from_directory(TOKENIZER, SHAPES.text)
    train_unet(options, train_vae(options), train_text(options, tokenizer), tokenizer)


if __name__ == "__main__":
    main()
