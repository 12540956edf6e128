"""The page's file: self-contained, whole, safe for any prompt, and of bounded size."""

from __future__ import annotations

import html
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from atedm import DENSE, parse_preset
from atedm.merging import Merging
from atedm.ranking import kept_count
from minisdxl.config import SDXL_BASE, SHAPES, ModelConfig
from minisdxl.inspector import maps
from minisdxl.inspector.maps import AttentionMaps, Top
from minisdxl.inspector.page import Inspection, page, picture_data
from minisdxl.inspector.recorder import Reduction, Step
from minisdxl.inspector.session import RecordedRun, Recording, check_attention_steps, step_costs
from minisdxl.inspector.words import Word
from minisdxl.pipeline import SDXL
from minisdxl.settings import Settings, check_settings
from minisdxl.steps.plan import StepPlan

PROMPT = "a small red circle above a big blue square on a white background"


def random_recording(
    config: ModelConfig, prompt: str = PROMPT, steps: int = 10, plans: tuple[str, ...] = ("at-edm",)
) -> Recording:
    """A recording with random numbers and noise for pictures, which nothing compresses."""
    generator = torch.Generator().manual_seed(0)
    settings = Settings(steps=steps, prune=plans[0])
    words = [Word(text, (i + 1,)) for i, text in enumerate(prompt.split())]
    sites = list(config.unet.attention_sites())
    side = config.size // config.vae.downscale
    noise = np.random.default_rng(0).integers(0, 256, (config.size, config.size, 3), dtype=np.uint8)
    picture = Image.fromarray(noise)

    def random(*shape: int) -> torch.Tensor:
        return torch.rand(shape, generator=generator)

    def reduction(count: int, method: Any) -> Reduction:
        merges = isinstance(method, Merging)
        stay = count - method.removed(count) if merges else kept_count(count, method.ratio)
        kept = torch.zeros(count, dtype=torch.bool)
        kept[torch.randperm(count, generator=generator)[:stay]] = True
        scores = None if merges else random(count).double()
        sources = torch.randint(count, (count, 1), generator=generator)
        return Reduction(0, torch.ones_like(kept), kept, scores, sources)

    def attention(rows: int) -> AttentionMaps:
        count, cells = rows * rows, min(rows, maps.WORD_SIDE)
        top = Top(torch.randint(count, (count, maps.TOP), generator=generator), random(count, maps.TOP))
        numbers = list(range(1, maps.ITERATIONS + 1))
        return AttentionMaps(top, top, random(len(words), cells, cells), numbers, random(len(numbers), count))

    runs = []
    for name in ("dense", *plans):
        schedule = None if name == "dense" else parse_preset(name)
        checked = check_settings(replace(settings, prune=schedule), config)
        chosen = set() if schedule is None else check_attention_steps(None, [checked], [parse_preset(p) for p in plans])
        recorded = []
        for number in range(steps):
            plan = DENSE if schedule is None else schedule.plan(number, steps, sites)
            method = None if schedule is None else schedule.method
            recorded.append(
                Step(
                    number,
                    1.0,
                    random(4, side, side),
                    {site.name: [reduction((side >> site.level) ** 2, method)] for site in sites if site.name in plan},
                    {site.name: attention(side >> site.level) for site in sites} if number in chosen else {},
                )
            )
        planned = [StepPlan(plan) for plan in checked.plans]
        costs = step_costs(config, checked, planned, 77)
        runs.append(RecordedRun(name, schedule, picture, planned, recorded, [picture] * steps, costs))
    return Recording(prompt, words, config, settings, check_settings(settings, config), runs)


@pytest.fixture(scope="module")
def small() -> Inspection:
    return page(random_recording(SHAPES, steps=2))


class Links(HTMLParser):
    """Everything that an element may load or lead to."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, str]] = []
        self.elements: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append(tag)
        self.found += [(name, value or "") for name, value in attrs if name in ("src", "href", "srcset", "action")]


def test_nothing_is_loaded_from_elsewhere(small: Inspection) -> None:
    links = Links()
    links.feed(small.html)
    assert links.found == [("href", "data:,")]  # no icon is asked for either
    assert "url(" not in small.html and "@import" not in small.html and "fetch(" not in small.html
    policy = re.findall(r'content="(default-src[^"]*)"', small.html)
    assert policy == ["default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"]


def test_prompts_cannot_leave_their_place() -> None:
    prompt = 'a </script><script>alert(1)</script> <b title="x"> {{page.js}} <!-- & dog'
    plain, evil = (page(random_recording(SHAPES, text, steps=1)) for text in ("a dog", prompt))
    elements = []
    for each in (plain, evil):
        links = Links()
        links.feed(each.html)
        elements.append(links.elements)
    assert elements[0] == elements[1]
    data = re.search(r'<script type="application/json" id="data">(.*?)</script>', evil.html, re.DOTALL)
    assert data is not None and json.loads(data[1])["prompt"] == prompt


def test_it_is_saved_whole(small: Inspection, tmp_path: Path) -> None:
    path = small.save(tmp_path / "inside.html")
    assert path.read_text(encoding="utf-8") == small.html
    assert path.stat().st_size == small.size
    with pytest.raises(OSError, match="nowhere"):
        small.save(tmp_path / "nowhere" / "inside.html")
    assert [each.name for each in tmp_path.iterdir()] == ["inside.html"]


def test_a_notebook_shows_it_in_a_frame(small: Inspection) -> None:
    frame = small._repr_html_()
    (inner,) = re.findall(r'srcdoc="([^"]*)"', frame)
    assert html.unescape(inner) == small.html
    assert frame.count("<iframe") == 1 and frame.endswith("</iframe>")


def test_equal_plans_have_names_of_their_own() -> None:
    found = page(random_recording(SHAPES, steps=1, plans=("at-edm", "at-edm")))
    assert list(found.pictures) == ["dense", "at-edm (1)", "at-edm (2)"]


@pytest.mark.parametrize(("config", "most"), [(SHAPES, 6e6), (SDXL_BASE, 40e6)])
def test_pages_of_50_steps_are_small(config: ModelConfig, most: float, shapes: SDXL) -> None:
    """With random numbers, which take the most, and the small model's pictures; SDXL's are of noise, which is worse."""
    found = random_recording(config)  # 10 steps, 3 of them early and 3 with attention
    noise = found.runs[0].image
    picture = shapes.generate([PROMPT], steps=3, seed=1)[0] if config is SHAPES else noise
    blank = Image.new("RGB", noise.size)
    found = replace(found, runs=[replace(run, pictures=[blank] * 10) for run in found.runs])
    whole = page(found).size
    for step in (step for run in found.runs for step in run.steps):
        step.attention.clear()
    numbers = whole + 4 * page(found).size
    pictures = 50 * len(found.runs) * len(picture_data(picture))
    print(f"{config.name}: {numbers / 1e6:.1f} MB of numbers, {pictures / 1e6:.1f} MB of pictures")
    assert numbers + pictures < most
