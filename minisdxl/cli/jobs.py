"""The pictures of a run: which, in what order, into which files, and how many at a time."""

from __future__ import annotations

import argparse
import os
import re
import secrets
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from minisdxl.cli.previews import preview_path
from minisdxl.cli.prompt_files import RANDOM, Prompt, read_prompts
from minisdxl.cli.prompt_syntax import check_syntax
from minisdxl.config import ModelConfig
from minisdxl.seeds import check_seed
from minisdxl.settings import Settings, check_settings, first_step, split_step

LONGEST_NAME = 255  # bytes of a file's name, on all common file systems
WORDS, KIND = 100, 60  # bytes of a picture's name that its prompt and its preset may take


class Job(NamedTuple):
    """One picture to be made."""

    prompt: str
    negative: str
    seed: int
    target: Path
    steps: int
    cfg: float
    size: tuple[int, int]

    @property
    def shared(self) -> tuple[str, int, float, tuple[int, int]]:
        """What all pictures of a batch have in common."""
        return self.negative, self.steps, self.cfg, self.size


def find_jobs(options: argparse.Namespace, config: ModelConfig, embeddings: Collection[str] = ()) -> list[Job]:
    """What the options of ``minisdxl.sample`` ask for, prompt by prompt; they are settled, so no number is ``None``.

    Picture i has seed ``--seed`` + i, unless its prompt has a seed in the file. Warns of web-UI syntax that has no
    effect; ``embeddings`` are the names of those that are loaded. Raises
    ``ValueError`` for options that contradict each other or do not fit the model, and as
    :func:`minisdxl.cli.prompt_files.read_prompts`.
    """
    prompts = [Prompt(text) for text in options.prompts] + (read_prompts(options.file) if options.file else [])
    if not prompts:
        raise ValueError("there is no prompt, expected one or more")
    each, jobs, taken = options.images_per_prompt, list[Job](), Counter[Path]()
    start = drawn_seed(options.seed)
    for index, prompt in enumerate(prompts):
        first = start + index * each if prompt.seed is None else drawn_seed(prompt.seed)
        negative = options.negative if prompt.negative is None else prompt.negative
        steps, cfg, size = _own_settings(prompt, options, config)
        for seed in range(first, first + each):
            target = _target(options, prompt.prompt, check_seed(seed))
            taken[target] += 1
            if taken[target] > 1:  # seeds of a file may repeat, and names hold no more than the first words
                target = target.with_stem(f"{target.stem}-{taken[target]}")
            jobs.append(Job(prompt.prompt, negative, seed, target, steps, cfg, size))
    if _is_file(options.out) and len(jobs) > 1:
        raise ValueError(f"--out is the file {options.out} for {len(jobs)} pictures, expected a folder")
    check_syntax([text for job in jobs for text in (job.prompt, job.negative)], embeddings)
    return jobs


def drawn_seed(seed: int) -> int:
    """A random seed of 32 bits for ``RANDOM``, others as they are."""
    return secrets.randbelow(2**32) if seed == RANDOM else seed


def _own_settings(
    prompt: Prompt, options: argparse.Namespace, config: ModelConfig
) -> tuple[int, float, tuple[int, int]]:
    """Steps, guidance scale and size of a prompt's pictures. Raises ``ValueError``."""
    width, height = options.size
    steps = options.steps if prompt.steps is None else prompt.steps
    cfg = options.cfg if prompt.cfg is None else prompt.cfg
    size = (width if prompt.width is None else prompt.width, height if prompt.height is None else prompt.height)
    if (steps, cfg, size) == (options.steps, options.cfg, options.size):
        return steps, cfg, size
    try:
        if options.budget is not None and (steps, size) != (options.steps, options.size):
            raise ValueError(f"--budget is {options.budget}, which is for pictures of one size and number of steps")
        methods = {"prune": options.prune, "skip": options.skip, "guide": options.guide}
        run = check_settings(Settings(sampling=options.sampling, steps=steps, cfg=cfg, size=size, **methods), config)
        first = 0 if options.strength is None else first_step(steps, options.strength)
        if options.refiner_start is not None:
            split_step(options.refiner_start, run.sigmas, config.noise, first)
    except ValueError as error:
        raise ValueError(f"{prompt.place}: {error}") from error
    return steps, cfg, size


def _is_file(out: Path) -> bool:
    return out.suffix.lower() == ".png" and not out.is_dir()


def _target(options: argparse.Namespace, prompt: str, seed: int) -> Path:
    """The file of a picture. Its name has room for what previews and pictures of the same name add to it."""
    out: Path = options.out
    if _is_file(out):
        longest = preview_path(out.with_stem(f"{out.stem}-pruned"), options.steps) if options.preview else out
        if (length := len(os.fsencode(longest.name))) > LONGEST_NAME:
            added = " with what previews add to it" if options.preview else ""
            raise ValueError(f"--out is {out}, a name of {length} bytes{added}, expected at most {LONGEST_NAME}")
        return out
    if out.suffix.lower() in Image.registered_extensions() and not out.is_dir():
        raise ValueError(f"--out is {out}, expected a .png file or a folder")
    words = _shortened("-".join(re.findall(r"\w+", prompt.lower()))[:60], WORDS)
    method = "-".join(text for text in (options.prune, options.skip, options.guide) if text is not None)
    kind = "compare" if options.compare else _shortened(re.sub(r"[^\w.=-]+", "-", method or "dense"), KIND)
    return out / f"{seed}-{words or 'untitled'}-{kind}.png"


def _shortened(text: str, most: int) -> str:
    """The beginning of a text that takes so many bytes at most."""
    return text.encode()[:most].decode(errors="ignore")


def batches(jobs: Iterable[Job], size: int, length: Callable[[Job], int]) -> Iterator[list[Job]]:
    """Up to ``size`` neighbours at a time that one call can make: all but the prompt shared, seeds that count up.

    They have one context ``length``: a shorter context would be padded, which changes its picture.
    """
    batch: list[Job] = []
    for job in jobs:
        if batch and (
            len(batch) == size
            or (job.shared, job.seed) != (batch[-1].shared, batch[-1].seed + 1)
            or length(job) != length(batch[-1])
        ):
            yield batch
            batch = []
        batch.append(job)
    if batch:
        yield batch
