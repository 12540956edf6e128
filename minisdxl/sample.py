"""``python -m minisdxl.sample``: pictures of prompts."""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw
from PIL.PngImagePlugin import PngInfo
from tqdm import tqdm

from minisdxl.budget import settle_preset
from minisdxl.checkpoint import read_config
from minisdxl.command import Parser, add_pruning, parse_size, plain_warnings
from minisdxl.files import atomic_path
from minisdxl.flops import count, format_flops
from minisdxl.pipeline import SDXL, load, weights_path

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
DEVICES = ("auto", "cpu", "cuda", "mps")


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command; exit code 0 on success, 2 with one line on bad input, 130 after Ctrl-C."""
    parser = _parser()
    options = parser.parse_intermixed_args(arguments)  # prompts and options in any order
    plain_warnings()
    try:
        if options.compare and options.prune is None:
            options.prune = "at-edm"
        # Before gigabytes of weights are read; and the list of presets needs no prompt.
        options.prune = settle_preset(read_config(weights_path(options.weights)), options)
        if not options.prompts:
            raise ValueError("there is no prompt, expected one or more")
        targets = [_target(options, index) for index in range(len(options.prompts))]
        _check_writable(targets)
        sdxl = load(
            options.weights, device=_device(options.device), dtype=DTYPES[options.dtype], tokenizer=options.tokenizer
        )
        settings = _settings(options, sdxl)
        for first in range(0, len(targets), options.batch):
            _make(sdxl, options, settings, first, targets[first : first + options.batch])
    except (ValueError, OSError, ArithmeticError) as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        parser.exit(130, "interrupted: no partial picture was left\n")


def _parser() -> Parser:
    parser = Parser(prog="python -m minisdxl.sample", description="Makes pictures of prompts.")
    add = parser.add_argument
    add("prompts", nargs="*", metavar="PROMPT", help="what to draw; each prompt makes one picture")
    add_pruning(parser)
    add("--compare", action="store_true", help="dense and pruned side by side in one picture, from the same noise")
    add(
        "--weights",
        default="shapes",
        metavar="NAME|PATH",
        help="the bundled 'shapes' (default) or an SDXL .safetensors file",
    )
    add(
        "--tokenizer",
        metavar="DIR",
        help="folder of vocab.json and merges.txt (default: 'tokenizer' beside the weights)",
    )
    add("--steps", type=int, default=50, help="denoising steps (default: %(default)s)")
    add("--cfg", type=float, default=7.0, help="classifier-free guidance scale (default: %(default)s)")
    add("--seed", type=int, default=0, help="of the first picture; picture i has seed + i (default: %(default)s)")
    add("--size", type=parse_size, metavar="WxH", help="in pixels (default: what the model was made for)")
    add("--negative", default="", metavar="TEXT", help="what to steer away from")
    add(
        "--out",
        type=Path,
        default=Path("out"),
        metavar="FILE|DIR",
        help="a .png file, or a folder (default: %(default)s)",
    )
    add("--batch", type=int, default=1, help="pictures made at a time (default: %(default)s)")
    add("--dtype", choices=DTYPES, default="fp32", help="of the weights (default: %(default)s)")
    add("--device", choices=DEVICES, default="auto", help="(default: %(default)s)")
    return parser


def _target(options: argparse.Namespace, index: int) -> Path:
    """Where picture ``index`` goes. Raises ``ValueError`` where options contradict each other."""
    if options.batch < 1:
        raise ValueError(f"--batch is {options.batch}, expected 1 or more")
    if options.out.suffix and options.out.suffix.lower() != ".png":
        raise ValueError(f"--out is {options.out}, expected a .png file or a folder")
    if options.out.suffix and len(options.prompts) > 1:
        raise ValueError(f"--out is the file {options.out} for {len(options.prompts)} pictures, expected a folder")
    if options.out.suffix:
        return Path(options.out)
    words = "-".join(re.findall(r"\w+", options.prompts[index].lower()))[:60]
    kind = "compare" if options.compare else re.sub(r"[^\w.=-]+", "-", options.prune or "dense")
    return Path(options.out / f"{options.seed + index}-{words or 'untitled'}-{kind}.png")


def _check_writable(targets: Sequence[Path]) -> None:
    """Finds out before the work, not after it, whether pictures can be written. Raises ``OSError``."""
    for folder in {target.parent for target in targets}:
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_path(folder / ".writable") as path:
            path.touch()
        (folder / ".writable").unlink()


def _device(name: str) -> str:
    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name == "auto":
        return next(device for device in ("cuda", "mps", "cpu") if available[device])
    if not available[name]:
        raise ValueError(f"--device is {name}, which this machine or this build of torch does not have")
    return name


def _settings(options: argparse.Namespace, sdxl: SDXL) -> dict[str, Any]:
    """What all pictures of a run share, and what it takes to make them again."""
    weights = weights_path(options.weights)
    with weights.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    width, height = sdxl.config.picture_size(options.size)
    shared = {key: getattr(options, key) for key in ("negative", "steps", "cfg", "prune", "compare", "batch", "dtype")}
    model = {"weights": weights.name, "sha256": digest, "model": sdxl.config.name, "torch": torch.__version__}
    return {**shared, "size": f"{width}x{height}", "device": str(sdxl.device), **model}


def _make(
    sdxl: SDXL, options: argparse.Namespace, settings: dict[str, Any], first: int, targets: Sequence[Path]
) -> None:
    """Makes one batch of pictures, the first of them number ``first``, and prints one line for each."""
    prompts = options.prompts[first : first + len(targets)]
    began = time.perf_counter()
    kinds = [None, options.prune] if options.compare else [options.prune]
    made = {prune: _generate(sdxl, options, prompts, options.seed + first, prune) for prune in kinds}
    seconds = (time.perf_counter() - began) / len(targets)
    for index, (prompt, target) in enumerate(zip(prompts, targets, strict=True)):
        picture = made[options.prune][0][index]
        if options.compare:
            picture = _side_by_side({prune or "dense": images[index] for prune, (images, _) in made.items()})
        record = {"prompt": prompt, "seed": options.seed + first + index, **settings}
        notes = PngInfo()
        notes.add_itxt("prompt", prompt)
        notes.add_itxt("minisdxl", json.dumps(record, ensure_ascii=False))
        with atomic_path(target) as path:
            picture.save(path, pnginfo=notes)
        share = made[options.prune][1]
        print(f"{target}  seed {record['seed']}  {seconds:.1f} s  {share:.1%} of dense FLOPs")


def _generate(
    sdxl: SDXL, options: argparse.Namespace, prompts: Sequence[str], seed: int, prune: str | None
) -> tuple[list[Image.Image], float]:
    """Pictures, and the share of the dense model's FLOPs that they took. Shows progress on a terminal."""
    width, height = sdxl.config.picture_size(options.size)
    f, text = sdxl.config.vae.downscale, sdxl.config.text[0].context_length
    plans = sdxl.plans(prune, options.steps)
    cost = {plan: count(sdxl.config, height // f, width // f, plan, text).total for plan in set(plans)}
    dense = count(sdxl.config, height // f, width // f, context_length=text).total
    calls = (1 if options.cfg == 1 else 2) * len(prompts)
    with tqdm(total=options.steps, desc=prune or "dense", unit="step", disable=not sys.stderr.isatty()) as bar:

        def on_step(step: int, _: torch.Tensor) -> None:
            bar.set_postfix_str(f"{format_flops(calls * cost[plans[step]])}FLOPs/step", refresh=False)
            bar.update()

        images = sdxl.generate(
            prompts,
            negative=options.negative,
            steps=options.steps,
            cfg=options.cfg,
            seed=seed,
            prune=prune,
            size=options.size,
            on_step=on_step,
        )
    return images, sum(cost[plan] for plan in plans) / (dense * options.steps)


def _side_by_side(images: dict[str, Image.Image]) -> Image.Image:
    """Pictures in a row, each with its name above."""
    first = next(iter(images.values()))
    label = max(20, first.height // 20)
    row = Image.new("RGB", (first.width * len(images), first.height + label), "white")
    draw = ImageDraw.Draw(row)
    for column, (name, image) in enumerate(images.items()):
        row.paste(image, (column * first.width, label))
        draw.text((column * first.width + 4, label // 2), name, "black", anchor="lm", font_size=label * 0.7)
    return row


if __name__ == "__main__":
    main()
