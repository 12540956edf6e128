"""Presets: named schedules, and the text form of their settings, such as ``at-edm:rho=0.5,tau=10``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from atedm.merging import Merging
from atedm.pruning import Pruning
from atedm.schedule import Schedule
from atedm.sito import SiTo
from atedm.todo import ToDo
from atedm.toma import ToMA

RHO = 0.63  # section 4.1
R = 0.50  # ToMe's ratio, section 4.1

# ToDo and SiTo are published for the largest level of SD 1.5 alone, level 0, where a picture of 512 pixels has 64 x 64
# tokens. SDXL has no attention at that level. At its level 1 a picture of 1024 pixels has as many tokens.
LARGEST = (1,)


@dataclass(frozen=True)
class Preset:
    """A schedule, what it is in one line, and the ratios that meet the FLOPs budgets a to d of the paper's table 1."""

    schedule: Schedule
    about: str
    budgets: tuple[tuple[str, float], ...] = ()


def _preset(schedule: Schedule, about: str, **budgets: float) -> tuple[str, Preset]:
    return schedule.name, Preset(schedule, about, tuple(budgets.items()))


# Budgets a to d of table 1. The paper gives rho for c alone; the others are what its FLOPs need with one pruning layer.
_AT_EDM = {"a": 0.94, "b": 0.75, "c": RHO, "d": 0.52}
_TOME = {"a": 0.75, "b": 0.60, "c": R, "d": 0.40}

PRESETS: dict[str, Preset] = dict(
    (
        _preset(Schedule("at-edm", Pruning(RHO)), "the paper's method: G-WPR on self-attention, DSAP", **_AT_EDM),
        _preset(
            Schedule("at-edm-dagger", Pruning(RHO), spare_largest=True),
            "at-edm, but no pruning where token sets are largest (section 4.3)",
        ),
        _preset(
            Schedule("tome", Merging(R), tau=0), "token merging in all layers and sub-layers, at every step", **_TOME
        ),
        _preset(Schedule("tome-dsap", Merging(R)), "token merging with the prune-less early steps of DSAP", **_TOME),
        _preset(Schedule("ca-wpr", Pruning(RHO, ranking="ca-wpr")), "at-edm ranked by cross-attention (figure 8)"),
        _preset(
            Schedule("zeros", Pruning(RHO, recovery="zeros")), "at-edm, pruned tokens come back as zeros (figure 9)"
        ),
        _preset(
            Schedule("bicubic", Pruning(RHO, recovery="bicubic")), "at-edm, pruned tokens are interpolated (figure 9)"
        ),
        _preset(
            Schedule("direct", Pruning(RHO, recovery="direct")),
            "at-edm, pruned tokens come back as they were when pruned (figure 9)",
        ),
        _preset(Schedule("random", Pruning(RHO, ranking="random")), "at-edm, but random tokens stay"),
        _preset(
            Schedule("one-vote", Pruning(RHO, ranking="one-vote")),
            "at-edm ranked by attention received, without iterating",
        ),
        _preset(
            Schedule("at-edm-subsampled", Pruning(RHO, graph="subsampled")),
            "at-edm, but only every fifth token votes, which ranks in a fraction of the time",
        ),
        _preset(
            Schedule("dissimilarity", Pruning(RHO, ranking="dissimilarity", recovery="nearest-change")),
            "prunes tokens similar to others; they add the change of the nearest kept token; no attention map",
        ),
        _preset(
            Schedule("moving-grid", Pruning(RHO, ranking="moving-grid", recovery="nearest-change")),
            "keeps a regular grid, shifted at every step; other tokens add the change of the nearest kept token",
        ),
        _preset(
            Schedule("todo", ToDo(0.75), tau=0, levels=LARGEST),
            "self-attention to every second row and column alone, where token sets are largest",
        ),
        _preset(
            Schedule("sito", SiTo(0.5), tau=0, levels=LARGEST),
            "no self-attention for tokens similar to others, which copy it, where token sets are largest",
        ),
        _preset(
            Schedule("toma", ToMA(0.5), tau=0),
            "token merging by matrix products within 64 tiles, in all layers and sub-layers",
        ),
    )
)


# Names of presets and settings before version 0.2, which files, metadata and scripts may still contain.
OLD_SPELLINGS = {
    "at-edm-sketched": "at-edm-subsampled",
    "graph=held": "graph=by-head",
    "graph=whole": "graph=dense",
    "graph=sketched": "graph=subsampled",
}


def current_spelling(text: str) -> str:
    """Replaces old spellings in a preset's text: ``at-edm-sketched`` becomes ``at-edm-subsampled``."""
    name, colon, settings = text.partition(":")
    current = ",".join(OLD_SPELLINGS.get(setting, setting) for setting in settings.split(","))
    return OLD_SPELLINGS.get(name, name) + colon + current


def parse_preset(text: str) -> Schedule:
    """The schedule of a preset's name with optional settings, as in ``at-edm:rho=0.5,tau=10``.

    A single letter among the settings is a budget of the paper's table 1: ``at-edm:b``. Old spellings are understood
    (:func:`current_spelling`). Raises ``ValueError`` for an unknown preset or setting, for a setting that is given
    twice, and for a value that is unreadable or out of range.
    """
    name, colon, settings = current_spelling(text).partition(":")
    if name not in PRESETS:
        raise ValueError(f"unknown preset {name!r}, expected one of {', '.join(PRESETS)}")
    schedule, budgets = PRESETS[name].schedule, dict(PRESETS[name].budgets)
    prunes = isinstance(schedule.method, Pruning)
    ratio = "rho" if prunes else "r"  # as the papers call it
    known = {ratio: _ratio, **SETTINGS, **METHOD_SETTINGS.get(type(schedule.method), {})}
    seen = set[str]()
    for setting in settings.split(",") if colon else []:
        key, _, value = (ratio, "=", str(budgets[setting])) if setting in budgets else setting.partition("=")
        if key not in known:
            letters = f" or a budget, {', '.join(budgets)}" if budgets else ""
            raise ValueError(f"unknown setting {setting!r} of {name}, expected one of {', '.join(known)}{letters}")
        if key in seen:
            raise ValueError(f"setting {key} of {name} is given twice")
        seen.add(key)
        try:
            schedule = known[key](schedule, value)
        except ValueError as error:
            raise ValueError(f"setting {key} of {name} is {value!r}: {error}") from error
    return schedule


Setting = Callable[[Schedule, str], Schedule]


def _ratio(schedule: Schedule, value: str) -> Schedule:
    return replace(schedule, method=replace(schedule.method, ratio=_number(value)))


def _method(field: str, read: Callable[[str], str | float]) -> Setting:
    """A setting of the method itself."""

    def change(schedule: Schedule, value: str) -> Schedule:
        return replace(schedule, method=replace(schedule.method, **{field: read(value)}))  # type: ignore[arg-type]

    return change


def _layers(schedule: Schedule, value: str) -> Schedule:
    return replace(schedule, layers=tuple(_whole(layer) for layer in value.split("+")))


def _levels(schedule: Schedule, value: str) -> Schedule:
    return replace(schedule, levels=tuple(_whole(level) for level in value.split("+")))


def _place(schedule: Schedule, value: str) -> Schedule:
    places = {"after-ff": False, "before-ff": True}
    if value not in places:
        raise ValueError(f"expected one of {', '.join(places)}")
    return replace(schedule, before_feed_forward=places[value])


def _ratios(schedule: Schedule, value: str) -> Schedule:
    pairs = [pair.partition("@") for pair in value.split("+")]
    if not all(name for _, _, name in pairs):
        raise ValueError("expected ratios at attention blocks, as 0.3@mid+0.8@up.2.0")
    return replace(schedule, ratios=tuple((name, _number(ratio)) for ratio, _, name in pairs))


def _names(value: str) -> tuple[str, ...]:
    names = tuple(value.split("+"))
    if not all(names):
        raise ValueError("expected names of attention blocks, as mid+up.2.0")
    return names


def _number(value: str) -> float:
    try:
        return float(value)
    except ValueError:
        raise ValueError("expected a number") from None


def _whole(value: str) -> int:
    try:
        return int(value)
    except ValueError:
        raise ValueError("expected a whole number") from None


SETTINGS: dict[str, Setting] = {  # besides the ratio, rho of pruning and r of the others
    "tau": lambda schedule, value: replace(schedule, tau=_whole(value)),
    "early": lambda schedule, value: replace(schedule, early=value),
    "ends": lambda schedule, value: replace(schedule, ends=_names(value)),
    "spare": lambda schedule, value: replace(schedule, spared=_names(value)),
    "ratios": _ratios,  # 0.3@mid+0.8@up.2.0
    "levels": _levels,  # 1+2
}
PRUNING_SETTINGS: dict[str, Setting] = {
    "layers": _layers,  # 0+1
    "place": _place,
    "ranking": _method("ranking", str),
    "recovery": _method("recovery", str),
    "graph": _method("graph", str),
    "sharpness": _method("sharpness", _number),
    "iterations": _method("iterations", _whole),
}
METHOD_SETTINGS: dict[type, dict[str, Setting]] = {
    Pruning: PRUNING_SETTINGS,
    SiTo: {"alpha": _method("alpha", _number), "beta": _method("beta", _number), "seed": _method("seed", _whole)},
    ToMA: {"tiles": _method("tiles", _whole), "scale": _method("scale", _number)},
}
