"""The command ``python -m tools.watch``: what self-attention does in models of the drawn world, on two kinds of scene.

    python -m tools.watch weights/shapes/shapes.safetensors weights/training/open.safetensors

A row for each model and kind of scene, half a minute each: how many times the error of the predicted noise grows when
all self-attention is made uniform; the cosine between a token and the one that gives it most attention, and the most
similar one there is; entropy of the map, of uniform; shares of tokens that `at-edm` keeps on objects and elsewhere; and
its change of the prediction, in units of the error, as in ``tools.single_step``. ``tools.train_shapes`` logs the same.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence

from minisdxl.bundled import BUNDLED
from minisdxl.cli.options import Parser
from minisdxl.loading import load
from tools.benchmark.machine import machine
from tools.training.likeness import TIMESTEPS, watch

TOKENIZER = BUNDLED["shapes"].parent / "tokenizer"
HEAD = (
    *("model", "scenes", "error", "with uniform attention, times", "source cosine", "best possible", "entropy"),
    *("objects kept", "rest kept", *(f"`at-edm` change at t = {t}" for t in TIMESTEPS)),
)


def table(found: Mapping[str, Mapping[str, float]]) -> str:
    """Markdown: two rows for each model, from the numbers of ``watch``."""
    names = ("error", "uniform", "source", "likest", "entropy", "objects", "rest", *(f"change_{t}" for t in TIMESTEPS))
    lines = [list(HEAD), ["---"] * len(HEAD)]
    for model, figures in found.items():
        for kind in ("plain", "open"):
            cells = [figures[f"{kind}_{name}"] for name in names]
            lines.append([f"`{model}`", kind, f"{cells[0]:.5f}", *(f"{cell:.2f}" for cell in cells[1:])])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _watch(options: argparse.Namespace) -> None:
    """Raises ``ValueError`` or ``OSError``."""
    if options.pictures < 1:
        raise ValueError(f"--pictures is {options.pictures}, expected 1 or more")
    found = {each: watch(load(each, tokenizer=options.tokenizer), options.pictures) for each in options.weights}
    print(f"{options.pictures} pictures of each kind; {machine()}\n\n{table(found)}")


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command; exit code 0 on success, 2 with one line on bad input, 130 after Ctrl-C."""
    parser = Parser(
        prog="python -m tools.watch", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("weights", nargs="+", metavar="WEIGHTS", help="'shapes', or another model of the drawn world")
    add("--tokenizer", default=TOKENIZER, metavar="DIR", help="vocabulary folder (default: that of 'shapes')")
    add("--pictures", type=int, default=8, metavar="N", help="of each kind, in one batch (default: %(default)s)")
    options = parser.parse_args(arguments)
    with parser.one_line("nothing was measured"):
        _watch(options)


if __name__ == "__main__":
    main()
