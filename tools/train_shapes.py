"""Makes the bundled model ``shapes`` from nothing: draws data, trains the VAE, then text encoders and U-Net.

    python -m tools.train_shapes                 # everything, resuming whatever a killed run left in runs/shapes

Pictures are drawn as they are needed, a third of them plain (``tools.drawn.world``), so there is no data set and no
epoch. The text encoders learn by themselves first (``tools.training.text``), then together with the U-Net
(``tools.training.unet``). That sees small latents first, 64x64 ones (256 px) last, told apart by SDXL's own size
conditioning: words are learned where steps cost little.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

import torch

from minisdxl.config import SHAPES
from minisdxl.tokenizer import Tokenizer
from tools.drawn.world import COLORS
from tools.training.batches import WORLDS
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
    """The command line, with defaults that depend on other options filled in. Exits with status 2 on bad input."""
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
        help="checkpoint to go on from, where the run has no state: keeps its VAE's encoder, but for --teach",
    )
    parser.add_argument(
        "--teach",
        choices=(*COLORS, "open"),
        metavar="WHAT",
        help="with --init: train the VAE's encoder, too, on this new color, or on open scenes ('open')",
    )
    parser.add_argument(
        "--teacher", type=Path, metavar="FILE", help="U-Net: learn what this model predicts, in place of the noise"
    )
    parser.add_argument(
        "--world", choices=WORLDS, default="mixed", help="U-Net: plain and open scenes, or plain ones (default: mixed)"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--workers", type=int, help="processes that draw pictures (default: none on a CPU; for a GPU all cores but two)"
    )
    parser.add_argument("--bf16", action=argparse.BooleanOptionalAction, default=True, help="bfloat16 autocast (U-Net)")
    parser.add_argument("--vae-steps", type=int, default=1600, help="(default: %(default)s)")
    parser.add_argument("--text-steps", type=int, default=800, help="of the text encoders alone")
    parser.add_argument(
        "--stages",
        type=parse_stages,
        default="64:400,128:300,256:3000",
        metavar="SIDE:STEPS,...",
        help="U-Net steps at each picture side in pixels (default: %(default)s)",
    )
    parser.add_argument("--batch", type=int, default=32, help="pictures a step; half of it at full size")
    parser.add_argument(
        "--rate", type=float, default=1.0, help="share of the full learning rates to begin with, less after --init"
    )
    parser.add_argument("--cfg", type=float, default=4.0, help="guidance scale of the sample grids")
    parser.add_argument(
        "--sharpness",
        type=float,
        metavar="S2",
        help="start all self-attention from a similarity kernel of this s^2 (tools/training/likeness.py), 0: do not; "
        f"default: {SHARPNESS:g}, with --init 0",
    )
    parser.add_argument(
        "--kernel-noise", type=float, default=NOISE, metavar="A", help="the kernel's a (default: %(default)s)"
    )
    parser.add_argument(
        "--attention-rate",
        type=float,
        default=1.0,
        metavar="SHARE",
        help="share of the learning rate that query and key maps of self-attention have (default: %(default)s)",
    )
    parser.add_argument(
        "--watch-every", type=int, default=200, help="U-Net steps between two looks at self-attention, 0: none"
    )
    parser.add_argument("--watch-pictures", type=int, default=8, help="plain and as many open pictures of such a look")
    parser.add_argument("--grid-every", type=int, default=200, help="U-Net steps between two sample grids, 0: none")
    parser.add_argument("--grid-pictures", type=int, default=16, help="of a grid, in rows of four")
    options = parser.parse_args(arguments)
    if options.teach is not None and options.init is None:
        parser.error(f"--teach is {options.teach} without --init, expected both: from nothing, all colors are learned")
    if options.sharpness is None:
        options.sharpness = SHARPNESS if options.init is None else 0.0
    if options.workers is None:
        on_gpu = torch.device(options.device).type == "cuda"
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
