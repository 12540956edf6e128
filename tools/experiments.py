"""The command ``python -m tools.experiments NAME``: the paper's comparisons, on the bundled model or another one.

An experiment writes its rows to runs/experiments/NAME.csv. To docs/results it writes its table and the outcome of its
claims (NAME.md), all numbers (NAME.json), a plot (NAME.png) and, for presets side by side, pictures
(NAME-pictures.png). Pictures that two experiments have in common are made once. A run that was stopped continues where
it was.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from minisdxl.cli.options import DTYPES, Parser, find_device, plain_warnings
from minisdxl.cli.reports import versions
from minisdxl.loading import load
from minisdxl.pipeline import SDXL
from minisdxl.scale.store import Store
from tools.evaluation.experiment_specs import BASELINE, EXPERIMENTS, Experiment
from tools.evaluation.paired_statistics import INTERVALS
from tools.evaluation.pictures import Captions, Evaluation, average_share, drawn_captions, solve
from tools.evaluation.plots import CAPTION_ACCURACY, DISTANCES, figure_png, pictures_png
from tools.evaluation.rows import DENSE, Folder, Row, rows_csv
from tools.evaluation.run_options import model_options, settings_of
from tools.evaluation.set_metrics import REFERENCES, Drawn, SetMetrics
from tools.evaluation.summaries import (
    ClaimOutcome,
    Summary,
    as_json,
    claim_table,
    common_rows,
    judge,
    markdown_table,
    summarize,
)

SHOWN = 8  # captions whose pictures are shown


@dataclass(frozen=True)
class Part:
    """An experiment under one budget, CFG scale and number of steps.

    ``presets`` maps each preset of the experiment to its text with a ratio. ``share`` is their share of dense FLOPs.
    """

    steps: int
    cfg: float
    share: float | None  # ``None``: each has its own
    presets: Mapping[str, str]

    @property
    def label(self) -> str:
        """Budget, steps and CFG scale as text."""
        share = "" if self.share is None else f"{self.share:.1%} of the FLOPs, "
        return f"{share}{self.steps} steps, CFG {self.cfg:g}"


def plan(experiment: Experiment, sdxl: SDXL, size: tuple[int, int]) -> tuple[list[Part], list[str]]:
    """The parts of an experiment, and notes on presets that cannot be brought to a budget.

    Under a budget, each part also has the control: dense in so many fewer steps that its FLOPs are the budget's.
    """
    parts, notes = list[Part](), list[str]()
    for steps in experiment.steps:
        for cfg in experiment.cfgs:
            for budget in experiment.budgets:
                share = average_share(sdxl.config, size, budget, steps) if isinstance(budget, str) else budget
                solved = dict[str, str]()
                for preset in experiment.presets:
                    try:
                        solved |= solve(sdxl.config, size, [preset], steps, share, "average")
                    except ValueError as error:
                        notes.append(str(error))
                if share is not None and 1 <= (fewer := round(share * steps)) < steps:
                    solved[f"steps={fewer}"] = f"steps={fewer}"
                parts.append(Part(steps, cfg, share, solved))
    return parts, list(dict.fromkeys(notes))


def make(
    parts: Sequence[Part], sdxl: SDXL, size: tuple[int, int], captions: Captions, options: argparse.Namespace
) -> Iterator[Evaluation]:
    """Makes the missing pictures of each part, unless ``--table`` was given, and yields its evaluation."""
    for part in parts:
        settings = settings_of(options, sdxl.config, size, part.steps, part.cfg, "drawn, test")
        folder = Folder(f"{options.out}/{options.sampling}-{part.steps}-steps-cfg-{part.cfg:g}", settings)
        evaluation = Evaluation(sdxl, captions, folder, part.steps, part.cfg, size, options.batch, options.sampling)
        if not options.table:
            print(part.label, flush=True)
            evaluation.run(list(part.presets.values()), options.shard)
        yield evaluation


@dataclass(frozen=True)
class Findings:
    """The results of an experiment."""

    rows: list[Row]
    summaries: list[Summary]
    outcomes: list[ClaimOutcome]
    drawn_distance: float | None


def find(
    experiment: Experiment, parts: Sequence[Part], evaluations: Sequence[Evaluation], drawn: Drawn, captions: int
) -> Findings:
    """Summarizes all parts and judges the claims. Raises ``ValueError`` if a part has no caption with all rows."""
    summaries, outcomes, rows = list[Summary](), list[ClaimOutcome](), dict[tuple[str, int, float], Sequence[Row]]()
    for part, evaluation in zip(parts, evaluations, strict=True):
        mine = common_rows(evaluation.folder.rows, list(part.presets.values()), captions)
        numbers = [row.number for row in mine[DENSE]]
        for summary in summarize(mine, part.presets.get(BASELINE), SetMetrics(evaluation, drawn).of(numbers)):
            key = summary.preset, part.steps, part.cfg
            if key not in rows:  # dense is in several parts
                rows[key] = mine[summary.preset]
                summaries.append(summary)
        for claim in experiment.claims:
            if claim.better in part.presets and claim.worse in part.presets:
                text = claim.text if len(parts) == 1 else f"{claim.text}: {part.label}"
                better, worse = (mine[part.presets[name]] for name in (claim.better, claim.worse))
                outcomes.append(judge(text, better, worse))
    count = min(summary.captions for summary in summaries)
    own_distance = drawn.own_distance(count) if count > 1 else None
    return Findings([row for each in rows.values() for row in each], summaries, outcomes, own_distance)


def page(name: str, findings: Findings, notes: Sequence[str], command: str, settings: Mapping[str, object]) -> str:
    """The Markdown page of an experiment."""
    machines = sorted({row.machine for row in findings.rows})
    made = (
        f"{max(each.captions for each in findings.summaries)} captions, {settings['size']} pixels, {settings['dtype']}"
    )
    parts = [
        f"# {name}\n\n{EXPERIMENTS[name].about}",
        f"    {command}",
        f"{made}, on {'; '.join(machines)}. Weights {settings['weights']}, sha256 `{settings['sha256']}`.",
        markdown_table(findings.summaries, BASELINE),
        INTERVALS,
    ]
    if findings.drawn_distance is not None:
        parts[-1] += (
            f" The same number of other drawn pictures has a Fréchet distance of {findings.drawn_distance:.4g} "
            f"to the {REFERENCES} drawn."
        )
    parts += ["\n".join(f"- {note}" for note in notes)] if notes else []
    parts += [claim_table(findings.outcomes)] if findings.outcomes else []
    parts += [f"![{name}]({name}.png)"]
    parts += [f"![pictures of {name}]({name}-pictures.png)"] if EXPERIMENTS[name].axis is None else []
    return "\n\n".join(parts) + "\n"


def _experiment(options: argparse.Namespace) -> None:
    """Raises ``ValueError``, ``OSError``, ``ArithmeticError`` or ``ModuleNotFoundError``."""
    if options.captions < 1:
        raise ValueError(f"--captions is {options.captions}, expected 1 or more")
    name, experiment = options.name, EXPERIMENTS[options.name]
    sdxl = load(
        options.weights, device=find_device(options.device), dtype=DTYPES[options.dtype], tokenizer=options.tokenizer
    )
    options.sampling = options.sampling or sdxl.config.defaults.sampling
    size = sdxl.config.picture_size(options.size)
    parts, notes = plan(experiment, sdxl, size)
    evaluations = list(make(parts, sdxl, size, drawn_captions(options.captions), options))
    if not options.table:
        missing = sum(e.missing(list(part.presets.values())) for part, e in zip(parts, evaluations, strict=True))
        if missing:
            print(f"{missing} pictures are left to other shards; --table reports on those that are there")
            return
    findings = find(experiment, parts, evaluations, Drawn(sdxl.vae, size[0]), options.captions)
    command = shlex.join(["python", "-m", "tools.experiments", *options.arguments])
    settings = settings_of(options, sdxl.config, size, parts[0].steps, parts[0].cfg, "drawn, test")
    text = page(name, findings, notes, command, settings)
    print(text)
    results = Store(options.results)
    Store(options.out).write(f"{name}.csv", rows_csv(findings.rows))
    results.write(f"{name}.md", text.encode())
    report = {
        "command": command,
        "settings": {key: value for key, value in settings.items() if key not in ("steps", "cfg")},
        "versions": versions(),
        "machines": sorted({row.machine for row in findings.rows}),
        "notes": notes,
        "presets": [as_json(each) for each in findings.summaries],
        "verdicts": [as_json(each) for each in findings.outcomes],
    }
    results.write(f"{name}.json", (json.dumps(report, indent=1) + "\n").encode())
    measures = [CAPTION_ACCURACY, DISTANCES[experiment.distance]]
    results.write(f"{name}.png", figure_png(findings.summaries, measures, experiment.axis))
    if experiment.axis is None:
        folder, numbers = evaluations[0].folder, sorted({row.number for row in findings.rows})[:SHOWN]
        presets = dict.fromkeys([DENSE, *parts[0].presets.values()])
        rows = {preset: [folder.picture(preset, number) for number in numbers] for preset in presets}
        results.write(f"{name}-pictures.png", pictures_png(rows))


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs one experiment; exit code 0 on success, 2 with one line on bad input, 130 after Ctrl-C."""
    parser = Parser(
        prog="python -m tools.experiments", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", choices=EXPERIMENTS, metavar="NAME", help=", ".join(EXPERIMENTS))
    model_options(parser, weights="shapes", out="runs/experiments")
    parser.add_argument("--results", default="docs/results", metavar="FOLDER", help="(default: %(default)s)")
    options = parser.parse_args(arguments)
    options.arguments = list(sys.argv[1:] if arguments is None else arguments)
    plain_warnings()
    with parser.one_line("finished pictures are kept"):
        _experiment(options)


if __name__ == "__main__":
    main()
