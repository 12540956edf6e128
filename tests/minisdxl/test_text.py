"""The text encoders against diffusers' SDXL pipeline, against torch's own transformer layers, and by their names."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from diffusers.loaders.single_file_utils import convert_ldm_clip_checkpoint, convert_open_clip_checkpoint
from diffusers.models.embeddings import Timesteps
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from minisdxl.checkpoint.text_names import load_official_text_state, official_text_state
from minisdxl.config import SDXL_BASE, SHAPES, TextConfig
from minisdxl.text import TextEmbeddings, TextEncoders, size_embedding
from minisdxl.tokenizer import Tokenizer
from tests.manifest import official_shapes

BUNDLED = Path(__file__).parents[2] / "weights" / "shapes" / "tokenizer"
TOKENS = {"vocabulary": 640, "start_token": 638, "end_token": 639}
# Widths, depths and projection all different: a forgotten transposition or a wrong order cannot hide.
SMALL = (
    TextConfig(48, 3, 4, "quick_gelu", **TOKENS, pad_token=639),
    TextConfig(32, 4, 2, "gelu", **TOKENS, pad_token=0, projection=40),
)
PROMPTS = ["a small red circle above a big blue square on a white background", "", "x", "Ångström, 日本"]
CLIP, OPENCLIP = "conditioner.embedders.0.transformer.", "conditioner.embedders.1.model."


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_directory(BUNDLED, SMALL)


def random_encoders(scale: float = 1.0, configs: tuple[TextConfig, TextConfig] = SMALL) -> TextEncoders:
    """Encoders in which no weight is special: biases are not 0, LayerNorms not 1, positions and tokens not tiny.

    ``scale`` makes the variance at the norms small, where a wrong epsilon shows; the norms' own weights stay.
    """
    torch.manual_seed(0)
    encoders = TextEncoders(configs).eval().requires_grad_(False)
    for name, parameter in encoders.named_parameters():
        noise = torch.randn_like(parameter)
        if "norm" in name:
            parameter.copy_(0.2 * noise + float("weight" in name))
        else:
            parameter.copy_(scale * (1.0 if "embedding" in name else 0.2) * noise)
    return encoders


def peer_of(encoders: TextEncoders) -> Any:
    """The diffusers pipeline with our weights, by diffusers' own conversion of official names."""
    official = official_text_state(encoders)
    clip, openclip = (
        kind(
            CLIPTextConfig(
                vocab_size=config.vocabulary,
                hidden_size=config.width,
                intermediate_size=4 * config.width,
                projection_dim=config.projection or 512,
                num_hidden_layers=config.layers,
                num_attention_heads=config.heads,
                hidden_act=config.activation,
                bos_token_id=config.start_token,
                eos_token_id=config.end_token,
            )
        )
        for kind, config in zip((CLIPTextModel, CLIPTextModelWithProjection), SMALL, strict=True)
    )
    weights = convert_ldm_clip_checkpoint(official)
    if not hasattr(clip, "text_model"):  # the prefix depends on the release of transformers
        weights = {name.removeprefix("text_model."): value for name, value in weights.items()}
    for model, state in ((clip, weights), (openclip, convert_open_clip_checkpoint(openclip, official, OPENCLIP))):
        missing, unexpected = model.load_state_dict(state, strict=False)
        assert not [name for name in missing if "position_ids" not in name] and not unexpected
    tokenizers = (
        CLIPTokenizer.from_pretrained(str(BUNDLED), pad_token=pad, model_max_length=77)
        for pad in ("<|endoftext|>", "!")
    )
    return StableDiffusionXLPipeline(
        None, clip, openclip, *tokenizers, unet=None, scheduler=None, add_watermarker=False
    )


def assert_close(name: str, ours: Tensor, theirs: Tensor, bound: float) -> None:
    assert ours.shape == theirs.shape
    error, scale = (ours - theirs).abs(), theirs.abs().max()
    print(f"{name}: max error {error.max():.2e}, mean {error.mean():.2e}, of {scale:.2e} at most; bound {bound:.0e}")
    assert error.max() <= bound * min(1.0, scale.item())


@pytest.mark.parametrize("scale", [1.0, 1e-2], ids=["ordinary", "small"])
@torch.no_grad()
def test_parity_with_the_diffusers_pipeline(tokenizer: Tokenizer, scale: float) -> None:
    encoders = random_encoders(scale)
    prompts, negatives = [*PROMPTS, "red " * 90], ["ugly", "a gray background", "x x", "small", "blue " * 80]
    context, negative_context, pooled, negative_pooled = peer_of(encoders).encode_prompt(
        prompts, negative_prompt=negatives, device=torch.device("cpu")
    )
    with pytest.warns(UserWarning, match="cut off"):
        ours, ours_negative = encoders.encode(prompts, tokenizer), encoders.encode_negative(negatives, tokenizer)
    assert ours.context.shape == (5, 77, 80) and ours.pooled.shape == (5, 40)
    assert_close("context", ours.context, context, 1e-6)
    assert_close("pooled", ours.pooled, pooled, 1e-6)
    assert_close("negative context", ours_negative.context, negative_context, 1e-6)
    assert_close("negative pooled", ours_negative.pooled, negative_pooled, 1e-6)


@torch.no_grad()
def test_an_empty_negative_prompt_is_zeros(tokenizer: Tokenizer) -> None:
    encoders = random_encoders()
    _, context, _, pooled = peer_of(encoders).encode_prompt(["a", "a"], device=torch.device("cpu"))
    ours = encoders.encode_negative(["", " \n"], tokenizer)
    assert torch.equal(ours.context, context) and torch.equal(ours.pooled, pooled)
    assert not ours.context.any() and not ours.pooled.any()
    mixed, encoded = encoders.encode_negative(["red", ""], tokenizer), encoders.encode(["red", ""], tokenizer)
    assert torch.equal(mixed.context[0], encoded.context[0]) and torch.equal(mixed.pooled[0], encoded.pooled[0])
    assert not mixed.context[1].any() and encoded.context[1].any() and encoded.pooled[1].any()
    sizes = torch.tensor([[1024, 1024, 0, 0, 1024, 1024]] * 2)
    assert ours.vector(sizes, 16)[:, 40:].any(dim=1).all()  # sizes are embedded all the same


def quick_gelu(values: Tensor) -> Tensor:
    return values * torch.sigmoid(1.702 * values)


def reference(official: dict[str, Tensor], ids: Tensor, config: TextConfig, layers: int) -> Tensor:
    """The first ``layers`` layers by torch's own transformer layer, which has OpenCLIP's fused projection itself."""
    second = config.projection is not None
    prefix = f"{OPENCLIP}transformer.resblocks" if second else f"{CLIP}text_model.encoder.layers"
    norms, out = (("ln_1", "ln_2"), "attn") if second else (("layer_norm1", "layer_norm2"), "self_attn")
    linears = ("c_fc", "c_proj") if second else ("fc1", "fc2")
    if second:
        tokens, positions = official[f"{OPENCLIP}token_embedding.weight"], official[f"{OPENCLIP}positional_embedding"]
    else:
        tokens, positions = (
            official[f"{CLIP}text_model.embeddings.{n}_embedding.weight"] for n in ("token", "position")
        )
    hidden = tokens[ids] + positions
    mask = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).triu(1)
    for index in range(layers):
        layer = nn.TransformerEncoderLayer(
            config.width,
            config.heads,
            4 * config.width,
            dropout=0.0,
            activation=nn.functional.gelu if second else quick_gelu,
            layer_norm_eps=1e-5,
            batch_first=True,
            norm_first=True,
        ).double()
        state = {}
        for kind in ("weight", "bias"):
            at = f"{prefix}.{index}."
            if second:
                state[f"self_attn.in_proj_{kind}"] = official[f"{at}attn.in_proj_{kind}"]
            else:
                projections = [official[f"{at}self_attn.{letter}_proj.{kind}"] for letter in "qkv"]
                state[f"self_attn.in_proj_{kind}"] = torch.cat(projections)
            state[f"self_attn.out_proj.{kind}"] = official[f"{at}{out}.out_proj.{kind}"]
            for number in (1, 2):
                state[f"norm{number}.{kind}"] = official[f"{at}{norms[number - 1]}.{kind}"]
                state[f"linear{number}.{kind}"] = official[f"{at}mlp.{linears[number - 1]}.{kind}"]
        layer.load_state_dict(state)
        hidden = layer(hidden, src_mask=mask)
    return hidden


@pytest.mark.parametrize("scale", [1.0, 1e-2], ids=["ordinary", "small"])
@torch.no_grad()
def test_parity_with_torch_layers_in_float64(tokenizer: Tokenizer, scale: float) -> None:
    encoders = random_encoders(scale).double()
    official = official_text_state(encoders)
    ids, ids_2 = tokenizer(PROMPTS)
    ours = encoders(ids, ids_2)
    context = torch.cat([reference(official, ids, SMALL[0], 2), reference(official, ids_2, SMALL[1], 3)], dim=-1)
    assert_close("context", ours.context, context, 1e-12)
    last = reference(official, ids_2, SMALL[1], 4)
    weight, bias = (official[f"{OPENCLIP}ln_final.{kind}"] for kind in ("weight", "bias"))
    last = nn.functional.layer_norm(last, (32,), weight, bias, eps=1e-5)
    at_end = torch.stack([row[tokens.tolist().index(639)] for row, tokens in zip(last, ids_2, strict=True)])
    assert_close("pooled", ours.pooled, at_end @ official[f"{OPENCLIP}text_projection"], 1e-12)


@torch.no_grad()
def test_pools_at_the_first_end_token(tokenizer: Tokenizer) -> None:
    encoders = random_encoders()
    ids, ids_2 = tokenizer(["a red circle"])
    end = ids_2[0].tolist().index(639)
    pooled = encoders(ids, ids_2).pooled
    for later in (0, 639, 638, 17):  # nothing after the first end token counts
        ids_2[0, end + 1 :] = later
        assert torch.equal(encoders(ids, ids_2).pooled, pooled)
    ids_2[0, end] = 17
    ids_2[0, -1] = 639
    assert not torch.allclose(encoders(ids, ids_2).pooled, pooled)
    ids_2[0, -1] = 0
    with pytest.raises(ValueError, match="without the end token 639"):
        encoders(ids, ids_2)


def test_names_and_shapes_are_those_of_the_official_file() -> None:
    with torch.device("meta"):
        encoders = TextEncoders(SDXL_BASE.text)
    ours = {name: tuple(tensor.shape) for name, tensor in official_text_state(encoders).items()}
    unused = {f"{CLIP}text_model.embeddings.position_ids", f"{OPENCLIP}logit_scale"}
    official = official_shapes()
    expected = {name: official[name] for name in official if name.startswith("conditioner.") and name not in unused}
    print(f"{len(ours)} names")
    assert ours == expected and len(ours) == 585


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@torch.no_grad()
def test_loads_into_encoders_on_the_meta_device(tokenizer: Tokenizer, dtype: torch.dtype) -> None:
    source = random_encoders().to(dtype)
    official = official_text_state(source)
    with torch.device("meta"):
        encoders = TextEncoders(SMALL)
    load_official_text_state(encoders, official)
    encoders.to("cpu").eval()  # fails where a buffer stayed on the meta device
    assert {tensor.device.type for tensor in (*encoders.parameters(), *encoders.buffers())} == {"cpu"}
    assert {parameter.dtype for parameter in encoders.parameters()} == {dtype}
    assert encoders.state_dict().keys() == source.state_dict().keys()
    ours, expected = encoders.encode(PROMPTS, tokenizer), source.encode(PROMPTS, tokenizer)
    assert ours.context.dtype == ours.pooled.dtype == dtype
    assert torch.equal(ours.context, expected.context) and torch.equal(ours.pooled, expected.pooled)
    assert ours.context.isfinite().all() and ours.pooled.isfinite().all()


def test_loading_is_strict() -> None:
    encoders = random_encoders()
    official = official_text_state(encoders)
    with pytest.raises(ValueError, match=r"1 missing \['conditioner.embedders.1.model.text_projection'\], 0 unexp"):
        load_official_text_state(encoders, {n: v for n, v in official.items() if not n.endswith("text_projection")})
    with pytest.raises(ValueError, match=r"0 missing \[\], 1 unexpected \['conditioner.extra'\]"):
        load_official_text_state(encoders, official | {"conditioner.extra": torch.zeros(1)})
    with pytest.raises(RuntimeError, match="size mismatch"):
        load_official_text_state(encoders, official | {f"{OPENCLIP}text_projection": torch.zeros(40, 32)})
    for rows in (93, 99):  # of a fused projection of 96: neither three equal parts nor the right ones
        wrong = {f"{OPENCLIP}transformer.resblocks.0.attn.in_proj_bias": torch.zeros(rows)}
        with pytest.raises(RuntimeError, match="size mismatch"):
            load_official_text_state(encoders, official | wrong)


def test_size_embedding_is_that_of_diffusers() -> None:
    sizes = torch.tensor([[1024, 768, 0, 16, 512, 640], [256, 256, 3, 0, 4096, 31]])
    peer = Timesteps(32, flip_sin_to_cos=True, downscale_freq_shift=0)(sizes.flatten()).reshape(2, -1)
    assert_close("sizes", size_embedding(sizes, 32), peer, 1e-6)
    pooled = torch.randn(2, 40)
    vector = TextEmbeddings(torch.zeros(2, 77, 80), pooled).vector(sizes, 32)
    assert_close("vector", vector, torch.cat([pooled, peer], dim=-1), 1e-6)
    half = TextEmbeddings(torch.zeros(2, 77, 80), pooled.half()).vector(sizes, 32)
    assert half.dtype == torch.float16 and torch.equal(half, vector.half())  # computed in float32, then rounded
    with pytest.raises(ValueError, match=r"sizes have shape \(2, 4\), expected \(B, 6\)"):
        size_embedding(sizes[:, :4], 32)


def test_the_vector_is_as_wide_as_the_unet_takes() -> None:
    for config in (SDXL_BASE, SHAPES):
        projection = config.text[1].projection
        assert projection is not None
        conditioning = TextEmbeddings(torch.zeros(1, 77, config.unet.context_channels), torch.zeros(1, projection))
        vector = conditioning.vector(torch.zeros(1, 6), config.size_channels)
        assert vector.shape == (1, config.unet.vector_channels)


def test_gradients_reach_every_weight_that_is_used(tokenizer: Tokenizer) -> None:
    encoders = random_encoders().train().requires_grad_(True)
    conditioning = encoders.encode(PROMPTS, tokenizer)
    torch.autograd.backward(conditioning.context.square().mean() + conditioning.pooled.square().mean())
    unused = {n for n, p in encoders.named_parameters() if p.grad is None or not p.grad.any()}
    # The context is taken before the last layer: encoder 1, which gives no pooled output, never uses its own.
    last = "clip.text_model.encoder.layers.2."
    expected = {n for n, _ in encoders.named_parameters() if n.startswith(last)}
    expected |= {n for n, _ in encoders.named_parameters() if n.startswith("clip.") and "final_layer_norm" in n}
    assert unused == expected and len(expected) == 18


def test_training_and_evaluation_agree(tokenizer: Tokenizer) -> None:
    encoders = random_encoders()
    evaluated, trained = encoders.eval().encode(PROMPTS, tokenizer), encoders.train().encode(PROMPTS, tokenizer)
    assert torch.equal(evaluated.context, trained.context) and torch.equal(evaluated.pooled, trained.pooled)


def test_rows_are_zeroed_where_asked() -> None:
    conditioning = TextEmbeddings(torch.ones(3, 77, 8), torch.ones(3, 4)).zeroed(torch.tensor([False, True, False]))
    assert conditioning.context.sum(dim=(1, 2)).tolist() == [616, 0, 616]
    assert conditioning.pooled.sum(dim=1).tolist() == [4, 0, 4]


def test_normalization_constants_and_activations() -> None:
    with torch.device("meta"):
        encoders = TextEncoders(SDXL_BASE.text)
    norms = [module for module in encoders.modules() if isinstance(module, nn.LayerNorm)]
    assert len(norms) == 2 * 12 + 1 + 2 * 32 + 1 and {norm.eps for norm in norms} == {1e-5}
    with pytest.raises(ValueError, match="text activation is 'relu'"):
        replace(SMALL[0], activation="relu")
