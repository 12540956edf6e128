"""Compares presets on the same captions and seeds: caption accuracy, distance to dense, FLOPs and time.

    python -m tools.evaluate --presets at-edm tome random --share 0.76 --captions 200 --baseline at-edm
    python -m tools.evaluate --weights sd_xl_base_1.0.safetensors --prompts captions.txt --captions 5000 \\
        --references coco/val2017 --inception pt_inception-2015-12-05-6726825d.pth --clip clip-vit-large-patch14

Every picture is a row of a CSV file in the folder --out, written when its batch is done. A run that was stopped
continues where it was. With --shard 1/2 and --shard 2/2 two machines share the work: copy their files into one folder,
and --table reports on all of them.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from minisdxl.checkpoint.atomic import atomic_path
from minisdxl.cli.options import DTYPES, Parser, find_device, plain_warnings
from minisdxl.cli.reports import versions, write_report
from minisdxl.loading import load
from minisdxl.settings import Settings, check_settings
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
from tools.evaluation.plots import CAPTION_ACCURACY, LATENT_ERROR, save_figure
from tools.evaluation.rows import DENSE, Folder
from tools.evaluation.run_options import model_options, settings_of
from tools.evaluation.set_metrics import REFERENCES, Drawn, SetMetrics
from tools.evaluation.summaries import as_json, common_rows, markdown_table, summarize


def _parser() -> Parser:
    parser = Parser(
        prog="python -m tools.evaluate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    model_options(parser, weights="shapes", out=Path("runs/evaluate"))
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
        "--prompts", type=Path, metavar="FILE", help="captions from this .txt, .jsonl or .csv file, not of drawn scenes"
    )
    add("--references", type=Path, metavar="DIR", help="folder of real pictures for FID; with --inception")
    add("--inception", type=Path, metavar="FILE", help="Inception's weights for FID, as torch-fidelity has them")
    add("--clip", type=Path, metavar="DIR", help="a CLIP model for CLIP score, in the layout of transformers")
    return parser


def _evaluate(options: argparse.Namespace) -> None:
    """Raises ``ValueError``, ``OSError``, ``ArithmeticError`` or ``ModuleNotFoundError``."""
    if (options.references is None) != (options.inception is None):
        raise ValueError("--references and --inception belong together, expected both or none")
    if options.prompts is None and (options.references or options.clip):
        raise ValueError("FID and CLIP score are for --prompts, expected a file of captions")
    if options.captions < 1:
        raise ValueError(f"--captions is {options.captions}, expected 1 or more")
    captions, source = _captions(options)
    sdxl = load(
        options.weights, device=find_device(options.device), dtype=DTYPES[options.dtype], tokenizer=options.tokenizer
    )
    asked = Settings(sampling=options.sampling, steps=options.steps, cfg=options.cfg, size=options.size)
    run = check_settings(asked, sdxl.config)
    options.sampling = run.sampling.name
    solved = solve(sdxl.config, run.size, options.presets, run.steps, options.share, options.share_for)
    if options.baseline is not None and options.baseline not in solved:
        raise ValueError(f"--baseline is {options.baseline}, expected one of {', '.join(solved)}")
    baseline = None if options.baseline is None else solved[options.baseline]
    fid = Fid(options.inception, find_pictures(options.references), sdxl.device) if options.inception else None
    clip = ClipScore(options.clip, sdxl.device) if options.clip else None
    settings = settings_of(options, sdxl, run.size, run.steps, run.cfg, source)
    folder = Folder(options.out, settings)
    evaluation = Evaluation(sdxl, captions, folder, run.steps, run.cfg, run.size, options.batch, options.sampling)
    presets = list(solved.values())
    if not options.table:
        evaluation.run(presets, options.shard)
        missing = evaluation.missing(presets)
        if missing:
            print(f"{missing} pictures are left to other shards; --table reports on those that are there")
            return
    metrics = SetMetrics(evaluation, Drawn(sdxl.vae, run.size[0]), fid, clip)
    _report(evaluation, metrics, presets, baseline, settings, options)


def _captions(options: argparse.Namespace) -> tuple[Captions, str]:
    """The captions, and their description for the settings."""
    if options.prompts is None:
        return drawn_captions(options.captions, options.split), f"drawn, {options.split}"
    return file_captions(options.prompts, options.captions), options.prompts.name


def _report(
    evaluation: Evaluation,
    metrics: SetMetrics,
    presets: Sequence[str],
    baseline: str | None,
    settings: Mapping[str, Any],
    options: argparse.Namespace,
) -> None:
    """Writes the table to stdout and table.md, all numbers to summary.json, and plots to PNG files."""
    rows = common_rows(evaluation.folder.rows, presets, options.captions)
    numbers = [row.number for row in rows[DENSE]]
    summaries = summarize(rows, baseline, metrics.of(numbers))
    text = [markdown_table(summaries, baseline), "", f"{len(numbers)} captions. {INTERVALS}"]
    if evaluation.captions.drawn and len(numbers) > 1:
        drawn = metrics.drawn.own_distance(len(numbers))
        text.append(
            f"The same number of other drawn pictures has a Fréchet distance of {drawn:.4g} to the {REFERENCES} drawn."
        )
    print("\n".join(text))
    with atomic_path(options.out / "table.md") as path:
        path.write_text("\n".join(text) + "\n")
    report = {
        "command": shlex.join(["python", "-m", "tools.evaluate", *options.arguments]),
        "settings": settings,
        "versions": versions(),
        "machines": sorted({row.machine for each in rows.values() for row in each}),
        "captions": len(numbers),
        "presets": [as_json(each) for each in summaries],
    }
    write_report(str(options.out / "summary.json"), report)
    if evaluation.captions.drawn:
        save_figure(options.out / "caption-accuracy.png", summaries, [CAPTION_ACCURACY], "flops_share")
    save_figure(options.out / "latent-error.png", summaries, [LATENT_ERROR], None)


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
