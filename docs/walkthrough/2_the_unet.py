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
# # 2. The U-Net and its official names
#
# The U-Net predicts the noise in a latent. It is nearly all of SDXL's work: it runs twice at every step, the other
# parts run once. Here you take it apart, and learn to read names such as
# `input_blocks.4.1.transformer_blocks.0.attn1.to_q`.
#
# Building SDXL's U-Net takes no memory on torch's `meta` device, which knows shapes and no numbers.

# %%
import json
from collections import Counter

import matplotlib.pyplot as plt
import torch
from checks import check
from course import ROOT, load

from minisdxl.config import SDXL_BASE, SHAPES
from minisdxl.transformer import AttentionBlock
from minisdxl.unet import UNet

with torch.device("meta"):
    unet = UNet(SDXL_BASE.unet)
print(f"{sum(p.numel() for p in unet.parameters()) / 1e9:.2f} billion weights in {len(unet.state_dict())} tensors")

# %% [markdown]
# ## The names are the checkpoint's
#
# The modules of this U-Net have the names of the official checkpoint, so that a file loads as it is. The project has
# a list of that file's tensors. Compare: no name is missing, none is too many, every shape is the same.

# %%
prefix = "model.diffusion_model."
official = json.loads((ROOT / "weights/sd_xl_base_1.0.keys.json").read_text())
theirs = {name.removeprefix(prefix): shape for name, shape in official.items() if name.startswith(prefix)}
ours = {name: list(tensor.shape) for name, tensor in unet.state_dict().items()}
print("names and shapes are equal:", ours == theirs)
print(next(name for name in theirs if "attn1.to_q" in name))

# %% [markdown]
# ## Down, middle, up
#
# `input_blocks` go down: at each level ResBlocks, some followed by attention, then a convolution that halves height
# and width. `middle_block` is at the bottom. `output_blocks` go up. Each takes the output of an input block beside
# its own input: a **skip connection**.
#
# An **attention block** (official: SpatialTransformer) is a stack of transformer layers. It works on tokens, one for
# each position of the feature map. SDXL has none at level 0, where there would be most tokens.

# %%
grids, channels = [], []


def watch(block, _, output):
    channels.append(output.shape[1])
    grids.append(tuple(output.shape[2:]))


def shapes_of(network, config, side):
    """Feature map of each numbered block for a picture of so many pixels, in running order."""
    blocks = [*network.input_blocks, network.middle_block, *network.output_blocks]
    hooks = [block.register_forward_hook(watch) for block in blocks]
    latent = torch.empty(1, 4, side // config.vae.downscale, side // config.vae.downscale, device="meta")
    context = torch.empty(1, 77, config.unet.context_channels, device="meta")
    network(latent, torch.empty(1, device="meta"), context, torch.empty(1, config.unet.vector_channels, device="meta"))
    for hook in hooks:
        hook.remove()
    return blocks


with torch.no_grad():
    blocks = shapes_of(unet, SDXL_BASE, 1024)
print("a skip connection:", channels[8], "channels of", grids[8], "go to output_blocks.0")

# %%
figure, axis = plt.subplots(figsize=(11, 4.2))
down = len(unet.input_blocks)
names = [f"in.{i}" for i in range(down)] + ["middle"] + [f"out.{i}" for i in range(len(unet.output_blocks))]
for x, block in enumerate(blocks):
    depth = [len(part.transformer_blocks) for part in block if isinstance(part, AttentionBlock)]
    height = grids[x][0] ** 0.5 / 4
    axis.bar(x, height, 0.75, color="tab:orange" if depth else "tab:blue")
    label = f"{depth[0]} layers" if depth else ""
    axis.text(x, height + 0.06, f"{label}\n{grids[x][0]}x{grids[x][1]}\nx {channels[x]}", ha="center", fontsize=6.5)
for i in range(down):
    axis.plot([i, 2 * down - i], [-0.1 - 0.06 * (down - i)] * 2, color="gray", linewidth=0.8)
axis.set_xticks(range(len(names)), names, rotation=60, fontsize=8)
axis.set(
    ylim=(-1, 3.9),
    yticks=[],
    title="SDXL's U-Net at 1024 px: output of each block. Orange: with attention. Gray: skips",
)
plt.tight_layout()
plt.show()

# %% [markdown]
# ## Names that people can say
#
# Token plans and pictures in this project call an attention block by stage, level and number: `down.1.0` is the first
# one at level 1 on the way down. SDXL has 11.

# %%
tokens = {site.name: ((1024 // 8) >> site.level) ** 2 for site in SDXL_BASE.unet.attention_sites()}
for official_name, module in unet.named_modules():
    if isinstance(module, AttentionBlock):
        layers = len(module.transformer_blocks)
        print(f"{module.name:9} {official_name:18} {layers:2} layers, {tokens[module.name]} tokens at 1024 px")

# %% [markdown]
# One transformer layer is self-attention `attn1`, cross-attention to the prompt `attn2`, and feed-forward `ff`, each
# after a norm, each added to its input:
#
# $$x \leftarrow x + \mathrm{attn1}(\mathrm{norm1}(x))$$
# $$x \leftarrow x + \mathrm{attn2}(\mathrm{norm2}(x), \mathrm{text})$$
# $$x \leftarrow x + \mathrm{ff}(\mathrm{norm3}(x))$$
#
# Nothing in it knows where a token lies, or how many there are. This is why tokens can be pruned at all.

# %%
print(unet.middle_block[1].transformer_blocks[0])

# %% [markdown]
# ## The small model
#
# The included model has the same classes and the same names, with other numbers.

# %%
small = load().unet
kinds = Counter(type(module).__name__ for module in small.modules())
weights = sum(p.numel() for p in small.parameters())
print(f"{weights / 1e6:.1f} million weights, {kinds['AttentionBlock']} attention blocks")
for level, (large, little) in enumerate(zip(SDXL_BASE.unet.levels, SHAPES.unet.levels)):
    print(f"level {level}: {large.depth} layers and {SDXL_BASE.unet.channels(level)} channels in SDXL,", end=" ")
    print(f"{little.depth} and {SHAPES.unet.channels(level)} in the small model")

# %% [markdown]
# ## Exercises
#
# **2.1** What is the official name of `up.1.1` in SDXL? Work it out from the picture before you look at the list.

# %%
official_name = ...
check("2.1", official_name)

# %% [markdown]
# **2.2** How many transformer layers has SDXL's U-Net in all?

# %%
layers_in_all = ...
check("2.2", layers_in_all)

# %% [markdown]
# **2.3** Write how many tokens an attention block of SDXL at `level` has for a picture of `width` x `height` pixels.
# A side that cannot be halved is rounded up.


# %%
def token_count(level, width, height): ...


check("2.3", token_count)
