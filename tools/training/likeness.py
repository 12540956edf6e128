"""Self-attention between similar tokens: a start for training, and measurements of how much of it remains.

In a large model self-attention gives most weight to tokens similar to the query. G-WPR and the similarity-based copy of
AT-EDM rely on that (section 3.2). A small model trained on plain pictures does not learn it, so training starts from it
with :func:`similarity_kernel`. :func:`watch` measures during training whether it remains.
"""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from atedm import DENSE
from atedm.graph.inputs import AttentionInputs
from atedm.tokens import TokenSet
from minisdxl.pipeline import SDXL
from minisdxl.preconditioning import discrete_sigmas
from minisdxl.transformer import AttentionBlock, TransformerLayer
from minisdxl.unet import UNet
from tools.drawn.world import random_open_scene, random_scene
from tools.evaluation.step_changes import Pictures, drawn_pictures, outcomes

SHARPNESS = 10.0  # s^2: scales all logits
NOISE = 0.15  # a: how far query and key maps differ
TIMESTEPS = (800, 500, 200)  # where `watch` measures


@torch.no_grad()
def similarity_kernel(
    unet: UNet, generator: torch.Generator, sharpness: float = SHARPNESS, noise: float = NOISE
) -> None:
    """Sets query and key maps of all self-attentions so that similar tokens attend to each other.

    In each head W_q = s (P + a N) and W_k = s (P + a N'), s^2 = ``sharpness``, a = ``noise``, with the same random
    orthonormal rows P (d x C) and independent Gaussian N, N' of variance 1/C: "mimetic initialization" (Trockman and
    Kolter 2023, arXiv:2305.09828), because W_q W_k^T of trained transformers is close to a multiple of the identity.
    """
    for layer in unet.modules():
        if not isinstance(layer, TransformerLayer):
            continue
        attention = layer.attn1
        channels = attention.to_q.in_features
        head = channels // attention.heads
        rows = [nn.init.orthogonal_(torch.empty(head, channels), generator=generator) for _ in range(attention.heads)]
        shared = torch.cat(rows)
        for weight in (attention.to_q.weight, attention.to_k.weight):
            own = torch.randn(shared.shape, generator=generator) * channels**-0.5
            weight.copy_(sharpness**0.5 * (shared + noise * own))


def watch(sdxl: SDXL, pictures: int = 8) -> dict[str, float]:
    """Measures self-attention on ``pictures`` plain and as many open pictures of the test split.

    Returns each number of :func:`watch_scenes`, named ``plain_error``, ``open_error`` and so on.
    """
    kinds = {"plain": random_scene, "open": random_open_scene}
    return {
        f"{kind}_{name}": value
        for kind, draw_scene in kinds.items()
        for name, value in watch_scenes(sdxl, drawn_pictures(sdxl, pictures, draw_scene)).items()
    }


@torch.no_grad()
def watch_scenes(sdxl: SDXL, drawn: Pictures) -> dict[str, float]:
    """Measures the self-attention of a model on drawn pictures.

    At t = 500:

    - ``error`` of the predicted noise, and ``uniform``, the error with uniform self-attention over ``error``.
    - ``source``, the mean cosine between a token and the other token that gives it most attention, and ``likest``,
      between a token and the other token most similar to it. Cosines are of centered values after the first layer of
      each attention block.
    - ``entropy`` of the rows of the maps over ln N.
    - ``objects`` and ``rest``, the shares of tokens that `at-edm` keeps where objects are and elsewhere.

    ``change_800``, ``change_500`` and ``change_200`` are the change by `at-edm` as in ``tools.single_step``.
    """
    timestep = TIMESTEPS[1]
    noise = torch.randn(drawn.latents.shape, generator=torch.Generator().manual_seed(timestep)).to(sdxl.device)
    sigma = float(discrete_sigmas(sdxl.config.noise)[timestep])
    noisy = (drawn.latents + sigma * noise) / (1 + sigma**2) ** 0.5
    c_noise = torch.full((len(noise),), timestep, device=sdxl.device)

    def error(unet: UNet) -> float:
        predicted = unet(noisy, c_noise, drawn.text, drawn.vector, DENSE)
        return float((predicted - noise).square().mean())

    found: dict[str, list[float]] = {"source": [], "likest": [], "entropy": []}

    def see_map(_: nn.Module, __: object, output: tuple[Tensor, AttentionInputs]) -> None:
        attention_maps.append(attention_map(output[1]))

    def see_values(_: nn.Module, __: object, output: tuple[TokenSet, object]) -> None:
        measure(attention_maps.pop(), output[0].values, found)

    attention_maps: list[Tensor] = []
    handles = []
    for block in sdxl.unet.modules():
        if isinstance(block, AttentionBlock):
            first = block.transformer_blocks[0]
            assert isinstance(first, TransformerLayer)
            handles += [first.attn1.register_forward_hook(see_map), first.register_forward_hook(see_values)]
    dense = error(sdxl.unet)
    for handle in handles:
        handle.remove()
    uniform = copy.deepcopy(sdxl.unet)
    for layer in uniform.modules():
        if isinstance(layer, TransformerLayer):
            nn.init.zeros_(layer.attn1.to_q.weight)
    changes = {each.timestep: each for each in outcomes(sdxl, drawn, ["at-edm"], TIMESTEPS)}
    return {
        "error": dense,
        "uniform": error(uniform) / dense,
        **{name: sum(values) / len(values) for name, values in found.items()},
        "objects": changes[timestep].objects_mean,
        "rest": changes[timestep].rest_mean,
        **{f"change_{t}": changes[t].change for t in TIMESTEPS},
    }


def attention_map(inputs: AttentionInputs) -> Tensor:
    """The map softmax(scale * query key^T), (B, heads, N, N)."""
    return (inputs.scale * inputs.query.float() @ inputs.key.float().transpose(-1, -2)).softmax(dim=-1)


def measure(maps: Tensor, values: Tensor, found: dict[str, list[float]]) -> None:
    """Adds the numbers of one block to ``found``: from its ``maps`` (B, heads, N, N) and first ``values`` (B, N, C)."""
    tokens = values.shape[1]
    entropy = torch.special.entr(maps).sum(dim=-1).mean() / torch.log(torch.tensor(float(tokens)))
    centered = F.normalize(values.float() - values.float().mean(dim=1, keepdim=True), dim=-1)
    cosine = centered @ centered.transpose(-1, -2)
    itself = torch.eye(tokens, dtype=torch.bool, device=maps.device)
    # Column b of the map is the attention that token b receives; its source is another token.
    source = maps.mean(dim=1).masked_fill(itself, -1).argmax(dim=1)
    found["source"].append(float(cosine.gather(1, source[:, None]).mean()))
    found["likest"].append(float(cosine.masked_fill(itself, -2).amax(dim=-1).mean()))
    found["entropy"].append(float(entropy))
