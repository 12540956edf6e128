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
# # 6. Counting: FLOPs, and what they do not say about time
#
# Papers on efficient models compare FLOPs: floating point operations. They are exact, and the same on every machine.
# Time is what you wait for. In this lesson you count the first and measure the second.

# %%
import statistics
import time

import matplotlib.pyplot as plt
import torch
from checks import check
from course import call, example, load
from torch.utils.flop_counter import FlopCounterMode

import atedm
from minisdxl.config import SDXL_BASE
from minisdxl.cost import Kind, count, format_flops, summary
from minisdxl.unet import UNet

torch.set_grad_enabled(False)

# %% [markdown]
# ## A formula and a counter
#
# A product of matrices (m x k) and (k x n) takes m·k·n multiplications and as many additions: 2·m·k·n FLOPs. The
# paper counts 2 for each multiply-accumulate as well, for one U-Net call, which is half of a step with guidance.
#
# `minisdxl/cost.py` adds these up by formula. torch counts while a model runs, also on the `meta` device, where
# nothing is computed. Both must find the same number.

# %%
with torch.device("meta"):
    unet = UNet(SDXL_BASE.unet)
    inputs = (torch.empty(1, 4, 128, 128), torch.empty(1), torch.empty(1, 77, 2048), torch.empty(1, 2816))
    with FlopCounterMode(display=False) as counter:
        unet(*inputs)
dense = count(SDXL_BASE, 128, 128)
print(f"by formula {dense.total:,}\nby torch   {counter.get_total_flops():,}")

# %% [markdown]
# ## Figure 2: where they go

# %%
kinds = [kind for kind in Kind if kind != Kind.RANKING]
shares = [sum(work.flops for work in dense.works if work.kind == kind) / dense.total for kind in kinds]
plt.figure(figsize=(8, 2))
left = 0.0
for kind, share in zip(kinds, shares):
    plt.barh(0, share, left=left, label=f"{kind.value} {share:.0%}")
    left += share
plt.yticks([])
plt.xlabel(f"share of {format_flops(dense.total)}, SDXL at 1024 px")
plt.legend(ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1), fontsize=8)
plt.show()

# %% [markdown]
# ## One transformer layer
#
# With n tokens of C channels, and T words of c channels:
#
# | | FLOPs |
# | --- | --- |
# | self-attention: q, k, v and out | 8 n C² |
# | self-attention: Q Kᵀ and A V | 4 n² C |
# | cross-attention: q and out; k and v; products | 4 n C² + 4 T c C + 4 n T C |
# | feed-forward: up to 2·4 C, back from 4 C | 24 n C² |
#
# Nearly all of it grows with n, so fewer tokens help everywhere. Only one term grows with n², the products with the
# map. At level 1 of SDXL, with 4,096 tokens, it has just caught up with the feed-forward. At level 2 it is far
# behind.

# %%
C, c, T = 640, 2048, 77  # SDXL's level 1
n = torch.linspace(256, 16384, 200)
parts = {
    "feed-forward": 24 * n * C**2,
    "projections": 12 * n * C**2 + 4 * T * c * C,
    "cross-attention": 4 * n * T * C,
    "self-attention": 4 * n**2 * C,
}
plt.figure(figsize=(7, 3))
plt.stackplot(n, [flops / 1e9 for flops in parts.values()], labels=list(parts))
plt.axvline(4096, color="black", linestyle=":")
plt.text(4300, 0.8 * plt.ylim()[1], "1024 px")
plt.legend(loc="upper left", fontsize=8, bbox_to_anchor=(1, 1))
plt.gca().set(xlabel="tokens n", ylabel="GFLOPs of one layer")
plt.tight_layout()
plt.show()

# %% [markdown]
# ## What pruning saves
#
# `steady` is a call in later steps, `average` is that of 50 steps. Table 1 of the paper has 4.1 T for AT-EDM-c and
# for ToMe-c, which are `at-edm` and `tome` here: a steady call.

# %%
for name in ("at-edm", "at-edm-dagger", "tome", "moving-grid"):
    calls = summary(SDXL_BASE, 128, 128, atedm.PRESETS[name].schedule, 50)
    numbers = {key: format_flops(calls[key]) for key in ("dense", "steady", "average")}
    ranking = sum(work["flops"] for work in calls["blocks"] if work["kind"] == Kind.RANKING)
    print(f"{name:14} {numbers}, ranking and recovery besides: {format_flops(ranking)}")

# %% [markdown]
# The last number is in no total, here and in the paper. G-WPR reads the whole attention map, which fused attention
# never writes down, so it has to be made once more. It is counted with the most iterations that are allowed, 50.
#
# ## What you wait for
#
# The time of a U-Net call of the small model at 256 px, in turns, so that a busy machine disturbs all alike. Each bar
# is a median of three.

# %%
sdxl = load()
picture, sites = example(sdxl), list(sdxl.config.unet.attention_sites())
names = ("dense", "at-edm", "moving-grid", "tome")
plans = {name: atedm.DENSE if name == "dense" else atedm.parse_preset(name).plan(49, 50, sites) for name in names}
times = {name: [] for name in names}
for turn in range(4):
    for name, plan in plans.items():
        start = time.perf_counter()
        call(sdxl, picture, 500, plan)
        if turn > 0:  # the first turn warms up
            times[name].append(time.perf_counter() - start)

# %%
median = {name: statistics.median(each) for name, each in times.items()}
flops = {name: count(sdxl.config, 64, 64, plan).total for name, plan in plans.items()}
place = torch.arange(len(names))
plt.figure(figsize=(7, 3))
plt.bar(place - 0.2, [flops[name] / flops["dense"] for name in names], 0.4, label="FLOPs")
plt.bar(place + 0.2, [median[name] / median["dense"] for name in names], 0.4, label="time")
plt.xticks(place, names)
plt.axhline(1, color="gray", linewidth=0.8)
plt.ylabel("share of dense")
plt.legend()
plt.show()
for name in names:
    low, high = min(times[name]), max(times[name])
    print(f"{name:12} {median[name] * 1e3:5.0f} ms, between {low * 1e3:.0f} and {high * 1e3:.0f}")

# %% [markdown]
# Your numbers differ from anybody else's; look at the bars, and at how far the times of one plan lie apart.
#
# - `at-edm` and `moving-grid` prune equally many tokens: the same FLOPs. They differ in time by how they rank and
# recover.
# - Work outside attention blocks is not reduced at all, and small products use a processor less well than large ones.
# - The paper met the same (table 2). With fused attention that gives no maps, SDXL took 18.0 s and AT-EDM 18.3 s,
# with 38.8 % fewer FLOPs. Only with maps for free would it be 16.3 s.
#
# So: FLOPs to compare methods, time to decide. The project's measured times are in `docs/performance.md`.
#
# ## Exercises
#
# **6.1** Write the FLOPs of one self-attention with n tokens of C channels: the four projections and both products.


# %%
def self_attention_flops(n, C): ...


check("6.1", self_attention_flops)

# %% [markdown]
# **6.2** Write the average FLOPs of a call over `steps` steps, of which the first `early` cost `early_flops` and the
# others `later_flops`. What does it give for the paper's 4.99 T and 4.06 T, 15 of 50?


# %%
def average_flops(early_flops, later_flops, early, steps): ...


check("6.2", average_flops)

# %% [markdown]
# **6.3** The paper's budget is 4.1 T. For which ρ does `at-edm` meet it on the average of 50 steps at 1024 px, and
# not only in later steps? Give the smallest, in hundredths. (`summary` and `atedm.parse_preset("at-edm:rho=0.5")`
# help.)

# %%
rho = ...
check("6.3", rho)
