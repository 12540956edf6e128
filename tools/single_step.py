"""The command ``python -m tools.single_step``: the effect of pruning on one U-Net call, in about a minute.

Drawn pictures are noised to some timesteps, and the U-Net predicts the noise, dense and under each preset. ``change``
is the squared difference of the two predictions divided by the squared error of the dense one: at 1, pruning adds as
much error as the dense model has. ``objects`` and ``rest`` are the shares of tokens kept where objects are drawn and
elsewhere: the minimum over attention blocks, and the mean. There is no guidance. Presets act as at the last step.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path

import torch

from minisdxl.checkpoint.atomic import atomic_path
from minisdxl.cli.options import Parser
from minisdxl.loading import load
from tools.benchmark.machine import machine
from tools.evaluation.step_changes import Outcome, drawn_pictures, outcomes

PRESETS = (
    *("at-edm", "at-edm:ranking=lowest", "at-edm:ranking=covered", "random"),
    *("at-edm:ranking=grid", "at-edm:ranking=dissimilarity"),
    *("direct", "at-edm:recovery=similarity-change", "at-edm:recovery=nearest", "at-edm:recovery=nearest-change"),
    *("at-edm:ranking=covered,recovery=nearest-change", "dissimilarity:recovery=direct"),
    *("dissimilarity:recovery=similarity-change", "dissimilarity:recovery=nearest", "dissimilarity"),
    *("dissimilarity:recovery=nearest-two-change", "dissimilarity:ranking=lowest", "dissimilarity:ranking=random"),
    *("dissimilarity:ranking=grid", "dissimilarity:ranking=grid,recovery=nearest-two-change", "tome:r=0.38"),
)


def table(results: Sequence[Outcome]) -> str:
    """Markdown: a row for each preset, with the change at each timestep and the tokens kept at the middle one."""
    timesteps = list(dict.fromkeys(each.timestep for each in results))
    middle = timesteps[len(timesteps) // 2]
    head = ["preset", "FLOPs", *(f"change at t = {t}" for t in timesteps)]
    head += [f"objects kept at t = {middle}, least", "mean", "rest kept, mean"]
    lines = [head, ["---"] * len(head)]
    for preset in dict.fromkeys(each.preset for each in results):
        mine = {each.timestep: each for each in results if each.preset == preset}
        changes = [f"{mine[t].change:.3f}" for t in timesteps]
        it = mine[middle]
        kept = [f"{it.objects_least:.2f}", f"{it.objects_mean:.2f}", f"{it.rest_mean:.2f}"]
        lines.append([f"`{preset}`", f"{it.flops:.0%}", *changes, *kept])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _single_step(options: argparse.Namespace) -> None:
    """Raises ``ValueError`` or ``OSError``."""
    if options.pictures < 1:
        raise ValueError(f"--pictures is {options.pictures}, expected 1 or more")
    sdxl = load(options.weights, tokenizer=options.tokenizer)
    most = sdxl.config.noise.steps - 1
    if not all(0 <= t <= most for t in options.timesteps):
        raise ValueError(f"--timesteps are {options.timesteps}, expected 0 to {most}")
    with torch.no_grad():
        pictures = drawn_pictures(sdxl, options.pictures)
        results = list(outcomes(sdxl, pictures, options.presets, options.timesteps))
    print(f"{options.pictures} pictures; {machine()}\n\n{table(results)}")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(options.out) as temporary, temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Outcome)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(each) for each in results)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command; exit code 0 on success, 2 with one line on bad input, 130 after Ctrl-C."""
    parser = Parser(
        prog="python -m tools.single_step", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--weights", default="shapes", help="'shapes' (default), or another model of the drawn world")
    add("--tokenizer", metavar="DIR", help="vocabulary folder (default: 'tokenizer' by the weights, else CLIP's)")
    add("--presets", nargs="+", default=list(PRESETS), metavar="PRESET", help="(default: rankings by recoveries)")
    add("--timesteps", nargs="+", type=int, default=[800, 500, 200], metavar="T", help="(default: 800 500 200)")
    add("--pictures", type=int, default=16, metavar="N", help="in one batch (default: %(default)s)")
    add(
        "--out",
        type=Path,
        default=Path("docs/results/single-step.csv"),
        metavar="FILE.csv",
        help="(default: %(default)s)",
    )
    options = parser.parse_args(arguments)
    with parser.one_line("nothing was written"):
        _single_step(options)


if __name__ == "__main__":
    main()
