"""The command ``python -m minisdxl.sample``: draws pictures from prompts and writes them as PNG files."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from minisdxl.checkpoint.predictions import prediction_text
from minisdxl.checkpoint.published import is_hub_id
from minisdxl.checkpoint.resolve import Source
from minisdxl.cli.jobs import batches, find_jobs
from minisdxl.cli.models import add_model, add_refiner, load_model, open_model, open_refiner, parts_of
from minisdxl.cli.options import Parser, add_pruning, add_steps, plain_warnings
from minisdxl.cli.picture_files import InitImage
from minisdxl.cli.pictures import add_picture, list_samplings, read_mask, read_source, settle_picture
from minisdxl.cli.presets import check_plans, preset_note, settle_fast, settle_preset
from minisdxl.cli.reports import check_writable, hardware, sha256, versions, write_report
from minisdxl.cli.runs import Run
from minisdxl.cli.workers import add_workers, check_workers, parse_output
from minisdxl.loading import weights_path
from minisdxl.settings import token_plans


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command; exit code 0 on success, 2 with one line on bad input, 130 after Ctrl-C."""
    parser = _parser()
    options = parser.parse_intermixed_args(arguments)  # prompts and options in any order
    plain_warnings()
    with parser.one_line("no partial picture was left"):
        _sample(options)


def _sample(options: argparse.Namespace) -> None:
    """Checks the options, loads the model and samples. Raises ``ValueError``, ``OSError`` or ``ArithmeticError``."""
    if options.sampling == "list":
        print(list_samplings())
        return
    weights, embeddings = open_model(options)
    _check_counts(options)
    refiner = open_refiner(options, weights.config)
    sampling = settle_picture(options, weights.config, None if refiner is None else refiner.config)
    settle_fast(options, weights.config)  # these two may end the program with a list of presets
    if options.compare and (options.prune, options.skip, options.guide) == (None, None, None):
        options.prune = True
    options.prune = settle_preset(weights.config, options)
    check_plans(options, weights.config)
    if refiner is not None:
        token_plans(refiner.config, options.prune, options.steps)  # raises for a preset that does not fit it
    check_workers(options)
    if options.workers is None and isinstance(options.out, str):
        raise ValueError(f"--out is {options.out}, expected a path of this machine, or --workers")
    if options.workers is not None:  # files are named within the folder, which may be on another file system
        options.folder, options.out = str(options.out), Path()
    jobs = find_jobs(options, weights.config, embeddings)
    reports = [] if options.json in (None, "-") else [Path(options.json)]
    check_writable(reports + ([] if options.workers else [job.target for job in jobs]))
    source = read_source(options, {job.size for job in jobs})
    mask = read_mask(options, source)
    if options.fast is None and (note := preset_note(weights.config, options.prune)):
        print(f"note: {note}", file=sys.stderr)
    describe = partial(_settings, options, weights, refiner, source, mask)
    run_of = partial(Run, sampling=sampling, options=options, source=source, mask=mask)
    if options.workers is not None:
        from minisdxl.scale.pictures import context_chunks, make_at_scale  # import Ray

        make_at_scale(options, jobs, context_chunks(options, weights.config, embeddings), run_of, describe)
        return
    began = time.perf_counter()
    sdxl = load_model(options)
    if options.low_memory:  # frees the text encoders: nothing else refers to them
        sdxl = sdxl.encode_ahead(list({job.prompt for job in jobs}), list({job.negative for job in jobs}))
    if options.compile:
        sdxl = sdxl.compile()
    loaded = time.perf_counter()
    settings = describe(str(sdxl.device))
    run = run_of(sdxl=sdxl, settings=settings)
    made = []
    for batch in batches(jobs, options.batch, run.context_length):
        for picture in run.make(batch):
            line = "{path}  seed {seed}  {seconds:.1f} s  {share:.1%} of dense FLOPs".format(**picture)
            print(line, file=sys.stderr if options.json == "-" else sys.stdout, flush=True)
            made.append(picture)
    if options.json is not None:
        totals = {key: sum(picture[key] for picture in made) for key in ("seconds", "flops", "dense_flops")}
        report = {
            "settings": settings,
            "versions": versions(),
            "hardware": hardware(sdxl.device),
            "load_seconds": loaded - began,
            **totals,
            "share": totals["flops"] / totals["dense_flops"],
            "pictures": made,
        }
        write_report(options.json, report)


def _parser() -> Parser:
    parser = Parser(
        prog="python -m minisdxl.sample",
        usage="%(prog)s [options] PROMPT ...",
        description="Draws pictures from prompts.",
    )
    add = parser.add_argument
    add(
        "prompts",
        nargs="*",
        metavar="PROMPT",
        help=r"what to draw, one picture of each; (word:1.3) and [word] weigh words, \( is a bracket",
    )
    add(
        "--prompts",
        dest="file",
        metavar="FILE",
        help="more prompts: a .txt file with one in each line, which may end in options of its own (--n NEGATIVE "
        "--d SEED --w WIDTH --h HEIGHT --s STEPS --l CFG); or .jsonl, .csv or .tsv with prompt and, if wanted, "
        "negative, seed, width, height, steps, cfg",
    )
    add("--images-per-prompt", type=int, default=1, metavar="N", help="pictures of each prompt (default: %(default)s)")
    add_pruning(parser)
    add_steps(parser)
    add("--compare", action="store_true", help="dense and pruned side by side in one picture, from the same noise")
    add_model(parser)
    add_refiner(parser)
    add_picture(parser)
    add(
        "--out",
        type=parse_output,
        default=Path("out"),
        metavar="FILE|DIR",
        help="a .png file, or a folder, with --workers also s3://BUCKET/FOLDER and the like (default: %(default)s)",
    )
    add("--preview", type=int, metavar="N", help="every N steps write a small preview beside each picture")
    add("--json", metavar="FILE", help="write a report of the run; '-' is stdout, other output then goes to stderr")
    add("--batch", type=int, default=1, help="pictures at a time (default: %(default)s)")
    add(
        "--low-memory",
        action="store_true",
        help="drop the text encoders before sampling and decode in strips: the same pictures up to rounding",
    )
    add(
        "--compile",
        action="store_true",
        help="compile the U-Net first, which takes minutes: use it for many pictures of one size",
    )
    add_workers(parser)
    return parser


def _check_counts(options: argparse.Namespace) -> None:
    """Raises ``ValueError`` for numbers below 1."""
    for name in ("batch", "images_per_prompt", "preview"):
        number = getattr(options, name)
        if number is not None and number < 1:
            raise ValueError(f"--{name.replace('_', '-')} is {number}, expected 1 or more")


def _settings(
    options: argparse.Namespace,
    weights: Source,
    refiner: Source | None,
    source: InitImage | None,
    mask: InitImage | None,
    device: str,
) -> dict[str, Any]:
    """The settings that all pictures of a run share, enough to make them again, under the names of the options.

    ``sha256`` is that of all weight files read, one after the other; each LoRA and embedding has its own.
    ``image_sha256`` is that of the file to start from, and ``mask_sha256`` that of its mask.
    """
    shared = {
        key: getattr(options, key)
        for key in ("sampling", "steps", "cfg", "prune", "skip", "guide", "compare", "batch", "dtype", "compile")
    }
    sizes = {
        "size": "{}x{}".format(*options.size),
        "original_size": "{}x{}".format(*(options.original_size or options.size)),
        "crop": "{},{}".format(*options.crop),
        "target_size": "{}x{}".format(*(options.target_size or options.size)),
    }
    image = {"image": source.name, "image_sha256": source.sha256, "strength": options.strength} if source else {}
    image |= {"mask": mask.name, "mask_sha256": mask.sha256} if mask else {}
    others = {part: Path(path).name for part, path in parts_of(options).items() if path}
    name = options.weights if is_hub_id(options.weights) else weights_path(options.weights).name
    noise = weights.config.noise
    predicted = {"prediction": prediction_text(noise)} if noise.prediction != "noise" else {}
    model = {"weights": name, **others, **predicted, "sha256": sha256(weights.files)}
    loras = [{"file": lora.path.name, **lora.scales, "sha256": sha256([lora.file])} for lora in options.lora]
    embeddings = [
        {"file": each.path.name, "name": each.name, "sha256": sha256([each.path])} for each in options.embedding
    ]
    changes: dict[str, Any] = {key: files for key, files in (("lora", loras), ("embedding", embeddings)) if files}
    if refiner is not None:
        name = options.refiner if is_hub_id(options.refiner) else weights_path(options.refiner).name
        changes |= {"refiner": name, "refiner_sha256": sha256(refiner.files), "refiner_start": options.refiner_start}
    made_with = {"model": weights.config.name, "torch": torch.__version__, "device": device}
    return {**shared, **sizes, **image, **model, **changes, **made_with}


if __name__ == "__main__":
    main()
