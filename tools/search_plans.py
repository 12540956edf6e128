"""The command ``python -m tools.search_plans``: finds static plans of steps, tokens and guidance within a FLOPs budget.

    python -m tools.search_plans --budget 0.33 --trials 150 --captions 8

Optuna's TPE sampler proposes plans. Each that costs 80 to 100 % of the budget is drawn and compared with the dense
picture of the same seed. The captions are not those that ``tools.evaluate`` and ``tools.experiments`` use, so found
plans are checked on others. The state of a search lies in a journal file, from which a stopped search goes on. The best
plans are printed as options of ``minisdxl.sample``, with their FLOPs and PSNR.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from minisdxl.cli.options import DTYPES, Parser, add_device, find_device, plain_warnings
from minisdxl.cli.reports import hardware, versions, write_report
from minisdxl.config import ModelConfig
from minisdxl.loading import load
from minisdxl.pipeline import SDXL
from tools.drawn.world import random_scene
from tools.evaluation.methods import Method, picture_flops, settings_of
from tools.evaluation.metrics import Picture, psnr
from tools.evaluation.pictures import drawn_captions

if TYPE_CHECKING:
    import optuna

EVALUATED = 500  # captions of the largest evaluation
PROPOSALS = 100  # for each trial, of which most cost too much or too little


def search_captions(count: int) -> list[str]:
    """Captions of training's side of the split that are not among the first ``EVALUATED`` of an evaluation."""
    rng, used = random.Random("search"), set(drawn_captions(EVALUATED).texts)
    drawn = dict.fromkeys(random_scene(rng, "train").caption for _ in range(20 * count))
    return [caption for caption in drawn if caption not in used][:count]


def propose(trial: optuna.Trial, config: ModelConfig) -> Method:
    """A method whose settings the trial chooses: steps, depth, guidance, and tokens to prune on each level."""
    skip = "spaced:share={:.2f},power={:.2f},shallow={}".format(
        trial.suggest_float("share", 0.16, 0.7, step=0.02),
        trial.suggest_float("power", 0.6, 2.0, step=0.1),
        trial.suggest_int("shallow", 0, 4),
    )
    guide = trial.suggest_categorical("guide", ["alternate", "until", "none"])
    if guide == "alternate":
        guide_text = f"alternate:every={trial.suggest_int('every', 2, 6)}"
    elif guide == "until":
        off = trial.suggest_categorical("off", ["kept", "conditional"])
        guide_text = f"until:share={trial.suggest_float('until', 0.2, 0.9, step=0.1):.1f},off={off}"
    prune = None
    if trial.suggest_categorical("tokens", [True, False]):
        recovery = trial.suggest_categorical("recovery", ["own-change", "own-change-linear"])
        tau = trial.suggest_int("tau", 0, 15, step=5)
        sites = list(config.unet.attention_sites())
        of_level = {
            level: trial.suggest_float(f"rho {level}", 0, 0.75, step=0.05) for level in {s.level for s in sites}
        }
        ratios = "+".join(f"{of_level[site.level]:.2f}@{site.name}" for site in sites)
        prune = f"moving-grid:rho=0,ratios={ratios},tau={tau},recovery={recovery}"
    return Method(prune, skip, None if guide == "none" else guide_text)


class Search:
    """Draws the captions by a method, and says what it costs and how near to dense it comes."""

    def __init__(self, sdxl: SDXL, captions: Sequence[str], sampling: str, steps: int, size: tuple[int, int]) -> None:
        self.sdxl, self.captions = sdxl, captions
        self.run: dict[str, Any] = {"sampling": sampling, "steps": steps, "size": size, "cfg": sdxl.config.defaults.cfg}
        self.dense_flops = picture_flops(sdxl.config, settings_of(Method(), **self.run))
        self.dense = self._draw(Method())

    def _draw(self, method: Method) -> list[Picture]:
        images = self.sdxl.generate(self.captions, settings_of(method, **self.run), seed=10_000)
        return [np.asarray(image) for image in images]

    def share(self, method: Method) -> float:
        """FLOPs of a picture as a share of dense."""
        return picture_flops(self.sdxl.config, settings_of(method, **self.run)) / self.dense_flops

    def nearness(self, method: Method) -> float:
        """Mean PSNR to the dense pictures, in dB."""
        return float(np.mean([psnr(*pair) for pair in zip(self._draw(method), self.dense, strict=True)]))


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the search; exit code 0 on success, 2 with one line on bad input, 130 after Ctrl-C."""
    parser = Parser(prog="python -m tools.search_plans", description=__doc__)
    add = parser.add_argument
    add("--weights", default="shapes", help="(default: %(default)s)")
    add("--budget", type=float, default=0.33, metavar="SHARE", help="of the FLOPs of dense (default: %(default)s)")
    add("--trials", type=int, default=100, help="(default: %(default)s)")
    add("--captions", type=int, default=8, help="(default: %(default)s)")
    add("--steps", type=int, default=50, help="(default: %(default)s)")
    add("--sampling", default="euler", help="a solver of the ODE (default: %(default)s)")
    add("--dtype", choices=DTYPES, default="fp32", help="(default: %(default)s)")
    add("--show", type=int, default=5, help="number of plans to print (default: %(default)s)")
    add("--out", type=Path, default=Path("runs/search.journal"), metavar="FILE", help="(default: %(default)s)")
    add("--json", metavar="FILE", help="also write the best plans there; - is stdout")
    add_device(parser)
    options = parser.parse_args(arguments)
    plain_warnings()
    with parser.one_line("finished trials are kept"):
        if not 0 < options.budget < 1:
            raise ValueError(f"--budget is {options.budget}, expected a share of dense between 0 and 1")
        for name in ("trials", "captions", "show"):
            if getattr(options, name) < 1:
                raise ValueError(f"--{name} is {getattr(options, name)}, expected 1 or more")
        sdxl = load(options.weights, device=find_device(options.device), dtype=DTYPES[options.dtype])
        size = sdxl.config.picture_size(None)
        search = Search(sdxl, search_captions(options.captions), options.sampling, options.steps, size)
        best = run(search, options)
        for share, found, method in best:
            parts = " ".join(f"--{name} {value}" for name, value in method._asdict().items() if value is not None)
            print(f"{1 / share:.2f} x fewer FLOPs, {found:.1f} dB: {parts}")
        if options.json is not None:
            plans = [{"share": share, "psnr": found, **method._asdict()} for share, found, method in best]
            made = {"weights": options.weights, "captions": options.captions, "trials": options.trials, **search.run}
            report = {"settings": made, "budget": options.budget, "machine": hardware(sdxl.device)}
            write_report(options.json, {**report, "versions": versions("optuna"), "plans": plans})


def run(search: Search, options: Any) -> list[tuple[float, float, Method]]:
    """The plans within the budget that came nearest to dense: share of FLOPs, PSNR and method, best first.

    Raises ``ValueError`` if too few plans cost what the budget allows.
    """
    import optuna  # of the extra "search"
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    study = optuna.create_study(
        study_name=f"{options.steps} steps of {options.sampling} within {options.budget}",
        storage=JournalStorage(JournalFileBackend(str(options.out))),
        direction="maximize",
        load_if_exists=True,
    )
    # Another seed when a search goes on, which else would propose its first plans again.
    study.sampler = optuna.samplers.TPESampler(seed=len(study.trials))
    for power in (1.0, 1.4):  # the best single method comes first, so that what is found is compared with it
        alone = {"shallow": 0, "guide": "none", "tokens": False, "power": power}
        for hundredths in range(16, int(100 * options.budget), 2):
            study.enqueue_trial({**alone, "share": hundredths / 100}, skip_if_exists=True)

    def objective(trial: optuna.Trial) -> float:
        try:
            method = propose(trial, search.sdxl.config)
            share = search.share(method)
        except ValueError:  # settings that contradict each other, or change nothing
            raise optuna.TrialPruned from None
        trial.set_user_attr("share", share)
        trial.set_user_attr("method", list(method))
        if not 0.8 * options.budget <= share <= options.budget:
            raise optuna.TrialPruned
        found = search.nearness(method)
        print(f"{share:.3f} {found:.2f} dB {method}", flush=True)
        return found

    complete = [optuna.trial.TrialState.COMPLETE]
    for _ in range(PROPOSALS * options.trials):
        if len(study.get_trials(states=complete)) >= options.trials:
            break
        study.optimize(objective, n_trials=1)
    else:
        raise ValueError(f"--budget is {options.budget}, for which too few plans were found; expected more, up to 0.7")
    best = sorted(study.get_trials(states=complete), key=lambda trial: -(trial.value or 0))
    return [
        (trial.user_attrs["share"], float(trial.value or 0), Method(*trial.user_attrs["method"]))
        for trial in best[: options.show]
    ]


if __name__ == "__main__":
    main()
