"""The experiments of ``tools.experiments`` as data: presets, budgets, and the claims that are judged."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

BASELINE = "at-edm"  # the preset that all others are compared with
CFG = 4.0  # the best CFG scale of the bundled model


class Claim(NamedTuple):
    """The claim that preset ``better`` beats preset ``worse``, from the paper or one's own."""

    text: str
    better: str
    worse: str


@dataclass(frozen=True)
class Experiment:
    """Presets under every combination of budget, CFG scale and number of steps, with the dense model beside them.

    A budget is a share of the dense FLOPs, averaged over all steps, or a preset whose cost all presets get, or ``None``
    for methods that cost what they cost (``tools.evaluation.methods`` has their texts). ``axis`` is
    the plot's horizontal axis (``AXES`` of ``plots``), or ``None`` for presets side by side, with pictures.
    ``distance`` to the dense picture is what its second panel shows (``DISTANCES`` of ``plots``).
    """

    about: str
    presets: tuple[str, ...]
    claims: tuple[Claim, ...]
    budgets: tuple[float | str | None, ...] = (BASELINE,)
    cfgs: tuple[float, ...] = (CFG,)
    steps: tuple[int, ...] = (50,)
    axis: str | None = None
    distance: str = "latent_error"


_RIVALS = (
    Claim("AT-EDM beats ToMe (table 1)", "at-edm", "tome"),
    Claim("AT-EDM beats ToMe with DSAP", "at-edm", "tome-dsap"),
    Claim("G-WPR beats drawing at random", "at-edm", "random"),
    Claim("DSAP helps ToMe (figure 6)", "tome-dsap", "tome"),
)
_COMPARED = ("at-edm", "tome", "tome-dsap", "random")
_RANKINGS = (
    *("at-edm:ranking=lowest", "random"),
    *("at-edm:ranking=grid", "at-edm:ranking=covered", "at-edm:ranking=dissimilarity"),
)
_RECOVERIES = tuple(
    f"dissimilarity:recovery={name}"
    for name in ("nearest-two-change", "nearest", "similarity-change", "direct", "similarity")
)
_RANKED_WITH_CHANGE = tuple(
    f"{name}recovery=nearest-change"
    for name in ("at-edm:", "at-edm:ranking=covered,", "at-edm:ranking=lowest,", "random:", "at-edm:ranking=grid,")
)
_FEWER = ("steps=25", "steps=17", "steps=12", "steps=10")  # dense in fewer steps: what any method must beat
# Evenly spaced evaluations with forecasts in the number of the step instead of sigma: what `fast` was at first.
_IN_STEPS = "skip=given:WW111W11111W1111W11111W1111W11111W1111W11111W1111W"
# The papers' settings, and others that bring each method to fewer FLOPs.
_STEP_METHODS = {
    "deepcache": ("skip=deepcache:every=2", "skip=deepcache", "skip=deepcache:every=5"),
    "tgate": ("skip=tgate", "skip=tgate:gate=5"),
    "zeus": ("skip=zeus", "skip=zeus:start=4,end=48,every=4", "skip=zeus:start=3,end=49,every=6"),
    "sada": ("skip=sada", "skip=sada:start=4,end=49,most=6,every=6"),
    "easycache": ("skip=easycache", "skip=easycache:threshold=0.5,start=0.06"),
    "guidance": ("guide=interval", "guide=until", "guide=alternate"),
    "spaced": ("fast=faithful", "fast=fast", "skip=spaced:share=0.22,power=1", _IN_STEPS),
    "own-change": tuple(
        f"moving-grid:recovery={recovery}" for recovery in ("nearest-change", "own-change", "own-change-linear")
    ),
}
_OF_ONE_STEP = ("guidance", "own-change")  # these evaluate all steps, at three quarters of the FLOPs
_COMPOSED = ("fast=faithful", "fast=fast")
# Pruning and shallow steps beside forecasts, as `tools.search_plans` found them best on two captions.
_FOUND = tuple(
    f"prune=moving-grid:levels=2,rho=0.75,tau=15,recovery=own-change skip=spaced:share={share},power=1.1,shallow=2"
    for share in (0.34, 0.22)
)
_RIVALS_OF_COMPOSED = {  # of each other method, what costs as much or more
    "fast=faithful": (
        *("steps=17", "skip=deepcache", "skip=tgate", "skip=zeus:start=4,end=48,every=4"),
        *("skip=sada", "skip=sada:start=4,end=49,most=6,every=6", "skip=easycache"),
        *("guide=interval", "at-edm", "tome", _FOUND[0]),
    ),
    "fast=fast": (
        *("steps=12", "skip=deepcache:every=5", "skip=tgate:gate=5", "skip=zeus:start=3,end=49,every=6"),
        *("skip=sada:start=4,end=49,most=6,every=6", "skip=easycache:threshold=0.5,start=0.06"),
        *("skip=spaced:share=0.22,power=1", _IN_STEPS, "guide=interval", "at-edm", "tome", _FOUND[1]),
    ),
}
_ITERATIONS = ("at-edm", "at-edm:iterations=1", "at-edm:iterations=3", "at-edm:graph=subsampled")

EXPERIMENTS: dict[str, Experiment] = {
    "table-1": Experiment(
        "Table 1, by cost: budgets d to a are the paper's shares of the dense FLOPs, 4.5, 4.1, 3.6 and 2.9 of 6.7 T.",
        presets=_COMPARED,
        claims=_RIVALS,
        budgets=(4.5 / 6.7, 4.1 / 6.7, 3.6 / 6.7, 2.9 / 6.7),
        axis="flops_share",
    ),
    "table-1-ratios": Experiment(
        "Table 1, by ratio: budgets d to a are the cost of AT-EDM with the paper's rho, 0.52, 0.63, 0.75 and 0.94. "
        "For models whose attention blocks have too small a share of the FLOPs for the budgets of table-1.",
        presets=_COMPARED,
        claims=_RIVALS,
        budgets=("at-edm:d", "at-edm:c", "at-edm:b", "at-edm:a"),
        axis="flops_share",
    ),
    "figure-7": Experiment(
        "Figure 7: quality against the CFG scale.",
        presets=("at-edm", "at-edm-dagger", "tome"),
        claims=(Claim("AT-EDM beats ToMe (figure 7)", "at-edm", "tome"),),
        cfgs=(1.0, 2.0, 3.0, 4.0, 6.0, 8.0),
        axis="cfg",
    ),
    "figure-8": Experiment(
        "Figure 8: tokens ranked by self-attention, by cross-attention, and at random.",
        presets=("at-edm", "ca-wpr", "random"),
        claims=(
            Claim("self-attention ranking beats cross-attention (figure 8)", "at-edm", "ca-wpr"),
            Claim("self-attention ranking beats drawing at random", "at-edm", "random"),
        ),
    ),
    "figure-9": Experiment(
        "Figure 9: recoveries of pruned tokens.",
        presets=("at-edm", "direct", "bicubic", "zeros"),
        claims=tuple(
            Claim(f"similarity copy beats {name} (figure 9)", "at-edm", recovery)
            for name, recovery in (("direct copy", "direct"), ("bicubic", "bicubic"), ("zeros", "zeros"))
        ),
    ),
    "figure-10": Experiment(
        "Figure 10: the number of prune-less early steps, and prune-more early steps, at one budget.",
        presets=("at-edm", *(f"at-edm:tau={tau}" for tau in (0, 5, 30, 45)), "at-edm:early=more"),
        budgets=(0.85,),  # tau 45 leaves little to save
        claims=(
            Claim("DSAP beats no DSAP (figure 10)", "at-edm", "at-edm:tau=0"),
            *(Claim(f"tau 15 beats tau {tau} (figure 10)", "at-edm", f"at-edm:tau={tau}") for tau in (5, 30, 45)),
            Claim("prune-less early steps beat prune-more ones", "at-edm", "at-edm:early=more"),
        ),
    ),
    "feed-forward": Experiment(
        "Pruning after the feed-forward, as the paper does, or before it, which saves more at the same ratio.",
        presets=("at-edm", "at-edm:place=before-ff"),
        claims=(Claim("before the feed-forward beats after it at equal FLOPs", "at-edm:place=before-ff", "at-edm"),),
    ),
    "iterations": Experiment(
        "Iterations of G-WPR: until it converges, one, three; and with the votes of every fifth query only.",
        presets=_ITERATIONS,
        claims=tuple(
            Claim(f"settled G-WPR beats {other.partition(':')[2]}", "at-edm", other) for other in _ITERATIONS[1:]
        ),
    ),
    "rankings": Experiment(
        "Rankings at equal FLOPs, with the paper's recovery: G-WPR, its reverse, its best token of each window, "
        "and others.",
        presets=("at-edm", *_RANKINGS),
        claims=tuple(Claim(f"G-WPR beats {other.partition('=')[2] or other}", "at-edm", other) for other in _RANKINGS),
    ),
    "recoveries": Experiment(
        "Recoveries of pruned tokens at equal FLOPs, with a ranking that keeps the tokens unlike the rest.",
        presets=("at-edm", "dissimilarity", *_RECOVERIES),
        claims=tuple(
            Claim(f"nearest-change beats {other.partition('=')[2]}", "dissimilarity", other) for other in _RECOVERIES
        ),
    ),
    "rankings-with-change": Experiment(
        "Rankings at equal FLOPs, where a pruned token adds the change of its nearest kept token.",
        presets=("at-edm", "dissimilarity", *_RANKED_WITH_CHANGE),
        claims=(
            *(
                Claim(f"G-WPR beats {name}", _RANKED_WITH_CHANGE[0], other)
                for name, other in zip(
                    ("its best of each window", "its reverse", "drawing at random", "a grid"),
                    _RANKED_WITH_CHANGE[1:],
                    strict=True,
                )
            ),
            *(
                Claim(f"dissimilarity beats {name}", "dissimilarity", other)
                for name, other in zip(
                    ("G-WPR", "its best of each window", "its reverse", "drawing at random", "a grid"),
                    _RANKED_WITH_CHANGE,
                    strict=True,
                )
            ),
        ),
    ),
    "better-method": Experiment(
        "The presets dissimilarity and moving-grid, with an ablation of each, beside AT-EDM and ToMe. Budgets are "
        "the cost of AT-EDM with rho 0.3, 0.5, 0.63 and 0.75.",
        presets=(
            *("at-edm", "tome", "tome-dsap", "dissimilarity:tau=0"),
            *("dissimilarity", "dissimilarity:recovery=nearest-two-change", "moving-grid", "moving-grid:ranking=grid"),
        ),
        claims=(
            Claim("dissimilarity beats AT-EDM", "dissimilarity", "at-edm"),
            Claim("dissimilarity beats ToMe", "dissimilarity", "tome"),
            Claim("dissimilarity beats ToMe with DSAP", "dissimilarity", "tome-dsap"),
            Claim("moving-grid beats AT-EDM", "moving-grid", "at-edm"),
            Claim("moving-grid beats ToMe", "moving-grid", "tome"),
            Claim("moving-grid beats ToMe with DSAP", "moving-grid", "tome-dsap"),
            Claim("moving-grid beats dissimilarity", "moving-grid", "dissimilarity"),
            Claim("a moving grid beats one that stays", "moving-grid", "moving-grid:ranking=grid"),
            Claim("two changes beat one", "dissimilarity:recovery=nearest-two-change", "dissimilarity"),
            Claim("DSAP helps dissimilarity", "dissimilarity", "dissimilarity:tau=0"),
        ),
        budgets=("at-edm:rho=0.3", "at-edm:rho=0.5", "at-edm", "at-edm:rho=0.75"),
        axis="flops_share",
    ),
    **{
        name: Experiment(
            f"{name} with several settings, beside the dense model in fewer steps.",
            presets=(*_FEWER, *methods),
            claims=(),
            budgets=(None,),
            axis="flops_share",
            distance="psnr",
        )
        for name, methods in _STEP_METHODS.items()
    },
    "composed": Experiment(
        "All methods over steps, the best over guidance and tokens, the presets, and the dense model in fewer steps.",
        presets=(
            *_FEWER,
            *(each for name, methods in _STEP_METHODS.items() if name not in _OF_ONE_STEP for each in methods),
            *("guide=interval", "moving-grid:recovery=own-change-linear", "at-edm", "tome"),
            *_FOUND,
        ),
        claims=tuple(
            Claim(f"{ours} beats {other}", ours, other) for ours in _COMPOSED for other in _RIVALS_OF_COMPOSED[ours]
        ),
        budgets=(None,),
        axis="flops_share",
        distance="psnr",
    ),
    **{
        f"composed-{steps}": Experiment(
            f"Composed presets where the dense model takes {steps} steps, beside the dense model in fewer.",
            presets=(*(f"steps={fewer}" for fewer in less), "skip=spaced:share=0.5", *_COMPOSED),
            claims=tuple(
                Claim(f"{ours} beats steps={other}", ours, f"steps={other}")
                for ours, other in zip(_COMPOSED, less[1:], strict=True)
            ),
            budgets=(None,),
            steps=(steps,),
            axis="flops_share",
            distance="psnr",
        )
        for steps, less in {25: (13, 8, 6), 10: (5, 4, 3)}.items()
    },
    "few-steps": Experiment(
        "Sampling in 10, 20 and 50 steps, each compared with the dense model in as many steps.",
        presets=("at-edm", "dissimilarity", "tome"),
        claims=(
            Claim("AT-EDM beats ToMe", "at-edm", "tome"),
            Claim("dissimilarity beats ToMe", "dissimilarity", "tome"),
        ),
        steps=(10, 20, 50),
        axis="steps",
    ),
}
