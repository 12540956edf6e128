"""Summaries of the rows of an evaluation: one for each preset, outcomes of claims, and Markdown tables."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from tools.drawn.world import has_new_pair, parse_caption
from tools.evaluation.paired_statistics import Estimate, bootstrap_mean, paired_shares, verdict, wilson
from tools.evaluation.rows import DENSE, Row, Rows

MeasureSet = Callable[[str], Mapping[str, float]]  # preset -> metrics of all its pictures together, by name


@dataclass(frozen=True)
class Summary:
    """The results of one preset on the captions that all presets have.

    Estimates have intervals of 95 %; ``None`` is not measured. ``obeyed`` is the caption accuracy. ``seen`` and
    ``held_out`` are the accuracy on captions that training saw and never saw, if both kinds are there. ``new_pairs`` is
    that on captions with a color and a shape that training never showed together. ``plain`` and ``open`` are that on
    captions that name every color or leave some open, if both kinds are there. ``lost`` is the share of captions of
    which the dense picture shows all objects, and the preset's does not. ``over_dense`` and ``over_baseline``
    are paired differences of caption accuracy, ``error_over_baseline`` of latent error. Dense has no differences.
    ``crowd`` holds the metrics of all pictures together. The fields are the keys of recorded JSON.
    """

    preset: str
    steps: int
    cfg: float
    captions: int
    flops_share: float
    seconds: float  # a picture
    time_ratio: float  # to dense
    obeyed: Estimate | None
    seen: Estimate | None
    held_out: Estimate | None
    new_pairs: Estimate | None
    plain: Estimate | None
    open: Estimate | None
    lost: Estimate | None
    over_dense: Estimate | None
    over_baseline: Estimate | None
    psnr: Estimate  # dB, to the dense picture of the same seed, as are the next two
    ssim: Estimate
    latent_error: Estimate
    error_over_baseline: Estimate | None
    crowd: Mapping[str, float] = field(default_factory=dict)


def common_rows(rows: Rows, presets: Sequence[str], captions: int) -> dict[str, list[Row]]:
    """The rows of dense and of each preset, for the captions below ``captions`` that have a row of all of them.

    Raises ``ValueError`` if there is no such caption.
    """
    kinds = list(dict.fromkeys([DENSE, *presets]))
    numbers = [number for number in range(captions) if all((kind, number) in rows for kind in kinds)]
    if not numbers:
        raise ValueError(f"there is no caption with rows of all of {', '.join(kinds)}, expected one or more")
    return {kind: [rows[kind, number] for number in numbers] for kind in kinds}


def summarize(
    rows: Mapping[str, Sequence[Row]], baseline: str | None, measure: MeasureSet = lambda _: {}
) -> list[Summary]:
    """A summary of each preset of :func:`common_rows`. Raises ``ValueError`` for a ``baseline`` that is not there."""
    if baseline is not None and baseline not in rows:
        raise ValueError(f"baseline is {baseline!r}, expected one of {', '.join(rows)}")
    return [_summary(mine, rows[DENSE], rows[baseline] if baseline else None, measure) for mine in rows.values()]


def _summary(mine: Sequence[Row], dense: Sequence[Row], baseline: Sequence[Row] | None, measure: MeasureSet) -> Summary:
    first = mine[0]
    other = None if baseline is None or first.preset in (DENSE, baseline[0].preset) else baseline
    both = len({row.held_out for row in mine}) == 2
    opened, closed = [row for row in mine if _is_open(row)], [row for row in mine if not _is_open(row)]
    return Summary(
        preset=first.preset,
        steps=first.steps,
        cfg=first.cfg,
        captions=len(mine),
        flops_share=first.flops_share,
        seconds=math.fsum(row.seconds for row in mine) / len(mine),
        time_ratio=math.fsum(row.seconds for row in mine) / math.fsum(row.seconds for row in dense),
        obeyed=_share(mine),
        seen=_share([row for row in mine if row.held_out is False]) if both else None,
        held_out=_share([row for row in mine if row.held_out is True]) if both else None,
        new_pairs=_share([row for row in mine if has_new_pair(row.caption)]),
        plain=_share(closed) if opened else None,
        open=_share(opened) if closed else None,
        lost=None if first.preset == DENSE else _lost(mine, dense),
        over_dense=None if first.preset == DENSE else accuracy_over(mine, dense),
        over_baseline=accuracy_over(mine, other) if other else None,
        psnr=bootstrap_mean([row.psnr for row in mine]),
        ssim=bootstrap_mean([row.ssim for row in mine]),
        latent_error=bootstrap_mean([row.latent_error for row in mine]),
        error_over_baseline=error_over(mine, other) if other else None,
        crowd=measure(first.preset),
    )


def _share(rows: Sequence[Row]) -> Estimate | None:
    judged = [row.obeyed for row in rows if row.obeyed is not None]
    return wilson(sum(judged), len(judged)) if judged else None


def _is_open(row: Row) -> bool:
    return row.obeyed is not None and parse_caption(row.caption).open


def _lost(mine: Sequence[Row], dense: Sequence[Row]) -> Estimate | None:
    lost = []
    for row, other in zip(mine, dense, strict=True):
        if row.objects is not None and other.objects is not None:
            named = len(parse_caption(row.caption).objects)
            lost.append(row.objects < named <= other.objects)
    return wilson(sum(lost), len(lost)) if lost else None


def accuracy_over(ours: Sequence[Row], theirs: Sequence[Row]) -> Estimate | None:
    """Our caption accuracy less theirs, paired (:func:`paired_shares`); ``None`` if captions cannot be checked."""
    if ours[0].obeyed is None:
        return None
    return paired_shares([row.obeyed is True for row in ours], [row.obeyed is True for row in theirs])


def error_over(ours: Sequence[Row], theirs: Sequence[Row]) -> Estimate:
    """Our mean latent error less theirs, by the paired bootstrap (:func:`bootstrap_mean`)."""
    return bootstrap_mean([a.latent_error - b.latent_error for a, b in zip(ours, theirs, strict=True)])


@dataclass(frozen=True)
class ClaimOutcome:
    """Whether two measures confirm the claim that ``better`` beats ``worse``; each verdict is one of ``VERDICTS``.

    The fields are the keys of recorded JSON.
    """

    claim: str
    better: str
    worse: str
    obeyed: Estimate | None  # caption accuracy, better less worse
    obeyed_verdict: str | None
    error: Estimate  # latent error to dense, better less worse: below 0 supports the claim
    error_verdict: str


def judge(claim: str, better: Sequence[Row], worse: Sequence[Row]) -> ClaimOutcome:
    """Judges a claim by the rows of two presets on the same captions."""
    obeyed, error = accuracy_over(better, worse), error_over(better, worse)
    return ClaimOutcome(
        claim=claim,
        better=better[0].preset,
        worse=worse[0].preset,
        obeyed=obeyed,
        obeyed_verdict=None if obeyed is None else verdict(obeyed, len(better)),
        error=error,
        error_verdict=verdict(-error, len(better)),
    )


def markdown_table(summaries: Sequence[Summary], baseline: str | None) -> str:
    """Markdown: a row for each summary, without columns in which nothing was measured."""
    several = {(each.steps, each.cfg) for each in summaries}
    columns: dict[str, Callable[[Summary], str]] = {"preset": lambda s: f"`{s.preset}`"}
    if len(several) > 1:
        columns |= {"steps": lambda s: str(s.steps), "CFG": lambda s: f"{s.cfg:g}"}
    if len({each.captions for each in summaries}) > 1:
        columns["captions"] = lambda s: str(s.captions)
    columns |= {
        "FLOPs": lambda s: f"{s.flops_share:.1%}",
        "caption accuracy": lambda s: _percent(s.obeyed),
        "captions seen": lambda s: _percent(s.seen),
        "held out": lambda s: _percent(s.held_out),
        "new pairs": lambda s: _percent(s.new_pairs),
        "plain captions": lambda s: _percent(s.plain),
        "open captions": lambda s: _percent(s.open),
        "objects lost": lambda s: _percent(s.lost),
        "over dense": lambda s: _percent(s.over_dense, "+"),
        f"over `{baseline}`": lambda s: _percent(s.over_baseline, "+"),
        "latent error": lambda s: _number(s.latent_error, ".4f"),
        f"error over `{baseline}`": lambda s: _number(s.error_over_baseline, "+.4f"),
        "PSNR, dB": lambda s: _number(s.psnr, ".2f"),
        "SSIM": lambda s: _number(s.ssim, ".3f"),
    }
    for name in dict.fromkeys(name for each in summaries for name in each.crowd):
        columns[name] = lambda s, name=name: f"{s.crowd[name]:.4g}"  # type: ignore[misc]
    columns["time"] = lambda s: f"{s.time_ratio:.2f}"
    cells = {head: [show(each) for each in summaries] for head, show in columns.items()}
    kept = {head: column for head, column in cells.items() if any(column)}
    lines = [" | ".join(kept), " | ".join("---" for _ in kept), *map(" | ".join, zip(*kept.values(), strict=True))]
    return "\n".join(f"| {line} |" for line in lines)


def claim_table(outcomes: Sequence[ClaimOutcome]) -> str:
    """Markdown: a row for each claim."""
    lines = ["| claim | by caption accuracy | by latent error |", "| --- | --- | --- |"]
    for each in outcomes:
        obeyed = "" if each.obeyed is None else f"{each.obeyed_verdict}: {_percent(each.obeyed, '+')}"
        lines.append(f"| {each.claim} | {obeyed} | {each.error_verdict}: {_number(each.error, '+.4f')} |")
    return "\n".join(lines)


def as_json(record: Summary | ClaimOutcome) -> dict[str, Any]:
    """A record ready for JSON, which has no infinity: ``None`` replaces it, as in the PSNR of equal pictures."""

    def finite(value: Any) -> Any:
        if isinstance(value, float):
            return value if math.isfinite(value) else None
        if isinstance(value, Estimate):
            return {name: finite(number) for name, number in value._asdict().items()}
        return {name: finite(each) for name, each in value.items()} if isinstance(value, dict) else value

    plain: dict[str, Any] = finite({name: getattr(record, name) for name in asdict(record)})
    return plain


def _percent(estimate: Estimate | None, sign: str = "") -> str:
    if estimate is None:
        return ""
    value, low, high = (f"{100 * number:{sign}.1f}" for number in estimate)
    return f"{value} % ({low} to {high})"


def _number(estimate: Estimate | None, form: str) -> str:
    if estimate is None or math.isinf(estimate.value):
        return "" if estimate is None else "equal"
    value, low, high = (f"{number:{form}}" for number in estimate)
    return f"{value} ({low} to {high})"
