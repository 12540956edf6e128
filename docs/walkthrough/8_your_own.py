# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 8. Your own ranking, your own schedule
#
# Now you know the parts, and can put in your own. This lesson writes a ranking that no paper has, and a schedule, and
# measures both against the others. A measurement without an interval is an anecdote, so there are intervals.

# %%
from dataclasses import replace

import matplotlib.pyplot as plt
import torch
from checks import check
from course import call, examples, load, show

from atedm import BlockPlan, LayerPlan, LazyGraph, Pruning, TokenPlan, kept_count, parse_preset, recover, top_k
from minisdxl.cost import count
from minisdxl.sampler import timesteps
from tools.evaluation.paired_statistics import bootstrap_mean, verdict

torch.set_grad_enabled(False)
sdxl = load()
sites = list(sdxl.config.unet.attention_sites())
pictures = examples(sdxl, 6, side=128)
show([picture.pixels for picture in pictures])

# %% [markdown]
# ## A ranking
#
# A ranking gives each token a score; the highest stay. Here is one: a token matters if it differs from the tokens
# around it, so that edges stay and flat regions go. Values come as (B, N, C), and the grid says how N tokens lie.


# %%
def edges(tokens):
    """How far each token is from the mean of its 3 x 3 neighborhood: (B, N)."""
    grid = tokens.to_feature_map()
    mean = torch.nn.functional.avg_pool2d(grid, 3, stride=1, padding=1, count_include_pad=False)
    return (grid - mean).square().mean(dim=1).flatten(1)


class OwnLayer(LayerPlan):
    """Prunes by ``edges``. The U-Net asks each layer's plan twice: before the feed-forward and after it."""

    def prune(self, tokens, self_attention, cross_attention, *, before_feed_forward):
        if before_feed_forward:
            return tokens, []
        kept = top_k(edges(tokens), kept_count(tokens.count, self.pruning.ratio))
        return tokens.keep(kept), [recover("nearest-change", tokens, kept, LazyGraph(self_attention))]


own = TokenPlan({site.name: BlockPlan(((0, OwnLayer(Pruning(0.63))),)) for site in sites})

# %% [markdown]
# ## A measure
#
# One U-Net call on each picture, dense and pruned, at timestep 500. *Change* is the squared difference to the dense
# prediction, over the squared error that the dense model makes on average. It is cheap and fine, but it is not
# quality: it says how little a method disturbs the model. For pictures, `python -m tools.evaluate` draws captions and
# checks them.

# %%
presets = ("at-edm", "at-edm:recovery=nearest-change", "random:recovery=nearest-change", "moving-grid")
plans = {"own: edges": own, **{preset: parse_preset(preset).plan(49, 50, sites) for preset in presets}}
dense = [call(sdxl, picture, 500, seed=i) for i, picture in enumerate(pictures)]
error = sum(each.error for each in dense) / len(dense)


def changes(plan, timestep, dense):
    """The change of each picture."""
    found = [call(sdxl, picture, timestep, plan, seed=i) for i, picture in enumerate(pictures)]
    return [(a.predicted - b.predicted).square().mean().item() / error for a, b in zip(found, dense)]


change = {name: changes(plan, 500, dense) for name, plan in plans.items()}

# %% [markdown]
# ## Pairs
#
# Some pictures are harder than others, for all methods. So do not compare means: compare on the same picture with the
# same noise, and take the mean of the **differences**. The bootstrap draws the six pictures again and again, with
# repetition, and 95 % of the means that come out are the interval. If it holds 0, you cannot tell. With fewer than
# six pairs, `verdict` does not try. Of twenty comparisons of equal methods, about one looks decided by chance.

# %%
figure, axis = plt.subplots(figsize=(8, 3))
for place, name in enumerate(list(change)[1:]):
    difference = bootstrap_mean([theirs - ours for ours, theirs in zip(change["own: edges"], change[name])])
    axis.plot([difference.low, difference.high], [place, place], linewidth=3)
    axis.plot(difference.value, place, "ko")
    mean = sum(change[name]) / len(pictures)
    print(f"{name:32} change {mean:6.3f}, own is better: {verdict(difference, len(pictures))}", end=" ")
    print(f"({difference.value:+.3f}, {difference.low:+.3f} to {difference.high:+.3f})")
print(f"{'own: edges':32} change {sum(change['own: edges']) / len(pictures):6.3f}")
axis.set_yticks(range(len(change) - 1), list(change)[1:])
axis.axvline(0, color="gray", linewidth=0.8)
axis.set_xscale("symlog", linthresh=0.1)
axis.set_xlabel("its change less that of edges; right of 0, edges disturbs less")
plt.tight_layout()
plt.show()

# %% [markdown]
# ## A schedule
#
# DSAP has two kinds of steps. Yours may have fifty: here ρ rises in a line, from 0.4 of its last value. To be fair it
# has to cost the same. So the last value is found by bisection, until the average of 50 steps has DSAP's FLOPs.

# %%
dsap = parse_preset("moving-grid")
every_step = parse_preset("moving-grid:tau=0")


def plan_at(step, rho):
    return replace(every_step, method=replace(every_step.method, ratio=rho)).plan(step, 50, sites)


def average(plans):
    return sum(count(sdxl.config, 32, 32, plan).total for plan in plans) / len(plans)


budget = average([dsap.plan(step, 50, sites) for step in range(50)])
low, high = 0.0, 0.99
for _ in range(8):
    last = (low + high) / 2
    ramp = [plan_at(step, last * (0.4 + 0.6 * step / 49)) for step in range(50)]
    low, high = (last, high) if average(ramp) > budget else (low, last)
print(f"ρ rises from {0.4 * last:.2f} to {last:.2f}; FLOPs over those of DSAP: {average(ramp) / budget:.3f}")

# %%
for step in (5, 40):
    timestep = int(timesteps(50, sdxl.config.noise)[step])
    dense = [call(sdxl, picture, timestep, seed=i) for i, picture in enumerate(pictures)]
    error = sum(each.error for each in dense) / len(dense)
    ours, theirs = (changes(plan, timestep, dense) for plan in (ramp[step], dsap.plan(step, 50, sites)))
    difference = bootstrap_mean([b - a for a, b in zip(ours, theirs)])
    print(f"step {step:2}: ramp {sum(ours) / 6:.4f}, DSAP {sum(theirs) / 6:.4f};", end=" ")
    print(f"ramp is better: {verdict(difference, 6)} ({difference.low:+.4f} to {difference.high:+.4f})")

# %% [markdown]
# Expect a ramp to disturb less where it prunes less, and more where it prunes more; the intervals say whether six
# pictures can tell. Which of these steps matter for the picture, a single call cannot say. For that, draw pictures:
# `python -m tools.evaluate --presets moving-grid tome --captions 16` prints shares of right captions with intervals.
# CONTRIBUTING.md says how to add a ranking under a name, so that all commands know it.
#
# ## Exercises
#
# **8.1** Another ranking: the mean squared difference of a token from its neighbors left, right, above and below,
# over channels and over those neighbors that exist. `values` is (N, C), `grid` is (rows, columns). Return (N,).


# %%
def neighbor_score(values, grid): ...


check("8.1", neighbor_score)

# %% [markdown]
# **8.2** Write a judge. `ours` and `theirs` are errors on the same pictures. Return "better", "worse" or "undecided":
# by the interval of `bootstrap_mean` over the paired differences.


# %%
def judge(ours, theirs): ...


check("8.2", judge)

# %% [markdown]
# **8.3** A schedule for SDXL at 1024 px: write ρ of each step, 0 to 49, for `moving-grid:tau=0`, so that the average
# U-Net call costs what DSAP's does at ρ = 0.63, to 1 %. It has to prune less in early steps than in late ones.


# %%
def rho_of(step): ...


check("8.3", rho_of)
