"""What the U-Net learns in one step: from noisy drawn pictures, or from a teacher along its own sampling."""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from argparse import Namespace
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from minisdxl.config import SHAPES
from minisdxl.preconditioning import discrete_sigmas
from minisdxl.tokenizer import Tokenizer
from minisdxl.vae import VAE
from tools.drawn.world import WORLDS
from tools.training.batches import Batch, BatchSize, to_images
from tools.training.model import Model
from tools.training.steps import noise_levels
from tools.training.teacher import Teacher


class Graded(NamedTuple):
    """How wrong the model was in one step."""

    errors: Tensor  # (B,), squared
    share: Tensor  # (B,), in [0, 1): position of each in the noise levels, lowest first
    beside: Tensor  # another loss, a number


class Lesson(ABC):
    """One kind of training for the U-Net.

    In two parts, because a GPU records the second one and repeats it (``tools.training.learning``): what is different
    in each step goes through the tensors of the first.
    """

    @abstractmethod
    def inputs(self, step: int, size: BatchSize) -> tuple[Tensor, ...]:
        """What step ``step`` learns from, on the model's device."""

    @abstractmethod
    def grade(self, *inputs: Tensor) -> Graded:
        """The model's errors on these :meth:`inputs`, with gradients. Waits for no result of the GPU."""

    def state(self) -> dict[str, Any]:
        """What a run that was stopped needs to go on, for :meth:`load_state`."""
        return {}

    def load_state(self, state: dict[str, Any]) -> None:  # noqa: B027  # most have none
        """Restores a :meth:`state`."""


class NoisyPictures(Lesson):
    """Drawn pictures with noise. The target is the noise (epsilon prediction) or the teacher's prediction."""

    def __init__(
        self, model: Model, teacher: Teacher | None, vae: VAE, tokenizer: Tokenizer, drawn: Iterator[Batch]
    ) -> None:
        self.model, self.teacher, self.vae, self.tokenizer, self.drawn = model, teacher, vae, tokenizer, drawn
        self.device = next(model.parameters()).device
        self.levels = discrete_sigmas(SHAPES.noise).float().to(self.device)

    def inputs(self, step: int, size: BatchSize) -> tuple[Tensor, ...]:
        """The next drawn pictures, their captions, and noise."""
        torch.manual_seed(step)
        pictures, captions = next(self.drawn)
        # Offset noise, as in SDXL's own training but twice as strong. Without it the noisiest latent still shows its
        # mean. The model then takes the background from it, and at sampling, where it is 0, no caption makes it white.
        shape = (size.count, *SHAPES.latent_shape((size.side, size.side)))
        noise = torch.randn(shape, device=self.device) + 0.1 * torch.randn(*shape[:2], 1, 1, device=self.device)
        drop = torch.rand(size.count) < 0.1
        made = (noise_levels(size.count), *self.tokenizer(captions), drop, size_numbers(size.side, size.count))
        return torch.from_numpy(pictures).to(self.device), noise, *(each.to(self.device) for each in made)

    def grade(self, *inputs: Tensor) -> Graded:
        """The errors on noisy latents of the pictures."""
        pictures, noise, share, ids, ids_2, drop, sizes = inputs
        images = to_images(pictures)
        with torch.no_grad():
            latents = self.vae.encode(images).float()
        timestep = (share * SHAPES.noise.steps).long()
        sigma = _wide(self.levels[timestep])
        noisy = (latents + sigma * noise) / (1 + sigma.square()).sqrt()
        words = self.model.text(ids, ids_2)
        predicted = self.model(noisy, timestep, words.zeroed(drop), sizes).float()
        seen = self.model.thumbnails.loss(words, images)
        target = noise if self.teacher is None else self.teacher(noisy, timestep, ids, ids_2, drop, sizes)
        return Graded(_squared(predicted - target), share, seen)


class OwnSampling(Lesson):
    """Pictures on their way from noise to the end: in each step of training, a step of sampling with guidance.

    A student that learns on noisy drawn pictures never meets what its own errors lead to, nor what guidance makes of a
    latent, and guidance multiplies its errors. Here the student samples, and learns what the teacher would have
    predicted at these latents (DAgger: Ross et al. 2011, arXiv:1011.0686; for guided diffusion: Meng et al. 2023,
    arXiv:2210.03142, section 3). The errors are those of both predictions and of what guidance makes of them.

    The pictures of a batch are at different places of their sampling, evenly spread. Each needs two predictions, so a
    batch has half as many as one of drawn pictures.
    """

    def __init__(
        self, model: Model, teacher: Teacher, tokenizer: Tokenizer, options: Namespace, steps: int = 25
    ) -> None:
        """``steps`` of a picture, at equal distances. Its timesteps are shifted by a random number, so all are met."""
        self.model, self.teacher, self.tokenizer = model, teacher, tokenizer
        self.steps, self.stride = steps, SHAPES.noise.steps // steps
        self.seed, self.cfg, self.scene = options.seed, options.cfg, WORLDS[options.world]
        self.device = next(model.parameters()).device
        self.levels = discrete_sigmas(SHAPES.noise).float()
        count = max(1, options.batch // 4)
        self.offsets = torch.arange(count) * self.steps // count
        self.x = torch.zeros(count, *SHAPES.latent_shape((SHAPES.size, SHAPES.size)), device=self.device)
        self.captions, self.shifts = [""] * count, torch.zeros(count, dtype=torch.long)

    def inputs(self, step: int, size: BatchSize) -> tuple[Tensor, ...]:
        """The noise levels, fresh noise and captions of a step of sampling, in which finished pictures begin anew."""
        if not all(self.captions):  # a new run: sample until each picture is at its place
            with torch.no_grad():
                for before in range(step - self.steps, step):
                    self.grade(*self._inputs(before))
            self.teacher.forget()
        return self._inputs(step)

    def _inputs(self, step: int) -> tuple[Tensor, ...]:
        rng = random.Random(f"own sampling {self.seed} {step}")
        generator = torch.Generator().manual_seed(rng.getrandbits(32))
        place = (step + self.offsets) % self.steps
        begins = (place == 0).nonzero().flatten()
        for row in begins.tolist():
            self.captions[row] = self.scene(rng, "train").caption
            self.shifts[row] = rng.randrange(self.stride)
        first = (1 + self.levels[-1].square()).sqrt() * torch.randn(len(begins), *self.x.shape[1:], generator=generator)
        timestep = self._timesteps(place)
        sigma = self.levels[timestep]
        after = torch.where(place < self.steps - 1, self.levels[self._timesteps(place + 1)], 0)
        fresh = torch.randn(self.x.shape, generator=generator)
        made = (timestep, sigma, after, fresh, *self.tokenizer(self.captions), size_numbers(SHAPES.size, len(place)))
        self.x[begins.to(self.device)] = first.to(self.device)  # only now: a GPU first ends the step before
        return tuple(each.to(self.device) for each in made)

    def grade(self, *inputs: Tensor) -> Graded:
        """The errors on the latents of this step, and a step of sampling."""
        timestep, sigma, after, fresh, ids, ids_2, sizes = inputs
        scaled = self.x / _wide((1 + sigma.square()).sqrt())
        twice = [torch.cat([each, each]) for each in (scaled, timestep, ids, ids_2, sizes)]
        x, timesteps, ids, ids_2, sizes = twice
        drop = torch.arange(len(x), device=self.device) >= len(scaled)
        words = self.model.text(ids, ids_2).zeroed(drop)
        ours = self._guided(self.model(x, timesteps, words, sizes).float())
        theirs = self._guided(self.teacher(x, timesteps, ids, ids_2, drop, sizes))
        down = after.square() / sigma  # as minisdxl.solvers.euler_ancestral, each row with its own noise level
        up = (after.square() - down.square()).sqrt()
        self.x += _wide(down - sigma) * ours[-1].detach() + _wide(up) * fresh
        errors = torch.stack([_squared(one - other) for one, other in zip(ours, theirs, strict=True)]).sum(dim=0)
        return Graded(errors, timestep / SHAPES.noise.steps, errors.new_zeros(()))

    def _timesteps(self, place: Tensor) -> Tensor:
        last = SHAPES.noise.steps - 1
        return torch.where(place == 0, last, (last - self.stride * place - self.shifts).clamp_min(0))

    def _guided(self, both: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        conditional, unconditional = both.chunk(2)
        return conditional, unconditional, unconditional + self.cfg * (conditional - unconditional)

    def state(self) -> dict[str, Any]:
        """The pictures on their way."""
        return {"x": self.x, "captions": self.captions, "shifts": self.shifts}

    def load_state(self, state: dict[str, Any]) -> None:
        """Restores a :meth:`state`. That of another lesson has no pictures on their way: they begin as in a new run."""
        if "x" not in state:
            return
        self.x.copy_(state["x"])
        self.captions, self.shifts = state["captions"], state["shifts"].cpu()


def size_numbers(side: int, count: int) -> Tensor:
    """SDXL's size conditioning (count, 6) of whole pictures of ``side`` pixels."""
    return torch.tensor([[side, side, 0, 0, side, side]]).repeat(count, 1)


def _wide(numbers: Tensor) -> Tensor:
    return numbers[:, None, None, None]


def _squared(differences: Tensor) -> Tensor:
    return differences.square().mean(dim=(1, 2, 3))
