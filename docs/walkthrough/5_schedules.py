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
# # 5. Schedules: when to prune
#
# A picture takes 50 steps. Must all of them prune alike? The paper says no: early steps decide the layout, and their
# attention tells tokens apart less well (section 3.3). Its schedule, DSAP (denoising-steps-aware pruning), prunes
# less in the first 15 of 50 steps. In this lesson you look for the reason in the attention maps, and then read a
# schedule.

# %%
import matplotlib.pyplot as plt
import torch
from checks import check
from course import call, decode, example, load, show, watch

import atedm
from minisdxl.config import SDXL_BASE
from minisdxl.cost import count, format_flops
from minisdxl.sampler import timesteps

torch.set_grad_enabled(False)
models = {"in training": load("similar"), "included": load("included")}
pictures = {name: example(sdxl) for name, sdxl in models.items()}
noise = models["included"].config.noise
steps = [0, 4, 9, 14, 21, 30, 40, 49]  # of 50
times = [int(timesteps(50, noise)[step]) for step in steps]

# %% [markdown]
# ## Early and late
#
# One drawn picture, with the noise of some of the 50 steps, and what the denoiser makes of it. In the first steps it
# knows colors and rough places. From the middle on, little changes any more.

# %%
sdxl = models["included"]
shown = {}
for step, time in list(zip(steps, times))[::2]:
    shown[f"D at step {step + 1}"] = decode(sdxl, call(sdxl, pictures["included"], time).denoised)
show(shown)

# %% [markdown]
# ## Figure 5: how much maps differ from uniform ones
#
# If all entries of a map are the same, 1/N, the map says nothing about tokens. The paper measures the variance of the
# maps at each step (figure 5) and finds it small at first. Here is the same measure: the variance of N·A[i, j], which
# is 0 for a uniform map and N − 1 if each token looks at one token alone.
#
# $$\mathrm{Var} = \frac{1}{N^2} \sum_{i,j} (N A_{i,j} - 1)^2$$
#
# The picture is a drawn one with noise. Sampling would go through other latents, at fifty times the price.


# %%
def variance(seen):
    """Of a block's map, the mean over heads."""
    return (seen.map * seen.map.shape[-1]).var(dim=(1, 2), correction=0).mean().item()


blocks = [site.name for site in sdxl.config.unet.attention_sites()]
spread = {}
for name, model in models.items():
    seen = [watch(model, pictures[name], time) for time in times]
    spread[name] = {block: [variance(each[block]) for each in seen] for block in blocks}

# %%
figure, axes = plt.subplots(1, 2, figsize=(11, 3.6))
for axis, (name, lines) in zip(axes, spread.items()):
    for block, values in lines.items():
        axis.plot([step + 1 for step in steps], values, "--" if "down" in block else "-", marker=".", label=block)
    mean = torch.tensor(list(lines.values())).mean(dim=0)
    axis.plot([step + 1 for step in steps], mean, "k", linewidth=3, label="mean")
    axis.axvspan(0.5, 15.5, color="gray", alpha=0.2)
    axis.set(
        title=f"weights: {name}", xlabel="step of 50 (gray: early, τ = 15)", ylabel="variance of N A[i, j]", ylim=0
    )
axes[1].legend(fontsize=8)
plt.tight_layout()
plt.show()

for name, lines in spread.items():
    mean = torch.tensor(list(lines.values())).mean(dim=0)
    print(f"{name:12} mean of early steps {mean[:4].mean():6.2f}, of later steps {mean[4:].mean():6.2f}")

# %% [markdown]
# Compare with the paper's reason. On SDXL it saw small variance at first, a fast rise, and then a plateau. Here the
# variance rises through the early steps too, but then the two kinds of weights part, and blocks differ much. What was
# measured over whole runs of the included model is in `docs/results.md`, "Attention".
#
# ## The schedule
#
# In the first τ = 15 of every 50 steps, DSAP leaves some attention blocks unpruned: the first one of each down-stage
# and the last one of each up-stage, but never the mid block (section 3.3). A schedule makes a **token plan** for each
# step. A plan is data: it says what each attention block does with its tokens.

# %%
sites = list(SDXL_BASE.unet.attention_sites())
schedule = atedm.parse_preset("at-edm")
plans = [schedule.plan(step, 50, sites) for step in range(50)]
print(plans[0].describe(), "\n")
print("later steps prune as well:", sorted(set(plans[20]) - set(plans[0])))

# %%
pruned = torch.tensor([[site.name in plan for plan in plans] for site in sites]).float()
cost = [count(SDXL_BASE, 128, 128, plan).total for plan in plans]
figure, (axis, below) = plt.subplots(2, 1, figsize=(9, 5), sharex=True, height_ratios=[2, 1])
axis.pcolormesh(range(1, 51), range(len(sites)), pruned, cmap="Blues", edgecolors="white", vmin=-0.2)
axis.set_yticks(range(len(sites)), [site.name for site in sites])
axis.invert_yaxis()
axis.set_title("SDXL with at-edm: which blocks prune (dark) at which step")
below.step(range(1, 51), [flops / 1e12 for flops in cost], where="mid")
below.set(xlabel="step", ylabel="TFLOPs of a call", ylim=(0, 7))
plt.show()
dense = count(SDXL_BASE, 128, 128).total
print(f"dense {format_flops(dense)}, early {format_flops(cost[0])}, later {format_flops(cost[-1])}")
print(f"average of 50 steps: {format_flops(sum(cost) / 50)}")

# %% [markdown]
# The paper's table 1 says 4.1 T for this setting. That is a later step. With the early ones, the average is higher.
#
# With other numbers of steps, τ is 15 of every 50, rounded, halves up.

# %%
for total in (4, 10, 20, 25, 50):
    print(total, "steps:", schedule.early_steps(total), "of them early")

# %% [markdown]
# ## Exercises
#
# **5.1** Write how many of `steps` steps are early, for τ (`tau`) of every 50. Halves are rounded up.


# %%
def early_steps(steps, tau): ...


check("5.1", early_steps)

# %% [markdown]
# **5.2** Write which blocks DSAP leaves unpruned in early steps. `sites` is a list of attention blocks in running
# order, each with `.stage` ("down", "mid" or "up"), `.level`, `.index` and `.name`. Return a set of names.


# %%
def unpruned(sites): ...


check("5.2", unpruned)

# %% [markdown]
# **5.3** Write the variance of the formula above, of one map `A` (N, N).


# %%
def map_variance(A): ...


check("5.3", map_variance)
