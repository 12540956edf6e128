"""Times one step of the U-Net, dense and with token plans, beside diffusers with the same random weights.

    python tools/bench.py --device cpu                                    # SDXL, 1024 px, fp32: takes 20 minutes
    python tools/bench.py --device cuda --batch 2 --compile               # a guided pair, bf16, CUDA graphs
    python tools/bench.py --device cpu --scale small --size 256           # a quick estimate
    python tools/bench.py --device cpu --block down.1.1 --presets dense at-edm at-edm:graph=subsampled

Contenders take turns. Each runs the last of 50 steps, which prunes most. Ratios compare times of one round. On a CPU
freed memory stays mapped, as it does while a picture is sampled; "unkept" times are without that. Memory is the peak of
the first call, less what was in use before any call.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

if __name__ == "__main__":  # run as a file, Python looks for imports in tools/ and not in the repository
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from minisdxl.cli.options import DTYPES, Parser
from minisdxl.runtime import allocator
from tools.benchmark.bench_models import CONFIGS, PEERS, Contender, blocks, unets
from tools.benchmark.gauges import forget_peak, memory, seconds
from tools.benchmark.machine import gib, machine
from tools.benchmark.profile_parts import PARTS, spent

BASELINES = ("dense", "diffusers")


@torch.no_grad()
def measure(contenders: Sequence[Contender], repeats: int, device: torch.device) -> list[dict[str, Any]]:
    """One row for each contender: all its times, its peak memory, and its time by part of the U-Net.

    Each is called once before anything is timed. That call gives ``off``, the largest difference from the first
    contender's output, as a share of the largest value. On a CPU a round has two halves. In the first, freed memory
    goes back to the system, as in any program: ``unkept``. In the second it stays mapped for all contenders, as in
    ``SDXL.generate``: ``seconds``, from which the ratios come, and ``parts``.
    """
    before = memory(device, "VmRSS")
    rows: list[dict[str, Any]] = []
    first = contenders[0].call().float()
    for contender in contenders:
        forget_peak(device)
        output = contender.call().float()
        needed = memory(device, "VmHWM") - before
        off = (output - first).abs().max() / first.abs().max()
        rows.append({"name": contender.name, "seconds": [], "unkept": [], "memory": needed, "off": off.item()})
    for repeat in range(repeats):
        turns = list(zip(contenders, rows, strict=True))[:: -1 if repeat % 2 else 1]
        if device.type == "cpu":
            for contender, row in turns:
                row["unkept"].append(seconds(contender, device))
        with allocator.freed_memory_kept():
            contenders[0].call()  # maps the memory before anything is timed
            for contender, row in turns:
                row["seconds"].append(seconds(contender, device))
            if repeat == 0:
                for contender, row in turns:
                    row["parts"] = spent(contender, device)
        times = ", ".join(f"{row['name']} {row['seconds'][-1]:.3f} s" for row in rows)
        print(f"{repeat + 1} of {repeats}: {times}", file=sys.stderr)
    bases = {row["name"]: row["seconds"] for row in rows if row["name"] in BASELINES}
    bases |= {f"{row['name']} unkept": row["unkept"] for row in rows if row["name"] == "diffusers" and row["unkept"]}
    for row in rows:
        row["ratios"] = {
            name: [mine / theirs for mine, theirs in zip(row["seconds"], base, strict=True)]
            for name, base in bases.items()
        }
    return rows


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Two Markdown tables: medians with the range of all repeats, and milliseconds of each part."""
    bases = list(rows[0]["ratios"])
    unkept = ["unkept, s"] if rows[0]["unkept"] else []
    heads = ["", "s a step", *(f"of {base}" for base in bases), *unkept, "memory, GiB", "output differs by"]
    lines = [_line(heads), _line(["---"] * len(heads))]
    for row in rows:
        ratios = [_spread(row["ratios"][base], 3) for base in bases]
        others = [*(_spread(row["unkept"], 3) for _ in unkept), gib(row["memory"]), f"{row['off']:.1e}"]
        lines.append(_line([row["name"], _spread(row["seconds"], 3), *ratios, *others]))
    parts = [part for part in PARTS if any(row["parts"][part] for row in rows)]
    lines += ["", _line(["ms of one step, profiled", *parts]), _line(["---"] * (len(parts) + 1))]
    for row in rows:
        total = sum(row["parts"].values())
        shares = (f"{row['parts'][part]:.1f} ({row['parts'][part] / total:.1%})" for part in parts)
        lines.append(_line([row["name"], *shares]))
    return "\n".join(lines)


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _spread(values: Sequence[float], digits: int) -> str:
    low, middle, high = (f"{of(values):.{digits}f}" for of in (min, statistics.median, max))
    return f"{middle} ({low} to {high})"


def describe(options: argparse.Namespace, device: torch.device) -> str:
    """The machine, the library versions and what is timed, as text."""
    if device.type == "cuda":
        where = f"{torch.cuda.get_device_name(device)}, CUDA {torch.version.cuda}"
    else:
        where = f"{torch.get_num_threads()} threads"
    what = CONFIGS[options.scale].name + (f" {options.block}" if options.block else "")
    how = f"{options.dtype}{', compiled' if options.compile else ''}"
    return f"{machine()}; {where}\n{what}, {options.size} px, batch {options.batch}, {how}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command; exit code 0 on success, 2 with one line if something cannot be measured."""
    parser = _parser()
    options = parser.parse_args(arguments)
    options.dtype = options.dtype or ("bf16" if options.device == "cuda" else "fp32")
    peers = ([] if options.block else list(PEERS)) if options.peers is None else options.peers
    config, device, dtype = CONFIGS[options.scale], torch.device(options.device), DTYPES[options.dtype]
    with parser.one_line("nothing was written"):
        if options.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("--device is 'cuda', torch finds none here; expected cpu")
        if options.device == "cpu" and not os.access("/proc/self/clear_refs", os.W_OK):
            raise ValueError("cannot write /proc/self/clear_refs, which resets the peak memory on Linux")
        for name in ("batch", "repeats"):
            if getattr(options, name) < 1:
                raise ValueError(f"--{name} is {getattr(options, name)}, expected 1 or more")
        config.picture_size((options.size, options.size))
        if options.block and peers:
            raise ValueError(f"--peers are {', '.join(peers)} with --block, expected none: they run whole U-Nets")
        if options.block and options.compile:
            raise ValueError("--compile is given with --block, expected one of them: whole U-Nets are compiled")
        print(describe(options, device), file=sys.stderr)
        with torch.no_grad():
            made = (
                blocks(config, options.block, options.size, options.batch, options.presets, device, dtype)
                if options.block
                else unets(config, options.size, options.batch, options.presets, peers, device, dtype, options.compile)
            )
            rows = measure(list(made), options.repeats, device)
    report = {"machine": describe(options, device), **vars(options), "peers": peers, "rows": rows}
    print(json.dumps(report, indent=1) if options.json else f"{describe(options, device)}\n\n{table(rows)}")


def _parser() -> Parser:
    parser = Parser(
        prog="python -m tools.bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--device", choices=("cpu", "cuda"), required=True)
    add("--scale", choices=CONFIGS, default="full", help="of the model (default: %(default)s)")
    add("--size", type=int, default=1024, help="side of the picture in pixels (default: %(default)s)")
    add("--batch", type=int, default=1, help="latents in a call, with guidance two a picture (default: %(default)s)")
    add("--dtype", choices=DTYPES, help="(default: fp32 on a CPU, bf16 on a GPU)")
    presets = ["dense", "at-edm", "at-edm-subsampled", "moving-grid"]
    add("--presets", nargs="+", default=presets, metavar="PRESET", help=f"(default: {' '.join(presets)})")
    add("--peers", nargs="*", choices=PEERS, help="(default: all, and none with --block)")
    add("--block", metavar="NAME", help="time this attention block alone, such as down.1.1")
    add("--compile", action="store_true", help="compile all U-Nets with torch.compile; with CUDA graphs on a GPU")
    add("--repeats", type=int, default=3, help="rounds (default: %(default)s)")
    add("--json", action="store_true", help="print every number as JSON")
    return parser


if __name__ == "__main__":
    main()
