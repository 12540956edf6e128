"""Shared command-line options, and errors as one line on stderr."""

from __future__ import annotations

import argparse
import re
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

import torch

Options = argparse.ArgumentParser | argparse._ArgumentGroup
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
DEVICES = ("auto", "cpu", "cuda", "mps")

# Exceptions for bad input and missing packages, of this package and of libraries that read files.
FAILURES: tuple[type[Exception], ...] = (ValueError, OSError, ArithmeticError, ImportError)


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line on stderr and exit code 2, without the usage."""

    def error(self, message: str) -> NoReturn:
        """Prints the message and exits with code 2."""
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())}\n")

    @contextmanager
    def one_line(self, left: str, *more: type[Exception]) -> Iterator[None]:
        """A context that turns :data:`FAILURES` and ``more`` into one line on stderr and exit code 2.

        Ctrl-C becomes exit code 130 and a line that says what is ``left`` behind.
        """
        failures = FAILURES + more
        try:
            yield
        except failures as error:
            self.error(str(error))
        except KeyboardInterrupt:
            self.exit(130, f"interrupted: {left}\n")


def add_pruning(parser: argparse.ArgumentParser) -> None:
    """Adds the options for a token-reduction preset and its budget."""
    add = parser.add_argument_group("fewer tokens").add_argument
    add(
        "--prune",
        nargs="?",
        const=True,
        metavar="PRESET",
        help="reduce tokens; the preset (default: the model's best, at-edm for SDXL) may carry settings, as in "
        "at-edm:rho=0.5,tau=10; 'list' prints all presets",
    )
    add(
        "--budget",
        metavar="FLOPS|SHARE",
        help="find the preset's ratio for these FLOPs of a U-Net call: 4.1T, or 61%% of dense",
    )
    add(
        "--budget-for",
        choices=("average", "steady"),
        default="average",
        help="what --budget counts: the average of all steps, or the last step (default: %(default)s)",
    )


def add_steps(parser: argparse.ArgumentParser) -> None:
    """Adds the options for step plans: what is skipped or forecast at some steps, and where guidance is left out."""
    add = parser.add_argument_group("less work at some steps").add_argument
    add(
        "--skip",
        metavar="METHOD",
        help="do not run the whole U-Net at each step; a method may carry settings, as in deepcache:every=3; 'list' "
        "prints all",
    )
    add(
        "--guide",
        metavar="METHOD",
        help="leave guidance out at some steps, as in interval:0.28-5.42; 'list' prints all",
    )
    add("--fast", metavar="NAME", help="sets --prune, --skip and --guide together; 'list' prints all")


def add_device(parser: Options) -> None:
    """Adds the option that :func:`find_device` reads."""
    parser.add_argument(
        "--device",
        choices=DEVICES,
        default="auto",
        help="where it runs; auto takes a GPU if there is one (default: %(default)s)",
    )


def find_device(name: str) -> str:
    """The device of that name; the fastest there is for "auto". Raises ``ValueError`` for one that is not there."""
    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name == "auto":
        return next(device for device in ("cuda", "mps", "cpu") if available[device])
    if not available[name]:
        raise ValueError(f"--device is {name}, which this machine or this build of torch does not have")
    return name


def add_prediction(parser: Options) -> None:
    """Adds the option for what a U-Net predicts."""
    parser.add_argument(
        "--prediction",
        metavar="NAME",
        help="what the U-Net predicts: noise, v (with zero terminal SNR; v:ztsnr=0 is without), edm (Playground 2.5), "
        "edm-v (CosXL), or flow, as in flow:shift=3 (default: what the files say, else noise)",
    )


def parse_size(text: str) -> tuple[int, int]:
    """(width, height) of ``WxH``. Raises ``argparse.ArgumentTypeError`` for other texts."""
    match = re.fullmatch(r"([0-9]{1,9})x([0-9]{1,9})", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"size is {text!r}, expected WIDTHxHEIGHT in pixels, such as 1024x1024")
    return int(match[1]), int(match[2])


def parse_point(text: str) -> tuple[int, int]:
    """(left, top) of ``X,Y``. Raises ``argparse.ArgumentTypeError`` for other texts."""
    match = re.fullmatch(r"([0-9]{1,9}),([0-9]{1,9})", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"point is {text!r}, expected LEFT,TOP in pixels, such as 0,0")
    return int(match[1]), int(match[2])


def plain_warnings() -> None:
    """Makes warnings one line for the user, without the place in the code."""
    warnings.showwarning = lambda message, *_, **__: print(f"warning: {message}", file=sys.stderr)
