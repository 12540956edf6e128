"""The pictures of a run: which, in what order, into which files, and how many at a time."""

from __future__ import annotations

import argparse
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from minisdxl.cli.prompt_files import Prompt, read_prompts
from minisdxl.sampler import check_seed


class Job(NamedTuple):
    """One picture to be made."""

    prompt: str
    negative: str
    seed: int
    target: Path


def find_jobs(options: argparse.Namespace) -> list[Job]:
    """What the options of ``minisdxl.sample`` ask for, prompt by prompt.

    Picture i has seed ``--seed`` + i, unless its prompt has a seed in the file. Raises ``ValueError`` for options that
    contradict each other, and as :func:`minisdxl.cli.prompt_files.read_prompts`.
    """
    prompts = [Prompt(text) for text in options.prompts] + (read_prompts(options.file) if options.file else [])
    if not prompts:
        raise ValueError("there is no prompt, expected one or more")
    each, jobs, taken = options.images_per_prompt, list[Job](), Counter[Path]()
    for index, prompt in enumerate(prompts):
        first = options.seed + index * each if prompt.seed is None else prompt.seed
        negative = options.negative if prompt.negative is None else prompt.negative
        for seed in range(first, first + each):
            target = _target(options, prompt.prompt, seed)
            taken[target] += 1
            if taken[target] > 1:  # seeds of a file may repeat, and names hold no more than the first words
                target = target.with_stem(f"{target.stem}-{taken[target]}")
            jobs.append(Job(prompt.prompt, negative, seed, target))
    seeds = [job.seed for job in jobs]
    check_seed(min(seeds))
    check_seed(max(seeds))
    if options.out.suffix and len(jobs) > 1:
        raise ValueError(f"--out is the file {options.out} for {len(jobs)} pictures, expected a folder")
    return jobs


def _target(options: argparse.Namespace, prompt: str, seed: int) -> Path:
    if options.out.suffix and options.out.suffix.lower() != ".png":
        raise ValueError(f"--out is {options.out}, expected a .png file or a folder")
    if options.out.suffix:
        return Path(options.out)
    words = "-".join(re.findall(r"\w+", prompt.lower()))[:60]
    kind = "compare" if options.compare else re.sub(r"[^\w.=-]+", "-", options.prune or "dense")[:60]
    return Path(options.out / f"{seed}-{words or 'untitled'}-{kind}.png")


def batches(jobs: Iterable[Job], size: int) -> Iterator[list[Job]]:
    """Up to ``size`` neighbours at a time that one call can make: one negative prompt, seeds that count up."""
    batch: list[Job] = []
    for job in jobs:
        if batch and (len(batch) == size or (job.negative, job.seed) != (batch[-1].negative, batch[-1].seed + 1)):
            yield batch
            batch = []
        batch.append(job)
    if batch:
        yield batch
