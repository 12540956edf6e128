"""Damages model files at random, thousands of times, and checks that each is refused or loaded right.

    python -m tools.fuzz --cases 20000 --seed 0   # a table of results by kind of damage
    python -m tools.fuzz --case 1234 --seed 0     # one case again, with its result

A case is a sound model (``fuzzing.forms``) with one damaged file (``fuzzing.damage``). Two results are right: the model
is refused in one line that names the file, or what the files say is loaded exactly (``fuzzing.truth``). Anything else
is a violation: another exception, other numbers, an ignored field, more than ``SECONDS`` or ``MEMORY``, a process that
dies. So cases run in a child process. Some cases also run through ``python -m minisdxl.sample``.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import multiprocessing
import os
import resource
import shutil
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from PIL import Image
from tqdm import tqdm

from minisdxl import sample
from minisdxl.checkpoint import modules, tensorfile
from minisdxl.checkpoint.errors import CheckpointError
from minisdxl.checkpoint.modules import Modules, official_state_dict, without_memory
from minisdxl.cli.options import DTYPES, Parser
from minisdxl.config import ModelConfig
from minisdxl.loading import load
from minisdxl.pipeline import SDXL
from tools.fuzzing.damage import Case, make_case
from tools.fuzzing.forms import CONFIG, INPAINTING, REFINER, Files, forms
from tools.fuzzing.truth import Violation, flat, right_config, right_tokens, right_weights

SECONDS = 5  # most processor time for one case
PATIENCE = 120  # seconds to wait for a case that uses no processor time
MEMORY = 2**30  # most bytes that a case may allocate


@dataclass(frozen=True)
class Result:
    """The result of a case: the line with which it was refused, if it was, and the violation, if there is one."""

    message: str | None
    violation: str | None = None


def examine(case: Case, folder: Path) -> Result:
    """Loads the model in ``folder`` and compares it with its files."""
    form = forms()[case.form]
    options: dict[str, Any] = {name: folder / path for name, path in form.options.items() if name != "lora"}
    options["loras"] = [folder / path for name, path in form.options.items() if name == "lora"]
    by_shape = {"SDXL_BASE": CONFIG, "SDXL_INPAINTING": INPAINTING, "SDXL_REFINER": REFINER}
    with contextlib.ExitStack() as patches:
        for name, config in by_shape.items() if form.official else ():
            patches.enter_context(mock.patch.object(modules, name, config))
        patches.enter_context(mock.patch.object(modules, "without_memory", skeleton))
        patches.enter_context(mock.patch.object(tensorfile, "MAPPED", 64 if case.mapped else tensorfile.MAPPED))
        message = None
        try:
            try:
                loaded: SDXL | Exception = load(folder / form.weights, dtype=case.dtype, **options)
            except (ValueError, FileNotFoundError) as error:
                loaded = error
                message = str(error)
            if isinstance(loaded, SDXL):
                known = check_model(case, folder, loaded)
            else:
                known = check_refusal(case, folder, loaded)
            if case.command or not known:
                check_command(case, folder, refused=message is not None)
        except Violation as violation:
            return Result(message, str(violation))
        except Exception as error:  # any other exception is a violation
            return Result(message, f"{type(error).__name__}: {error}")
        return Result(message)


@lru_cache(16)
def skeleton(config: ModelConfig) -> Modules:
    """A model without weights, cached to save time. ``check_model`` fills it with NaN, so that stale weights show."""
    return without_memory(config)


def check_refusal(case: Case, folder: Path, error: Exception) -> bool:
    """Checks that an error is one line that names the file. Returns ``True``; raises ``Violation`` if it is not."""
    message, subject = str(error), forms()[case.form].subject
    if len(message.splitlines()) != 1:
        raise Violation(f"refused in {len(message.splitlines())} lines: {message!r:.500}")
    if "tokenizer" in case.path:  # if merges and tokens do not match, either file can be wrong
        return True
    if not isinstance(error, CheckpointError):
        raise Violation(f"{type(error).__name__}: {message}")
    if str(folder / subject) not in message:
        raise Violation(f"refused without the name {subject}: {message}")
    return True


def check_model(case: Case, folder: Path, sdxl: SDXL) -> bool:
    """Compares a loaded model with its files, and returns whether its config is the sound one. Raises ``Violation``."""
    found, right = json.loads(json.dumps(sdxl.config.to_dict())), right_config(case, folder)
    if json.dumps(found, sort_keys=True) != json.dumps(right, sort_keys=True):
        raise Violation(f"loaded with the config {found}, expected {right}")
    modules = Modules(sdxl.unet, sdxl.vae, sdxl.text)  # type: ignore[arg-type]
    tensors = official_state_dict(modules)
    numbers, (right_numbers, margins) = flat(tensors.values()), right_weights(case)
    same = (numbers == right_numbers) | (numbers.isnan() & right_numbers.isnan())
    wrong = ~same & ~((numbers - right_numbers).abs() <= margins)
    if wrong.any():
        names = [name for name, tensor in tensors.items() for _ in range(tensor.numel())]
        raise Violation(f"loaded {int(wrong.sum())} other numbers, the first in {names[int(wrong.int().argmax())]}")
    for module in modules:
        for parameter in module.parameters():
            parameter.data.fill_(torch.nan)
    for word, ids in right_tokens(case, right["text"][0]["pad_token"]):
        if sdxl.tokenizer([word])[0][0].tolist() != ids:
            raise Violation(f"turned {word!r} into the tokens {sdxl.tokenizer([word])[0][0].tolist()}, expected {ids}")
    return sdxl.config == forms()[case.form].config


def check_command(case: Case, folder: Path, refused: bool) -> None:
    """Runs the sample command: it must write a picture, or fail with one line. Raises ``Violation``."""
    form, picture = forms()[case.form], folder / "out" / "picture.png"
    dtype = next(name for name, dtype in DTYPES.items() if dtype == case.dtype)
    options = [f"--{name.replace('_', '-')}={folder / path}" for name, path in form.options.items()]
    quick = ["--steps=1", "--size=8x8", "--device=cpu", f"--dtype={dtype}", f"--out={picture}"]
    if form.config.inpaints or form.config.refines:  # which start from a picture
        start = folder / "start.png"
        Image.new("RGB", (8, 8), "white").save(start)  # as a mask too: all is drawn anew
        quick += [f"--image={start}", f"--mask={start}" if form.config.inpaints else "--strength=1"]
    output, code = io.StringIO(), 0
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(output):
        try:
            sample.main(["a b", f"--weights={folder / form.weights}", *options, *quick])
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 1
    lines = output.getvalue().splitlines()
    errors = [line for line in lines if line.startswith("python -m minisdxl.sample: error: ")]
    if code not in ((2,) if refused else (0, 2)):
        raise Violation(f"the command ended with {code}: {lines}")
    if (code == 2) != (lines[-1:] == errors and len(errors) == 1) or (code == 2) == picture.exists():
        raise Violation(f"the command ended with {code} and {'a' if picture.exists() else 'no'} picture: {lines}")
    picture.unlink(missing_ok=True)


def place(files: Files, folder: Path, there: Files) -> None:
    """Replaces the files ``there`` in ``folder`` by ``files``; equal ones are left alone."""
    for path in sorted(there.keys() | files.keys()):
        content, target = files.get(path), folder / path
        if content == there.get(path):
            continue
        if target.is_dir():
            shutil.rmtree(target)
        else:
            target.unlink(missing_ok=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        match content:
            case "folder":
                target.mkdir()
            case "pipe":
                os.mkfifo(target)
            case bytes():
                target.write_bytes(content)


def work(results: Connection, numbers: Sequence[int], seed: int, folder: Path) -> None:
    """Runs cases in this process and sends a :class:`Result` for each."""
    torch.set_num_threads(1)
    logging.disable()
    limit_memory(MEMORY)
    there: dict[str, Files] = {name: {} for name in forms()}
    for number in numbers:
        signal.setitimer(signal.ITIMER_PROF, SECONDS)  # the system ends the process when they have passed
        case = make_case(number, seed)
        place(case.files, folder / case.form, there[case.form])
        there[case.form] = case.files
        results.send(examine(case, folder / case.form))
    signal.setitimer(signal.ITIMER_PROF, 0)


def limit_memory(more: int) -> None:
    """Limits this process to ``more`` bytes beyond its present size, on systems with /proc."""
    sizes = Path("/proc/self/statm")
    if sizes.exists():
        size = int(sizes.read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + more, resource.getrlimit(resource.RLIMIT_AS)[1]))


def results(numbers: Sequence[int], seed: int, folder: Path) -> Generator[Result, None, None]:
    """Runs cases in a child process, and yields their results up to the first case that kills it."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=work, args=(sender, numbers, seed, folder))
    child.start()
    sender.close()
    try:
        for _ in numbers:
            if not receiver.poll(PATIENCE):
                yield Result(None, f"no result in {PATIENCE} s")
                return
            try:
                yield receiver.recv()
            except EOFError:
                child.join()
                yield Result(None, how_it_ended(child.exitcode or 0))
                return
    finally:
        child.kill()
        child.join()


def how_it_ended(code: int) -> str:
    """The reason why a process ended, from its exit code."""
    if code == -signal.SIGPROF:
        return f"took more than {SECONDS} s of the processor"
    return f"the process ended with {signal.Signals(-code).name if code < 0 else f'exit code {code}'}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs cases; exit code 0 without violations, 1 at the first one, 2 with one line on bad input."""
    parser = Parser(prog="python -m tools.fuzz", description="Damages model files and checks how they load.")
    parser.add_argument("--cases", type=int, default=1000, help="number of cases (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the damage (default: %(default)s)")
    parser.add_argument("--case", type=int, metavar="N", help="run only this case and print its result")
    parser.add_argument("--folder", type=Path, help="keep the files of the last case here (default: delete them)")
    options = parser.parse_args(arguments)
    if options.cases < 1:
        parser.error(f"--cases is {options.cases}, expected 1 or more")
    numbers = range(options.cases) if options.case is None else range(options.case, options.case + 1)
    counts: Counter[tuple[str, bool]] = Counter()
    forms()  # before the process forks
    began = time.perf_counter()
    with contextlib.ExitStack() as stack:
        folder = options.folder or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        outcomes = stack.enter_context(contextlib.closing(results(numbers, options.seed, folder)))
        for number, result in zip(numbers, tqdm(outcomes, total=len(numbers), unit="case", disable=None), strict=False):
            case = make_case(number, options.seed)
            counts[case.damage, result.message is None] += 1
            came = "loaded" if result.message is None else f"refused: {result.message}"
            if options.case is not None:
                print(f"{case}; {came}")
            if result.violation is not None:
                again = f"python -m tools.fuzz --case {number} --seed {options.seed}"
                parser.exit(1, f"{case}: {result.violation}\n{again}\n")
    seconds = time.perf_counter() - began
    print("| damage | cases | refused | loaded, and right |\n| --- | --- | --- | --- |")
    for damage in sorted({damage for damage, _ in counts}):
        refused, loaded = counts[damage, False], counts[damage, True]
        print(f"| {damage} | {refused + loaded} | {refused} | {loaded} |")
    refused = sum(count for (_, loaded), count in counts.items() if not loaded)
    print(
        f"{counts.total()} cases with seed {options.seed}: {refused} refused, {counts.total() - refused} loaded and "
        f"right, 0 violations; {seconds:.0f} s, {counts.total() / seconds:.0f} cases a second"
    )


if __name__ == "__main__":
    main()
