"""The command ``python -m tools.attention``: how informative self-attention is, by attention block and step.

On the dense model it measures the entropy of the maps' rows as a share of its maximum ln N (1: every key gets equal
attention), the variance of the maps' entries as in figure 5 of the AT-EDM paper, and the variance of the G-WPR scores.
It prints a table, and writes all numbers to a CSV file and a plot beside it.
"""

from __future__ import annotations

import argparse
import csv
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from atedm import gwpr
from minisdxl.checkpoint.atomic import atomic_path
from minisdxl.cli.options import Parser, add_device, find_device, parse_size, plain_warnings
from minisdxl.loading import load
from minisdxl.pipeline import SDXL
from tools.evaluation.attention_maps import Settings, attention_spread, make
from tools.evaluation.pictures import drawn_captions

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MEASURES = {  # columns of the CSV file, and the labels of the plot
    "map_variance": "variance of a map's entries, times N²",
    "entropy": "entropy of a map's rows, share of ln N",
    "score_variance": "variance of G-WPR scores over their mean squared",
}


def score_variance(sdxl: SDXL, settings: Settings) -> NDArray[np.float64]:
    """Relative variance of the G-WPR scores, (attention blocks, steps); 0 where all tokens score the same.

    It is the variance over tokens of s / mean(s), for the scores s of the first layer of each block in the dense model,
    which is where tokens would be pruned. It is averaged over pictures and both halves of guidance.
    """
    depths = {site.name: site.depth for site in sdxl.config.unet.attention_sites()}
    seen: dict[str, list[float]] = defaultdict(list)
    calls: Counter[str] = Counter()

    def see(name: str, _: nn.Module, __: Any, output: Any) -> None:
        if calls[name] % depths[name] == 0:
            scores = gwpr(output[1].graph())
            relative = scores / scores.mean(dim=1, keepdim=True)
            seen[name].append(relative.var(dim=1, correction=0).mean().item())
        calls[name] += 1

    make(sdxl, settings, None, see, "attn1")
    return np.array(list(seen.values()))


def table(names: Sequence[str], measured: NDArray[np.float64]) -> str:
    """Markdown of (measures, blocks, steps): first, middle and last step, and the late half over the early half."""
    steps = measured.shape[2]
    moments = {"first": 0, "middle": steps // 2, "last": steps - 1}
    head = [f"{name.replace('_', ' ')}, {moment}" for name in MEASURES for moment in (*moments, "late / early")]
    lines = [" | ".join(["block", *head]), " | ".join(["---"] * (1 + len(head)))]
    for name, values in zip((*names, "mean"), (*np.moveaxis(measured, 1, 0), measured.mean(axis=1)), strict=True):
        cells = [name]
        for line in values:
            half = (steps + 1) // 2
            cells += [f"{line[step]:.3g}" for step in moments.values()]
            cells.append(f"{line[-half:].mean() / line[:half].mean():.2f}")
        lines.append(" | ".join(cells))
    return "\n".join(f"| {line} |" for line in lines)


def write_numbers(path: Path, names: Sequence[str], measured: NDArray[np.float64]) -> None:
    """Writes (measures, attention blocks, steps) as a CSV file: a row for each block and step, steps from 1."""
    with atomic_path(path) as temporary, temporary.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["block", "step", *MEASURES])
        for block, name in enumerate(names):
            for step in range(measured.shape[2]):
                writer.writerow([name, step + 1, *(repr(float(value)) for value in measured[:, block, step])])


def draw(figure: Figure, names: Sequence[str], measured: NDArray[np.float64], title: str) -> None:
    """Draws a panel for each measure, with a line for each block and one for their mean."""
    figure.set_size_inches(12, 10)
    steps = np.arange(measured.shape[2]) + 1
    panels = figure.subplots(len(MEASURES), 1, sharex=True)
    for panel, values, label in zip(panels, measured, MEASURES.values(), strict=True):
        for name, line in zip((*names, "mean"), (*values, values.mean(axis=0)), strict=True):
            style = {"color": "k", "linewidth": 3} if name == "mean" else {"ls": "--" if "down" in name else "-"}
            panel.plot(steps, line, marker=".", label=name, **style)
        panel.set(ylabel=label, ylim=(0, None))
    panels[-1].set(xlabel="denoising step, 1 is the noisiest")
    panels[-1].xaxis.get_major_locator().set_params(integer=True)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right center", title="attention block")
    figure.suptitle(title)


def _attention(options: argparse.Namespace) -> None:
    """Raises ``ValueError``, ``OSError``, ``ArithmeticError`` or ``ModuleNotFoundError``."""
    import matplotlib  # not a dependency of the package but of its extra "figures"
    from matplotlib.figure import Figure

    if options.captions < 1 or options.out.suffix != ".png":
        raise ValueError(
            f"--captions is {options.captions} and --out {options.out}, expected 1 or more and a .png file"
        )
    sdxl = load(options.weights, device=find_device(options.device), tokenizer=options.tokenizer)
    prompts = list(drawn_captions(options.captions).texts)
    settings = {"prompts": prompts, "seed": 0, **{key: vars(options)[key] for key in ("steps", "cfg", "size")}}
    measured = np.concatenate([attention_spread(sdxl, settings), score_variance(sdxl, settings)[None]])
    names = [site.name for site in sdxl.config.unet.attention_sites()]
    print(table(names, measured))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    write_numbers(options.out.with_suffix(".csv"), names, measured)
    title = f"self-attention of {sdxl.config.name}, {len(prompts)} captions, {options.steps} steps, CFG {options.cfg:g}"
    with matplotlib.rc_context({**matplotlib.rcParamsDefault, "font.size": 9}), atomic_path(options.out) as path:
        figure = Figure(layout="constrained")
        draw(figure, names, measured, title)
        figure.savefig(path, dpi=100, metadata={"Software": None})
    print(options.out)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command; exit code 0 on success, 2 with one line on bad input, 130 after Ctrl-C."""
    parser = Parser(
        prog="python -m tools.attention", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--weights", default="shapes", help="the bundled 'shapes' (default), a checkpoint file or a folder")
    add(
        "--tokenizer",
        metavar="DIR",
        help="vocabulary folder (default: 'tokenizer' by the weights, else CLIP's)",
    )
    add(
        "--captions",
        type=int,
        default=8,
        metavar="N",
        help="captions, in one batch (default: %(default)s)",
    )
    add("--steps", type=int, default=50, help="denoising steps (default: %(default)s)")
    add("--cfg", type=float, default=4.0, help="guidance scale (default: %(default)s)")
    add("--size", type=parse_size, metavar="WxH", help="in pixels (default: the model's own)")
    add_device(parser)
    add("--out", type=Path, default="docs/results/attention.png", metavar="FILE.png", help="(default: %(default)s)")
    options = parser.parse_args(arguments)
    plain_warnings()
    with parser.one_line("no partial figure was left"):
        _attention(options)


if __name__ == "__main__":
    main()
