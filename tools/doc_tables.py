"""Prints the tables of docs/results.md and docs/better-method.md from the JSON files of the experiments.

python -m tools.doc_tables table table-1-ratios
python -m tools.doc_tables claims table-1-ratios figure-7 few-steps figure-8 figure-9 figure-10
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from atedm.presets import current_spelling
from minisdxl.cli.options import Parser
from tools.evaluation.experiment_specs import BASELINE, EXPERIMENTS

Page = Mapping[str, Any]  # JSON that tools.experiments writes


def table(page: Page) -> str:
    """Markdown: a row for each preset of a page, with FLOPs, caption accuracy and distance to the dense model."""
    head = ("preset", "FLOPs", "caption accuracy", "latent error", f"error over `{BASELINE}`", "PSNR, dB")
    rows = [head, ("---",) * len(head)]
    for each in page["presets"]:
        rows.append(
            (
                f"`{current_spelling(each['preset'])}`",
                f"{each['flops_share']:.1%}",
                _number(each["obeyed"], ".1f", 100, " %"),
                _number(each["latent_error"], ".4f"),
                _number(each["error_over_baseline"], "+.4f"),
                _number(each["psnr"], ".2f"),
            )
        )
    return _lines(rows)


def claims(pages: Mapping[str, Page]) -> str:
    """Markdown: a row for each claim of each page. Cells have a line for each budget, CFG scale or number of steps."""
    rows = [("claim", "by latent error", "by caption accuracy", "page"), ("---",) * 4]
    for name, page in pages.items():
        said = dict[str, list[Mapping[str, Any]]]()
        for each in page["verdicts"]:
            said.setdefault(current_words(each["claim"].partition(":")[0]), []).append(each)
        for claim, verdicts in said.items():
            errors = [f"{each['error_verdict']}: {_number(each['error'], '+.4f')}" for each in verdicts]
            accuracy = [f"{each['obeyed_verdict']}: {_number(each['obeyed'], '+.0f', 100)}" for each in verdicts]
            rows.append((claim, "<br>".join(errors), "<br>".join(accuracy), f"[{name}](results/{name}.md)"))
    return _lines(rows)


def current_words(claim: str) -> str:
    """A claim in the words of version 0.2; older pages say "by lot" for "at random"."""
    return claim.replace("by lot", "at random")


def _number(estimate: Mapping[str, float | None] | None, form: str, factor: int = 1, unit: str = "") -> str:
    """An estimate with its interval as text; null in JSON stands for infinity."""
    if estimate is None:
        return ""
    value, low, high = (None if estimate[x] is None else factor * estimate[x] for x in ("value", "low", "high"))  # type: ignore[operator]
    return "equal" if value is None else f"{value:{form}}{unit} ({low:{form}} to {high:{form}})"


def _lines(rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command; exit code 0 on success, 2 with one line on bad input."""
    parser = Parser(
        prog="python -m tools.doc_tables", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("table", "claims"))
    parser.add_argument("names", nargs="+", choices=EXPERIMENTS, metavar="NAME", help=", ".join(EXPERIMENTS))
    results = Path("docs/results")
    parser.add_argument("--results", type=Path, default=results, metavar="DIR", help="(default: %(default)s)")
    options = parser.parse_args(arguments)
    with parser.one_line("nothing was written"):
        pages = {name: json.loads((options.results / f"{name}.json").read_text()) for name in options.names}
        print(claims(pages) if options.what == "claims" else "\n\n".join(table(page) for page in pages.values()))


if __name__ == "__main__":
    main()
