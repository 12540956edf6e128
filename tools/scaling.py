"""The command ``python -m tools.scaling``: time of a step by picture size and batch, beside its FLOPs.

One formula is fitted to the times of the dense U-Net: each kind of work has its own speed, and each call a fixed cost.
Where a measured time is far from the fit, FLOPs do not explain it: caches overflow, or calls are too small to fill the
machine. Presets are compared with the same fit. Weights are random.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from minisdxl.cli.options import DTYPES, Parser
from minisdxl.config import ModelConfig
from minisdxl.cost import Kind, count
from minisdxl.runtime import allocator
from tools.benchmark.bench_models import CONFIGS, plan_of, unets
from tools.benchmark.gauges import forget_peak, memory, seconds
from tools.benchmark.machine import gib, machine

# Kinds of work that share one speed. Convolutions and linear maps grow with the pixels, attention with their square.
SPEEDS = {
    "convolution and linear": (Kind.CONVOLUTION, Kind.PROJECTIONS, Kind.FEED_FORWARD),
    "attention": (Kind.SELF_ATTENTION, Kind.CROSS_ATTENTION),
}


@dataclass(frozen=True)
class Point:
    """One measurement: pixels on a side, latents in a call, seconds of all repeats, peak bytes without the weights."""

    preset: str
    size: int
    batch: int
    times: tuple[float, ...]
    memory: int

    @property
    def seconds(self) -> float:
        """The median time."""
        return statistics.median(self.times)


def work(config: ModelConfig, point: Point) -> NDArray[np.float64]:
    """FLOPs of a call for each of :data:`SPEEDS`, and 1 for its fixed cost."""
    side = point.size // config.vae.downscale
    counted = count(config, side, side, plan_of(point.preset, config), config.text[0].context_length)
    by_kind: Counter[Kind] = Counter()
    for piece in counted.works:
        by_kind[piece.kind] += piece.flops
    return np.array([*(point.batch * sum(by_kind[kind] for kind in kinds) for kinds in SPEEDS.values()), 1.0])


def fit(config: ModelConfig, points: Sequence[Point]) -> NDArray[np.float64]:
    """Seconds per FLOP for each of :data:`SPEEDS`, and per call: non-negative least squares of relative errors."""
    from scipy.optimize import nnls  # not a dependency of the package but of its extra "test"

    rows = np.array([work(config, point) / point.seconds for point in points])
    scale = rows.max(axis=0)
    found, _ = nnls(rows / scale, np.ones(len(points)))
    return np.asarray(found / scale)


@torch.no_grad()
def measure(
    config: ModelConfig,
    size: int,
    batch: int,
    presets: Sequence[str],
    repeats: int,
    device: torch.device,
    dtype: torch.dtype,
) -> list[Point]:
    """Measures every preset in turn, with a U-Net that is freed afterwards.

    Each time is that of a second call. The freed memory of the first one stays mapped, as it does between the steps of
    a picture.
    """
    with allocator.freed_memory_kept():  # free memory goes back to the system at the end, so no call starts with any
        contenders = list(unets(config, size, batch, presets, [], device, dtype))
    times: dict[str, list[float]] = {contender.name: [] for contender in contenders}
    peaks = dict.fromkeys(times, 0)
    before = memory(device, "VmRSS")
    for _ in range(repeats):
        for contender in contenders:
            forget_peak(device)
            with allocator.freed_memory_kept():
                contender.call()
                times[contender.name].append(seconds(contender, device))
            peaks[contender.name] = max(peaks[contender.name], memory(device, "VmHWM") - before)
    points = [Point(name, size, batch, tuple(mine), peaks[name]) for name, mine in times.items()]
    for point in points:
        print(f"{size} px, batch {batch}, {point.preset}: {point.seconds:.3f} s", file=sys.stderr)
    return points


def table(config: ModelConfig, points: Sequence[Point], speeds: NDArray[np.float64]) -> str:
    """Markdown: measured and fitted time, their ratio, FLOPs and memory; then the fitted speeds."""
    head = ["", "px", "batch", "s a step", "fitted", "measured / fitted", "TFLOPs", "memory, GiB"]
    lines = [head, ["---"] * len(head)]
    for point in points:
        cost = work(config, point)
        fitted = float(cost @ speeds)
        numbers = [f"{point.seconds:.3f}", f"{fitted:.3f}", f"{point.seconds / fitted:.2f}"]
        cells = [point.preset, str(point.size), str(point.batch), *numbers]
        lines.append([*cells, f"{cost[:-1].sum() / 1e12:.3g}", gib(point.memory)])
    rates = [
        f"{name} {1e-9 / speed:.3g} GFLOP/s" if speed else f"{name} too fast to tell"
        for name, speed in zip(SPEEDS, speeds[:-1], strict=True)
    ]
    text = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"{text}\n\nfitted to dense: {', '.join(rates)}, {1000 * speeds[-1]:.3g} ms a call"


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command; exit code 0 on success, 2 with one line if something cannot be measured."""
    parser = _parser()
    options = parser.parse_args(arguments)
    config, device = CONFIGS[options.scale], torch.device(options.device)
    dtype = DTYPES[options.dtype or ("bf16" if options.device == "cuda" else "fp32")]
    with parser.one_line("nothing was written"):
        if options.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("--device is 'cuda', torch finds none here; expected cpu")
        for name in ("repeats", "batches"):
            least = min(np.atleast_1d(getattr(options, name)))
            if least < 1:
                raise ValueError(f"--{name} has {least}, expected 1 or more")
        for size in options.sizes:
            config.picture_size((size, size))
        where = [(size, 1) for size in options.sizes]
        where += [(options.sizes[0], batch) for batch in options.batches if batch > 1]
        presets = ["dense", *(preset for preset in options.presets if preset != "dense")]
        points = [
            point
            for size, batch in where
            for point in measure(config, size, batch, presets, options.repeats, device, dtype)
        ]
    speeds = fit(config, [point for point in points if point.preset == "dense"])
    what = f"{machine()}; {config.name}, {options.device}, {str(dtype)[6:]}"
    report: Mapping[str, Any] = {"machine": what, "points": [asdict(point) for point in points], "fit": list(speeds)}
    print(json.dumps(report, indent=1) if options.json else f"{what}\n\n{table(config, points, speeds)}")


def _parser() -> Parser:
    parser = Parser(
        prog="python -m tools.scaling", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--device", choices=("cpu", "cuda"), default="cpu", help="(default: %(default)s)")
    add("--scale", choices=CONFIGS, default="full", help="of the model (default: %(default)s)")
    sizes, batches = [512, 768, 1024, 1536, 2048], [1, 2, 4]
    add("--sizes", nargs="+", type=int, default=sizes, metavar="PX", help="(default: 512 768 1024 1536 2048)")
    add("--batches", nargs="+", type=int, default=batches, metavar="B", help="at the first size (default: 1 2 4)")
    add("--dtype", choices=DTYPES, help="(default: fp32 on a CPU, bf16 on a GPU)")
    add("--presets", nargs="*", default=["at-edm"], metavar="PRESET", help="beside dense (default: at-edm)")
    add("--repeats", type=int, default=2, help="rounds (default: %(default)s)")
    add("--json", action="store_true", help="print every number as JSON")
    return parser


if __name__ == "__main__":
    main()
