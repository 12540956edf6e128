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
# # 3. Attention as a graph
#
# To prune tokens you must know which ones matter. AT-EDM asks the attention map (paper, section 3.2): it reads it as
# a graph in which each token votes for others, and counts votes as page rank does. The algorithm is called G-WPR,
# generalized weighted page rank. You first run it by hand on six tokens, and then on a picture.

# %%
import matplotlib.pyplot as plt
import torch
from checks import check
from course import call, decode, example, load, show, watch

import atedm
from minisdxl.inspector.maps import iterated

torch.set_printoptions(precision=3, sci_mode=False)
torch.set_grad_enabled(False)

# %% [markdown]
# ## Six tokens
#
# Row i of an attention map A says how token i shares out its attention; each row sums to 1. As a graph: an edge from
# query i to key j has weight A[i, j]. Row i is what i gives, column j is what j receives.

# %%
A = torch.tensor(
    [
        [0.10, 0.60, 0.10, 0.10, 0.05, 0.05],
        [0.50, 0.20, 0.10, 0.10, 0.05, 0.05],
        [0.30, 0.30, 0.20, 0.10, 0.05, 0.05],
        [0.10, 0.10, 0.30, 0.20, 0.20, 0.10],
        [0.05, 0.05, 0.10, 0.30, 0.20, 0.30],
        [0.05, 0.05, 0.10, 0.30, 0.30, 0.20],
    ]
)
print("rows sum to", A.sum(dim=1), "\ncolumns to", A.sum(dim=0))

# %%
angle = torch.arange(6) * torch.pi / 3
x, y = angle.cos(), angle.sin()
figure, (axis, matrix) = plt.subplots(1, 2, figsize=(9, 4))
for i in range(6):
    for j in range(6):
        if i != j:
            ends = {"xytext": (x[i], y[i]), "xy": (x[j], y[j])}
            bend = {"arrowstyle": "-|>", "connectionstyle": "arc3,rad=0.12", "shrinkA": 14, "shrinkB": 14}
            axis.annotate("", **ends, arrowprops={**bend, "linewidth": 6 * A[i, j].item(), "alpha": 0.6})
axis.scatter(x, y, s=500, color="tab:orange", zorder=3)
for i in range(6):
    axis.text(x[i], y[i], str(i), ha="center", va="center", zorder=4)
axis.set(xlim=(-1.4, 1.4), ylim=(-1.3, 1.3), title="edges: the wider, the more attention")
axis.axis("off")
matrix.imshow(A, cmap="viridis")
matrix.set(xlabel="key j", ylabel="query i", title="A[i, j]")
plt.show()

# %% [markdown]
# ## Algorithm 1
#
# At first all M queries have the same score. Then they vote, and votes count as much as the voter's score:
#
# $$s_Q^0 = \tfrac{1}{M}, \qquad s_K^{t+1} = A^T s_Q^t, \qquad s_Q^{t+1} = f(A, s_K^{t+1}), \qquad
# s_Q^{t+1} \leftarrow \frac{s_Q^{t+1}}{|s_Q^{t+1}|}$$
#
# until the scores settle. In self-attention queries and keys are the same tokens, so f returns s_K as it is.

# %%
s = torch.full((6,), 1 / 6)
for t in range(1, 8):
    s_K = A.T @ s
    s = s_K / s_K.abs().sum()
    print(t, s)

# %% [markdown]
# After one vote, the score is the attention that a token receives. Later votes of important tokens count more: tokens
# 0 and 1 vote for each other and win. Where this ends is known: A^T s = s, the left eigenvector of eigenvalue 1. And
# it is what the project's own `atedm.gwpr` finds.

# %%
values, vectors = torch.linalg.eig(A.T.double())
leading = vectors[:, values.real.argmax()].real
print("eigenvector  ", (leading / leading.sum()).float())
print("atedm.gwpr   ", atedm.gwpr(A[None, None])[0])

# %% [markdown]
# ## Cross-attention: equation (1)
#
# In cross-attention the queries are picture tokens and the keys are words. The scores of the words must come back to
# the picture tokens. Equation (1): a picture token is important if it gives its attention to important words, and if
# it has made up its mind. The entropy of its row, below the line, is small then.
#
# $$s_Q^{t+1}(q_i) = \frac{\sum_j A_{i,j} \, s_K^{t+1}(k_j)}{-\sum_j A_{i,j} \ln A_{i,j}}$$

# %%
first = torch.tensor([0.9, 0.8, 0.4, 0.34, 0.3, 0.1])  # attention to the first of three words
words = torch.stack([first, (1 - first) / 3, 2 * (1 - first) / 3], dim=1)
s = torch.full((6,), 1 / 6)
for _ in range(20):
    s_K = words.T @ s
    s = (words @ s_K) / -(words * words.log()).sum(dim=1)
    s = s / s.sum()
print("by hand    ", s)
print("atedm.gwpr ", atedm.gwpr(words[None, None], cross=True)[0])

# %% [markdown]
# Attention has several heads, and each gets its own scores. They are put together by the root mean square (section
# 3.2). It rewards a token that a few heads find very important: scores 0.3 and 0.1 give more than 0.2 and 0.2.

# %%
print(atedm.gwpr(torch.stack([A, A.flip(0, 1)])[None])[0], "from two heads that disagree")

# %% [markdown]
# ## A picture
#
# Now the same on a real map. A drawn picture gets noise (timestep 300 of 1,000), and the U-Net runs once. Block
# `down.2.0` has 16 x 16 tokens, so its map is 256 x 256 for each head. The weights are those in training
# (`weights/training/README.md`), whose attention looks for similar tokens. Why not the included ones, lesson 7 says.

# %%
sdxl = load("similar")
picture = example(sdxl)
seen = watch(sdxl, picture, 300)["down.2.0"]
attention = seen.map.mean(dim=0)  # over heads
token = 4 * 16 + 8  # row 4, column 8: in the circle
show(
    {
        "the picture": picture.pixels,
        "what D makes of it": decode(sdxl, call(sdxl, picture, 300).denoised),
        "row: what a token of\nthe circle attends to": attention[token].view(16, 16),
        "column: who attends to it": attention[:, token].view(16, 16),
    }
)

# %% [markdown]
# The scores of all tokens, after 1 iteration and later (`iterated` is a part of the inspector; the colors are
# logarithmic). Bright tokens stay when the others are pruned.

# %%
iterations, scores = iterated(seen.attention, cross=False)
chosen = sorted({0, 1, 2, len(iterations) // 2, len(iterations) - 1})
show({f"{iterations[i]} iterations": scores[i].clamp_min(1e-9).log().view(16, 16) for i in chosen})
print("highest score over lowest:", (scores[-1].max() / scores[-1].min()).item())

# %% [markdown]
# ## Exercises
#
# **3.1** Write one iteration of Algorithm 1 for self-attention, with its normalization.


# %%
def iteration(A, s): ...


check("3.1", iteration)

# %% [markdown]
# **3.2** Write equation (1), without the normalization: from the scores of keys to those of queries.


# %%
def f(A, s_K): ...


check("3.2", f)

# %% [markdown]
# **3.3** Find an attention map of 4 tokens in which token 0 receives the most attention, but token 1 has the highest
# score in the end. (Who votes for token 0, and whom does token 0 vote for?)

# %%
my_map = ...
check("3.3", my_map)
