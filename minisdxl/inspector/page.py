"""The page: a recording as one HTML file, with its pictures, numbers, style and script inside."""

from __future__ import annotations

import html
import io
import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from PIL import Image

from atedm.merging import Merging
from atedm.pruning import Pruning
from atedm.sito import SiTo
from atedm.todo import ToDo
from atedm.toma import ToMA
from minisdxl.checkpoint.atomic import atomic_path
from minisdxl.inspector.maps import AttentionMaps, Top
from minisdxl.inspector.packing import bits, ranked, scaled, text, whole
from minisdxl.inspector.recorder import Reduction
from minisdxl.steps.plan import WHOLE, StepPlan

if TYPE_CHECKING:
    from minisdxl.inspector.session import RecordedRun, Recording

SIDE = 512  # pixels of a picture's longer side on the page at most
QUALITY = 80  # of its WebP
FAR = 0.1  # a change of the denoised latent that shows
NOTEBOOK_HEIGHT = 900  # pixels


class Wording(NamedTuple):
    """How the page speaks of a method around the sub-layers."""

    stay: str  # of tokens of which attention sees something: "64 of 256 tokens ..."
    fate: str  # of another token
    source: str  # before the place of the token that it takes its result from
    note: str


WORDING: dict[type, Wording] = {
    Merging: Wording(
        "stay as they are or take in others",
        "merged",
        "Merged into the token in",
        "ToMe merges the most similar tokens and has no scores.",
    ),
    SiTo: Wording(
        "stay in self-attention",
        "left out of self-attention",
        "Takes the result of the token in",
        "SiTo leaves out those that are most like one that stays, and has no scores of attention.",
    ),
    ToDo: Wording(
        "are read as keys and values",
        "asks, and is not read",
        "",
        "ToDo reads a coarser grid, whatever the tokens are, and has no scores.",
    ),
    ToMA: Wording(
        "are destinations",
        "merged",
        "Its largest share goes to the token in",
        "ToMA merges the tokens of a tile into destinations, by shares, and has no scores.",
    ),
}


@dataclass(frozen=True)
class Inspection:
    """A page, and the pictures that it is about, by the names of their plans. A notebook shows the page."""

    html: str
    pictures: Mapping[str, Image.Image]

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return len(self.html.encode())

    def save(self, path: str | Path) -> Path:
        """Writes the page, whole or not at all. Raises ``OSError``."""
        with atomic_path(path) as temporary:
            temporary.write_text(self.html, encoding="utf-8")
        return Path(path)

    def _repr_html_(self) -> str:
        """The page in a frame of its own, for a notebook."""
        return (
            f'<iframe title="inside the picture" sandbox="allow-scripts" width="100%" height="{NOTEBOOK_HEIGHT}" '
            f'style="border: 0" srcdoc="{html.escape(self.html)}"></iframe>'
        )


def page(recording: Recording) -> Inspection:
    """The page of a recording."""
    names = unique_names([run.name for run in recording.runs])
    pictures = {name: run.image for name, run in zip(names, recording.runs, strict=True)}
    return Inspection(assemble(page_data(recording, names)), pictures)


def unique_names(names: list[str]) -> list[str]:
    """The names, numbered where one is there twice."""
    return [f"{name} ({names[: i + 1].count(name)})" if names.count(name) > 1 else name for i, name in enumerate(names)]


def assemble(data: Mapping[str, Any]) -> str:
    """The template with style, script and data in it."""
    here = files("minisdxl.inspector")
    parts = {name: here.joinpath(name).read_text(encoding="utf-8") for name in ("page.css", "data.js", "page.js")}
    # Within a script element only "<" could end it or open a comment.
    parts["data.json"] = json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    parts["prompt"] = html.escape(data["prompt"])
    whole_page = here.joinpath("page.html").read_text(encoding="utf-8")
    head, *rest = whole_page.split("{{")
    pieces = [head]
    for piece in rest:
        name, _, after = piece.partition("}}")
        pieces += [parts[name], after]
    return "".join(pieces)


def page_data(recording: Recording, names: list[str]) -> dict[str, Any]:
    """All that the page shows, ready for JSON."""
    run, config = recording.run, recording.config
    width, height = run.size
    f = config.vae.downscale
    sites = [
        {
            "name": site.name,
            "depth": site.depth,
            "grid": [-(-(height // f) >> site.level), -(-(width // f) >> site.level)],
        }
        for site in config.unet.attention_sites()
    ]
    settings = {
        "model": config.name,
        "sampling": run.sampling.name,
        "steps": run.steps,
        "cfg": run.cfg,
        "seed": recording.settings.seed,
        "size": f"{width}x{height}",
        "negative": recording.settings.negative,
    }
    return {
        "prompt": recording.prompt,
        "words": [word.text for word in recording.words],
        "settings": settings,
        "sites": sites,
        "steps": [{"number": step.number + 1, "sigma": step.sigma} for step in recording.runs[0].steps],
        "runs": [run_data(each, name, run.steps) for each, name in zip(recording.runs, names, strict=True)],
        "changes": [changes(recording.runs, a, b) for a, b in combinations(range(len(names)), 2)],
    }


def run_data(run: RecordedRun, name: str, steps: int) -> dict[str, Any]:
    """One run. Steps are counted from the first that was run."""
    costs = [cost for i, cost in enumerate(run.costs) if cost not in run.costs[:i]]  # few differ
    method = None if run.schedule is None else run.schedule.method
    how: dict[str, Any] = {"kind": "dense", "early": 0}
    if isinstance(method, Pruning):
        how |= {"kind": "pruning", "ranking": method.ranking, "recovery": method.recovery}
    elif method is not None:
        how |= {"kind": "merging", "wording": WORDING[type(method)]._asdict()}
    if run.schedule is not None and run.schedule.early == "less":
        how["early"] = run.schedule.early_steps(steps)
    blocks = {name for step in run.steps for name in step.reductions}
    attention: dict[str, dict[int, Any]] = {}
    for index, step in enumerate(run.steps):
        for block, maps in step.attention.items():
            attention.setdefault(block, {})[index] = attention_data(maps)
    return {
        "name": name,
        **how,
        "ratio": 0.0 if method is None else method.ratio,
        "did": [step_text(plan) for plan in run.plans],
        "pictures": [picture_data(picture) for picture in run.pictures],
        "costs": [{"total": cost.total, "ranking": cost.ranking, "blocks": cost.blocks} for cost in costs],
        "cost": [costs.index(cost) for cost in run.costs],
        "reductions": {
            block: [[reduction_data(each) for each in step.reductions.get(block, [])] for step in run.steps]
            for block in sorted(blocks)
        },
        "attention": attention,
    }


def step_text(plan: StepPlan) -> str:
    """What a step left out, in a few words; nothing if all blocks ran for both branches of guidance."""
    if not plan.runs:
        return f"forecast ({plan.unet}), the U-Net does not run"
    parts = [] if plan.unet == WHOLE else [f"only blocks outside of skip branch {plan.branch}"]
    guided = {
        "conditional": "no guidance",
        "unconditional": "without the prompt",
        "kept": "guidance of an earlier step",
    }
    parts += [guided[plan.guidance]] if plan.guidance in guided else []
    kinds = [kind for kind in ("self", "cross") if getattr(plan, f"{kind}_attention") == "reused"]
    return ", ".join([*parts, *(f"{kind}-attention of an earlier step" for kind in kinds)])


def reduction_data(reduction: Reduction) -> dict[str, Any]:
    """One layer's reduction: ``sources`` are those of the tokens that went, in raster order, m for each."""
    held, kept = reduction.held.numpy(), reduction.kept.numpy()
    data: dict[str, Any] = {"layer": reduction.layer, "kept": bits(kept)}
    if not held.all():
        data["held"] = bits(held)
    if reduction.scores is not None:
        data["scores"] = ranked(reduction.scores.numpy()[held])
    if reduction.sources is not None:
        data["sources"] = whole(reduction.sources.numpy()[held & ~kept].ravel())
        data["each"] = reduction.sources.shape[1]
    return data


def attention_data(maps: AttentionMaps) -> dict[str, Any]:
    """Attention of one block in one step."""
    return {
        "rows": top_data(maps.rows),
        "columns": top_data(maps.columns),
        "words": {"grid": list(maps.words.shape[1:]), **scaled(maps.words.double().numpy().ravel())},
        "iterations": maps.iterations,
        "scores": scaled(maps.scores.double().numpy().ravel()),
    }


def top_data(top: Top) -> dict[str, Any]:
    """The largest weights of each token."""
    return {
        "each": top.positions.shape[1],
        "positions": whole(top.positions.numpy().ravel()),
        **scaled(top.weights.double().numpy().ravel()),
    }


def picture_data(picture: Image.Image) -> str:
    """A WebP file of the picture, made smaller where it is large."""
    small = picture.copy()
    small.thumbnail((SIDE, SIDE))
    file = io.BytesIO()
    small.save(file, "webp", quality=QUALITY)
    return text(file.getvalue())


def changes(runs: list[RecordedRun], a: int, b: int) -> dict[str, Any]:
    """How far the denoised latents of two runs are apart, |A - B| / |B|, and the first steps at which they are."""
    pairs = [(x.denoised, y.denoised) for x, y in zip(runs[a].steps, runs[b].steps, strict=True)]
    values = [float((x - y).norm() / y.norm().clamp_min(1e-12)) for x, y in pairs]
    return {
        "runs": [a, b],
        "values": values,
        "first": next((step for step, (x, y) in enumerate(pairs) if not torch.equal(x, y)), None),
        "far": next((step for step, value in enumerate(values) if value > FAR), None),
        "threshold": FAR,
    }
