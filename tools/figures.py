"""The paper's pictures of its method, drawn from any weights: one command for each figure.

    python -m tools.figures flops --prune              # figure 2: what the U-Net costs, by block and kind of work
    python -m tools.figures variance                   # figure 5: variance of self-attention maps over the steps
    python -m tools.figures masks                      # figure 8: kept tokens, ranked by self- and cross-attention
    python -m tools.figures recoveries                 # figure 9: the ways to recover pruned tokens, side by side
    python -m tools.figures tau                        # figure 10: numbers of prune-less steps at one FLOPs budget

For each figure, one function computes what is shown and another draws it. The same arguments give the same file. Needs
matplotlib (the extra ``figures``).
"""

from __future__ import annotations

import argparse
import math
import textwrap
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypedDict

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from atedm.held import HeldGraph
from atedm.presets import parse_preset
from atedm.pruning import Pruning
from atedm.recovery import RECOVERIES
from atedm.schedule import Schedule
from minisdxl.budget import with_budget
from minisdxl.command import Parser, parse_size, plain_warnings
from minisdxl.config import SDXL_BASE, ModelConfig
from minisdxl.files import atomic_path
from minisdxl.flops import Kind, find_config, format_flops, summary
from minisdxl.pipeline import SDXL, load
from minisdxl.sample import DTYPES
from minisdxl.transformer import AttentionBlock, TransformerLayer
from minisdxl.unet import UNet

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WIDTH = 12  # inches of 100 pixels
PROMPT = "a small red circle above a big blue square on a white background"
TAUS = (0, 5, 15, 30, 45)  # of every 50 steps: figure 10, which places the last four in regions I to IV of figure 5
REGIONS = ("I", "II", "III", "IV")
BOUNDARIES = tuple((low + high) / 2 for low, high in pairwise(TAUS[1:]))  # of every 50 steps
RANKINGS = {"gwpr": "self-attention", "ca-wpr": "cross-attention"}
# Rows of figure 2 other than attention blocks, and the modules in them: with the ResBlocks go resampling, in and out.
BETWEEN = {
    "ResBlocks, down": ("input_blocks",),
    "ResBlocks, mid": ("middle_block",),
    "ResBlocks, up": ("output_blocks", "out"),
    "embeddings": ("time_embed", "label_emb"),
}


class Settings(TypedDict):
    """The arguments of :meth:`SDXL.generate` that all pictures of a figure share."""

    prompts: list[str]
    steps: int
    cfg: float
    seed: int
    size: tuple[int, int] | None


class Column(NamedTuple):
    """One picture for each prompt, and the mean squared distances (B,) of their latents from the dense model's."""

    label: str
    images: list[Image.Image]
    distances: list[float]


class Spread(NamedTuple):
    """How far self-attention maps are from uniform ones: (attention blocks, steps) each."""

    variance: NDArray[np.float64]  # of N A[i, j] over the map's N x N entries: 0 to N - 1
    entropy: NDArray[np.float64]  # of the map's rows, as a share of ln N: 0 to 1


def flops_by_block(config: ModelConfig, works: Iterable[dict[str, Any]]) -> dict[str, Counter[Kind]]:
    """FLOPs by row of figure 2 and kind, of the ``blocks`` of a summary; without ranking and recovery."""
    blocks = [site.name for site in config.unet.attention_sites()]
    row_of = {name: name for name in blocks} | {name: row for row, names in BETWEEN.items() for name in names}
    rows: dict[str, Counter[Kind]] = {row: Counter() for row in (*blocks, *BETWEEN)}
    for work in works:
        if work["kind"] != Kind.RANKING:
            name = work["name"]
            rows[row_of[name if name in blocks else name.partition(".")[0]]][work["kind"]] += work["flops"]
    return rows


def draw_flops(figure: Figure, options: argparse.Namespace) -> None:
    """Figure 2: a bar for each block, of its kinds of work; dense, and beside it the steady step of a preset."""
    config = find_config(options.model)
    width, height = (side // config.vae.downscale for side in config.picture_size(options.size))
    schedules = {"dense": None} | ({options.prune: parse_preset(options.prune)} if options.prune else {})
    figure.set_size_inches(WIDTH, 7.5)
    panels = figure.subplots(1, len(schedules), sharex=True, sharey=True, squeeze=False)[0]
    for panel, (label, schedule) in zip(panels, schedules.items(), strict=True):
        calls = summary(config, height, width, schedule, options.steps)
        rows = flops_by_block(config, calls["blocks"])
        ends = np.zeros(len(rows))
        for kind in (kind for kind in Kind if kind != Kind.RANKING):
            spent = np.array([row[kind] for row in rows.values()])
            panel.barh(list(rows), spent, left=ends, label=f"{kind}: {spent.sum() / calls['steady']:.0%}")
            ends += spent
        for row, end in enumerate(ends):
            panel.text(end, row, f" {format_flops(end)}", va="center", fontsize="small")
        which = "dense" if schedule is None else f"{label}, steady step"
        panel.set_title(f"{which}: {format_flops(calls['steady'])}, {calls['steady'] / calls['dense']:.0%} of dense")
        panel.set_xlabel("FLOPs of one U-Net call, without ranking and recovery")
        panel.xaxis.set_major_formatter(lambda flops, _: format_flops(flops))
        panel.legend(loc="upper center", bbox_to_anchor=(0.5, -0.1), ncols=2, title="kind of work, share of this call")
    panels[0].margins(x=0.12)
    panels[0].invert_yaxis()
    panels[0].set_ylabel("attention blocks as they run, and what is between them")
    figure.suptitle(f"U-Net of {config.name}, {width * config.vae.downscale}x{height * config.vae.downscale} pixels")


def make(sdxl: SDXL, settings: Settings, schedule: Schedule | None) -> tuple[list[Image.Image], Tensor]:
    """Pictures and their latents (B, 4, h, w). Shows progress on a terminal."""
    latents = []
    with tqdm(total=settings["steps"], desc=schedule.name if schedule else "dense", unit="step", disable=None) as bar:

        def on_step(_: int, x: Tensor) -> None:
            latents[:] = [x]
            bar.update()

        images = sdxl.generate(**settings, prune=schedule, on_step=on_step)
    return images, latents[0]


def layers(unet: UNet) -> Iterator[tuple[str, TransformerLayer]]:
    """Every transformer layer in running order, with the name of its attention block."""
    for block in unet.modules():
        if isinstance(block, AttentionBlock):
            yield from ((block.name, layer) for layer in block.modules() if isinstance(layer, TransformerLayer))


@contextmanager
def hooked(modules: Iterable[tuple[str, nn.Module]], see: Callable[[str, Any], None]) -> Iterator[None]:
    """While it lasts, ``see(name, output)`` is shown what each of the modules returns, each time it runs."""

    def hook(name: str) -> Callable[[nn.Module, Any, Any], None]:
        return lambda _, __, output: see(name, output)

    handles = [module.register_forward_hook(hook(name)) for name, module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def attention_spread(sdxl: SDXL, settings: Settings) -> Spread:
    """The spread of all self-attention maps of the dense model, averaged over a block's layers, heads and the batch.

    With guidance the batch holds both halves. Raises ``ValueError`` for a picture so small that a block has one token.
    """
    seen: dict[str, list[tuple[float, float]]] = defaultdict(list)

    def see(name: str, output: Any) -> None:
        graph = HeldGraph.from_qk(*output[1])
        tokens = graph.shape[-1]
        if tokens < 2:
            raise ValueError(f"attention block {name} has 1 token, expected 2 or more; ask for a larger --size")
        # Each row sums to one, so N A[i, j] is 1 on average over any map.
        variance = (graph.map * tokens).var(correction=0).item()
        seen[name].append((variance, graph.entropy().mean().item() / math.log(tokens)))

    with hooked([(name, layer.attn1) for name, layer in layers(sdxl.unet)], see):
        make(sdxl, settings, None)
    # Each layer runs once a step, so a block's list goes through its layers step by step.
    blocks = np.array([np.reshape(values, (settings["steps"], -1, 2)).mean(axis=1) for values in seen.values()])
    return Spread(blocks[..., 0], blocks[..., 1])


def draw_variance(figure: Figure, options: argparse.Namespace) -> None:
    """Figure 5: variance of the maps, and their entropy, over the steps, with the paper's regions."""
    sdxl, settings = _load(options), _settings(options)
    spread, steps = attention_spread(sdxl, settings), np.arange(options.steps) + 1
    names = [site.name for site in sdxl.config.unet.attention_sites()]
    figure.set_size_inches(WIDTH, 8)
    panels = figure.subplots(2, 1, sharex=True)
    edges = np.array([0, *BOUNDARIES, 50]) * options.steps / 50 + 0.5  # between steps, which are at whole numbers
    for panel, values in zip(panels, spread, strict=True):
        for name, line in zip(names, values, strict=True):
            panel.plot(steps, line, label=name, linewidth=1, marker=".")
        panel.plot(steps, values.mean(axis=0), "k", label="mean", linewidth=2.5)
        for index, (region, (start, end)) in enumerate(zip(REGIONS, pairwise(edges), strict=True)):
            panel.axvspan(start, end, color="gray", alpha=0.08 + 0.1 * (index % 2), linewidth=0)
            panel.text((start + end) / 2, 1.01, region, transform=panel.get_xaxis_transform(), ha="center")
    panels[0].set_ylabel("variance of the map's entries, times $N^2$\n(0: all tokens are attended to alike)")
    panels[1].set_ylabel("entropy of the map's rows,\nas a share of its maximum, ln $N$")
    panels[1].set_xlim(edges[0], edges[-1])
    panels[1].set_xlabel(
        "denoising step, 1 is the noisiest\n"
        f"regions end at {', '.join(f'{edge:g}' for edge in BOUNDARIES)} of every 50 steps, midway between the tau"
        f" {', '.join(map(str, TAUS[1:]))} that the paper places in regions I to IV; it gives no numbers for them"
    )
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right center", title="attention block")
    figure.suptitle(f"self-attention maps of N x N entries: {_title(sdxl, settings)}")


def kept_tokens(
    sdxl: SDXL, settings: Settings, schedule: Schedule
) -> tuple[Image.Image, dict[str, list[NDArray[np.bool_]]]]:
    """The picture of one prompt, and for each attention block and step which positions (H, W) stay to the block's end.

    With guidance, those of its conditional half.
    """
    seen: dict[str, list[NDArray[np.bool_]]] = defaultdict(list)

    def see(name: str, output: Any) -> None:
        tokens = output[0]
        kept = torch.full((tokens.size,), tokens.is_dense)
        if not tokens.is_dense:
            kept[tokens.positions[-1].cpu()] = True
        seen[name].append(kept.reshape(tokens.grid).numpy())

    with hooked(layers(sdxl.unet), see):
        images, _ = make(sdxl, settings, schedule)
    depths = {site.name: site.depth for site in sdxl.config.unet.attention_sites()}
    return images[0], {name: masks[depths[name] - 1 :: depths[name]] for name, masks in seen.items()}


def darkened(image: Image.Image, kept: NDArray[np.bool_], cell: int) -> NDArray[np.uint8]:
    """The picture with its pruned positions, squares of ``cell`` pixels, dark: violet, to be seen on black as well."""
    pixels = np.asarray(image)
    shown = kept.repeat(cell, axis=0).repeat(cell, axis=1)[: pixels.shape[0], : pixels.shape[1], None]
    return np.where(shown, pixels, pixels // 4 + np.array([48, 24, 72], dtype=np.uint8))


def draw_masks(figure: Figure, options: argparse.Namespace) -> None:
    """Figure 8: what each ranking keeps at the first, the middle and the last step, over the picture that it leads to."""
    base, sdxl, settings = _pruning_preset(options), _load(options), _settings(options)
    if len(options.prompt) > 1:
        raise ValueError(f"masks are drawn over one picture, got {len(options.prompt)} prompts")
    sites = list(sdxl.config.unet.attention_sites())
    steps = sorted({0, options.steps // 2, options.steps - 1})
    width, height = sdxl.config.picture_size(options.size)
    cell_width = WIDTH / (len(sites) + 2)  # the picture is as wide as two
    figure.set_size_inches(WIDTH, 1 + len(RANKINGS) * len(steps) * (0.3 + cell_width * height / width))
    grid = figure.add_gridspec(len(RANKINGS) * len(steps), len(sites) + 1, width_ratios=[2] + [1] * len(sites))
    for ranking, attention in RANKINGS.items():
        method = replace(base.method, ranking=ranking)
        image, masks = kept_tokens(sdxl, settings, replace(base, method=method))
        first = list(RANKINGS).index(ranking) * len(steps)
        panel = figure.add_subplot(grid[first : first + len(steps), 0], xticks=[], yticks=[])
        panel.imshow(image)
        panel.set_title(f"ranked by {attention}")
        for (row, step), (column, site) in ((r, c) for r in enumerate(steps, first) for c in enumerate(sites, 1)):
            kept = masks[site.name][step]
            panel = figure.add_subplot(grid[row, column], xticks=[], yticks=[])
            panel.imshow(darkened(image, kept, sdxl.config.vae.downscale * 2**site.level))
            panel.set_xlabel(f"{kept.sum()} of {kept.size}", fontsize="small")
            panel.set_ylabel(f"step {step + 1}" if column == 1 else "")
            panel.set_title(site.name if row == first else "")
    figure.suptitle(f"kept tokens by attention block and step, pruned ones dark: {_title(sdxl, settings, base)}")


def compare(sdxl: SDXL, settings: Settings, schedules: dict[str, Schedule]) -> list[Column]:
    """The dense model's pictures and those of the schedules, all from the same noise."""
    images, dense = make(sdxl, settings, None)
    columns = [Column("dense", images, [0.0] * len(images))]
    for label, schedule in schedules.items():
        images, latents = make(sdxl, settings, schedule)
        columns.append(Column(label, images, (latents - dense).square().mean(dim=(1, 2, 3)).tolist()))
    return columns


def draw_columns(figure: Figure, columns: list[Column], prompts: list[str]) -> None:
    """A row for each prompt."""
    width, height = columns[0].images[0].size
    figure.set_size_inches(WIDTH, 1.1 + len(prompts) * (0.2 + WIDTH / len(columns) * height / width))
    panels = figure.subplots(len(prompts), len(columns), squeeze=False)
    for (row, prompt), (index, column) in ((r, c) for r in enumerate(prompts) for c in enumerate(columns)):
        panel = panels[row, index]
        panel.imshow(column.images[row])
        panel.set(xticks=[], yticks=[], xlabel=f"latent MSD to dense {column.distances[row]:.3g}")
        panel.set_title(column.label if row == 0 else "")
        panel.set_ylabel(textwrap.fill(textwrap.shorten(prompt, 90), 30) if index == 0 else "", fontsize="small")


def draw_recoveries(figure: Figure, options: argparse.Namespace) -> None:
    """Figure 9: dense, and every recovery."""
    base, sdxl, settings = _pruning_preset(options), _load(options), _settings(options)
    schedules = {name: replace(base, method=replace(base.method, recovery=name)) for name in RECOVERIES}
    draw_columns(figure, compare(sdxl, settings, schedules), options.prompt)
    figure.suptitle(f"ways to recover pruned tokens: {_title(sdxl, settings, base)}")


def tau_schedules(config: ModelConfig, base: Schedule, settings: Settings, budget: str) -> dict[str, Schedule]:
    """``base`` with each of ``TAUS``, and the ratio that brings the average step within the budget; labels say both."""
    width, height = (side // config.vae.downscale for side in config.picture_size(settings["size"]))
    schedules = {}
    for tau in TAUS:
        found = with_budget(config, height, width, replace(base, tau=tau), settings["steps"], budget, "average")
        letter = "rho" if isinstance(found.method, Pruning) else "r"
        schedules[f"tau = {tau}, {letter} = {found.method.ratio:.3f}"] = found
    return schedules


def draw_tau(figure: Figure, options: argparse.Namespace) -> None:
    """Figure 10: dense, and each number of prune-less steps."""
    base, sdxl, settings = parse_preset(options.prune), _load(options), _settings(options)
    schedules = tau_schedules(sdxl.config, base, settings, options.budget)
    draw_columns(figure, compare(sdxl, settings, schedules), options.prompt)
    title = f"{base.name}, the first tau of every 50 steps prune-less, average cost of a U-Net call {options.budget}"
    figure.suptitle(f"{title}{' of dense' if '%' in options.budget else ''}: {_title(sdxl, settings)}")


def _load(options: argparse.Namespace) -> SDXL:
    return load(options.weights, device=options.device, dtype=DTYPES[options.dtype], tokenizer=options.tokenizer)


def _settings(options: argparse.Namespace) -> Settings:
    return Settings(prompts=options.prompt, steps=options.steps, cfg=options.cfg, seed=options.seed, size=options.size)


def _pruning_preset(options: argparse.Namespace) -> Schedule:
    base = parse_preset(options.prune)
    if not isinstance(base.method, Pruning):
        raise ValueError(f"--prune is {options.prune!r}, which merges tokens; expected a preset that prunes them")
    return base


def _title(sdxl: SDXL, settings: Settings, base: Schedule | None = None) -> str:
    width, height = sdxl.config.picture_size(settings["size"])
    method = f", {base.name} with rho {base.method.ratio:g} and tau {base.tau}" if base else ""
    run = f"{settings['steps']} steps, CFG {settings['cfg']:g}, seed {settings['seed']}"
    return f"{sdxl.config.name}, {width}x{height} pixels, {run}{method}"


FIGURES = {
    "flops": draw_flops,
    "variance": draw_variance,
    "masks": draw_masks,
    "recoveries": draw_recoveries,
    "tau": draw_tau,
}


def _parser() -> Parser:
    parser = Parser(
        prog="python -m tools.figures", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="figure", required=True)
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    devices = ["cpu", *([accelerator.type] if accelerator else [])]
    for name, draw in FIGURES.items():
        add = commands.add_parser(name, help=draw.__doc__, description=draw.__doc__).add_argument
        out = Path("out", f"figure-{name}.png")
        add("--out", type=Path, default=out, metavar="FILE.png", help="(default: %(default)s)")
        add("--steps", type=int, default=50, help="denoising steps (default: %(default)s)")
        add("--size", type=parse_size, metavar="WxH", help="in pixels (default: what the model was made for)")
        if name == "flops":
            add("--model", default=SDXL_BASE.name, help="a config's name or a .safetensors file (default: %(default)s)")
            add(
                "--prune", nargs="?", const="at-edm", metavar="PRESET", help="show this too (default preset: %(const)s)"
            )
            continue
        add("--weights", default="shapes", help="the bundled 'shapes' (default) or an SDXL .safetensors file")
        add("--tokenizer", metavar="DIR", help="vocab.json and merges.txt (default: 'tokenizer' beside the weights)")
        add("--prompt", nargs="+", default=[PROMPT], help="what to draw (default: %(default)s)")
        add("--cfg", type=float, default=7.0, help="classifier-free guidance scale (default: %(default)s)")
        add("--seed", type=int, default=0, help="of the first prompt; prompt i has seed + i (default: %(default)s)")
        add("--dtype", choices=DTYPES, default="fp32", help="of the weights (default: %(default)s)")
        add("--device", choices=devices, default=devices[-1], help="(default: %(default)s)")
        if name != "variance":
            add("--prune", default="at-edm", metavar="PRESET", help="what is varied (default: %(default)s)")
        if name == "tau":
            add("--budget", default="85%", help="FLOPs as 4.1T (the paper's, of SDXL) or 61%% (default: %(default)s)")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Draws one figure; exit code 0 on success, 2 with one line on bad input, 130 after Ctrl-C."""
    parser = _parser()
    options = parser.parse_args(arguments)
    plain_warnings()
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        parser.error(f"{error}; figures need matplotlib: pip install -e '.[figures]'")
    try:
        if options.out.suffix != ".png":
            raise ValueError(f"--out is {options.out}, expected a .png file")
        options.out.parent.mkdir(parents=True, exist_ok=True)
        # The defaults, whatever the user's own settings; a "$" in a prompt is a dollar.
        with matplotlib.rc_context({**matplotlib.rcParamsDefault, "font.size": 9}), atomic_path(options.out) as path:
            figure = Figure(layout="constrained")
            FIGURES[options.figure](figure, options)
            figure.savefig(path, dpi=100, metadata={"Software": None})
    except (ValueError, OSError, ArithmeticError) as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        parser.exit(130, "interrupted: no partial figure was left\n")
    print(options.out)


if __name__ == "__main__":
    main()
