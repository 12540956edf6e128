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
# # 4. Pruning and recovery
#
# Tokens that score low are pruned: the transformer layers that follow see fewer tokens and cost less. But after the
# attention block comes a convolution, and a convolution needs every position. So pruned tokens must be recovered
# first. This lesson prunes a real picture's tokens, redraws the paper's figure 4 with them, and compares ways of
# recovery.

# %%
import matplotlib.pyplot as plt
import torch
from checks import check
from course import call, decode, example, grid_on, load, show, watch

from atedm import LazyGraph, gwpr, kept_count, parse_preset, similarity_copy, top_k

torch.set_grad_enabled(False)
sdxl = load("similar")
picture = example(sdxl)
seen = watch(sdxl, picture, 300)["down.2.0"]
tokens = seen.tokens
print(tokens.count, "tokens of", tokens.values.shape[2], "numbers on the grid", tokens.grid)

# %% [markdown]
# ## Which tokens stay
#
# Section 3.1, steps 2 to 4: score the tokens with G-WPR, keep the best, prune the share ρ of them. The paper has ρ =
# 0.63 (section 4.1), and prunes once in each attention block, after its first transformer layer.
#
# $$n_\mathrm{kept} = \mathrm{round}(N (1 - \rho))$$

# %%
rho = 0.63
scores = gwpr(seen.map[None])
kept = top_k(scores, kept_count(tokens.count, rho))
few = tokens.keep(kept)
print("kept", few.count, "of", few.size, "tokens; the first are at positions", few.positions[0, :8].tolist())
try:
    few.to_feature_map()
except ValueError as error:
    print("not a feature map:", error)

# %% [markdown]
# ## Where a pruned token takes its value from
#
# Section 3.2, "Recovering Pruned Tokens": a pruned token b copies the kept token that gives it the most attention.
# The paper's reason: the attention from a to b grows with how important b is and with how similar a and b are. Within
# column b, the importance of b is the same everywhere, so the largest entry is the most similar token.
#
# $$\eta(b) = \arg\max_{i \in \mathrm{kept}} A_{i, b}, \qquad x_b \leftarrow x_{\eta(b)}$$

# %%
attention = seen.map.mean(dim=0)  # over heads
source = torch.arange(tokens.count)  # a kept token is its own source
is_kept = torch.zeros(tokens.count, dtype=torch.bool).index_fill(0, kept[0], True)
for b in (~is_kept).nonzero().flatten():
    source[b] = kept[0][attention[kept[0], b].argmax()]

theirs = similarity_copy(tokens, LazyGraph(seen.attention).graph, kept)
print("the same as the project's:", torch.equal(kept[0][theirs.source[0]], source))

# %% [markdown]
# ## Figure 4, from real tokens
#
# Left: the tokens of the picture. Middle: after pruning, an irregular set that no convolution can use. Right: arrows
# lead from the kept token to the pruned one that copies it, here for tokens on and around the objects. Last: the
# picture that you get if you cut the drawn picture into tiles and copy them in the same way.

# %%
rows, columns = tokens.grid
cell = picture.pixels.shape[0] // rows
pixels = torch.from_numpy(picture.pixels)
tiles = pixels.unfold(0, cell, cell).unfold(1, cell, cell).flatten(0, 1)  # (N, 3, cell, cell)


def mosaic(tiles):
    """The tiles of all positions, put together again."""
    return tiles.view(rows, columns, 3, cell, cell).permute(0, 3, 1, 4, 2).reshape(pixels.shape)


pruned_tiles = torch.where(is_kept[:, None, None, None], tiles, tiles // 4 + 90)

# %%
figure, axes = plt.subplots(1, 4, figsize=(14, 3.8))
shown = [mosaic(tiles), mosaic(pruned_tiles), mosaic(pruned_tiles), mosaic(tiles[source])]
titles = ["tokens", f"pruned: {few.count} of {few.size} stay", "who copies whom", "recovered (tiles of the drawing)"]
for axis, image, title in zip(axes, shown, titles):
    grid_on(axis, image, tokens.grid)
    axis.set_title(title, fontsize=10)
on_objects = torch.from_numpy(picture.objects.copy()).float().view(rows, cell, columns, cell).mean(dim=(1, 3)) > 0.1
for b in (~is_kept & on_objects.flatten()).nonzero().flatten().tolist():
    start, end = ((i % columns + 0.5, i // columns + 0.5) for i in (int(source[b]), b))
    axes[2].annotate("", end, start, arrowprops={"arrowstyle": "->", "color": "tab:orange", "linewidth": 1})
plt.tight_layout()
plt.show()

# %% [markdown]
# Not all arrows lead to a similar token: some tokens of the background copy from an object. The last picture shows
# this more harshly than it is, because a token knows more than its tile. As numbers:

# %%
center = tokens.values[0] - tokens.values[0].mean(dim=0)
cosine = torch.nn.functional.cosine_similarity(center, center[source])[~is_kept]
nearest = torch.nn.functional.normalize(center, dim=1) @ torch.nn.functional.normalize(center[kept[0]], dim=1).T
print(f"cosine of a pruned token with the one it copies: {cosine.mean():.2f}")
print(f"with the most similar kept one:                  {nearest[~is_kept].max(dim=1).values.mean():.2f}")

# %% [markdown]
# ## Other ways to fill the gaps
#
# Figure 9 of the paper compares the copy with zeros, bicubic interpolation, and the token's own value from before.
# Here is one U-Net call with each, in all attention blocks at once, and what the denoiser D makes of it. *Change* is
# the squared difference to the dense prediction, over the squared error that the dense model has anyway.

# %%
sites = list(sdxl.config.unet.attention_sites())
dense = call(sdxl, picture, 300)
shown = {"dense": decode(sdxl, dense.denoised)}
for recovery in ("similarity", "zeros", "bicubic", "direct", "nearest-change"):
    plan = parse_preset(f"at-edm:rho={rho},recovery={recovery}").plan(49, 50, sites)
    found = call(sdxl, picture, 300, plan)
    change = (found.predicted - dense.predicted).square().mean().item() / dense.error
    shown[f"{recovery}\nchange {change:.2f}"] = decode(sdxl, found.denoised)
show(shown)

# %% [markdown]
# `nearest-change` is not the paper's. It keeps the pruned token's own value and adds how the nearest kept token
# changed since (`docs/better-method.md`).
#
# One safety net: with ρ = 0 every token is kept, and the result is the dense one bit for bit. The project's tests
# hold every method to that.

# %%
keep_all = parse_preset("at-edm:rho=0").plan(49, 50, sites)
print("equal:", torch.equal(call(sdxl, picture, 300, keep_all).predicted, dense.predicted))

# %% [markdown]
# ## Exercises
#
# **4.1** Write which tokens stay: the indices of the highest scores, in ascending order. `scores` is (N,).


# %%
def stay(scores, rho): ...


check("4.1", stay)

# %% [markdown]
# **4.2** Write where each pruned token copies from. `A` is (N, N), `kept` and `pruned` are indices. The result has an
# index of a token, among all N, for each of `pruned`.


# %%
def sources(A, kept, pruned): ...


check("4.2", sources)

# %% [markdown]
# **4.3** Put a token set together again. `values` (k, C) are the kept tokens' new values, `kept` (k,) their indices
# in ascending order, and `source` (N,) the index, among all N, of the kept token that each token copies. Return (N,
# C).


# %%
def restored(values, kept, source): ...


check("4.3", restored)
