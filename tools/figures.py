"""The command ``python -m tools.figures FIGURE``: draws figures 2, 5, 8, 9 and 10 of the AT-EDM paper for any weights.

For each figure one function computes the numbers and another draws them. The same arguments give the same file. Needs
matplotlib.
"""

from __future__ import annotations

import argparse
import textwrap
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import nn

from atedm.presets import parse_preset
from atedm.recovery import RECOVERIES
from atedm.schedule import Schedule
from minisdxl.budget import with_budget
from minisdxl.checkpoint.atomic import atomic_path
from minisdxl.cli.options import Parser, add_device, find_device, parse_size, plain_warnings
from minisdxl.config import SDXL_BASE, ModelConfig
from minisdxl.cost import Kind, format_flops, summary
from minisdxl.flops import find_config
from minisdxl.loading import load
from minisdxl.pipeline import SDXL
from tools.evaluation.attention_maps import Settings, attention_spread, make

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Masks = dict[str, list[NDArray[np.bool_]]]  # attention block -> for each step which positions (H, W) it keeps
PROMPT = "a small red circle above a big blue square on a white background"
WIDTH = 12  # inches of 100 pixels
TAUS = (0, 5, 15, 30, 45)  # of every 50 steps, from figure 10; the last four lie in regions I to IV of figure 5
BOUNDARIES = tuple((low + high) / 2 for low, high in pairwise(TAUS[1:]))  # of every 50 steps
RANKINGS = {"gwpr": "self-attention", "ca-wpr": "cross-attention"}
# Rows of figure 2 besides the attention blocks, by the modules in them: resampling, in and out go with the ResBlocks.
BETWEEN = {"input_blocks": "ResBlocks, down", "middle_block": "ResBlocks, mid", "output_blocks": "ResBlocks, up"}
BETWEEN |= {"out": "ResBlocks, up", "time_embed": "embeddings", "label_emb": "embeddings"}


def flops_by_block(config: ModelConfig, works: Iterable[dict[str, Any]]) -> dict[str, Counter[Kind]]:
    """FLOPs of the ``blocks`` of a summary by row of figure 2 and by kind, without ranking and recovery."""
    attention_blocks = [site.name for site in config.unet.attention_sites()]
    rows: dict[str, Counter[Kind]] = {row: Counter() for row in (*attention_blocks, *BETWEEN.values())}
    for work in works:
        name, kind = work["name"], work["kind"]
        if kind != Kind.RANKING:
            rows[name if name in rows else BETWEEN[name.partition(".")[0]]][kind] += work["flops"]
    return rows


def draw_flops(figure: Figure, options: argparse.Namespace) -> None:
    """Figure 2: FLOPs of each block by kind of work, dense and at the steady step of a preset."""
    config = find_config(options.model)
    (width, height), f = config.picture_size(options.size), config.vae.downscale
    schedules = {"dense": None} | ({f"{options.prune}, steady": parse_preset(options.prune)} if options.prune else {})
    figure.set_size_inches(WIDTH, 7.5)
    panels = figure.subplots(1, len(schedules), sharex=True, sharey=True, squeeze=False)[0]
    for panel, (label, schedule) in zip(panels, schedules.items(), strict=True):
        calls = summary(config, height // f, width // f, schedule, options.steps)
        rows, total = flops_by_block(config, calls["blocks"]), calls["steady"]
        ends = np.zeros(len(rows))
        for kind in (kind for kind in Kind if kind != Kind.RANKING):
            spent = np.array([row[kind] for row in rows.values()])
            bars = panel.barh(list(rows), spent, left=ends, label=f"{kind}: {spent.sum() / total:.1%}")
            ends += spent
        panel.bar_label(bars, [format_flops(end) for end in ends], padding=3, fontsize="small")
        attention = sum(row.total() for name, row in rows.items() if name not in BETWEEN.values()) / total
        panel.set_title(f"{label}: {format_flops(total)}, of which attention blocks {attention:.0%}")
        panel.set_xlabel("FLOPs of one U-Net call, without ranking and recovery")
        panel.xaxis.set_major_formatter(lambda flops, _: format_flops(flops))
        panel.legend(loc="upper center", bbox_to_anchor=(0.5, -0.1), ncols=2, title="kind of work, share of this call")
    panels[0].set(xlim=(0, 1.15 * panels[0].dataLim.x1), ylabel="attention blocks in running order, then the rest")
    panels[0].invert_yaxis()
    figure.suptitle(f"U-Net of {config.name}, {width}x{height} pixels")


def draw_variance(figure: Figure, options: argparse.Namespace) -> None:
    """Figure 5: variance and entropy of the self-attention maps over the steps, with the paper's regions."""
    sdxl, settings = _prepare(options)
    names = [site.name for site in sdxl.config.unet.attention_sites()]
    edges = np.array([0, *BOUNDARIES, 50]) * options.steps / 50 + 0.5  # between steps, which are at whole numbers
    figure.set_size_inches(WIDTH, 8)
    panels = figure.subplots(2, 1, sharex=True)
    for panel, values in zip(panels, attention_spread(sdxl, settings), strict=True):
        for name, line in zip([*names, "mean"], [*values, values.mean(axis=0)], strict=True):
            style = {"color": "k", "linewidth": 3} if name == "mean" else {"ls": "--" if "down" in name else "-"}
            panel.plot(np.arange(options.steps) + 1, line, marker=".", label=name, **style)
        for index, (region, (start, end)) in enumerate(zip(("I", "II", "III", "IV"), pairwise(edges), strict=True)):
            panel.axvspan(start, end, color="gray", alpha=0.08 + 0.1 * (index % 2), linewidth=0)
            panel.text((start + end) / 2, 1.01, f"region {region}", transform=panel.get_xaxis_transform(), ha="center")
    panels[0].set(ylabel="variance of the map's entries, times N²\n(0: all keys get equal attention)", ylim=(0, None))
    panels[1].set(ylabel="entropy of the map's rows,\nas a share of its maximum, ln N", xlim=(edges[0], edges[-1]))
    panels[1].xaxis.get_major_locator().set_params(integer=True)
    panels[1].set_xlabel(
        f"denoising step, 1 is the noisiest\n\nregions I to IV meet at {BOUNDARIES} of every 50 steps, midway between "
        f"{TAUS[1:]}:\nthe tau that the paper places in them; its text gives no boundaries"
    )
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right center", title="attention block")
    figure.suptitle(f"self-attention maps of N x N entries\n{_title(sdxl, options)}")


def kept_tokens(sdxl: SDXL, settings: Settings, schedule: Schedule) -> tuple[Image.Image, Masks]:
    """The picture, and the tokens that each attention block keeps; with guidance, in the conditional half."""
    seen: Masks = defaultdict(list)

    def see(name: str, _: nn.Module, __: Any, output: Any) -> None:
        tokens = output[0]
        held = range(tokens.size) if tokens.is_dense else tokens.positions[-1].tolist()
        seen[name].append(np.isin(range(tokens.size), held).reshape(tokens.grid))

    image, _ = make(sdxl, settings, schedule, see)
    depths = {site.name: site.depth for site in sdxl.config.unet.attention_sites()}
    return image, {name: masks[depths[name] - 1 :: depths[name]] for name, masks in seen.items()}


def darkened(image: Image.Image, kept: NDArray[np.bool_], cell: int) -> NDArray[np.uint8]:
    """The picture with pruned positions, squares of ``cell`` pixels, in dark violet, which also shows on black."""
    pixels = np.asarray(image)
    shown = kept.repeat(cell, axis=0).repeat(cell, axis=1)[: pixels.shape[0], : pixels.shape[1], None]
    return np.where(shown, pixels, pixels // 4 + np.array([48, 24, 72], dtype=np.uint8))


def draw_masks(figure: Figure, options: argparse.Namespace) -> None:
    """Figure 8: tokens that each ranking keeps at the first, middle and last step, over its final picture."""
    schedules, (sdxl, settings) = _variants(options.prune, "ranking", RANKINGS), _prepare(options)
    kept = {name: kept_tokens(sdxl, settings, schedule) for name, schedule in schedules.items()}
    sites, steps = list(sdxl.config.unet.attention_sites()), sorted({0, options.steps // 2, options.steps - 1})
    (width, height), f = sdxl.config.picture_size(options.size), sdxl.config.vae.downscale
    figure.set_size_inches(WIDTH, 2 * (0.4 + len(steps) * (0.5 + WIDTH / (len(sites) + 1) * height / width)))
    for part, (ranking, (image, masks)) in zip(figure.subfigures(2, 1, squeeze=False).flat, kept.items(), strict=True):
        part.suptitle(f"ranked by {RANKINGS[ranking]}, pruned tokens dark\n{_title(sdxl, options)}")
        for step, row in zip(steps, part.subplots(len(steps), len(sites) + 1, squeeze=False), strict=True):
            _show(row[0], image, "final picture", ylabel=f"step {step + 1}")
            for panel, site in zip(row[1:], sites, strict=True):
                mask = masks[site.name][step]
                _show(panel, darkened(image, mask, f * 2**site.level), f"{site.name}\n{mask.sum()} of {mask.size}")


def compare(sdxl: SDXL, settings: Settings, schedules: dict[str, Schedule]) -> dict[str, tuple[Image.Image, float]]:
    """Pictures of the dense model and of each schedule from the same noise, with the latent's mean squared error."""
    made = {label: make(sdxl, settings, schedule) for label, schedule in {"dense": None, **schedules}.items()}
    return {label: (image, (x - made["dense"][1]).square().mean().item()) for label, (image, x) in made.items()}


def draw_row(figure: Figure, made: dict[str, tuple[Image.Image, float]], title: str) -> None:
    """Draws pictures side by side. A label is broken at its first hyphen, because it can be wider than its picture."""
    width, height = made["dense"][0].size
    figure.set_size_inches(WIDTH, 1.2 + WIDTH / len(made) * height / width)
    for panel, (label, (image, distance)) in zip(figure.subplots(1, len(made)), made.items(), strict=True):
        _show(panel, image, f"latent MSD to dense\n{distance:.3g}", title=label.replace("-", "-\n", 1))
    figure.suptitle(title)


def draw_recoveries(figure: Figure, options: argparse.Namespace) -> None:
    """Figure 9: pictures of the dense model and of every recovery."""
    schedules, (sdxl, settings) = _variants(options.prune, "recovery", RECOVERIES), _prepare(options)
    draw_row(figure, compare(sdxl, settings, schedules), f"recovery of pruned tokens\n{_title(sdxl, options)}")


def tau_schedules(config: ModelConfig, base: Schedule, settings: Settings, budget: str) -> list[Schedule]:
    """``base`` with each of ``TAUS``, and with the ratio that meets the budget on average over all steps."""
    (width, height), f, steps = config.picture_size(settings["size"]), config.vae.downscale, settings["steps"]
    return [with_budget(config, height // f, width // f, replace(base, tau=tau), steps, budget) for tau in TAUS]


def draw_tau(figure: Figure, options: argparse.Namespace) -> None:
    """Figure 10: pictures of the dense model and of each number of prune-less steps."""
    base, (sdxl, settings) = parse_preset(options.prune), _prepare(options)
    found = tau_schedules(sdxl.config, base, settings, options.budget)
    made = compare(sdxl, settings, {f"tau {one.tau}, ratio {one.method.ratio:.3f}": one for one in found})
    title = f"the first tau of every 50 steps prune-less; average U-Net call within {options.budget}"
    draw_row(figure, made, f"{title}{' of dense' if '%' in title else ''}\n{_title(sdxl, options)}")


def _variants(preset: str, setting: str, values: Iterable[str]) -> dict[str, Schedule]:
    return {value: parse_preset(f"{preset}{',' if ':' in preset else ':'}{setting}={value}") for value in values}


def _prepare(options: argparse.Namespace) -> tuple[SDXL, Settings]:
    sdxl = load(options.weights, device=find_device(options.device), tokenizer=options.tokenizer)
    return sdxl, {"prompts": [options.prompt], **{key: vars(options)[key] for key in ("steps", "cfg", "seed", "size")}}


def _title(sdxl: SDXL, options: argparse.Namespace) -> str:
    width, height = sdxl.config.picture_size(options.size)
    run = f"{options.steps} steps, CFG {options.cfg:g}, seed {options.seed}, {vars(options).get('prune', 'dense')}"
    return f"{sdxl.config.name}, {width}x{height} pixels, {run}: {textwrap.shorten(options.prompt, 80)}"


def _show(panel: Any, image: Image.Image | NDArray[np.uint8], xlabel: str, **labels: str) -> None:
    panel.imshow(image)
    panel.set(xticks=[], yticks=[], xlabel=xlabel, **labels)


def _parser() -> Parser:
    parser = Parser(prog="python -m tools.figures", description=__doc__)
    commands = parser.add_subparsers(metavar="FIGURE", required=True)
    for draw in (draw_flops, draw_variance, draw_masks, draw_recoveries, draw_tau):
        name = draw.__name__.removeprefix("draw_")
        command = commands.add_parser(name, help=draw.__doc__, description=draw.__doc__)
        command.set_defaults(draw=draw)
        add = command.add_argument
        add("--out", type=Path, default=f"out/figure-{name}.png", metavar="FILE.png", help="(default: %(default)s)")
        add("--steps", type=int, default=50, help="denoising steps (default: %(default)s)")
        add("--size", type=parse_size, metavar="WxH", help="in pixels (default: the model's own)")
        if name == "flops":
            add("--model", default=SDXL_BASE.name, help="a config's name or a .safetensors file (default: %(default)s)")
            add(
                "--prune",
                nargs="?",
                const="at-edm",
                metavar="PRESET",
                help="show this preset, too (default: %(const)s)",
            )
            continue
        add("--weights", default="shapes", help="the bundled 'shapes' (default) or an SDXL .safetensors file")
        add("--tokenizer", metavar="DIR", help="vocabulary folder (default: 'tokenizer' by the weights, else CLIP's)")
        add("--prompt", default=PROMPT, help="what to draw (default: %(default)s)")
        add("--cfg", type=float, default=7.0, help="classifier-free guidance scale (default: %(default)s)")
        add("--seed", type=int, default=0, help="of the noise (default: %(default)s)")
        add_device(command)
        if name != "variance":
            add("--prune", default="at-edm", metavar="PRESET", help="the preset that is varied (default: %(default)s)")
        if name == "tau":
            add("--budget", default="85%", help="FLOPs as 4.1T (the paper's, of SDXL) or 61%% (default: %(default)s)")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Draws one figure; exit code 0 on success, 2 with one line on bad input, 130 after Ctrl-C."""
    parser = _parser()
    options = parser.parse_args(arguments)
    plain_warnings()
    with parser.one_line("no partial figure was left"):
        import matplotlib  # not a dependency of the package but of its extra "figures"
        from matplotlib.figure import Figure

        if options.out.suffix != ".png":
            raise ValueError(f"--out is {options.out}, expected a .png file")
        options.out.parent.mkdir(parents=True, exist_ok=True)
        # Defaults whatever the user's own settings are, and a "$" in a prompt is a dollar.
        style = {**matplotlib.rcParamsDefault, "font.size": 9, "text.parse_math": False}
        with matplotlib.rc_context(style), atomic_path(options.out) as path:
            figure = Figure(layout="constrained")
            options.draw(figure, options)
            figure.savefig(path, dpi=100, metadata={"Software": None})
    print(options.out)


if __name__ == "__main__":
    main()
