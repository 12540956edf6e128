"""A run of ``minisdxl.sample``: pictures made in batches, with what they cost, progress and previews."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import torch
from PIL import Image
from tqdm import tqdm

from atedm.plan import TokenPlan
from minisdxl.cli.jobs import Job
from minisdxl.cli.picture_files import InitImage, side_by_side, write_picture
from minisdxl.cli.previews import Preview, RGBMap, fit_rgb
from minisdxl.config import ModelConfig
from minisdxl.cost import count, format_flops
from minisdxl.pipeline import SDXL
from minisdxl.samplings import Sampling
from minisdxl.settings import Settings, first_step, split_step, token_plans

LOW_MEMORY_STRIP_ROWS = 8  # rows of the latent decoded at once, with --low-memory


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
            write_picture(job.target, image, {**self.settings, **own_record(job, self.options, self.settings)})
            yield picture

    def draw(self, jobs: Sequence[Job]) -> Iterator[tuple[Job, Image.Image, dict[str, Any]]]:
        """Makes a batch, and yields each job with its picture and what the report says of it.

        All jobs have one :meth:`context_length`.
        With ``--compare`` FLOPs are those of the pruned half, and seconds those of both. Raises as
        :meth:`SDXL.generate`.
        """
        prune, began = self.options.prune, time.perf_counter()
        kinds = [None, prune] if self.options.compare else [prune]
        made = {kind: self._generate(jobs, kind) for kind in kinds}
        seconds = (time.perf_counter() - began) / len(jobs)
        flops, dense = (sum(self.step_flops(kind, jobs[0])) for kind in (prune, None))
        cost = {"flops": flops, "dense_flops": dense, "share": flops / dense}
        for index, job in enumerate(jobs):
            image = made[prune][index]
            if self.options.compare:
                image = side_by_side({kind or "dense": images[index] for kind, images in made.items()})
            record = own_record(job, self.options, self.settings)
            yield job, image, {"path": str(job.target), **record, "seconds": seconds, **cost}

    def context_length(self, job: Job) -> int:
        """Text tokens that the U-Net attends to: those of the longer of prompt and negative prompt."""
        prompts = [job.prompt] if job.cfg == 1 else [job.prompt, job.negative]
        return self.sdxl.text.context_length(prompts, self.sdxl.tokenizer)

    def step_flops(self, prune: str | None, job: Job) -> list[int]:
        """What the U-Net costs for a job's picture in each step that is run, both halves of guidance together."""
        config, strength, text = self.sdxl.config, self.options.strength, self.context_length(job)
        first = 0 if strength is None else first_step(job.steps, strength)
        stages = [config] * job.steps
        if self.sdxl.refiner is not None:
            sigmas = self.sampling.sigmas(job.steps, config.noise)
            split = split_step(self.options.refiner_start, sigmas, config.noise, first)
            stages[split:] = [self.sdxl.refiner.config] * (job.steps - split)
        _, height, width = config.latent_shape(job.size)
        plans = {stage.name: token_plans(stage, prune, job.steps) for stage in stages}

        @cache
        def cost(stage: ModelConfig, plan: TokenPlan) -> int:
            return count(stage, height, width, plan, text).total

        guidance, calls = 1 if job.cfg == 1 else 2, self.sampling.calls(job.steps)
        return [
            guidance * calls[step] * cost(stages[step], plans[stages[step].name][step])
            for step in range(first, job.steps)
        ]

    @cached_property
    def _rgb(self) -> RGBMap:
        return fit_rgb(self.sdxl.vae)

    def _generate(self, jobs: Sequence[Job], prune: str | None) -> list[Image.Image]:
        """Shows progress on a terminal."""
        options, job = self.options, jobs[0]
        flops = self.step_flops(prune, job)
        first = job.steps - len(flops)
        preview = None
        if options.preview is not None:
            kind = f"-{'dense' if prune is None else 'pruned'}" if options.compare else ""
            targets = [job.target.with_stem(job.target.stem + kind) for job in jobs]
            preview = Preview(self._rgb, options.preview, targets)
        with tqdm(total=len(flops), desc=prune or "dense", unit="step", disable=not sys.stderr.isatty()) as bar:

            def on_step(step: int, _: torch.Tensor) -> None:
                bar.set_postfix_str(f"{format_flops(len(jobs) * flops[step - first])}FLOPs/step", refresh=False)
                bar.update()
                if preview is not None:
                    preview.write(step)

            settings = Settings(
                negative=job.negative,
                sampling=self.sampling if preview is None else preview.watch(self.sampling),
                steps=job.steps,
                cfg=job.cfg,
                seed=job.seed,
                prune=prune,
                size=job.size,
                original_size=options.original_size,
                crop=options.crop,
                target_size=options.target_size,
                image=None if self.source is None else self.source.image,
                strength=options.strength,
                refiner_start=options.refiner_start,
                mask=None if self.mask is None else self.mask.image,
                strip_rows=LOW_MEMORY_STRIP_ROWS if options.low_memory else None,
            )
            return self.sdxl.generate([job.prompt for job in jobs], settings, on_step=on_step)


def own_record(job: Job, options: argparse.Namespace, settings: Mapping[str, Any]) -> dict[str, Any]:
    """What is recorded of a picture alone: its prompt, and what differs from ``settings``, which the run's share."""
    size = "{}x{}".format(*job.size)
    own = {"steps": job.steps, "cfg": job.cfg, "size": size}
    own |= {key: size for key in ("original_size", "target_size") if getattr(options, key) is None}
    prompt = {"prompt": job.prompt, "negative": job.negative, "seed": job.seed}
    return prompt | {key: value for key, value in own.items() if value != settings[key]}
