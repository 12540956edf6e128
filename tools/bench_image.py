"""Times a whole picture, and the program's start up to the first step, beside diffusers.

    python -m tools.bench_image --weights weights/shapes/shapes.safetensors --size 256x256 # the bundled model
    python -m tools.bench_image --size 512x512 --steps 10                                  # SDXL, random weights
    python -m tools.bench_image --presets fast=faithful fast=fast --patches deepcache tomesd   # beside those packages

Every measurement runs in a fresh process, and contenders take turns. The process loads the model, samples a dense
picture in two steps, and then times a second picture with all steps. ``first step`` is the time from the start of the
program to the end of the first step. With fewer than 50 steps the share of prune-less steps is the same. Nothing is
downloaded.

Large pictures of many steps take hours. With ``--each N`` the process samples one picture, times N steps of each kind
after the first step, and decodes. A picture of all steps is added up from those and, for steps that were not run, the
median of their kind. Steps are of one kind if their plans are equal: evaluated, forecast, shallow, with these or those
tokens.

A preset is one of ``--prune`` or the text of a method as in ``tools.evaluate``, such as ``skip=deepcache``. A patch is
a package that accelerates diffusers, with the settings of its README: DeepCache 3 steps at branch 0, tomesd half of the
tokens, with ``max_downsample=4`` because by default it merges nothing on SDXL.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from minisdxl.cli.options import DTYPES, Parser, parse_size
from minisdxl.cli.reports import write_report
from minisdxl.steps.methods import Adaptive
from minisdxl.steps.presets import parse_skip
from tools.benchmark.machine import machine
from tools.benchmark.model_files import CONFIGS, prepared
from tools.benchmark.processes import measure
from tools.benchmark.worker import PATCHES
from tools.evaluation.methods import parse_method

PEER = "diffusers"
MEASURES = {"picture": "s a picture", "first_step": "s to the first step"}


Runs = dict[str, list[dict[str, Any]]]


def measure_pictures(weights: Path, folder: Path, options: argparse.Namespace, runs: Runs) -> None:
    """Adds to ``runs`` what is missing by contender: diffusers plain and with each patch, ours dense and by preset."""
    patched = {f"{PEER} + {patch}": patch for patch in options.patches}
    what = {"weights": str(weights), "folder": str(folder), "dtype": str(DTYPES[options.dtype])[6:]}
    what |= {"size": options.size, "steps": options.steps, "cfg": options.cfg, "each": options.each}
    for repeat in range(options.repeats):
        for name in runs if repeat % 2 == 0 else reversed(runs):
            if len(runs[name]) > repeat:
                continue
            if name == PEER or name in patched:
                contender: dict[str, Any] = {"library": PEER, "patch": patched.get(name)}
            else:
                contender = {"library": "ours", "method": parse_method(name)._asdict()}
            run = measure("two_pictures", {**what, **contender, "started": time.time()})
            runs[name].append(run)
            if options.out is not None:
                write_report(str(options.out), {"machine": _conditions(options), "runs": runs})
            print(
                f"{repeat + 1} of {options.repeats}, {name}: {run['picture']:.2f} s a picture, "
                f"first step after {run['first_step']:.2f} s",
                file=sys.stderr,
            )


def begun(options: argparse.Namespace) -> Runs:
    """The measurements in the file ``options.out``, for all contenders. Raises ``ValueError`` for those of others."""
    names = [PEER, *(f"{PEER} + {patch}" for patch in options.patches), "dense", *options.presets]
    if options.out is None or not options.out.exists():
        return {name: [] for name in names}
    there = json.loads(options.out.read_text())
    if (there["machine"], [*there["runs"]]) != (_conditions(options), names):
        raise ValueError(f"--out is {options.out}, begun with other options or elsewhere; expected another file")
    runs: Runs = there["runs"]
    return runs


def _conditions(options: argparse.Namespace) -> str:
    size = "x".join(map(str, options.size))
    steps = f"{options.steps} steps" + ("" if options.each is None else f" added up from {options.each} of each kind")
    return f"{machine()}\n{size} px, {steps}, CFG {options.cfg:g}, {options.dtype}"


def table(runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """Markdown: FLOPs beside dense, medians of both times, and of their ratios to diffusers in the same round.

    Ratios have their range. FLOPs are those of all calls of the U-Net, as planned before the run.
    """
    head = ["", "FLOPs", *(text for label in MEASURES.values() for text in (label, f"of {PEER}"))]
    lines = [head, ["---"] * len(head)]
    for name, mine in runs.items():
        flops = mine[0].get("flops")
        cells = [name, "" if flops is None else f"{flops / runs['dense'][0]['flops']:.1%}"]
        for key in MEASURES:
            ratios = [run[key] / peer[key] for run, peer in zip(mine, runs[PEER], strict=True)]
            cells.append(f"{statistics.median(run[key] for run in mine):.2f}")
            cells.append(f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")
        lines.append(cells)
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command; exit code 0 on success, 2 with one line if something cannot be measured."""
    parser = _parser()
    options = parser.parse_args(arguments)
    with parser.one_line("no file was left", RuntimeError):
        for name in ("steps", "repeats", "each"):
            if (number := getattr(options, name)) is not None and number < 1:
                raise ValueError(f"--{name} is {number}, expected 1 or more")
        for preset in options.presets:
            method = parse_method(preset)
            if method.steps is not None:
                raise ValueError(f"{preset!r} sets the steps, expected --steps, which all contenders share")
            if options.each is not None and method.skip is not None and isinstance(parse_skip(method.skip), Adaptive):
                raise ValueError(f"{preset!r} decides as it goes, expected no --each: its steps are not known before")
        runs = begun(options)
        with prepared(options) as (weights, folder):
            measure_pictures(weights, folder, options, runs)
    what = _conditions(options)
    print(json.dumps({"machine": what, "runs": runs}, indent=1) if options.json else f"{what}\n\n{table(runs)}")


def _parser() -> Parser:
    parser = Parser(
        prog="python -m tools.bench_image", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--scale", choices=CONFIGS, default="full", help="of the random weights (default: %(default)s)")
    add("--weights", type=Path, metavar="FILE", help="these weights instead of random ones")
    add(
        "--tokenizer",
        type=Path,
        metavar="DIR",
        help="vocabulary folder (default: 'tokenizer' by the weights, else CLIP's)",
    )
    add("--folder", type=Path, metavar="DIR", help="for 7 GB of temporary files (default: the system's)")
    add("--size", type=parse_size, default=(512, 512), metavar="WxH", help="in pixels (default: 512x512)")
    add("--steps", type=int, default=50, help="denoising steps (default: %(default)s)")
    add("--each", type=int, metavar="N", help="time N steps of each kind and add up (default: time all)")
    add("--cfg", type=float, default=7.0, help="guidance scale (default: %(default)s)")
    add("--dtype", choices=DTYPES, default="fp32", help="of U-Net and text (default: %(default)s)")
    add("--presets", nargs="*", default=["at-edm"], metavar="PRESET", help="beside dense (default: at-edm)")
    add("--patches", nargs="*", default=[], choices=PATCHES, help="packages on diffusers (default: none)")
    add("--repeats", type=int, default=2, help="rounds (default: %(default)s)")
    add("--out", type=Path, metavar="FILE", help="keep measurements there: the same command goes on where it stopped")
    add("--json", action="store_true", help="print every number as JSON")
    return parser


if __name__ == "__main__":
    main()
