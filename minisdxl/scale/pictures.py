"""``minisdxl.sample --workers``: the missing pictures of a folder, made by the workers of a cluster."""

from __future__ import annotations

import argparse
import platform
import sys
import time
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from minisdxl.cli.jobs import Job, batches
from minisdxl.cli.prompt_files import RANDOM, read_prompts
from minisdxl.cli.reports import versions, write_report
from minisdxl.cli.runs import Run, own_record
from minisdxl.config import ModelConfig
from minisdxl.loading import weights_path
from minisdxl.prompting.chunks import Embedding, chunks
from minisdxl.scale.cluster import Lost, Placement, answers, connected, place
from minisdxl.scale.folder import FAILURES, RESULTS, RunFolder
from minisdxl.scale.store import Store
from minisdxl.scale.worker import PictureWorker, Task, Unit
from minisdxl.tokenizer import Tokenizer, load_vocabulary

SECONDS, LOG_SECONDS = 0.1, 10.0  # between updates of the bar, on a terminal and elsewhere


def make_at_scale(
    options: argparse.Namespace,
    jobs: Sequence[Job],
    length: Callable[[Job], int],
    run: Callable[..., Run],
    settings: Callable[[str], dict[str, Any]],
) -> None:
    """Makes the pictures of ``jobs`` that the folder ``options.folder`` lacks, and reports.

    Args:
        options: of ``minisdxl.sample``, settled.
        jobs: all pictures of the run; their targets are names in the folder.
        length: the context length of a job, as of :meth:`Run.context_length`.
        run: :class:`Run` with all but its model and settings.
        settings: what all pictures share, made on a device.

    Raises:
        ValueError: for options that do not go with workers, and a folder of another run.
        OSError: if an address does not answer, a worker cannot write, or pictures failed, of which the first is named.
    """
    check_options(options, jobs)
    began = time.perf_counter()
    with connected(options.ray_address):
        placement = place(options.workers, options.device, options.threads)
        options.device = placement.device
        device = "cuda:0" if placement.device == "cuda" else placement.device  # a worker sees its own GPU alone
        threads = {} if placement.threads is None else {"threads": placement.threads}
        shared = settings(device) | threads
        records = {str(job.target): own_record(job, options, shared) for job in jobs}
        folder = RunFolder(Store(options.folder), shared, records)
        manifest = folder.begin(versions("ray", "fsspec"))
        there = folder.done()
        units = missing_units(jobs, options.batch, length, there)
        task = Task(options, run, shared, folder.store, manifest, placement.threads, Path.cwd(), platform.node())
        made, errors = _make(placement, task, units, len(jobs), len(there))
    failures = [{"path": name, **records[name], "error": errors[name]} for name in records if name in errors]
    folder.finish(failures)
    seconds = time.perf_counter() - began
    report = {
        "settings": shared,
        "versions": versions("ray", "fsspec"),
        "folder": options.folder,
        "results": RESULTS,
        "workers": placement.workers,
        "pictures": len(jobs),
        "there": len(there),
        "made": made,
        "failed": len(failures),
        "seconds": seconds,
        "failures": failures,
    }
    if options.json is not None:
        write_report(options.json, report)
    print(
        f"{len(there) + made} of {len(jobs)} pictures are in {options.folder}: {made} made in {seconds:.1f} s by "
        f"{placement.workers} workers, {len(there)} were there, {len(failures)} failed",
        file=sys.stderr if options.json == "-" else sys.stdout,
    )
    if failures:
        raise ChildProcessError(
            f"{len(failures)} of {len(jobs)} pictures failed, the first of them {failures[0]['path']} "
            f"({failures[0]['error']:.200}); {FAILURES} has all, and the same command tries them again"
        )


def check_options(options: argparse.Namespace, jobs: Sequence[Job]) -> None:
    """Raises ``ValueError`` for options that cannot be kept when a run is spread over workers and gone on with."""
    for name in ("preview", "low_memory"):
        if getattr(options, name):
            raise ValueError(f"--{name.replace('_', '-')} is for one process, expected it without --workers")
    if options.folder.lower().endswith(".png"):
        raise ValueError(f"--out is the file {options.folder} with --workers, expected a folder")
    prompts = read_prompts(options.file) if options.file else []
    if RANDOM in (options.seed, *(prompt.seed for prompt in prompts)):
        raise ValueError(f"seed is {RANDOM}, a random one, with --workers; expected a seed that the next run has too")
    target, count = Counter(job.target for job in jobs).most_common(1)[0]
    if count > 1:
        raise ValueError(f"{count} pictures have the name {target}, expected other seeds or prompts")


def context_chunks(
    options: argparse.Namespace, config: ModelConfig, embeddings: Mapping[str, Embedding]
) -> Callable[[Job], int]:
    """Chunks of the context of a job, without a model; jobs of one batch have equally many."""
    tokenizer = Tokenizer(*load_vocabulary(weights_path(options.weights), options.tokenizer), config.text)

    def length(job: Job) -> int:
        prompts = [job.prompt] if job.cfg == 1 else [job.prompt, job.negative]
        return max(len(chunks(prompt, tokenizer, embeddings)) for prompt in prompts)

    return length


def missing_units(jobs: Sequence[Job], batch: int, length: Callable[[Job], int], there: Collection[str]) -> list[Unit]:
    """The batches of all jobs, as far as one of their files is missing.

    They are the batches of every run of the command, so a picture that is made later has the same bits.
    """
    units = []
    for each in batches(jobs, batch, length):
        wanted = frozenset(str(job.target) for job in each) - frozenset(there)
        if wanted:
            units.append(Unit(tuple(each), wanted))
    return units


def _make(
    placement: Placement, task: Task, units: Sequence[Unit], total: int, there: int
) -> tuple[int, dict[str, str]]:
    """Makes units with progress on stderr. The number of pictures made, and the error of each that was not."""
    made, errors = 0, dict[str, str]()
    pause = SECONDS if sys.stderr.isatty() else LOG_SECONDS
    title = f"{placement.workers} workers"
    with tqdm(total=total, initial=there, unit="picture", desc=title, mininterval=pause) as bar:
        for answer in answers(placement, PictureWorker, task, units):
            if isinstance(answer, Lost):
                errors |= dict.fromkeys(answer.unit.wanted, answer.reason)
            elif answer.error is not None:
                errors |= dict.fromkeys(answer.names, answer.error)
            else:
                made += len(answer.names)
                bar.update(len(answer.names))
            bar.set_postfix_str(f"{len(errors)} failed" if errors else "")
    return made, errors
