"""Kills workers and drivers of a run at random, and shows that its pictures are those of an undisturbed run.

    python -m tools.chaos --kills 50 --seed 0 --pictures 40 --steps 2 --size 64x64 --out runs/chaos

Each round is one folder: ``minisdxl.sample --workers`` is started again until it is complete, while processes of it are
killed with SIGKILL. Rounds go on until so many processes have been killed. Needs Linux or macOS, and the extra "scale".
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import psutil

from minisdxl.cli.options import Parser, plain_warnings
from minisdxl.cli.reports import processor
from minisdxl.scale.folder import RESULTS, whole_record
from minisdxl.scale.store import PARTIAL

DRIVER, WORKER = "drivers", "workers"
LONGEST = 900.0  # seconds that a run may take without being killed


def _parser() -> Parser:
    parser = Parser(
        prog="python -m tools.chaos", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--kills", type=int, default=50, help="processes to kill (default: %(default)s)")
    add("--seed", type=int, default=0, help="of the moments and the victims (default: %(default)s)")
    add("--drivers", type=float, default=0.3, help="share of kills that are of the driver (default: %(default)s)")
    add("--pictures", type=int, default=40, help="of each round (default: %(default)s)")
    add("--workers", type=int, default=2, help="(default: %(default)s)")
    add("--steps", type=int, default=2, help="(default: %(default)s)")
    add("--size", default="64x64", help="(default: %(default)s)")
    add("--out", type=Path, default=Path("runs/chaos"), help="an empty or new folder (default: %(default)s)")
    return parser


class Rounds:
    """Runs of one command, each in a folder of its own, the first one undisturbed."""

    def __init__(self, options: argparse.Namespace) -> None:
        prompts = ["a small red circle on a white background", "a big blue square on a black background"]
        self.command = [sys.executable, "-m", "minisdxl.sample", *prompts, "--steps", str(options.steps)]
        self.command += ["--images-per-prompt", str(-(-options.pictures // len(prompts)))]
        self.command += ["--size", options.size, "--workers", str(options.workers), "--device", "cpu"]
        self.out: Path = options.out
        self.undisturbed = self.out / "undisturbed"

    def start(self, folder: Path) -> subprocess.Popen[str]:
        """A driver for this folder. It must not get the Ctrl-C that ends this program."""
        command = [*self.command, "--out", str(folder)]
        return subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True
        )

    def run_undisturbed(self) -> float:
        """Makes the first folder. The seconds that it took. Raises ``ChildProcessError`` if it fails."""
        began = time.perf_counter()
        driver = self.start(self.undisturbed)
        _, said = driver.communicate(timeout=LONGEST)
        if driver.returncode:
            raise ChildProcessError(f"the undisturbed run ended with {driver.returncode}: {last_line(said)}")
        return time.perf_counter() - began


def last_line(text: str) -> str:
    """The last line of what a command wrote."""
    return text.strip().splitlines()[-1] if text.strip() else "(nothing)"


def workers_of(driver: subprocess.Popen[str]) -> list[psutil.Process]:
    """The processes of a driver's workers, also those that are still being started."""
    found = []
    for process in psutil.Process(driver.pid).children(recursive=True):
        try:
            if any(part.startswith("ray::Actor") for part in process.cmdline()):
                found.append(process)
        except psutil.NoSuchProcess:
            continue
    return found


def strike(driver: subprocess.Popen[str], victim: str, rng: random.Random) -> bool:
    """Kills the driver or one of its workers. Whether there was one to be killed."""
    try:
        if victim == DRIVER:
            driver.kill()
            return True
        workers = sorted(workers_of(driver), key=lambda process: process.pid)
        if workers:
            rng.choice(workers).kill()
        return bool(workers)
    except psutil.NoSuchProcess:
        return False


def differences(folder: Path, undisturbed: Path) -> Counter[str]:
    """How many pictures of a complete folder are lost, doubled, cut or different from those of the undisturbed run."""
    expected, made = ({path.name for path in each.glob("*.png")} for each in (undisturbed, folder))
    rows = Counter(json.loads(line)["path"] for line in (folder / RESULTS).read_text().splitlines())
    found = Counter(lost=0, doubled=0, cut=0, different=0)
    found["lost"] = len(expected - made) + len(expected - rows.keys())
    found["doubled"] = len(made - expected) + sum(count - 1 for count in rows.values())
    found["cut"] = sum(path.name.startswith(PARTIAL) for path in folder.iterdir())
    for name in expected & made:
        data = (folder / name).read_bytes()
        found["cut"] += whole_record(data) is None
        found["different"] += data != (undisturbed / name).read_bytes()
    return found


def choose(rng: random.Random, drivers: float) -> str:
    """The kind of the next process to be killed."""
    return DRIVER if rng.random() < drivers else WORKER


def complete(
    rounds: Rounds, folder: Path, kills: Counter[str], options: argparse.Namespace, rng: random.Random
) -> None:
    """Runs the command until the folder is complete, and kills as long as there are kills left."""
    victim = choose(rng, options.drivers)
    while True:
        driver = rounds.start(folder)
        while driver.poll() is None and kills.total() < options.kills:
            try:
                driver.wait(rng.uniform(0, options.span / 4))
            except subprocess.TimeoutExpired:
                if strike(driver, victim, rng):
                    kills[victim] += 1
                    victim = choose(rng, options.drivers)
        _, said = driver.communicate(timeout=LONGEST)
        if driver.returncode == 0:
            return
        if driver.returncode > 0:
            print(f"goes on after: {last_line(said)}", flush=True)


def _chaos(options: argparse.Namespace) -> None:
    """Raises ``ValueError``, ``OSError``, and ``ArithmeticError`` if a picture is not as it should be."""
    if options.out.exists() and any(options.out.iterdir()):
        raise ValueError(f"--out is {options.out}, expected an empty or a new folder")
    rounds, rng = Rounds(options), random.Random(options.seed)
    options.span = rounds.run_undisturbed()
    count = len(list(rounds.undisturbed.glob("*.png")))
    print(f"undisturbed: {count} pictures in {options.span:.1f} s, {processor()}", flush=True)
    kills, found, number = Counter[str](), Counter[str](), 0
    while kills.total() < options.kills:
        number += 1
        folder = options.out / f"round-{number}"
        complete(rounds, folder, kills, options, rng)
        found.update(differences(folder, rounds.undisturbed))
        print(f"round {number} is complete: {kills.total()} killed so far, {shown(found)}", flush=True)
    print(
        f"seed {options.seed}: {kills.total()} processes killed, {kills[WORKER]} workers and {kills[DRIVER]} drivers, "
        f"in {number} rounds of {count} pictures: {shown(found)} from the undisturbed run"
    )
    if found.total():
        raise ArithmeticError(f"{found.total()} pictures are not as in the undisturbed run, expected none")


def shown(found: Counter[str]) -> str:
    """The counts of :func:`differences` as text."""
    return ", ".join(f"{found[name]} {name}" for name in ("lost", "doubled", "cut", "different"))


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command; exit code 0 if no picture differs, 2 with one line otherwise, 130 after Ctrl-C."""
    parser = _parser()
    options = parser.parse_args(arguments)
    plain_warnings()
    with parser.one_line("the folder of the round is left", subprocess.TimeoutExpired):
        _chaos(options)


if __name__ == "__main__":
    main()
