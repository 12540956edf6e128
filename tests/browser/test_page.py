"""The inspector's page in Chromium: every control is used, and its effect read from the page.

Screenshots of both widths and both color schemes are kept in ``runs/browser``, for looking at.
"""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from minisdxl.inspector.page import Inspection
from minisdxl.pipeline import SDXL

sync_api = pytest.importorskip("playwright.sync_api", reason="the extra `browser` is not installed")
pytestmark = [pytest.mark.browser, pytest.mark.xdist_group("browser")]

PROMPT = "a small red circle above a big blue square on a white background"
STEPS = 4  # the first is an early one
SHOTS = Path(__file__).parents[2] / "runs" / "browser"
SIZES = {"narrow": 400, "wide": 1280}


@pytest.fixture(scope="module")
def inspection(shapes: SDXL) -> Inspection:
    return shapes.inspect(
        PROMPT, steps=STEPS, size=(128, 128), prune="at-edm", against="tome", attention_steps=[1, 4], seed=3
    )


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.fail("there is no chromium on this machine; `make test-browser` installs it")
    with sync_api.sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield opened
        opened.close()


class Page:
    """An opened page, with what its console said and what it asked the network for."""

    def __init__(self, browser: Any, path: Path, width: int = 1280, scheme: str = "light") -> None:
        self.context = browser.new_context(
            viewport={"width": width, "height": 900}, color_scheme=scheme, offline=True, reduced_motion="reduce"
        )
        self.it = self.context.new_page()
        self.said: list[str] = []
        self.asked: list[str] = []
        self.it.on("console", lambda message: self.said.append(message.text))
        self.it.on("pageerror", lambda error: self.said.append(str(error)))
        self.it.on("request", lambda request: self.asked.append(request.url))
        self.it.goto(path.as_uri())

    def text(self, selector: str) -> str:
        return str(self.it.inner_text(selector))

    def pixels(self, selector: str) -> NDArray[np.int64]:
        """The colors (H, W, 3) of a canvas, after all pictures have been drawn."""
        self.it.wait_for_timeout(150)
        url = str(self.it.eval_on_selector(selector, "canvas => canvas.toDataURL()"))
        image = Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2])))
        return np.asarray(image.convert("RGB")).astype(np.int64)

    def click_cell(self, selector: str, row: float, column: float) -> None:
        """Clicks at shares of a canvas's height and width."""
        canvas = self.it.locator(selector)
        canvas.scroll_into_view_if_needed()
        box = canvas.bounding_box()
        canvas.click(position={"x": box["width"] * column, "y": box["height"] * row})


@pytest.fixture(scope="module")
def path(inspection: Inspection, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return inspection.save(tmp_path_factory.mktemp("page") / "inside.html")


@pytest.fixture
def page(browser: Any, path: Path) -> Iterator[Page]:
    opened = Page(browser, path)
    yield opened
    assert opened.said == []
    assert {url.split(":")[0] for url in opened.asked} <= {"file", "data"}
    assert [url for url in opened.asked if url.startswith("file")] == [path.as_uri()]
    opened.context.close()


def data(inspection: Inspection) -> dict[str, Any]:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', inspection.html, re.DOTALL)
    assert found is not None
    return json.loads(found[1])


def test_steps_by_slider_buttons_and_keys(page: Page, inspection: Inspection) -> None:
    assert page.text("#step-text").startswith("Step 4 of 4 · σ = ")
    pictures = {page.it.get_attribute("#picture-0", "src")}
    page.it.click("#previous")
    assert page.text("#step-text").startswith("Step 3 of 4")
    pictures.add(page.it.get_attribute("#picture-0", "src"))
    page.it.fill("#step", "1")
    assert page.text("#step-text").startswith("Step 2 of 4")
    pictures.add(page.it.get_attribute("#picture-0", "src"))
    page.it.locator("h1").click()
    page.it.keyboard.press("ArrowLeft")
    assert page.text("#step-text").startswith("Step 1 of 4")
    assert "early step (DSAP)" in page.text("#step-text")
    assert page.it.is_disabled("#previous")
    pictures.add(page.it.get_attribute("#picture-0", "src"))
    page.it.keyboard.press("ArrowRight")
    page.it.keyboard.press("End")
    assert page.text("#step-text").startswith("Step 4 of 4") and page.it.is_disabled("#next")
    page.it.keyboard.press("Home")
    page.it.click("#next")
    assert page.text("#step-text").startswith("Step 2 of 4")
    assert "early" not in page.text("#step-text")
    assert len(pictures) == STEPS


def test_cost_so_far(page: Page, inspection: Inspection) -> None:
    runs = data(inspection)["runs"]
    for step in (0, STEPS - 1):
        page.it.fill("#step", str(step))
        dense, pruned, merged = (sum(run["costs"][c]["total"] for c in run["cost"][: step + 1]) for run in runs)
        said = page.text("#step-text")
        assert f"at-edm {pruned / 1e9:#.3g} GFLOPs ({100 * pruned / dense:.0f}\u00a0% of dense)" in said
        assert f"tome {merged / 1e9:#.3g} GFLOPs ({100 * merged / dense:.0f}\u00a0% of dense)" in said


def test_pictures_and_their_difference(page: Page) -> None:
    alts = [page.it.get_attribute(f"#picture-{i}", "alt") for i in range(3)]
    assert alts == [f"{name}: the picture that step 4 heads for" for name in ("dense", "at-edm", "tome")]
    widths = page.it.eval_on_selector_all("#pictures img", "all => all.map(i => i.naturalWidth)")
    assert widths == [128, 128, 128]
    assert page.text("#difference-text").startswith("dense − at-edm: mean difference ")
    four = page.pixels("#difference")
    page.it.select_option("#gain", "1")
    one = page.pixels("#difference")
    assert one.max() > 0
    assert (np.minimum(255, 4 * one) == four).all()
    page.it.select_option("#pair", label="at-edm − tome")
    assert not np.array_equal(page.pixels("#difference"), one)
    assert page.text("#difference-text").startswith("at-edm − tome")


def test_blocks_by_table_and_strip(page: Page, inspection: Inspection) -> None:
    page.it.fill("#step", "0")
    rows = page.it.eval_on_selector_all(
        "#blocks-1 tbody tr", "all => all.map(r => Array.from(r.cells).map(c => c.innerText))"
    )
    assert [row[0] for row in rows] == [site["name"] for site in data(inspection)["sites"]]
    by_name = {row[0]: row for row in rows}
    assert by_name["down.1.0"][2:4] == ["256 / 256", "unpruned: early step of DSAP"]
    assert by_name["mid"][2:4] == ["24 / 64", "38\u00a0%"]
    assert by_name["down.1.0"][5] == "100\u00a0%" and by_name["mid"][5] != "100\u00a0%"
    page.it.fill("#step", "3")
    assert page.it.locator("#blocks-1 tbody tr").first.inner_text().split("\t")[2] == "95 / 256"
    page.it.click("#blocks-1 button:text-is('mid')")
    assert page.it.input_value("#site") == "2"
    assert page.it.get_attribute("#blocks-1 button:text-is('mid')", "aria-pressed") == "true"
    page.click_cell("#blocks-2 tbody tr:nth-child(4) canvas", 0.5, 0.1)
    assert page.text("#step-text").startswith("Step 1 of 4") and page.it.input_value("#site") == "3"
    label = page.it.get_attribute("#blocks-1 tbody tr:first-child canvas", "aria-label")
    assert label == "down.1.0: fewer tokens in 3 of 4 steps"
    assert "of dense" in page.text("#blocks-1 thead")


def test_tokens_that_stay_are_clear_and_others_covered(page: Page, inspection: Inspection) -> None:
    page.it.select_option("#view", "picture")
    plain = page.pixels("#tokens-1")
    page.it.select_option("#view", "kept")
    covered = page.pixels("#tokens-1")
    page.it.select_option("#view", "scores")
    scores = page.pixels("#tokens-1")
    assert len({each.tobytes() for each in (plain, covered, scores)}) == 3
    packed = base64.b64decode(data(inspection)["runs"][1]["reductions"]["down.1.0"][3][0]["kept"])
    kept = [packed[i >> 3] >> (i & 7) & 1 for i in range(256)]
    assert sum(kept) == 95
    page.it.evaluate(f"choose({{view: 'picture', token: {kept.index(1)}}})")  # one that stays has no arrow
    plain = page.pixels("#tokens-1")
    page.it.select_option("#view", "kept")
    same = (page.pixels("#tokens-1") == plain).all(axis=2)
    for token, stays in enumerate(kept):  # each has 32 x 32 pixels
        row, column = token // 16 * 32, token % 16 * 32
        cell = same[row : row + 32, column : column + 32]
        assert cell.all() if stays else not cell[8:24, 8:24].any(), token


def test_a_token_by_click_and_by_keys(page: Page, inspection: Inspection) -> None:
    page.click_cell("#tokens-1", 0.1, 0.1)
    for run in (1, 2):
        assert "Token in row 2, column 2: " in page.text(f"#tokens-text-{run}")
    assert re.search(r"Rank \d+ of 256 by gwpr, score \d", page.text("#tokens-text-1"))
    assert "ToMe merges the most similar tokens and has no scores." in page.text("#tokens-text-2")
    page.it.focus("#tokens-1")
    page.it.keyboard.press("ArrowRight")
    page.it.keyboard.press("ArrowDown")
    assert "Token in row 3, column 3: " in page.text("#tokens-text-1")
    assert page.text("#step-text").startswith("Step 4 of 4")  # the keys move the token and not the step
    for _ in range(5):
        page.it.keyboard.press("ArrowUp")
    assert "Token in row 1, column 3: " in page.text("#tokens-text-1")
    seen = set[str]()
    for token in range(256):  # ranks are a permutation, and those that stay are the first
        page.it.evaluate(f"choose({{token: {token}}})")
        said = page.text("#tokens-text-1")
        rank = int(re.findall(r"Rank (\d+) of 256", said)[0])
        assert ("pruned after layer 1" in said) == (rank > 95)
        assert ("copied from the token in row" in said) == (rank > 95)
        seen.add(str(rank))
    assert len(seen) == 256


def test_the_arrow_of_a_pruned_token(page: Page) -> None:
    for token in range(256):
        page.it.evaluate(f"choose({{token: {token}}})")
        if "copied from" in page.text("#tokens-text-1"):
            break
    pink = (page.pixels("#tokens-1") == [255, 61, 139]).all(axis=2)
    assert pink.sum() > 20
    rows, columns = pink.nonzero()
    source = [
        int(n) for n in re.findall(r"copied from the token in row (\d+), column (\d+)", page.text("#tokens-text-1"))[0]
    ]
    ends = sorted([(token // 16, token % 16), (source[0] - 1, source[1] - 1)])
    for along, found in enumerate((rows, columns)):
        low, high = sorted(end[along] * 32 + 16 for end in ends)
        assert (
            abs(found.min() - low) < 20 and abs(found.max() - high) < 20
        )  # from the middle of one to that of the other
    page.it.evaluate("choose({step: 0})")  # unpruned
    assert not (page.pixels("#tokens-1") == [255, 61, 139]).all(axis=2).any()


def test_changing_the_block_keeps_the_place(page: Page) -> None:
    page.click_cell("#tokens-1", 0.53, 0.78)
    assert "row 9, column 13" in page.text("#tokens-text-1")
    page.it.select_option("#site", label="mid (8 × 8)")
    assert "row 5, column 7" in page.text("#tokens-text-1") and "mid: 24 of 64" in page.text("#tokens-text-1")


def test_rows_and_columns_of_self_attention(page: Page) -> None:
    page.click_cell("#tokens-1", 0.1, 0.1)
    assert page.text("#attention-note") == "at-edm, down.1.0, row 2, column 2."
    row, column = page.text("#rows-text"), page.text("#columns-text")
    assert re.match(
        r"Row: what the token attends to\. The largest 12: together \d+(\.\d)?\u00a0% of its attention\.", row
    )
    assert re.match(r"Column: who attends to the token\. The largest 12: together ", column)
    first = page.pixels("#rows-map"), page.pixels("#columns-map")
    page.click_cell("#rows-map", 0.9, 0.9)
    assert page.text("#attention-note") == "at-edm, down.1.0, row 15, column 15."
    assert page.text("#rows-text") != row
    second = page.pixels("#rows-map"), page.pixels("#columns-map")
    assert not np.array_equal(first[0], second[0]) and not np.array_equal(first[1], second[1])
    page.it.select_option("#plan", label="tome")
    assert page.text("#attention-note") == "tome, down.1.0, row 15, column 15."
    assert not np.array_equal(page.pixels("#rows-map"), second[0])


def test_scores_through_the_iterations(page: Page) -> None:
    assert re.search(r"\(Algorithm 1\), 1 is the mean: 1: \d+\.\d\d, 2: ", page.text("#iterations-text"))
    assert page.it.locator("#iterations polyline").count() == 2  # the token, and the lowest that stays
    assert page.it.get_attribute("#iterations svg", "aria-label") == "Score through the iterations of G-WPR"


def test_steps_without_attention_say_so_and_lead_to_others(page: Page) -> None:
    page.it.fill("#step", "2")
    assert page.text("#attention-note") == "Attention was recorded at the steps 1, 4, not at this one."
    assert not page.it.is_visible("#rows-map") and not page.it.is_visible("#word-map-1")
    assert "Attention was recorded at the steps 1, 4" in page.text("#word-text-1")
    page.it.select_option("#recorded", label="step 1")
    assert page.text("#step-text").startswith("Step 1 of 4")
    assert page.it.is_visible("#rows-map") and page.it.is_visible("#word-map-1")


def test_words(page: Page) -> None:
    words = page.it.locator("#words button").all_inner_texts()
    assert words == PROMPT.split()
    page.it.click("#words button:text-is('circle')")
    assert "“circle”, average of all blocks: " in page.text("#word-text-1")
    circle = page.pixels("#word-map-1")
    page.it.click("#words button:text-is('square')")
    assert page.it.get_attribute("#words button:text-is('square')", "aria-pressed") == "true"
    square = page.pixels("#word-map-1")
    assert not np.array_equal(square, circle)
    page.it.select_option("#word-site", label="mid")
    assert "“square”, mid: " in page.text("#word-text-2") and "of 8" in page.text("#word-text-2")
    assert not np.array_equal(page.pixels("#word-map-1"), square)


def test_where_the_pictures_part(page: Page, inspection: Inspection) -> None:
    lines = page.it.locator("#parting li").all_inner_texts()
    assert [line.split(" part")[0] for line in lines] == ["dense and at-edm", "dense and tome", "at-edm and tome"]
    for line, change in zip(lines, data(inspection)["changes"], strict=True):
        assert f" part at step {change['first'] + 1}" in line
    assert page.it.locator("#changes polyline").count() == 3
    now = page.it.get_attribute("#changes .now", "x1")
    page.it.fill("#step", "1")
    assert page.it.get_attribute("#changes .now", "x1") != now


def test_every_control_and_picture_has_a_name(page: Page) -> None:
    nameless = page.it.evaluate(
        """() => Array.from(document.querySelectorAll("button, select, input, canvas, img, svg"))
          .filter((e) => !(e.getAttribute("aria-label") || e.alt || e.closest("label") || e.innerText?.trim()))
          .map((e) => e.outerHTML)"""
    )
    assert nameless == []
    sections = page.it.eval_on_selector_all(
        "section", "all => all.map(s => [s.querySelector('h2').innerText, s.querySelector('.about').innerText])"
    )
    assert len(sections) == 6 and all(re.search(r"section|D\(x; σ\)", about) for _, about in sections)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", SIZES)
def test_screens(browser: Any, path: Path, width: str, scheme: str) -> None:
    page = Page(browser, path, SIZES[width], scheme)
    page.it.wait_for_timeout(300)
    overflow = page.it.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
    assert overflow <= 0
    # Contrast of text on its background, as in WCAG 2: 4.5 or more.
    for selector in ("body", ".note", ".about", ".legend", "b.plan-0", "b.plan-1", "b.plan-2"):
        assert contrast(page, selector) >= 4.5, selector
    SHOTS.mkdir(parents=True, exist_ok=True)
    page.it.screenshot(path=SHOTS / f"{width}-{scheme}.png", full_page=True)
    page.it.eval_on_selector("nav", "nav => (nav.style.position = 'static')")  # it would cover a part of a panel
    for panel in page.it.locator("section").all():
        title = panel.locator("h2").inner_text().lower().replace(" ", "-")
        panel.screenshot(path=SHOTS / f"{width}-{scheme}-{title}.png")
    assert page.said == []
    page.context.close()


def contrast(page: Page, selector: str) -> float:
    """The ratio of the luminances of an element's text and of the background behind it."""
    colors = page.it.eval_on_selector(
        selector,
        """(e) => {
          let back = e;
          while (getComputedStyle(back).backgroundColor === "rgba(0, 0, 0, 0)") back = back.parentElement;
          return [getComputedStyle(e).color, getComputedStyle(back).backgroundColor];
        }""",
    )
    light = []
    for color in colors:
        channels = [int(c) / 255 for c in re.findall(r"\d+", color)[:3]]
        linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        light.append(sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True)))
    return (max(light) + 0.05) / (min(light) + 0.05)


def test_dense_alone(browser: Any, shapes: SDXL, tmp_path: Path) -> None:
    found = shapes.inspect("a circle", steps=2, size=(64, 64))
    page = Page(browser, found.save(tmp_path / "dense.html"))
    assert page.it.locator("#pictures figure").count() == 1
    assert not page.it.is_visible("#changes-section") and not page.it.is_visible("#pair")
    assert "all stay: dense" in page.text("#blocks-0") and "all stay: dense" in page.text("#tokens-text-0")
    assert page.it.is_visible("#rows-map")
    assert page.said == []
    page.context.close()


def test_other_plans_and_prompts(browser: Any, shapes: SDXL, tmp_path: Path) -> None:
    """A grid that moves, repeated pruning, steps from a picture, and a prompt that is markup."""
    prompt = '</script><img src=x onerror="console.log(1)"> &amp; circle'
    picture = shapes.generate(["a circle"], steps=1, size=(128, 96))[0]
    found = shapes.inspect(
        prompt,
        steps=4,
        size=(128, 96),
        image=picture,
        strength=0.5,
        prune="moving-grid",
        against="at-edm:rho=0.3,layers=0+1",
    )
    page = Page(browser, found.save(tmp_path / "other.html"))
    assert page.text(".prompt") == prompt
    assert page.text("#step-text").startswith("Step 4 of 4")
    page.it.keyboard.press("Home")
    assert page.text("#step-text").startswith("Step 3 of 4")
    page.it.select_option("#site", label="mid (6 × 8)")
    said = ""
    for token in range(48):
        page.it.evaluate(f"choose({{token: {token}}})")
        said += page.text("#tokens-text-1") + page.text("#tokens-text-2")
    assert "adds the change of the token in row" in said
    assert "pruned after layer 1" in said and "pruned after layer 2" in said
    assert re.search(r"Rank \d+ of 34 by gwpr, score [\d.e-]+ in layer 2", said)
    assert page.said == []
    page.context.close()


def test_steps_at_which_blocks_do_not_run(browser: Any, shapes: SDXL, tmp_path: Path) -> None:
    """Forecast steps on the left, shallow ones without guidance on the right."""
    settings: dict[str, Any] = {"steps": 8, "size": (128, 128), "sampling": "euler", "skip": "given:W000W000"}
    found = shapes.inspect(PROMPT, **settings, against="fast")
    page = Page(browser, found.save(tmp_path / "idle.html"))
    page.it.keyboard.press("Home")
    assert "forecast" not in page.text("#step-text")
    first = float(re.findall(r"given:W000W000 ([\d.]+) GFLOPs", page.text("#step-text"))[0])
    assert page.it.locator("#blocks-1 tbody tr").first.inner_text().split("\t")[2:4] == ["256 / 256", "all stay: dense"]
    page.it.keyboard.press("ArrowRight")
    said = page.text("#step-text")
    assert f"given:W000W000 {first} GFLOPs (50\u00a0% of dense): forecast (latent-0), the U-Net does not run" in said
    cells = page.it.locator("#blocks-1 tbody tr").first.inner_text().split("\t")
    assert cells[2:] == ["0 / 256", "does not run at this step", "0", "0.0\u00a0%"]
    assert page.text("#tokens-text-1").endswith(
        "down.1.0: does not run at this step, 256 tokens.\nToken in row 9, column 9."
    )
    assert page.text("#attention-note") == "Attention was recorded at the steps 1, 5, not at this one."
    label = page.it.get_attribute("#blocks-1 tbody tr:first-child canvas", "aria-label")
    assert label == "down.1.0: fewer tokens in 0 of 8 steps, does not run in 6"
    page.it.select_option("#recorded", label="step 5")
    assert page.it.is_visible("#rows-map") and page.text("#step-text").startswith("Step 5 of 8")
    assert page.it.is_visible(".swatch.idle")
    page.it.locator("#blocks").screenshot(path=SHOTS / "idle-blocks.png")
    assert page.said == []
    page.context.close()


@pytest.mark.parametrize("preset", ["sito", "todo", "toma"])
def test_other_reductions(browser: Any, shapes: SDXL, tmp_path: Path, preset: str) -> None:
    found = shapes.inspect("a circle", steps=1, size=(128, 128), prune=preset)
    page = Page(browser, found.save(tmp_path / "page.html"))
    said, columns = set(), set()
    for token in range(256):
        page.it.evaluate(f"choose({{token: {token}}})")
        lines = page.text("#tokens-text-1").split("\n")
        said.add((lines[1].partition(": ")[2], re.sub(r"row \d+, column \d+", "X", lines[2])))
        columns.add("None does: it is not read." in page.text("#columns-text"))
        assert "of its attention. Most to row" in page.text("#rows-text")
    note = next(text for _, text in said if preset in text.lower())
    expected = {
        "sito": {("stays.", note), ("left out of self-attention.", "Takes the result of the token in X.")},
        "todo": {("stays.", note), ("asks, and is not read.", note)},
        "toma": {("stays.", note), ("merged.", "Its largest share goes to the token in X.")},
    }
    assert said == expected[preset]
    assert columns == ({True, False} if preset == "todo" else {False})
    assert page.text("#iterations-text").startswith("G-WPR needs" if preset == "todo" else "Score × N through")
    assert page.said == []
    page.context.close()


def test_a_token_that_copies_its_own_change(browser: Any, shapes: SDXL, tmp_path: Path) -> None:
    found = shapes.inspect("a circle", steps=2, size=(64, 64), prune="moving-grid:recovery=own-change")
    page = Page(browser, found.save(tmp_path / "own.html"))
    page.it.select_option("#site", label="mid (4 × 4)")
    for step, expected in ((0, False), (1, True)):
        page.it.evaluate(f"choose({{step: {step}}})")
        said = []
        for token in range(16):
            page.it.evaluate(f"choose({{token: {token}}})")
            said.append(page.text("#tokens-text-1"))
        assert any("own-change”: adds the change of the token in row" in text for text in said)
        assert any("own-change”: adds its own change of an earlier step." in text for text in said) == expected
    assert page.said == []
    page.context.close()


def test_it_works_in_a_notebooks_frame(browser: Any, inspection: Inspection, tmp_path: Path) -> None:
    notebook = tmp_path / "notebook.html"
    notebook.write_text(f"<!doctype html><meta charset=utf-8><title>n</title>{inspection._repr_html_()}")
    page = Page(browser, notebook)
    frame = page.it.frame_locator("iframe")
    assert frame.locator("#step-text").inner_text().startswith("Step 4 of 4")
    frame.locator("#previous").click()
    assert frame.locator("#step-text").inner_text().startswith("Step 3 of 4")
    frame.locator("#difference-text:has-text('mean difference')").wait_for()  # pixels can be read in the frame
    assert page.said == []
    page.context.close()
