"""The command ``python -m minisdxl.inspect``: a page that shows what happens inside while a prompt is drawn."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from tqdm import tqdm

from minisdxl.cli.jobs import drawn_seed
from minisdxl.cli.models import add_model, load_model, open_model
from minisdxl.cli.options import Parser, add_pruning, add_steps, plain_warnings
from minisdxl.cli.pictures import (
    add_picture,
    list_samplings,
    picture_settings,
    read_mask,
    read_source,
    settle_picture,
)
from minisdxl.cli.presets import check_plans, preset_note, settle_fast, settle_preset
from minisdxl.cli.prompt_syntax import check_syntax
from minisdxl.cli.reports import check_writable
from minisdxl.inspector.page import Inspection
from minisdxl.inspector.session import check_attention_steps, compared, find_schedule
from minisdxl.prompting.syntax import parse
from minisdxl.settings import Settings, check_settings

SUFFIXES = (".html", ".htm")


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command; exit code 0 on success, 2 with one line on bad input, 130 after Ctrl-C."""
    parser = _parser()
    options = parser.parse_intermixed_args(arguments)
    plain_warnings()
    with parser.one_line("no partial page was left"):
        _inspect(options)


def _inspect(options: argparse.Namespace) -> None:
    """Checks the options, loads the model and records. Raises ``ValueError``, ``OSError`` or ``ArithmeticError``."""
    if options.sampling == "list":
        print(list_samplings())
        return
    weights, embeddings = open_model(options)
    settle_fast(options, weights.config)  # it and settle_preset may end the program with a list of presets
    settle_picture(options, weights.config)
    options.prune = settle_preset(weights.config, options)
    check_plans(options, weights.config)
    if options.prompt is None:
        raise ValueError("there is no prompt, expected one")
    if options.out.suffix.lower() not in SUFFIXES:
        raise ValueError(f"--out is {options.out}, expected an .html file")
    parse(options.prompt)
    check_syntax([options.prompt, options.negative], embeddings)
    source = read_source(options, [options.size])
    mask = read_mask(options, source)
    settings = replace(picture_settings(options, source, mask), seed=drawn_seed(options.seed))
    methods = compared(settings, options.against)
    schedules = [find_schedule(method.prune, weights.config) for method in methods]
    runs = [check_settings(method, weights.config) for method in methods]
    check_attention_steps(options.attention_steps, runs, schedules)
    check_writable([options.out])
    for preset in (options.prune, options.against):
        if note := preset_note(weights.config, preset):
            print(f"note: {note}", file=sys.stderr)
    found = _record(options, settings)
    found.save(options.out)
    print(f"{options.out}  seed {settings.seed}  {found.size / 1e6:.1f} MB  {', '.join(found.pictures)}")


def _record(options: argparse.Namespace, settings: Settings) -> Inspection:
    """Loads the model and draws, with a progress bar on a terminal."""
    sdxl = load_model(options)
    if options.low_memory:
        sdxl = sdxl.encode_ahead([options.prompt], [options.negative])
    with tqdm(unit="step", disable=not sys.stderr.isatty()) as bar:

        def on_step(plan: str, step: int) -> None:
            bar.set_description(f"{plan}, step {step + 1}")
            bar.update()

        steps = options.attention_steps
        return sdxl.inspect(options.prompt, settings, against=options.against, attention_steps=steps, on_step=on_step)


def _parser() -> Parser:
    parser = Parser(
        prog="python -m minisdxl.inspect",
        usage="%(prog)s [options] PROMPT",
        description="Draws a prompt dense and with the methods asked for, and writes a page that shows what happened "
        "inside.",
    )
    add = parser.add_argument
    add("prompt", nargs="?", metavar="PROMPT", help="what to draw, in the syntax of minisdxl.sample")
    add_pruning(parser)
    add_steps(parser)
    add("--against", metavar="NAME", help="another preset of --prune or --fast to compare with, from the same noise")
    add(
        "--attention-steps",
        type=parse_steps,
        metavar="N,N,...",
        help="steps, from 1, of which attention is recorded; each adds to the page (default: the first one, the first "
        "after the early steps of DSAP, and the last that runs the whole U-Net)",
    )
    add_model(parser)
    parser.set_defaults(refiner=None, refiner_start=None)  # the page shows the steps of one model
    add_picture(parser)
    add(
        "--low-memory",
        action="store_true",
        help="drop the text encoders before sampling and decode in strips: the same pictures up to rounding",
    )
    add(
        "--out", type=Path, default=Path("inside.html"), metavar="FILE", help="the page to write (default: %(default)s)"
    )
    return parser


def parse_steps(text: str) -> list[int]:
    """The numbers of ``N,N,...``. Raises ``argparse.ArgumentTypeError`` for other texts."""
    if not re.fullmatch(r"[0-9]{1,6}(,[0-9]{1,6})*", text):
        raise argparse.ArgumentTypeError(f"steps are {text!r}, expected numbers from 1 with commas, such as 1,16,50")
    return [int(number) for number in text.split(",")]


if __name__ == "__main__":
    main()
