"""Pictures an hour with one process and with workers, what the engine costs, and the memory of a worker.

    python -m tools.bench_workers --pictures 16 --steps 6 --workers 1 2
    python -m tools.bench_workers --weights sd_xl_base_1.0.safetensors --dtype bf16 --pictures 2 --steps 1 \\
        --size 64x64 --workers 2

Every run is a fresh process of ``minisdxl.sample`` in a fresh folder; on a busy machine, repeat them. Compare numbers
of one call only.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil

from minisdxl.cli.options import DTYPES, Parser, plain_warnings
from minisdxl.cli.reports import processor
from minisdxl.scale.folder import RESULTS

PROMPT = "a small red circle on a white background"
EVERY = 0.2  # seconds between two looks at the memory of workers
GIB = 2**30


def _parser() -> Parser:
    parser = Parser(
        prog="python -m tools.bench_workers", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--weights", default="shapes", help="(default: %(default)s)")
    add("--dtype", choices=DTYPES, default="fp32", help="(default: %(default)s)")
    add("--pictures", type=int, default=16, help="of each run (default: %(default)s)")
    add("--steps", type=int, default=6, help="(default: %(default)s)")
    add("--size", help="(default: the model's own)")
    add("--repeats", type=int, default=1, help="runs of each kind in turn, of which the fastest counts (default: 1)")
    add("--workers", type=int, nargs="+", default=[1, 2], help="numbers of workers (default: 1 2)")
    return parser


def run(options: argparse.Namespace, workers: int | None, folder: Path) -> dict[str, Any]:
    """One run, in seconds: until the first picture is there, from then on, and in making pictures; with its memory.

    Memory is what the largest worker adds to the machine (:func:`own_memory`): ``memory`` is the median from the first
    picture on, ``peak`` the largest value of the whole run. Raises ``ChildProcessError`` if the run fails.
    """
    command = [sys.executable, "-m", "minisdxl.sample", PROMPT, "--images-per-prompt", str(options.pictures)]
    command += ["--weights", options.weights, "--dtype", options.dtype, "--steps", str(options.steps)]
    command += ["--out", str(folder / "pictures"), "--json", str(folder / "report.json"), "--device", "cpu"]
    command += ["--size", options.size] if options.size else []
    command += ["--workers", str(workers)] if workers else []
    environment = {**os.environ, "OMP_NUM_THREADS": str(os.cpu_count())}
    began, first, before, making = time.perf_counter(), 0.0, [0], [0]
    driver = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True
    )
    while driver.poll() is None:
        if not first and any((folder / "pictures").glob("*.png")):
            first = time.perf_counter()
        (making if first else before).append(max(own_memory(driver.pid), default=0))
        time.sleep(EVERY)
    ended = time.perf_counter()
    if driver.returncode:
        assert driver.stderr is not None
        raise ChildProcessError(f"{' '.join(command)} ended with {driver.returncode}: {driver.stderr.read()[-300:]}")
    if workers:
        rows = [json.loads(line) for line in (folder / "pictures" / RESULTS).read_text().splitlines()]
    else:
        rows = json.loads((folder / "report.json").read_text())["pictures"]
    return {
        "workers": workers,
        "start": first - began,
        "making": ended - first,
        "busy": sum(row["seconds"] for row in rows),
        "memory": statistics.median(making),
        "peak": max(before + making),
    }


def own_memory(driver: int) -> list[int]:
    """The bytes of each worker of a driver that no other process can share: private pages that it has written to.

    Pages of a mapped file that were only read are left out. The system keeps them once for all processes, also while
    one worker alone has come upon them, as when it is the first to encode its prompt.
    """
    found = []
    try:
        for process in psutil.Process(driver).children(recursive=True):
            if any(part.startswith("ray::Actor") for part in process.cmdline()):
                found.append(sum(int(each.private_dirty) for each in process.memory_maps()))
    except psutil.Error:
        pass
    return found


def table(results: Sequence[dict[str, Any]], pictures: int) -> str:
    """Markdown: a row for each run."""
    heads = ["", "first picture after", "pictures an hour", "to one process", "time beside each picture"]
    heads += ["memory of a worker", "its peak"]
    lines = [f"| {' | '.join(line)} |" for line in (heads, ["---"] * len(heads))]
    plain = rate(results[0], pictures)
    for each in results:
        workers = each["workers"]
        name = f"{workers} worker{'s' * (workers > 1)}" if workers else f"one process, {os.cpu_count()} threads"
        beside = each["making"] * (workers or 1) / (pictures - 1) - each["busy"] / pictures
        memory = [f"{each[key] / GIB:.2f} GiB" if workers else "" for key in ("memory", "peak")]
        lines.append(
            f"| {name} | {each['start']:.1f} s | {rate(each, pictures):,.0f} | {rate(each, pictures) / plain:.2f} | "
            f"{1000 * beside:.0f} ms | {memory[0]} | {memory[1]} |"
        )
    return "\n".join(lines)


def rate(result: dict[str, Any], pictures: int) -> float:
    """Pictures an hour after the first one."""
    return 3600 * (pictures - 1) / float(result["making"])


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command; exit code 0 on success, 2 with one line on bad input, 130 after Ctrl-C."""
    parser = _parser()
    options = parser.parse_args(arguments)
    plain_warnings()
    with parser.one_line("nothing was left"):
        if options.pictures < 2:
            raise ValueError(f"--pictures is {options.pictures}, expected 2 or more")
        found: dict[int | None, list[dict[str, Any]]] = {kind: [] for kind in (None, *options.workers)}
        for kind in [*found] * options.repeats:
            with tempfile.TemporaryDirectory() as folder:
                found[kind].append(run(options, kind, Path(folder)))
        results = [min(runs, key=lambda each: float(each["making"])) for runs in found.values()]
        load = ", ".join(f"{each:.1f}" for each in os.getloadavg())
        print(f"{processor()}, {os.cpu_count()} cores, load {load}; {options.weights}, {options.dtype}")
        print(f"{options.pictures} pictures, {options.steps} steps, size {options.size or 'of the model'}\n")
        print(table(results, options.pictures))


if __name__ == "__main__":
    main()
