"""The command ``python -m minisdxl.sample``: draws pictures from prompts and writes them as PNG files."""

from __future__ import annotations

import argparse
import hashlib
import sys
import time
import warnings
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import torch

from minisdxl.checkpoint.atomic import atomic_path
from minisdxl.checkpoint.embeddings import EmbeddingFile, read_embeddings
from minisdxl.checkpoint.lora import LoRA, open_loras
from minisdxl.checkpoint.modules import open_source
from minisdxl.checkpoint.published import is_hub_id
from minisdxl.cli.jobs import batches, find_jobs
from minisdxl.cli.options import (
    DTYPES,
    Parser,
    add_device,
    add_pruning,
    find_device,
    parse_point,
    parse_size,
    plain_warnings,
)
from minisdxl.cli.picture_files import InitImage, read_picture
from minisdxl.cli.presets import preset_note, settle_preset
from minisdxl.cli.reports import hardware, versions, write_report
from minisdxl.cli.runs import Run
from minisdxl.config import ModelConfig
from minisdxl.loading import load, weights_path
from minisdxl.pipeline import SDXL
from minisdxl.samplings import LEVELS, SAMPLINGS, Sampling
from minisdxl.settings import Settings, check_settings, first_step

STRENGTH = 0.6  # the default with --image


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
        print(_list_samplings())
        return
    dtype = DTYPES[options.dtype]
    weights = open_source(weights_path(options.weights), dtype, vae=options.vae, unet=options.unet)
    options.lora = [LoRA.parse(text) for text in options.lora]
    open_loras(options.lora, weights.config, weights.shapes)
    options.embedding = [EmbeddingFile.parse(text) for text in options.embedding]
    embeddings = read_embeddings(options.embedding, [lora.file for lora in options.lora], weights.config)
    sampling = _settle(options, weights.config)
    options.prune = settle_preset(weights.config, options)  # may end the program with a list of presets
    jobs = find_jobs(options, weights.config, embeddings)
    reports = [] if options.json in (None, "-") else [Path(options.json)]
    _check_writable([job.target for job in jobs] + reports)
    source = _source(options, {job.size for job in jobs})
    if note := preset_note(weights.config, options.prune):
        print(f"note: {note}", file=sys.stderr)
    began = time.perf_counter()
    sdxl = load(
        options.weights,
        device=find_device(options.device),
        dtype=dtype,
        vae=options.vae,
        unet=options.unet,
        loras=options.lora,
        embeddings=options.embedding,
        tokenizer=options.tokenizer,
    )
    if options.low_memory:  # frees the text encoders: nothing else refers to them
        sdxl = sdxl.encode_ahead(list({job.prompt for job in jobs}), list({job.negative for job in jobs}))
    if options.compile:
        sdxl = sdxl.compile()
    loaded = time.perf_counter()
    settings = _settings(options, sdxl, source, weights.files)
    run = Run(sdxl, sampling, options, source, settings)
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
    parser = Parser(prog="python -m minisdxl.sample", description="Draws pictures from prompts.")
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
        help="more prompts: .txt with one a line; .jsonl, .csv or .tsv with prompt and optional negative, seed, width, "
        "height, steps and cfg; lines of .txt may end in --n NEGATIVE --d SEED --w WIDTH --h HEIGHT --s STEPS --l CFG",
    )
    add("--images-per-prompt", type=int, default=1, metavar="N", help="pictures of each prompt (default: %(default)s)")
    add_pruning(parser)
    add("--compare", action="store_true", help="dense and pruned side by side in one picture, from the same noise")
    add(
        "--weights",
        default="shapes",
        metavar="NAME|PATH",
        help="the bundled 'shapes' (default), an SDXL .safetensors file, a diffusers folder, a name of "
        "minisdxl.download, or an id on the Hugging Face hub",
    )
    add("--vae", metavar="FILE|DIR", help="take the VAE from here, such as the fp16-fix one, in either layout")
    add("--unet", metavar="FILE|DIR", help="take the U-Net from here, such as LCM-SDXL, in either layout")
    add(
        "--lora",
        action="append",
        default=[],
        metavar="FILE|DIR[:SCALE]",
        help="merge this LoRA of kohya's scripts or diffusers into the weights; may be given several times",
    )
    add(
        "--embedding",
        action="append",
        default=[],
        metavar="FILE[:NAME]",
        help="a textual inversion, used in prompts by its name (default: the file's); may be given several times",
    )
    add(
        "--tokenizer",
        metavar="DIR",
        help="folder of vocab.json and merges.txt (default: 'tokenizer' in or beside the weights, else CLIP's own)",
    )
    add(
        "--sampling",
        metavar="NAME",
        help=f"{', '.join(SAMPLINGS)}, or 'DPM++ 2M Karras' (default: the model's best); 'list' describes them",
    )
    add("--steps", type=int, help="denoising steps (default: the model's or the sampling's own, 50 for euler)")
    add(
        "--cfg",
        type=float,
        help="classifier-free guidance scale; 1 is none (default: the model's or the sampling's own, 7 for SDXL)",
    )
    add(
        "--seed",
        type=int,
        default=0,
        help="of the first picture, up to 64 bits, -1 for a random one; picture i has seed + i (default: %(default)s)",
    )
    add("--size", type=parse_size, metavar="WxH", help="in pixels (default: the sampling's own, or else the model's)")
    add(
        "--original-size",
        type=parse_size,
        metavar="WxH",
        help="size conditioning: before training resized the picture (default: --size)",
    )
    add(
        "--crop",
        type=parse_point,
        default=(0, 0),
        metavar="X,Y",
        help="size conditioning: where training cropped the picture (default: 0,0)",
    )
    add(
        "--target-size",
        type=parse_size,
        metavar="WxH",
        help="size conditioning: after training resized the picture (default: --size)",
    )
    add("--negative", default="", metavar="TEXT", help="what to steer away from")
    add("--image", metavar="FILE", help="a picture to start from, stretched to the size")
    add(
        "--strength",
        type=float,
        help=f"share of the steps to run on --image, above 0, up to 1 (default: {STRENGTH})",
    )
    add(
        "--out",
        type=Path,
        default=Path("out"),
        metavar="FILE|DIR",
        help="a .png file, or a folder (default: %(default)s)",
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
    add("--dtype", choices=DTYPES, default="fp32", help="of all weights but the VAE's (default: %(default)s)")
    add_device(parser)
    return parser


def _list_samplings() -> str:
    lines = [f"{'sampling':<16} {'steps':>5} {'cfg':>4}"]
    for name, each in SAMPLINGS.items():
        cfg = "" if each.cfg is None else f"{each.cfg:g}"
        lines.append(f"{name:<16} {each.steps:>5} {cfg:>4}   {each.about}")
    ends = " or ".join(f"-{levels}" for levels in LEVELS)
    lines.append(f"A name without cfg may end with {ends}, other noise levels for the same solver.")
    return "\n".join(lines)


def _settle(options: argparse.Namespace, config: ModelConfig) -> Sampling:
    """The sampling. Fills in options that were not given. Raises ``ValueError`` for what does not fit the model."""
    for name in ("batch", "images_per_prompt", "preview"):
        number = getattr(options, name)
        if number is not None and number < 1:
            raise ValueError(f"--{name.replace('_', '-')} is {number}, expected 1 or more")
    if options.image is not None:
        options.strength = STRENGTH if options.strength is None else options.strength
    elif options.strength is not None:
        raise ValueError(f"--strength is {options.strength} without --image, expected both")
    asked = Settings(
        sampling=options.sampling,
        steps=options.steps,
        cfg=options.cfg,
        size=options.size,
        original_size=options.original_size,
        crop=options.crop,
        target_size=options.target_size,
    )
    run = check_settings(asked, config)
    options.sampling, options.steps, options.cfg, options.size = run.sampling.name, run.steps, run.cfg, run.size
    if options.strength is not None:
        first_step(options.steps, options.strength)
    if options.compare and options.prune is None:
        options.prune = True
    return run.sampling


def _check_writable(targets: Sequence[Path]) -> None:
    """Checks before sampling that all files can be written. Raises ``OSError``."""
    for folder in {target.parent for target in targets}:
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_path(folder / ".writable") as path:
            path.touch()
        (folder / ".writable").unlink()
    for target in targets:
        if target.is_dir():
            raise IsADirectoryError(f"{target} is a folder, expected a file to write to")


def _source(options: argparse.Namespace, sizes: Collection[tuple[int, int]]) -> InitImage | None:
    """The picture to start from. Warns if one of ``sizes`` stretches it. Raises ``ValueError`` and ``OSError``."""
    if options.image is None:
        return None
    source = read_picture(options.image)
    width, height = source.image.size
    others = [(to, up) for to, up in sizes if not 0.99 < width / height * up / to < 1.01]
    if others:
        stretched = "{}x{}".format(*others[0])
        warnings.warn(
            f"{options.image} of {width}x{height} is stretched to {stretched}; use --size to keep its shape",
            stacklevel=2,
        )
    return source


def _settings(
    options: argparse.Namespace, sdxl: SDXL, source: InitImage | None, files: Sequence[Path]
) -> dict[str, Any]:
    """The settings that all pictures of a run share, enough to make them again, under the names of the options.

    ``sha256`` is that of all weight files read, one after the other; each LoRA and embedding has its own.
    ``image_sha256`` is that of the file to start from.
    """
    digest = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            hashlib.file_digest(file, lambda: digest)
    shared = {
        key: getattr(options, key)
        for key in ("sampling", "steps", "cfg", "prune", "compare", "batch", "dtype", "compile")
    }
    sizes = {
        "size": "{}x{}".format(*options.size),
        "original_size": "{}x{}".format(*(options.original_size or options.size)),
        "crop": "{},{}".format(*options.crop),
        "target_size": "{}x{}".format(*(options.target_size or options.size)),
    }
    image = {"image": source.name, "image_sha256": source.sha256, "strength": options.strength} if source else {}
    others = {key: Path(getattr(options, key)).name for key in ("vae", "unet") if getattr(options, key)}
    weights = options.weights if is_hub_id(options.weights) else weights_path(options.weights).name
    model = {"weights": weights, **others, "sha256": digest.hexdigest()}
    loras = [{"file": lora.path.name, "scale": lora.scale, "sha256": _sha256(lora.file)} for lora in options.lora]
    embeddings = [
        {"file": each.path.name, "name": each.name, "sha256": _sha256(each.path)} for each in options.embedding
    ]
    changes = {key: files for key, files in (("lora", loras), ("embedding", embeddings)) if files}
    made_with = {"model": sdxl.config.name, "torch": torch.__version__, "device": str(sdxl.device)}
    return {**shared, **sizes, **image, **model, **changes, **made_with}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


if __name__ == "__main__":
    main()
