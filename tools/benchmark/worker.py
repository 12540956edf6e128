"""One measurement of ``tools.memory`` or ``tools.bench_image`` in a fresh process, printed as JSON in the last line.

Each function imports only what it measures, because imports count in the memory of the process.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from torch import nn

PROMPT = "a photograph of an astronaut riding a horse"
WARM = 2  # steps of the first of two pictures, which no method accelerates: most have nothing to skip in so few
PATCHES = ("deepcache", "tomesd")  # packages that accelerate diffusers' pipeline
DEEPCACHE_INTERVAL = 3  # steps from one that runs the whole U-Net to the next


def ours(weights: str, folder: str, dtype: str) -> dict[str, Any]:
    """Loads a model with ``minisdxl.load``."""
    import torch

    began = _clocks()
    from minisdxl import load

    imported = _clocks()
    sdxl = load(weights, dtype=getattr(torch, dtype), tokenizer=Path(folder) / "tokenizer")
    called = _clocks()
    assert isinstance(sdxl.text, torch.nn.Module)
    return _loaded(began, imported, called, [sdxl.unet, sdxl.vae, sdxl.text])


def diffusers(weights: str, folder: str, dtype: str) -> dict[str, Any]:
    """Loads a model with diffusers. Its ``config=`` is a local folder, so it asks nothing of the hub.

    The VAE is converted to fp32. ``minisdxl.load`` does the same; diffusers does it with an fp16 VAE before decoding.
    """
    import torch

    began = _clocks()
    from diffusers import StableDiffusionXLPipeline

    imported = _clocks()
    pipeline = StableDiffusionXLPipeline.from_single_file(
        weights, config=folder, torch_dtype=getattr(torch, dtype), local_files_only=True
    )
    called = _clocks()
    pipeline.vae.float()
    modules = [pipeline.unet, pipeline.vae, pipeline.text_encoder, pipeline.text_encoder_2]
    return _loaded(began, imported, called, modules)


def picture(
    weights: str, folder: str, dtype: str, size: tuple[int, int] | None, steps: int, strip_rows: int | None
) -> dict[str, Any]:
    """Samples one picture with guidance. With ``strip_rows`` it drops the text encoders first and decodes in strips."""
    import torch

    from minisdxl import load

    stages: dict[str, dict[str, float]] = {}
    began = time.perf_counter()

    def note(stage: str) -> None:
        stages[stage] = {"seconds": time.perf_counter() - began, "resident": _memory("VmRSS"), "peak": _memory("VmHWM")}

    sdxl = load(weights, dtype=getattr(torch, dtype), tokenizer=Path(folder) / "tokenizer")
    note("loading")
    if strip_rows is not None:
        sdxl = sdxl.encode_ahead([PROMPT])
        note("encoding the prompt")
    sdxl.generate(
        [PROMPT],
        steps=steps,
        cfg=7.0,
        size=size,
        strip_rows=strip_rows,
        on_step=lambda step, _: note(f"step {step + 1} of {steps}"),
    )
    note("decoding")
    return {"stages": stages, "peak": _memory("VmHWM")}


def two_pictures(
    library: str,
    weights: str,
    folder: str,
    dtype: str,
    size: tuple[int, int],
    steps: int,
    cfg: float,
    started: float,
    each: int | None = None,
    method: dict[str, Any] | None = None,
    patch: str | None = None,
) -> dict[str, Any]:
    """Samples two pictures with guidance. Times the start, up to the first step of the first, and the whole second.

    With ``each`` there is one picture, which is decoded as soon as it had so many steps of each kind, and a picture of
    all steps is added up from those: see ``StepTimes``.

    ``started`` is ``time.time()`` when the process was requested. ``method`` has the fields of
    ``tools.evaluation.methods.Method``, for ours; ``patch`` is one of ``PATCHES``, for diffusers. Ours also counts the
    FLOPs of the picture, as planned.
    """
    import torch

    first_steps: list[float] = []
    counted: dict[str, int] = {}
    times: StepTimes

    def ended(step: int) -> bool:
        """Notes the end of a step, and says whether the picture may end with it."""
        if not first_steps:
            first_steps.append(time.time() - started)
        return times.ended(step)

    if library == "ours":
        from minisdxl import load
        from tools.evaluation.methods import Method, picture_flops, settings_of, step_plans

        sdxl = load(weights, dtype=getattr(torch, dtype), tokenizer=Path(folder) / "tokenizer")
        settings = settings_of(Method(**method or {}), "euler", steps, cfg, (size[0], size[1]))
        counted["flops"] = picture_flops(sdxl.config, settings)
        kinds: Sequence[Hashable] = step_plans(sdxl.config, settings)

        def make(steps: int, how: dict[str, Any]) -> Any:
            asked = {**how, "steps": steps, "cfg": cfg, "size": tuple(size)}
            asked["sampling"] = "euler"  # as diffusers does here
            return sdxl.generate([PROMPT], **asked, on_step=lambda step, _: ended(step))
    else:
        from diffusers import StableDiffusionXLPipeline

        pipeline = StableDiffusionXLPipeline.from_single_file(
            weights, config=folder, torch_dtype=getattr(torch, dtype), local_files_only=True, add_watermarker=False
        )
        pipeline.vae.float()
        pipeline.set_progress_bar_config(disable=True)
        _apply(patch, pipeline)
        kinds = [step % DEEPCACHE_INTERVAL == 0 if patch == "deepcache" else None for step in range(steps)]

        def seen(_: Any, step: int, __: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            pipeline._interrupt = ended(step)  # diffusers' documented way to stop after a step
            return tensors

        def make(steps: int, how: dict[str, Any]) -> Any:
            width, height = size
            asked = {"num_inference_steps": steps, "guidance_scale": cfg, "width": width, "height": height}
            return pipeline(PROMPT, **asked, callback_on_step_end=seen).images

    if each is None:
        times = StepTimes(kinds)
        make(WARM, {})
    times = StepTimes(kinds, each)
    make(steps, method or {})
    return {"first_step": first_steps[0], **times.picture(), **counted}


class StepTimes:
    """The time of a picture of all steps, from a picture that ends when ``each`` steps of every kind were timed.

    The first step is timed apart, with all that comes before it; what comes after the last one is decoding. Without
    ``each`` the picture has all its steps. Steps of one kind do the same work.
    """

    def __init__(self, kinds: Sequence[Hashable], each: int | None = None) -> None:
        self.kinds, self.each = kinds, each
        self.clock = time.perf_counter()
        self.seconds: list[float] = []

    def ended(self, step: int) -> bool:
        """Notes the end of step ``step``, counted from 0, and says whether enough steps were timed."""
        before, self.clock = self.clock, time.perf_counter()
        self.seconds.append(self.clock - before)
        if self.each is None:
            return False
        timed, all_steps = Counter(self.kinds[1 : step + 1]), Counter(self.kinds[1:])
        return all(timed[kind] >= min(self.each, number) for kind, number in all_steps.items())

    def picture(self) -> dict[str, Any]:
        """Seconds of a picture of all steps, of its decoding, and of the steps that were timed. Called at its end.

        A step that was not run counts as the median of its kind: the first ones still look for memory.
        """
        decoding = time.perf_counter() - self.clock
        of_kind = defaultdict[Hashable, list[float]](list)
        for kind, seconds in zip(self.kinds[1:], self.seconds[1:], strict=False):
            of_kind[kind].append(seconds)
        others = sum(statistics.median(of_kind[kind]) for kind in self.kinds[len(self.seconds) :])
        return {"picture": sum(self.seconds) + others + decoding, "decoding": decoding, "steps": self.seconds}


def _apply(patch: str | None, pipeline: Any) -> None:
    if patch == "deepcache":
        from DeepCache import DeepCacheSDHelper

        helper = DeepCacheSDHelper(pipe=pipeline)
        helper.set_params(cache_interval=DEEPCACHE_INTERVAL, cache_branch_id=0)
        helper.enable()
    elif patch == "tomesd":
        import tomesd

        tomesd.apply_patch(pipeline, ratio=0.5, max_downsample=4)


class Clocks(NamedTuple):
    """Seconds of the wall clock, and of the processor, which other programs disturb less."""

    wall: float
    processor: float


def _clocks() -> Clocks:
    return Clocks(time.perf_counter(), time.process_time())


def _loaded(began: Clocks, imported: Clocks, called: Clocks, modules: Iterable[nn.Module]) -> dict[str, Any]:
    """Times from the library's import to usable weights, with and without the import; bytes of weights; peak memory.

    torch is imported before the clocks start. One byte of each page of the weights is read, because a library may only
    map a file into memory and read it later.
    """
    import torch

    storages = {
        storage.data_ptr(): storage
        for module in modules
        for storage in (weight.untyped_storage() for weight in module.parameters())
    }
    for storage in storages.values():
        torch.empty(0, dtype=torch.uint8).set_(storage)[::4096].sum()
    ended = _clocks()
    return {
        "seconds": ended.wall - began.wall,
        "processor": ended.processor - began.processor,
        "loading": ended.wall - imported.wall,
        "called": called.wall - imported.wall,
        "peak": _memory("VmHWM"),
        "weights": sum(storage.nbytes() for storage in storages.values()),
    }


def _memory(field: str) -> int:
    """Bytes of a field of the process's status: ``VmRSS`` is the memory in use, ``VmHWM`` its peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


if __name__ == "__main__":
    kinds: tuple[Callable[..., dict[str, Any]], ...] = (ours, diffusers, picture, two_pictures)
    measure = {kind.__name__: kind for kind in kinds}[sys.argv[1]]
    print(json.dumps(measure(**json.loads(sys.argv[2]))))
