"""How many unseen captions the bundled model obeys, dense and with pruning: exact scoring by the detector.

    python -m tools.evaluate --presets dense at-edm --captions 200

The same captions and seeds for every preset. Each picture is one row of a CSV file; a run that was stopped goes on
where it was.
"""

from __future__ import annotations

import argparse
import csv
import math
import random
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

import minisdxl
from atedm.presets import parse_preset
from minisdxl.command import Parser
from minisdxl.flops import format_flops, summary
from minisdxl.pipeline import SDXL
from minisdxl.sample import DTYPES
from tools.check_shapes import check
from tools.shapes import random_scene

COLUMNS = ("preset", "seed", "caption", "obeyed", "reasons")


def unseen_captions(count: int) -> list[str]:
    """``count`` different captions that training never sees, the same ones every time."""
    rng = random.Random("evaluate")
    captions: dict[str, None] = {}
    while len(captions) < count:
        captions[random_scene(rng, "test").caption] = None
    return list(captions)


def wilson(successes: int, trials: int) -> tuple[float, float]:
    """The 95 % Wilson score interval of a share."""
    z = 1.959964
    share = successes / trials
    center = (share + z * z / (2 * trials)) / (1 + z * z / trials)
    half = z / (1 + z * z / trials) * math.sqrt(share * (1 - share) / trials + z * z / (4 * trials**2))
    return center - half, center + half


def evaluate(
    sdxl: SDXL, preset: str, captions: Sequence[str], first_seed: int, options: argparse.Namespace
) -> Iterator[dict[str, str]]:
    """One row for each caption, caption i with seed ``first_seed + i``."""
    prune = None if preset == "dense" else preset
    for start in range(0, len(captions), options.batch):
        batch, seed = captions[start : start + options.batch], first_seed + start
        images = sdxl.generate(batch, steps=options.steps, cfg=options.cfg, seed=seed, prune=prune)
        for offset, (caption, image) in enumerate(zip(batch, images, strict=True)):
            verdict = check(np.asarray(image), caption)
            values = (preset, str(seed + offset), caption, str(int(verdict.obeyed)), "; ".join(verdict.reasons))
            yield dict(zip(COLUMNS, values, strict=True))


def read_rows(file: Path) -> list[dict[str, str]]:
    """The rows of an earlier run, if there are any."""
    if not file.exists():
        return []
    with file.open(newline="") as lines:
        return list(csv.DictReader(lines))


def main(arguments: Sequence[str] | None = None) -> None:
    """Evaluates what is missing, then prints the table."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", default="shapes", help="the bundled model, or a checkpoint of the same world")
    parser.add_argument("--presets", nargs="+", default=["dense", "at-edm"], help="'dense' or pruning presets")
    parser.add_argument("--captions", type=int, default=200, help="number of unseen captions (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=50, help="denoising steps (default: %(default)s)")
    parser.add_argument("--cfg", type=float, default=3.0, help="guidance scale (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=8, help="pictures at a time (default: %(default)s)")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32", help="of the weights (default: %(default)s)")
    parser.add_argument("--device", default="cpu", help="(default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("runs/evaluate.csv"), help="(default: %(default)s)")
    options = parser.parse_args(arguments)
    sdxl = minisdxl.load(options.weights, device=options.device, dtype=DTYPES[options.dtype])
    captions = unseen_captions(options.captions)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    rows = read_rows(options.out)
    for preset in options.presets:
        done = sum(row["preset"] == preset for row in rows)
        began = time.time()
        for row in evaluate(sdxl, preset, captions[done:], done, options):
            with options.out.open("a", newline="") as file:
                writer = csv.DictWriter(file, COLUMNS)
                if not rows:
                    writer.writeheader()
                writer.writerow(row)
            rows.append(row)
            if len(rows) % options.batch == 0:
                mine = [r for r in rows if r["preset"] == preset]
                obeyed = sum(r["obeyed"] == "1" for r in mine)
                print(f"{preset}: {obeyed} of {len(mine)} obeyed, {time.time() - began:.0f} s", flush=True)

    print(f"{options.captions} unseen captions, {options.steps} steps, CFG {options.cfg:g}, {options.dtype}")
    print("| preset | obeyed | 95 % interval | FLOPs of a U-Net call, average |\n| --- | --- | --- | --- |")
    side = sdxl.config.size // sdxl.config.vae.downscale
    for preset in options.presets:
        mine = [row for row in rows if row["preset"] == preset][: options.captions]
        obeyed = sum(row["obeyed"] == "1" for row in mine)
        low, high = wilson(obeyed, len(mine))
        cost = summary(sdxl.config, side, side, None if preset == "dense" else parse_preset(preset), options.steps)
        share = f"{format_flops(cost['average'])} ({cost['average'] / cost['dense']:.0%})"
        print(f"| {preset} | {obeyed / len(mine):.1%} | {low:.1%} to {high:.1%} | {share} |")


if __name__ == "__main__":
    main()
