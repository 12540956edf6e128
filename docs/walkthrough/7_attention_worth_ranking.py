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
# # 7. What makes attention worth ranking
#
# G-WPR reads one thing, the self-attention map. Whether pruning works depends on whether there is something to read.
# On the model that comes with this project there is not: with AT-EDM its objects disappear. This lesson shows why,
# beside other weights of the same model, on which AT-EDM works. More is in `docs/better-method.md`.

# %%
import copy
import dataclasses

import torch
import torch.nn.functional as F
from checks import check
from course import call, decode, example, load, show, watch

from atedm import gwpr, kept_count, parse_preset, top_k
from minisdxl.transformer import TransformerLayer

torch.set_grad_enabled(False)
models = {"included": load("included"), "in training": load("similar")}
pictures = {name: example(sdxl) for name, sdxl in models.items()}
sites = list(models["included"].config.unet.attention_sites())
seen = {name: watch(sdxl, pictures[name], 500) for name, sdxl in models.items()}

# %% [markdown]
# ## The same call, twice
#
# One picture with noise (timestep 500), denoised once: dense, with AT-EDM at ρ = 0.63, and with `moving-grid`, which
# needs no attention. *Change* is the squared difference to the dense prediction, over the error that the dense model
# has anyway: at 1, pruning adds as much error as there was.

# %%
shown, dense = {}, {}
for name, sdxl in models.items():
    dense[name] = call(sdxl, pictures[name], 500)
    shown[f"{name}\ndense"] = decode(sdxl, dense[name].denoised)
    for preset in ("at-edm", "moving-grid"):
        found = call(sdxl, pictures[name], 500, parse_preset(preset).plan(49, 50, sites))
        change = (found.predicted - dense[name].predicted).square().mean().item() / dense[name].error
        shown[f"{name}, {preset}\nchange {change:.2f}"] = decode(sdxl, found.denoised)
show(shown, columns=3)

# %% [markdown]
# ## Where a token looks
#
# The row of a token in the middle of the square, in four blocks (square root, so that small weights show). AT-EDM
# needs tokens that look at tokens like themselves: then an object votes for itself, and the token that gives a pruned
# one most attention is a good replacement.

# %%
shown = {}
for name in models:
    shown[f"{name}:\nthe picture"] = pictures[name].pixels
    for block in ("down.1.0", "down.2.0", "mid", "up.2.0"):
        side = seen[name][block].tokens.grid[0]
        token = int(0.66 * side) * side + side // 2
        shown[f"{name}\n{block}"] = seen[name][block].map.mean(dim=0)[token].view(side, side).sqrt()
show(shown, columns=5)

# %% [markdown]
# As a number: how similar is a token to the one that it gives most attention? *Similar* is the cosine of their
# values, from which the mean of all tokens is taken away, because all tokens of a block share a large part.


# %%
def similarity(tokens):
    """The centered cosine of each token with each other one (N, N), and -1 with itself."""
    values = tokens.values[0] - tokens.values[0].mean(dim=0)
    values = F.normalize(values, dim=1)
    return (values @ values.T).fill_diagonal_(-1)


print(f"{'block':9}" + "".join(f"{name + ', looked at':>26}{'best':>6}" for name in models))
for site in sites:
    line = f"{site.name:9}"
    for name in models:
        cosine, attention = similarity(seen[name][site.name].tokens), seen[name][site.name].map.mean(dim=0)
        looked_at = attention.fill_diagonal_(0).argmax(dim=1, keepdim=True)
        line += f"{cosine.gather(1, looked_at).mean():26.2f}{cosine.max(dim=1).values.mean():6.2f}"
    print(line)

# %% [markdown]
# ## Who is kept
#
# So the votes of the included model fall somewhere else. Below are the tokens that G-WPR keeps, and the share that it
# keeps of the objects' tokens. Kept at random it would be 0.37.

# %%
shown = {}
for name in models:
    for block in ("down.1.0", "down.2.0", "up.1.0"):
        attention, (rows, columns) = seen[name][block].map, seen[name][block].tokens.grid
        kept = top_k(gwpr(attention[None]), kept_count(rows * columns, 0.63))[0]
        mask = torch.zeros(rows * columns).index_fill(0, kept, 1).view(rows, columns)
        on_object = F.adaptive_avg_pool2d(torch.tensor(pictures[name].objects)[None].float(), (rows, columns))[0] > 0.5
        shown[f"{name}, {block}\nobjects {mask[on_object].mean():.2f}"] = mask
show(shown, columns=6)

# %% [markdown]
# ## Why does it not look?
#
# Training makes a model do what lowers its error. The captions of the included model say everything: the size, color
# and shape of each object, which is where, and the background. Each token can read all of that from the words, by
# cross-attention. Convolutions carry the rest to its neighbors. What is left for self-attention? Make it useless, by
# setting all queries to zero, so that every token looks everywhere alike, and see how much worse the prediction
# becomes.

# %%
shown = {}
for name, sdxl in models.items():
    blind = copy.deepcopy(sdxl.unet)
    for layer in blind.modules():
        if isinstance(layer, TransformerLayer):
            layer.attn1.to_q.weight.zero_()
    without = call(dataclasses.replace(sdxl, unet=blind), pictures[name], 500)
    print(f"{name:12} error {dense[name].error:.4f}, with uniform self-attention {without.error:.4f}:", end=" ")
    print(f"{without.error / dense[name].error:.2f} times")
    shown[f"{name},\nuniform self-attention"] = decode(sdxl, without.denoised)
show(shown)

# %% [markdown]
# Compare with the change above. Without any attention that tells tokens apart, the included model still draws both
# objects. AT-EDM, which trusts that attention, does several times as much harm as leaving it out. Over more pictures
# the error grows 1.4 to 1.5 times (`docs/better-method.md`): attention is a detail there, and no step of training had
# a reason to make maps that say which tokens belong together.
#
# A model of photographs has captions that leave nearly everything open: which dog, which light, which of a thousand
# leaves. Tokens must agree on it among themselves, and self-attention is how. That is an explanation and not a proof;
# the measurements are what is certain.
#
# The weights in training got their attention in another way. Their query and key maps were replaced by a similarity
# kernel, and then the model learned to predict what the included one predicts (`weights/training/README.md`). With
# the same ranking and the same recovery, 89 of 200 captions were then drawn right under AT-EDM; with the included
# weights it is 1 of 150. Dense they were not yet as good, 147 of 200.
#
# The method was right all along; it had nothing to read. Before you prune by attention, look at the attention:
# `python -m tools.attention` and `python -m tools.single_step` do so for any checkpoint.
#
# ## Exercises
#
# **7.1** Write the centered cosine of each token with each other one, (N, N), of `values` (N, C): take away the mean
# token first. Leave the diagonal as it comes.


# %%
def centered_cosine(values): ...


check("7.1", centered_cosine)

# %% [markdown]
# **7.2** Recovery without attention, as `moving-grid` has it: for each of the N tokens, the index (among all N) of
# the kept token with the largest cosine of values, here without taking away the mean. A kept token is its own. `kept`
# are indices.


# %%
def nearest_kept(values, kept): ...


check("7.2", nearest_kept)

# %% [markdown]
# **7.3** All tokens look in the same way: each row of the map is the same `row` (N,). Which scores does G-WPR give?
# Write them without iterating.


# %%
def scores_of_equal_rows(row): ...


check("7.3", scores_of_equal_rows)
