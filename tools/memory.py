"""Measures loading time and memory of a whole model, beside diffusers in the same run.

    python -m tools.memory load                    # fp32, bf16 and fp16, four times each: time and peak memory
    python -m tools.memory picture                 # one picture of 1024 x 1024 with the least memory
    python -m tools.memory write full.safetensors  # the random weights that the others make themselves, for --weights

Nothing is downloaded: the file has the official names, shapes and dtypes, and random numbers. Every measurement runs in
a fresh process. The two libraries take turns, and the file is read once before each measurement.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from minisdxl.cli.options import DTYPES, Parser, parse_size
from tools.benchmark.machine import gib, machine
from tools.benchmark.model_files import CONFIGS, prepared, write_random
from tools.benchmark.processes import measure

LIBRARIES = ("ours", "diffusers")
PROMISE = 12 * 2**30  # bytes for a picture of 1024 x 1024


def measure_loading(weights: Path, folder: Path, dtypes: Sequence[str], repeats: int) -> list[dict[str, Any]]:
    """Measures both libraries in turn for each dtype: median times, largest peak memory, and ratios.

    ``seconds`` is wall-clock time with the library's import, ``loading`` is without it. ``processor`` is the time of
    all cores together, which other programs disturb less. Use an even number of repeats: the first of two processes can
    be slower, because the system has to free memory for it.
    """
    runs: dict[tuple[str, str], list[dict[str, Any]]] = {(dtype, kind): [] for dtype in dtypes for kind in LIBRARIES}
    for repeat in range(repeats):
        for dtype in dtypes:
            for kind in LIBRARIES if repeat % 2 == 0 else reversed(LIBRARIES):
                arguments = {"weights": str(weights), "folder": str(folder), "dtype": str(DTYPES[dtype])[6:]}
                run = measure(kind, arguments)
                runs[dtype, kind].append(run)
                print(
                    f"{repeat + 1} of {repeats}, {dtype}, {kind}: {run['seconds']:.2f} s "
                    f"(without imports {run['loading']:.2f} s, "
                    f"the call alone {run['called']:.2f} s, processor {run['processor']:.2f} s), "
                    f"peak {gib(run['peak'])} GiB",
                    file=sys.stderr,
                )
    rows = []
    for dtype in dtypes:
        row: dict[str, Any] = {"dtype": dtype}
        for kind in LIBRARIES:
            mine = runs[dtype, kind]
            row[kind] = {
                **{key: statistics.median(run[key] for run in mine) for key in ("seconds", "loading", "processor")},
                "peak": max(run["peak"] for run in mine),
                "weights": mine[0]["weights"],
                "runs": mine,
            }
        measured = ("seconds", "loading", "processor", "peak")
        row["ratio"] = {key: row["ours"][key] / row["diffusers"][key] for key in measured}
        rows.append(row)
    return rows


def loading_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Markdown of :func:`measure_loading`: seconds with imports, peak memory, and all ratios."""
    lines = [
        "| weights | import and load, s: ours | diffusers | ratio | without imports | processor "
        "| peak, GiB: ours | diffusers | ratio |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        ours, theirs, ratio = row["ours"], row["diffusers"], row["ratio"]
        lines.append(
            f"| {row['dtype']} | {ours['seconds']:.2f} | {theirs['seconds']:.2f} | {ratio['seconds']:.2f} "
            f"| {ratio['loading']:.2f} | {ratio['processor']:.2f} "
            f"| {gib(ours['peak'])} | {gib(theirs['peak'])} | {ratio['peak']:.2f} |"
        )
    return "\n".join(lines)


def picture_table(result: Mapping[str, Any]) -> str:
    """Markdown of a picture's stages, and whether its peak memory is within ``PROMISE``."""
    lines = ["| after | seconds | in memory, GiB | peak so far, GiB |", "| --- | --- | --- | --- |"]
    for stage, numbers in result["stages"].items():
        lines.append(f"| {stage} | {numbers['seconds']:.1f} | {gib(numbers['resident'])} | {gib(numbers['peak'])} |")
    verdict = "within" if result["peak"] <= PROMISE else "above"
    return "\n".join([*lines, f"peak {gib(result['peak'])} GiB, {verdict} {gib(PROMISE)} GiB"])


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command; exit code 0 on success, 2 with one line if something cannot be measured."""
    parser = _parser()
    options = parser.parse_args(arguments)
    with parser.one_line("no file was left", RuntimeError):
        if not Path("/proc/self/status").exists():
            raise OSError("this system has no /proc/self/status, from which peak memory is read")
        if options.command == "write":
            write_random(options.target, CONFIGS[options.scale])
            return
        if options.command == "load" and options.repeats < 1:
            raise ValueError(f"--repeats is {options.repeats}, expected 1 or more")
        if options.command == "picture" and options.strip_rows < 1:
            raise ValueError(f"--strip-rows is {options.strip_rows}, expected 1 or more")
        with prepared(options) as (weights, folder):
            report: dict[str, Any] = {"machine": machine(), "bytes": weights.stat().st_size}
            if options.command == "load":
                report["rows"] = measure_loading(weights, folder, options.dtypes, options.repeats)
                table = loading_table(report["rows"])
            else:
                settings = {
                    "size": options.size,
                    "steps": options.steps,
                    "strip_rows": None if options.plain else options.strip_rows,
                }
                dtype = {"dtype": str(DTYPES[options.dtype])[6:]}
                report |= settings | dtype
                report |= measure("picture", {"weights": str(weights), "folder": str(folder), **dtype, **settings})
                table = picture_table(report)
        print(json.dumps(report, indent=2) if options.json else f"{report['machine']}\n\n{table}")


def _parser() -> Parser:
    parser = Parser(
        prog="python -m tools.memory", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    write = commands.add_parser("write", help="only write a file of random numbers")
    write.add_argument("target", type=Path, metavar="FILE")
    write.add_argument("--scale", choices=CONFIGS, default="full", help="of the model (default: %(default)s)")
    loading = commands.add_parser("load", help="measure loading, in this package and in diffusers")
    loading.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES), help="(default: all)")
    loading.add_argument("--repeats", type=int, default=4, help="rounds (default: %(default)s)")
    picture = commands.add_parser("picture", help="measure one picture with guidance")
    picture.add_argument("--dtype", choices=DTYPES, default="bf16", help="of U-Net and text (default: %(default)s)")
    picture.add_argument("--size", type=parse_size, metavar="WxH", help="in pixels (default: the model's own)")
    picture.add_argument("--steps", type=int, default=1, help="denoising steps (default: %(default)s)")
    picture.add_argument(
        "--strip-rows", type=int, default=8, help="rows of the latent to decode at once (default: %(default)s)"
    )
    picture.add_argument("--plain", action="store_true", help="keep the text encoders, and decode all at once")
    for command in (loading, picture):
        command.add_argument("--scale", choices=CONFIGS, default="full", help="of the model (default: %(default)s)")
        command.add_argument("--weights", type=Path, metavar="FILE", help="these weights instead of random ones")
        command.add_argument(
            "--tokenizer",
            type=Path,
            metavar="DIR",
            help="vocabulary folder (default: as for sample)",
        )
        command.add_argument("--folder", type=Path, metavar="DIR", help="for 7 GB of files (default: the system's)")
        command.add_argument("--json", action="store_true", help="print every number as JSON")
    return parser


if __name__ == "__main__":
    main()
