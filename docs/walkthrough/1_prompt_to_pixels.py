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
# # 1. From prompt to pixels
#
# A diffusion model draws by removing noise, a little at each step. In this lesson you run all of SDXL by hand, in the
# order in which it runs: text encoders, denoising steps, decoder. You see a latent at every step.
#
# The model is the small one that comes with this project. It draws circles, squares and triangles. It has the parts
# of SDXL under the same names, only fewer and narrower, so that a laptop draws with it in seconds.

# %%
import torch
from checks import check
from course import decode, load, show

from atedm import DENSE
from minisdxl.cli.previews import fit_rgb
from minisdxl.sampler import UNetInputs, euler, guided_denoiser, image_generators, initial_noise, sigmas

sdxl = load()
prompt = "a big red circle on a white background"
torch.set_grad_enabled(False)

# %% [markdown]
# ## Text
#
# The tokenizer cuts the prompt into pieces and gives each a number. Two text encoders read them. They give
#
# - the **context** (77 x channels): a vector for each token, which cross-attention reads;
# - the **pooled vector**: one for the whole prompt. With the picture's size it is added to the time embedding.
#
# Guidance also needs the same for no prompt. SDXL was trained with zeros there.

# %%
ids, _ = sdxl.tokenizer([prompt])
print("token ids:", ids[0, :16].tolist(), "...")

side = 128  # pixels; the model's own size is 256, which takes four times as long
sizes = torch.tensor([[side, side, 0, 0, side, side]])  # the size before and after cropping, and where it was cropped


def unet_inputs(text):
    return UNetInputs(text.context, text.vector(sizes, sdxl.config.size_channels))


conditional = unet_inputs(sdxl.text.encode([prompt], sdxl.tokenizer))
unconditional = unet_inputs(sdxl.text.encode_negative([""], sdxl.tokenizer))
print("context", tuple(conditional.context.shape), " vector", tuple(conditional.vector.shape))

# %% [markdown]
# ## Noise levels
#
# The U-Net works on a latent, a picture of 4 channels that the VAE made small. A latent x at noise level σ is a clean
# latent plus noise of standard deviation σ. Sampling goes down a list of levels σ₀ > σ₁ > ... > 0. The denoiser D
# guesses the clean latent from x (EDM paper, equation 7, for a model that predicts noise):
#
# $$D(x; \sigma) = x - \sigma \, F\left(\tfrac{x}{\sqrt{\sigma^2 + 1}}\right)$$
#
# F is the U-Net. Guidance runs it twice, with the prompt (c) and without (u), and goes from u past c:
#
# $$D = D_u + \mathrm{scale} \cdot (D_c - D_u)$$

# %%
levels = sigmas(12, sdxl.config.noise)
print("sigma:", [round(level, 2) for level in levels.tolist()])


def plan_of(step):
    """What each attention block does with its tokens at a step: nothing here. Lessons 4 and 5 change this."""
    return DENSE


denoiser = guided_denoiser(sdxl.unet, conditional, unconditional, 4.0, plan_of, sdxl.config.noise)

# %% [markdown]
# ## Steps
#
# Euler's method follows the slope of x from one level to the next (EDM paper, algorithm 1 without its correction):
#
# $$x \leftarrow x + (\sigma_{i+1} - \sigma_i) \, \frac{x - D(x; \sigma_i)}{\sigma_i}$$

# %%
start = initial_noise(image_generators([0]), (4, side // 4, side // 4), float(levels[0]))
guesses = []


def watched(x, sigma, step):
    guesses.append(denoiser(x, sigma, step))
    return guesses[-1]


latents = [start, *euler(watched, start, levels)]
print(len(latents), "latents of shape", tuple(start.shape))

# %% [markdown]
# Here is the latent at every step. Its 4 channels are shown as colors, by a linear map that fits the decoder roughly
# (`minisdxl/cli/previews.py`), and scaled so that noise and picture together have the picture's contrast. Below is
# what each step heads for: D, decoded. At first D is a blur, the mean of all pictures that the noise allows. The
# layout comes early, edges come late. Lesson 5 uses this.

# %%
to_rgb = fit_rgb(sdxl.vae)
contrast = float(latents[-1].std())


def colors(latent, sigma):
    return (to_rgb(latent / (1 + (sigma / contrast) ** 2) ** 0.5)[0].permute(1, 2, 0) / 2 + 0.5).clamp(0, 1)


show({f"σ = {s:.2f}": colors(x, s) for x, s in zip(latents, levels.tolist())}, columns=7)
show({f"D at step {i + 1}": decode(sdxl, guess) for i, guess in enumerate(guesses)})

# %% [markdown]
# ## Pixels
#
# The VAE decoder turns the last latent into a picture. `sdxl.generate` does all of the above in one call. To see that
# it is the same, compare the latents after the first step: they are equal bit for bit.

# %%
first = []
settings = {"steps": 12, "cfg": 4.0, "size": (side, side), "seed": 0, "sampling": "euler"}
sdxl.generate([prompt], **settings, on_step=lambda step, x: first.append(x) or True)  # true stops after this step
print("equal after the first step:", torch.equal(first[0], latents[1]))
decode(sdxl, latents[-1]).resize((256, 256))

# %% [markdown]
# ## Exercises
#
# Write the answers in place of the dots and run the cell. `check` says "right", or what is off. Solutions are in
# `solutions/lesson_1.py`.
#
# **1.1** Write one step of Euler's method.


# %%
def euler_step(x, denoised, sigma, sigma_next): ...


check("1.1", euler_step)

# %% [markdown]
# **1.2** Write guidance, of the conditional c and the unconditional u.


# %%
def guided(u, c, scale): ...


check("1.2", guided)

# %% [markdown]
# **1.3** SDXL's latent has 4 channels and is 8 times shorter on both sides than its picture, which has 3 channels.
# How many times fewer numbers does the latent have? This is why diffusion runs on latents.

# %%
times_fewer = ...
check("1.3", times_fewer)
