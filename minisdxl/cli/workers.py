"""The options that spread a run over workers, and their check. Ray is imported only where they are used."""

from __future__ import annotations

import argparse
from importlib.util import find_spec
from pathlib import Path


def add_workers(parser: argparse.ArgumentParser) -> None:
    """Adds the options that :func:`check_workers` reads."""
    add = parser.add_argument_group("several processes").add_argument
    add(
        "--workers",
        type=int,
        metavar="N",
        help="make the pictures in N processes, one for each GPU or share of the cores, by Ray (the extra 'scale'); "
        "the same command again goes on where a run ended",
    )
    add("--ray-address", metavar="ADDRESS", help="a running Ray cluster: auto, HOST:PORT or ray://HOST:PORT")
    add("--threads", type=int, metavar="N", help="of each worker on a CPU (default: the cores, divided)")


def parse_output(text: str) -> Path | str:
    """A path of this machine, or as text what names another file system, such as ``s3://BUCKET/FOLDER``."""
    return text if "://" in text else Path(text)


def check_workers(options: argparse.Namespace) -> None:
    """Raises ``ValueError`` for numbers below 1, and for options that need workers, of which there are none."""
    for name in ("workers", "threads"):
        number = getattr(options, name)
        if number is not None and number < 1:
            raise ValueError(f"--{name} is {number}, expected 1 or more")
    if options.workers is not None and find_spec("ray") is None:
        raise ModuleNotFoundError("--workers needs Ray, expected it installed: pip install 'minisdxl[scale]'")
    if options.workers is None:
        for name in ("ray_address", "threads"):
            if getattr(options, name) is not None:
                raise ValueError(f"--{name.replace('_', '-')} is {getattr(options, name)} without --workers")
