"""The options that say how a picture is drawn, and their check."""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Collection

from minisdxl.cli.options import parse_point, parse_size
from minisdxl.cli.picture_files import InitImage, read_picture
from minisdxl.config import ModelConfig
from minisdxl.runtime.inpainting import check_white
from minisdxl.samplings import LEVELS, SAMPLINGS, Sampling
from minisdxl.settings import REFINER_START, Settings, check_pictures, check_settings, first_step, split_step

STRENGTH, MASKED_STRENGTH = 0.6, 1.0  # the default with --image alone, and with --mask
LOW_MEMORY_STRIP_ROWS = 8  # rows of the latent decoded at once, with --low-memory


def add_picture(parser: argparse.ArgumentParser) -> None:
    """Adds the options that :func:`settle_picture`, :func:`read_source` and :func:`read_mask` read."""
    add = parser.add_argument_group("how it is drawn").add_argument
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
    add(
        "--size",
        type=parse_size,
        metavar="WxH",
        help="of the picture in pixels (default: the sampling's own, or else the model's)",
    )
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
    add("--image", metavar="FILE", help="a picture to start from, stretched to --size")
    add(
        "--strength",
        type=float,
        help=f"share of the steps to run on --image, above 0, up to 1 (default: {STRENGTH}, with --mask "
        f"{MASKED_STRENGTH:g})",
    )
    add("--mask", metavar="FILE", help="draw anew only what is white in this picture, and keep the rest of --image")


def list_samplings() -> str:
    """One line for each sampling."""
    lines = [f"{'sampling':<16} {'steps':>5} {'cfg':>4}"]
    for name, each in SAMPLINGS.items():
        cfg = "" if each.cfg is None else f"{each.cfg:g}"
        lines.append(f"{name:<16} {each.steps:>5} {cfg:>4}   {each.about}")
    ends = " or ".join(f"-{levels}" for levels in LEVELS)
    lines.append(f"A name without cfg may end with {ends}, other noise levels for the same solver.")
    return "\n".join(lines)


def settle_picture(options: argparse.Namespace, config: ModelConfig, refiner: ModelConfig | None = None) -> Sampling:
    """The sampling. Fills in options that were not given. Raises ``ValueError`` for what does not fit the model."""
    check_pictures(config, options.image is not None, options.mask is not None)
    if options.image is not None:
        strength = STRENGTH if options.mask is None else MASKED_STRENGTH
        options.strength = strength if options.strength is None else options.strength
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
    first = 0 if options.strength is None else first_step(options.steps, options.strength)
    if refiner is not None:
        options.refiner_start = REFINER_START if options.refiner_start is None else options.refiner_start
        split_step(options.refiner_start, run.sigmas, config.noise, first)
    elif options.refiner_start is not None:
        raise ValueError(f"--refiner-start is {options.refiner_start} without --refiner, expected both")
    return run.sampling


def picture_settings(options: argparse.Namespace, source: InitImage | None, mask: InitImage | None) -> Settings:
    """The settings of a picture, from the options of a command that have been settled and read."""
    return Settings(
        negative=options.negative,
        sampling=options.sampling,
        steps=options.steps,
        cfg=options.cfg,
        seed=options.seed,
        prune=options.prune,
        skip=options.skip,
        guide=options.guide,
        size=options.size,
        original_size=options.original_size,
        crop=options.crop,
        target_size=options.target_size,
        image=None if source is None else source.image,
        strength=options.strength,
        mask=None if mask is None else mask.image,
        refiner_start=options.refiner_start,
        strip_rows=LOW_MEMORY_STRIP_ROWS if options.low_memory else None,
    )


def read_source(options: argparse.Namespace, sizes: Collection[tuple[int, int]]) -> InitImage | None:
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


def read_mask(options: argparse.Namespace, source: InitImage | None) -> InitImage | None:
    """The mask of ``source``. Warns if it has another size. Raises ``ValueError`` and ``OSError``."""
    if options.mask is None or source is None:
        return None
    mask = read_picture(options.mask)
    check_white(mask.image)
    if mask.image.size != source.image.size:
        sizes = ["{}x{}".format(*each.image.size) for each in (mask, source)]
        warnings.warn(f"{options.mask} of {sizes[0]} is stretched over the picture of {sizes[1]}", stacklevel=2)
    return mask
