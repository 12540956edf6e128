"""Compares presets on the same captions and seeds: caption accuracy, distance to dense, FLOPs and time.

    python -m tools.evaluate --presets at-edm tome random --share 0.76 --captions 200 --baseline at-edm
    python -m tools.evaluate --weights sd_xl_base_1.0.safetensors --prompts captions.txt --captions 5000 \\
        --references coco/val2017 --inception pt_inception-2015-12-05-6726825d.pth --clip clip-vit-large-patch14

Every picture is a row of a CSV file in the folder --out, written when its batch is done. A run that was stopped
continues where it was. With --workers 8 eight processes share the work, on one machine or on a Ray cluster; they also
compute the features for FID and CLIP score. With --shard 1/2 and --shard 2/2 two machines without a common folder share
it: copy their files into one folder, and --table reports on all of them.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from minisdxl.checkpoint.modules import open_source
from minisdxl.cli.options import DTYPES, Parser, find_device, plain_warnings
from minisdxl.cli.reports import versions
from minisdxl.cli.workers import add_workers, check_workers
from minisdxl.loading import load, weights_path
from minisdxl.scale.store import Store
from minisdxl.settings import CheckedSettings, Settings, check_settings
from tools.drawn.world import WORLDS
from tools.evaluation.official_metrics import ClipScore, Fid, find_pictures
from tools.evaluation.paired_statistics import INTERVALS
from tools.evaluation.pictures import (
    SPLITS,
    Captions,
    Evaluation,
    drawn_captions,
    file_captions,
    solve,
)
from tools.evaluation.plots import CAPTION_ACCURACY, LATENT_ERROR, figure_png
from tools.evaluation.rows import DENSE, Folder, Row
from tools.evaluation.run_options import model_options, settings_of
from tools.evaluation.set_metrics import REFERENCES, Drawn, SetMetrics
from tools.evaluation.summaries import Summary, as_json, common_rows, markdown_table, summarize


def _parser() -> Parser:
    parser = Parser(
        prog="python -m tools.evaluate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    model_options(parser, weights="shapes", out="runs/evaluate")
    add = parser.add_argument
    add("--presets", nargs="+", default=["at-edm"], help="presets to compare with the dense model (default: at-edm)")
    add("--baseline", metavar="PRESET", help="one of the presets; the others are compared with it, too")
    add("--share", type=float, help="share of the dense FLOPs, as 0.76: finds the ratio of each preset for it")
    add(
        "--share-for",
        choices=("average", "steady"),
        default="average",
        help="--share of all steps or of the last one (default: %(default)s)",
    )
    add("--steps", type=int, help="denoising steps (default: the model's or the sampling's own)")
    add("--cfg", type=float, help="guidance scale (default: the model's or the sampling's own)")
    add(
        "--split",
        choices=SPLITS,
        default="test",
        help="drawn captions: unseen in training, or all (default: test)",
    )
    add(
        "--world",
        choices=WORLDS,
        default="plain",
        help="drawn captions: plain, or mixed: two thirds leave attributes open (default: plain)",
    )
    add(
        "--prompts",
        type=Path,
        metavar="FILE",
        help="captions from this .txt, .jsonl or .csv file, or COCO's captions_val2017.json, not of drawn scenes",
    )
    add("--references", type=Path, metavar="DIR", help="folder of real pictures for FID; with --inception")
    add("--inception", type=Path, metavar="FILE", help="Inception's weights for FID, as torch-fidelity has them")
    add("--clip", type=Path, metavar="DIR", help="a CLIP model for CLIP score, in the layout of transformers")
    add_workers(parser)
    return parser


def _evaluate(options: argparse.Namespace) -> None:
    """Raises ``ValueError``, ``OSError``, ``ArithmeticError`` or ``ModuleNotFoundError``."""
    if (options.references is None) != (options.inception is None):
        raise ValueError("--references and --inception belong together, expected both or none")
    if options.prompts is None and (options.references or options.clip):
        raise ValueError("FID and CLIP score are for --prompts, expected a file of captions")
    if options.captions < 1:
        raise ValueError(f"--captions is {options.captions}, expected 1 or more")
    check_workers(options)
    captions, source = _captions(options)
    references = find_pictures(options.references) if options.references else []
    config = open_source(weights_path(options.weights), DTYPES[options.dtype]).config
    asked = Settings(sampling=options.sampling, steps=options.steps, cfg=options.cfg, size=options.size)
    run = check_settings(asked, config)
    options.sampling = run.sampling.name
    solved = solve(config, run.size, options.presets, run.steps, options.share, options.share_for)
    if options.baseline is not None and options.baseline not in solved:
        raise ValueError(f"--baseline is {options.baseline}, expected one of {', '.join(solved)}")
    baseline = None if options.baseline is None else solved[options.baseline]
    settings, presets = settings_of(options, config, run.size, run.steps, run.cfg, source), list(solved.values())
    if options.workers is not None:
        _at_scale(options, captions, run, settings, presets, baseline, references)
        return
    sdxl = load(
        options.weights, device=find_device(options.device), dtype=DTYPES[options.dtype], tokenizer=options.tokenizer
    )
    fid = Fid(options.inception, references, sdxl.device) if options.inception else None
    clip = ClipScore(options.clip, sdxl.device) if options.clip else None
    folder = Folder(options.out, settings)
    evaluation = Evaluation(sdxl, captions, folder, run.steps, run.cfg, run.size, options.batch, options.sampling)
    if not options.table:
        evaluation.run(presets, options.shard)
        missing = evaluation.missing(presets)
        if missing:
            print(f"{missing} pictures are left to other shards; --table reports on those that are there")
            return
    rows = common_rows(folder.rows, presets, options.captions)
    numbers = [row.number for row in rows[DENSE]]
    metrics = SetMetrics(evaluation, Drawn(sdxl.vae, run.size[0]), fid, clip)
    own = metrics.drawn.own_distance(len(numbers)) if captions.drawn and len(numbers) > 1 else None
    _report(summarize(rows, baseline, metrics.of(numbers)), rows, baseline, own, settings, options)


def _at_scale(
    options: argparse.Namespace,
    captions: Captions,
    run: CheckedSettings,
    settings: dict[str, Any],
    presets: Sequence[str],
    baseline: str | None,
    references: Sequence[Path],
) -> None:
    """The same by the workers of a cluster. Raises as :func:`_evaluate`, and ``ConnectionError``."""
    from minisdxl.scale.cluster import connected, place  # imports Ray
    from tools.evaluation.at_scale import MergedMetrics, make_rows
    from tools.evaluation.worker import Task

    if options.shard != (1, 1):
        raise ValueError("--shard is {}/{} with --workers, expected one of them".format(*options.shard))
    with connected(options.ray_address):
        placement = place(options.workers, options.device, options.threads)
        options.device = placement.device
        if placement.threads is not None:
            settings["threads"] = placement.threads
        Folder(options.out, settings)
        task = Task(options, captions, settings, run.steps, run.cfg, run.size, placement.threads, Path.cwd())
        if not options.table:
            make_rows(placement, task, presets)
        rows = common_rows(Folder(options.out, settings).rows, presets, options.captions)
        numbers = [row.number for row in rows[DENSE]]
        metrics = MergedMetrics(placement, task, references, presets, numbers)
    own = metrics.own_distance() if captions.drawn and len(numbers) > 1 else None
    _report(summarize(rows, baseline, metrics.of), rows, baseline, own, settings, options)


def _captions(options: argparse.Namespace) -> tuple[Captions, str]:
    """The captions, and their description for the settings."""
    if options.prompts is None:
        kind = options.split if options.world == "plain" else f"{options.split}, {options.world}"
        return drawn_captions(options.captions, options.split, options.world), f"drawn, {kind}"
    return file_captions(options.prompts, options.captions), options.prompts.name


def _report(
    summaries: Sequence[Summary],
    rows: Mapping[str, Sequence[Row]],
    baseline: str | None,
    own: float | None,
    settings: Mapping[str, Any],
    options: argparse.Namespace,
) -> None:
    """Writes the table to stdout and ``table.md``, all numbers to ``summary.json``, and plots to PNG files.

    ``own`` is the Fréchet distance of other drawn pictures.
    """
    count = len(rows[DENSE])
    text = [markdown_table(summaries, baseline), "", f"{count} captions. {INTERVALS}"]
    if own is not None:
        text.append(
            f"The same number of other drawn pictures has a Fréchet distance of {own:.4g} to the {REFERENCES} drawn."
        )
    print("\n".join(text))
    store = Store(options.out)
    store.write("table.md", ("\n".join(text) + "\n").encode())
    report = {
        "command": shlex.join(["python", "-m", "tools.evaluate", *options.arguments]),
        "settings": settings,
        "versions": versions(),
        "machines": sorted({row.machine for each in rows.values() for row in each}),
        "captions": count,
        "presets": [as_json(each) for each in summaries],
    }
    store.write("summary.json", (json.dumps(report, indent=1) + "\n").encode())
    if options.prompts is None:
        store.write("caption-accuracy.png", figure_png(summaries, [CAPTION_ACCURACY], "flops_share"))
    store.write("latent-error.png", figure_png(summaries, [LATENT_ERROR], None))


def main(arguments: Sequence[str] | None = None) -> None:
    """Makes missing pictures, then reports; exit code 0 on success, 2 with one line on bad input, 130 after Ctrl-C."""
    parser = _parser()
    options = parser.parse_args(arguments)
    options.arguments = list(sys.argv[1:] if arguments is None else arguments)
    plain_warnings()
    with parser.one_line("finished pictures are kept"):
        _evaluate(options)


if __name__ == "__main__":
    main()
