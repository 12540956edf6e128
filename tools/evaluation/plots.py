"""Plots of summaries, with intervals, against FLOPs or a setting or by preset; and sheets of small pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from typing import TYPE_CHECKING, Any

from PIL import Image, ImageDraw

from tools.evaluation.metrics import Picture
from tools.evaluation.paired_statistics import Estimate
from tools.evaluation.rows import DENSE
from tools.evaluation.summaries import Summary

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WIDTH, HEIGHT = 12, 5  # inches of 100 pixels
THUMBNAIL, LABEL = 128, 18  # pixels
MANY = 8  # lines of a panel; the names of more are beside it


@dataclass(frozen=True)
class Measure:
    """A field of a summary that is an estimate, its axis label, and the factor that converts it to the label's unit."""

    field: str
    label: str
    factor: float = 1.0

    def of(self, summary: Summary) -> Estimate | None:
        """The estimate, in the unit of the label."""
        found: Estimate | None = getattr(summary, self.field)
        return None if found is None else Estimate(*(self.factor * number for number in found))


CAPTION_ACCURACY = Measure("obeyed", "caption accuracy, %", 100)
LATENT_ERROR = Measure("latent_error", "mean squared latent error to dense")
PSNR = Measure("psnr", "PSNR to dense, dB")
DISTANCES = {measure.field: measure for measure in (LATENT_ERROR, PSNR)}
AXES = {  # horizontal axes by field of a summary
    "flops_share": "FLOPs of all U-Net calls of a picture, share of dense",
    "cfg": "CFG scale",
    "steps": "denoising steps",
}


def draw_against(panel: Any, summaries: Sequence[Summary], measure: Measure, axis: str) -> None:
    """Draws a line for each preset, at all its ratios, over ``axis``, one of ``AXES``, with intervals of 95 %."""
    lines: dict[str, list[tuple[float, Estimate]]] = {}
    for each in summaries:
        found = measure.of(each)
        if found is not None and not (each.preset == DENSE and measure.field in DISTANCES):  # of dense to itself
            lines.setdefault(family(each.preset), []).append((getattr(each, axis), found))
    order = list(dict.fromkeys(family(each.preset) for each in summaries))  # one color in all panels
    for name, points in lines.items():
        xs, estimates = zip(*sorted(points), strict=True)
        style = {"marker": "o", "capsize": 3, "color": _color(order.index(name))}
        panel.errorbar(xs, [e.value for e in estimates], _bars(estimates), label=name, **style)
    panel.set(xlabel=AXES[axis], ylabel=measure.label)
    if len(lines) > MANY:
        panel.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))
    else:
        panel.legend()


def draw_presets(panel: Any, summaries: Sequence[Summary], measure: Measure) -> None:
    """Draws a point with its interval of 95 % for each preset, from top to bottom."""
    shown = [(each.preset, found) for each in summaries if (found := measure.of(each)) is not None]
    estimates = [found for _, found in shown]
    panel.errorbar([e.value for e in estimates], range(len(shown)), xerr=_bars(estimates), fmt="o", capsize=3)
    panel.set_yticks(range(len(shown)), [preset for preset, _ in shown])
    panel.set(xlabel=measure.label)
    panel.invert_yaxis()


def family(preset: str) -> str:
    """A preset's text without its ratio, or a step method's name. Presets of one family are one line in a plot."""
    if preset.startswith("steps="):
        return "dense in fewer steps"
    if preset.startswith(("skip=", "guide=", "prune=")):
        return preset.partition(":")[0]
    if preset.startswith("fast="):
        return "--fast"
    name, _, settings = preset.partition(":")
    others = [part for part in settings.split(",") if part and not part.startswith(("rho=", "r="))]
    return f"{name}:{','.join(others)}" if others else name


def figure_png(summaries: Sequence[Summary], measures: Sequence[Measure], axis: str | None) -> bytes:
    """A PNG file with a panel for each measure that was taken, against ``axis``, or by preset for ``None``.

    Raises ``ModuleNotFoundError`` without matplotlib, and ``ValueError`` if nothing was measured.
    """
    import matplotlib  # not a dependency of the package but of its extra "evaluate"
    from matplotlib.figure import Figure

    taken = [measure for measure in measures if any(measure.of(each) is not None for each in summaries)]
    if not taken:
        raise ValueError(f"a plot has nothing to show: there is no {measures[0].label}")
    data = BytesIO()
    with matplotlib.rc_context({**matplotlib.rcParamsDefault, "font.size": 9}):
        figure: Figure = Figure(layout="constrained", figsize=(WIDTH / 2 * len(taken), HEIGHT))
        for panel, measure in zip(figure.subplots(1, len(taken), squeeze=False)[0], taken, strict=True):
            if axis is None:
                draw_presets(panel, summaries, measure)
            else:
                draw_against(panel, summaries, measure, axis)
        first = summaries[0]
        figure.suptitle(f"{first.captions} captions, bars are intervals of 95 %")
        figure.savefig(data, format="png", dpi=100, metadata={"Software": None})
    return data.getvalue()


def pictures_png(rows: Mapping[str, Sequence[Picture]]) -> bytes:
    """Small pictures as a PNG file of 256 colors, a row for each preset under its name."""
    columns, height = max(map(len, rows.values())), THUMBNAIL + LABEL
    sheet = Image.new("RGB", (columns * THUMBNAIL, len(rows) * height), "white")
    draw = ImageDraw.Draw(sheet)
    for row, (preset, pictures) in enumerate(rows.items()):
        draw.text((4, row * height + LABEL // 2), preset, "black", anchor="lm", font_size=12)
        for column, picture in enumerate(pictures):
            small = Image.fromarray(picture).resize((THUMBNAIL, THUMBNAIL))
            sheet.paste(small, (column * THUMBNAIL, row * height + LABEL))
    data = BytesIO()
    sheet.quantize(256).save(data, "PNG", optimize=True)
    return data.getvalue()


def _color(index: int) -> Any:
    from matplotlib import colormaps

    return colormaps["tab20"](index % 10 * 2 + index // 10 % 2)  # ten strong colors, then ten pale ones


def _bars(estimates: Sequence[Estimate]) -> tuple[list[float], list[float]]:
    return [e.value - e.low for e in estimates], [e.high - e.value for e in estimates]
