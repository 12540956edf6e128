"""A run of ``minisdxl.sample``: pictures made in batches, with what they cost, progress and previews."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import torch
from PIL import Image
from tqdm import tqdm

from minisdxl.cli.jobs import Job
from minisdxl.cli.picture_files import InitImage, side_by_side, write_picture
from minisdxl.cli.pictures import picture_settings
from minisdxl.cli.previews import Preview, RGBMap, fit_rgb
from minisdxl.cost import format_flops
from minisdxl.pipeline import SDXL
from minisdxl.samplings import Sampling
from minisdxl.settings import CheckedSettings, Settings, check_settings
from minisdxl.steps.cost import PictureCost, picture_cost
from minisdxl.steps.plan import StepPlan, describe

REALIZED = "realized"  # the plans of the steps that were run, a setting that shows only in the run


class Method(NamedTuple):
    """What makes a picture cheaper than a dense one: the texts of ``--prune``, ``--skip`` and ``--guide``."""

    prune: str | None = None
    skip: str | None = None
    guide: str | None = None

    def __str__(self) -> str:
        return " ".join(text for text in self if text is not None) or "dense"


DENSE = Method()


class Drawn(NamedTuple):
    """A picture, and the plans of the steps that made it."""

    image: Image.Image
    plans: Sequence[StepPlan]
    split: int  # the first step of the refiner; the number of steps without one


@dataclass(frozen=True)
class Run:
    """What all pictures of a run share: a model, the command's options, and what is recorded of both.

    ``options`` has numbers where the command line may have had none, which hold where a job has no others; ``source``
    is the picture to start from, and ``mask`` says what is drawn anew in it.
    """

    sdxl: SDXL
    sampling: Sampling
    options: argparse.Namespace
    source: InitImage | None
    mask: InitImage | None
    settings: dict[str, Any]

    def make(self, jobs: Sequence[Job]) -> Iterator[dict[str, Any]]:
        """Makes a batch, writes one picture after the other, and yields what the report says of each.

        Raises as :meth:`draw`, and ``OSError``.
        """
        for job, image, picture in self.draw(jobs):
            write_picture(job.target, image, self.metadata(job, picture))
            yield picture

    def metadata(self, job: Job, picture: Mapping[str, Any]) -> dict[str, Any]:
        """What the file of a picture says of how it was made, of what the report says of it."""
        made = {REALIZED: picture[REALIZED]} if REALIZED in picture else {}
        return {**self.settings, **own_record(job, self.options, self.settings), **made}

    def draw(self, jobs: Sequence[Job]) -> Iterator[tuple[Job, Image.Image, dict[str, Any]]]:
        """Makes a batch, and yields each job with its picture and what the report says of it.

        All jobs have one :meth:`context_length`.
        With ``--compare`` FLOPs are those of the pruned half, and seconds those of both. Raises as
        :meth:`SDXL.generate`.
        """
        options, began = self.options, time.perf_counter()
        method = Method(options.prune, options.skip, options.guide)
        made = {each: self._generate(jobs, each) for each in ((DENSE, method) if options.compare else (method,))}
        seconds = (time.perf_counter() - began) / len(jobs)
        first = made[method][0]
        dense = self.cost([StepPlan()] * len(first.plans), jobs[0], first.split).flops
        for index, (job, (image, plans, split)) in enumerate(zip(jobs, made[method], strict=True)):
            if options.compare:
                image = side_by_side({str(each): pictures[index].image for each, pictures in made.items()})
            spent = self.cost(plans, job, split)
            record = own_record(job, options, self.settings)
            if options.skip is not None or options.guide is not None:
                record |= {REALIZED: describe(plans)}
            cost = {"flops": spent.flops, "dense_flops": dense, "share": spent.flops / dense, **spent.steps()}
            yield job, image, {"path": str(job.target), **record, "seconds": seconds, **cost}

    def context_length(self, job: Job) -> int:
        """Text tokens that the U-Net attends to: those of the longer of prompt and negative prompt."""
        prompts = [job.prompt] if job.cfg == 1 else [job.prompt, job.negative]
        return self.sdxl.text.context_length(prompts, self.sdxl.tokenizer)

    def cost(self, plans: Sequence[StepPlan], job: Job, split: int) -> PictureCost:
        """What the U-Net costs for a job's picture under the plans of the steps that are run, the last ones.

        Those from step ``split`` on are the refiner's.
        """
        costs = [self._cost([plan], job, step >= split, [calls]) for step, plan, calls in self._steps(plans, job)]
        return PictureCost(*map(sum, zip(*costs, strict=True)))

    def _steps(self, plans: Sequence[StepPlan], job: Job) -> Iterator[tuple[int, StepPlan, int]]:
        """Number, plan and calls of the denoiser of each step that is run."""
        first = job.steps - len(plans)
        return zip(range(first, job.steps), plans, self.sampling.calls(job.steps)[first:], strict=True)

    def _cost(self, plans: Sequence[StepPlan], job: Job, refined: bool, calls: Sequence[int]) -> PictureCost:
        sdxl = self.sdxl.refiner if refined and self.sdxl.refiner is not None else self.sdxl
        _, height, width = self.sdxl.config.latent_shape(job.size)
        return picture_cost(sdxl.config, height, width, plans, self.context_length(job), job.cfg, calls)

    def _check(self, settings: Settings) -> CheckedSettings:
        return check_settings(settings, self.sdxl.config, self.sdxl.refiner.config if self.sdxl.refiner else None)

    @cached_property
    def _rgb(self) -> RGBMap:
        return fit_rgb(self.sdxl.vae)

    def _generate(self, jobs: Sequence[Job], method: Method) -> list[Drawn]:
        """Shows progress on a terminal."""
        options, job = self.options, jobs[0]
        preview = None
        if options.preview is not None:
            kind = f"-{'dense' if method == DENSE else 'pruned'}" if options.compare else ""
            targets = [job.target.with_stem(job.target.stem + kind) for job in jobs]
            preview = Preview(self._rgb, options.preview, targets)
        settings = replace(
            picture_settings(options, self.source, self.mask),
            negative=job.negative,
            sampling=self.sampling if preview is None else preview.watch(self.sampling),
            steps=job.steps,
            cfg=job.cfg,
            seed=job.seed,
            size=job.size,
            **method._asdict(),
        )
        run, realized = self._check(settings), list[Sequence[StepPlan]]()
        plans = run.planner.base if run.planner else [StepPlan(plan) for plan in run.plans[run.first :]]
        flops = {
            step: self._cost([plan], job, step >= run.split, [calls]).flops
            for step, plan, calls in self._steps(plans, job)
        }
        with tqdm(total=len(plans), desc=str(method), unit="step", disable=not sys.stderr.isatty()) as bar:

            def on_step(step: int, _: torch.Tensor) -> None:
                bar.set_postfix_str(f"{format_flops(len(jobs) * flops[step])}FLOPs/step", refresh=False)
                bar.update()
                if preview is not None:
                    preview.write(step)

            images = self.sdxl.generate([job.prompt for job in jobs], settings, on_step=on_step, realized=realized)
        return [
            Drawn(image, made, run.split) for image, made in zip(images, realized or [plans] * len(jobs), strict=True)
        ]


def own_record(job: Job, options: argparse.Namespace, settings: Mapping[str, Any]) -> dict[str, Any]:
    """What is recorded of a picture alone: its prompt, and what differs from ``settings``, which the run's share."""
    size = "{}x{}".format(*job.size)
    own = {"steps": job.steps, "cfg": job.cfg, "size": size}
    own |= {key: size for key in ("original_size", "target_size") if getattr(options, key) is None}
    prompt = {"prompt": job.prompt, "negative": job.negative, "seed": job.seed}
    return prompt | {key: value for key, value in own.items() if value != settings[key]}
