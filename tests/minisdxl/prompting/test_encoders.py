"""Weights and long prompts against compel on the same text encoders, and pictures against diffusers with compel."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from compel import CompelForSDXL, EmbeddingsProvider, ReturnedEmbeddingsType
from compel.embeddings_provider import SplitLongTextMode
from PIL import Image

import minisdxl
from minisdxl.config import SDXL_BASE
from minisdxl.pipeline import SDXL
from minisdxl.prompting.encoders import PromptEncoders, same_length
from minisdxl.sampler import image_generators, initial_noise
from minisdxl.samplings import SAMPLINGS
from minisdxl.text import TextEmbeddings
from minisdxl.tokenizer import Tokenizer
from tests.minisdxl.test_pipeline import diffusers_pipeline
from tests.minisdxl.test_samplings import scheduler
from tests.minisdxl.test_text import BUNDLED, PROMPTS, SMALL, assert_close, peer_of, random_encoders

LONG = "a small red circle above a big blue square on a white background, " * 8  # 112 tokens


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_directory(BUNDLED, SMALL)


@pytest.fixture(scope="module")
def encoders() -> PromptEncoders:
    return PromptEncoders(random_encoders())


@pytest.fixture(scope="module")
def pipeline() -> Any:
    return peer_of(random_encoders())


def compel_of(pipeline: Any) -> Any:
    """compel for that pipeline, that ends chunks after whole words and leaves their end tokens as they are."""
    compel = CompelForSDXL(pipeline)
    for each in (compel.compel_1, compel.compel_2):
        each.conditioning_provider.split_long_text_mode = SplitLongTextMode.WORDS
    return compel


@torch.no_grad()
def test_prompts_without_syntax_keep_every_bit(encoders: PromptEncoders, tokenizer: Tokenizer) -> None:
    full = " ".join(["red"] * 75)
    for prompts in (PROMPTS, ["x"], ["a :-) b", full, "a: 1.3, <b> {c|d}"]):
        ours, plain = encoders.encode(prompts, tokenizer), random_encoders().encode(prompts, tokenizer)
        assert torch.equal(ours.context, plain.context) and torch.equal(ours.pooled, plain.pooled)
    ours, plain = (each.encode_negative(["", "ugly"], tokenizer) for each in (encoders, random_encoders()))
    assert torch.equal(ours.context, plain.context) and torch.equal(ours.pooled, plain.pooled)


@torch.no_grad()
def test_escaped_brackets_are_the_plain_ones(encoders: PromptEncoders, tokenizer: Tokenizer) -> None:
    ours = encoders.encode([r"a \(red\) \[cat\]"], tokenizer)
    assert torch.equal(ours.context, random_encoders().encode(["a (red) [cat]"], tokenizer).context)


@pytest.mark.parametrize(
    ("ours", "theirs", "first", "chunks"),
    [
        ("a small (big blue cat:1.3)", "a small (big blue cat)1.3", "a small big blue cat", 1),
        ("a (red) fox, ((blue)) (ox:2.5)", "a (red)1.1 fox, (blue)1.21 (ox)2.5", "a red fox, blue ox", 1),
        (LONG, LONG, LONG, 2),
        (f"{LONG} and a (green triangle:1.5)", f"{LONG} and a (green triangle)1.5", LONG, 2),
        (f"a red cat {'ab' * 99} {LONG}", f"a red cat {'ab' * 99} {LONG}", "a red cat", 4),
    ],
    ids=["weight", "weights", "long", "long and weight", "long word"],
)
@torch.no_grad()
def test_parity_with_compel(
    encoders: PromptEncoders, tokenizer: Tokenizer, pipeline: Any, ours: str, theirs: str, first: str, chunks: int
) -> None:
    compel, found = compel_of(pipeline), encoders.encode([ours], tokenizer)
    assert found.context.shape[1] == chunks * 77 == encoders.context_length([ours], tokenizer)
    assert_close("context", found.context, compel(theirs).embeds, 1e-6)
    # compel pools the prompt as it is typed, brackets and all; so it is asked for the text of the first chunk.
    assert_close("pooled", found.pooled, compel(first).pooled_embeds, 1e-6)


@pytest.mark.parametrize("weight", [-1.5, 0, 0.5, 1 / 1.1, 3])
@torch.no_grad()
def test_parity_with_compels_interpolation(
    encoders: PromptEncoders, tokenizer: Tokenizer, pipeline: Any, weight: float
) -> None:
    """compel masks a word of weight below 1; its step from token weights to states takes any."""
    fragments, weights = ["a small ", "red", " circle"], [1.0, weight, 1.0]
    parts = []
    for tokens, model in ((pipeline.tokenizer, pipeline.text_encoder), (pipeline.tokenizer_2, pipeline.text_encoder_2)):
        kind = ReturnedEmbeddingsType.PENULTIMATE_HIDDEN_STATES_NON_NORMALIZED
        provider = EmbeddingsProvider(tokens, model, returned_embeddings_type=kind)
        ids, expanded, _ = provider.get_token_ids_and_expand_weights(fragments, weights, device="cpu")
        parts.append(provider.build_weighted_embedding_tensor(ids, expanded))
    found = encoders.encode([f"a small (red:{weight:.12f}) circle"], tokenizer)
    assert_close(f"context at weight {weight:g}", found.context, torch.cat(parts, dim=-1), 1e-6)


@torch.no_grad()
def test_weights_in_float64(tokenizer: Tokenizer) -> None:
    """At weight 2 the state goes as far again from the empty prompt's, at 0 it is that, at 1 it stays, to the bit."""
    encoders = PromptEncoders(random_encoders())
    plain, empty = (encoders.encode([prompt], tokenizer).context for prompt in ("a red cat", ""))
    at = {weight: encoders.encode([f"a (red:{weight}) cat"], tokenizer).context for weight in (0, 1, 2)}
    red = slice(2, 3)  # after the start token and "a"
    expected = 2 * plain.double() - empty.double()
    assert_close("weight 2", at[2][:, red].double(), expected[:, red], 5e-6)  # states are up to 18
    assert_close("weight 0", at[0][:, red], empty[:, red], 1e-6)
    assert torch.equal(at[1], plain)
    others = [index for index in range(77) if index != 2]
    assert all(torch.equal(context[:, others], plain[:, others]) for context in at.values())


@torch.no_grad()
def test_break_is_the_next_chunk(encoders: PromptEncoders, tokenizer: Tokenizer) -> None:
    found = encoders.encode(["a red cat BREAK a (blue:1.2) dog"], tokenizer)
    first, second = (encoders.encode([prompt], tokenizer) for prompt in ("a red cat", "a (blue:1.2) dog"))
    assert_close("context", found.context, torch.cat([first.context, second.context], dim=1), 1e-6)
    assert_close("pooled", found.pooled, first.pooled, 1e-6)


@torch.no_grad()
def test_shorter_prompts_are_padded_as_by_compel(encoders: PromptEncoders, tokenizer: Tokenizer, pipeline: Any) -> None:
    short, long = (encoders.encode([prompt], tokenizer) for prompt in ("a cat", f"{LONG} {LONG}"))
    ours, _ = same_length([short, long], lambda: encoders.encode([""], tokenizer))
    expected = compel_of(pipeline)([f"{LONG} {LONG}"], negative_prompt=["a cat"])
    assert ours.context.shape == (1, 231, 80)
    assert_close("padded", ours.context, expected.negative_embeds, 1e-6)
    both = encoders.encode(["a cat", f"{LONG} {LONG}"], tokenizer)
    assert_close("in a batch", both.context, torch.cat([ours.context, long.context]), 1e-6)


def test_no_prompt_stays_zeros_at_every_length() -> None:
    def two(value: float, length: int) -> TextEmbeddings:
        return TextEmbeddings(torch.tensor([[[value]], [[0.0]]]).repeat(1, length, 1), torch.zeros(2, 1))

    long, short = same_length([two(5, 4), two(6, 2)], lambda: TextEmbeddings(torch.ones(1, 2, 1), torch.zeros(1, 1)))
    assert long.context[..., 0].tolist() == [[5] * 4, [0] * 4]
    assert short.context[..., 0].tolist() == [[6, 6, 1, 1], [0] * 4]


@pytest.fixture(scope="module")
def sdxl() -> SDXL:
    shapes = minisdxl.load("shapes")
    return replace(shapes, config=replace(shapes.config, defaults=SDXL_BASE.defaults))


@pytest.fixture(scope="module")
def peer(sdxl: SDXL) -> Any:
    return diffusers_pipeline(sdxl)


@pytest.mark.parametrize("negative", ["", "gray", LONG], ids=["no negative", "short negative", "long negative"])
def test_picture_equals_diffusers_with_compel(sdxl: SDXL, peer: Any, negative: str) -> None:
    words = f"{LONG} a red circle above a {{}} on a white background"
    ours = sdxl.generate(
        [words.format("(big blue square:1.3)")], negative=negative, steps=4, cfg=5.0, seed=3, size=(64, 64)
    )[0]
    with torch.no_grad():
        text = compel_of(peer)(words.format("(big blue square)1.3"), negative_prompt=negative or None)
    peer.scheduler = scheduler("euler", 4)
    sigma = float(SAMPLINGS["euler"].sigmas(4, sdxl.config.noise)[0])
    noise = initial_noise(image_generators([3]), (4, 16, 16), sigma) / peer.scheduler.init_noise_sigma
    if negative:
        negatives = (text.negative_embeds, text.negative_pooled_embeds)
    else:  # the zeros of force_zeros_for_empty_prompt
        negatives = (torch.zeros_like(text.embeds), torch.zeros_like(text.pooled_embeds))
    theirs = peer(
        prompt_embeds=text.embeds,
        pooled_prompt_embeds=text.pooled_embeds,
        negative_prompt_embeds=negatives[0],
        negative_pooled_prompt_embeds=negatives[1],
        num_inference_steps=4,
        guidance_scale=5.0,
        height=64,
        width=64,
        latents=noise,
    ).images[0]
    error = np.abs(np.asarray(ours, np.float64) - np.asarray(theirs, np.float64)) / 255
    print(f"picture, in [0, 1]: max error {error.max():.2e}, mean {error.mean():.2e}; context {text.embeds.shape}")
    assert error.max() <= 1.01 / 255


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image, np.float64) / 255


def test_a_long_negative_has_no_effect_without_guidance(sdxl: SDXL) -> None:
    settings: dict[str, Any] = {"steps": 2, "cfg": 1.0, "size": (64, 64)}
    plain = sdxl.generate(["a red circle"], **settings)[0]
    with pytest.warns(UserWarning, match="no effect"):
        guided = sdxl.generate(["a red circle"], negative=LONG, **settings)[0]
    assert np.array_equal(pixels(plain), pixels(guided))


@pytest.mark.parametrize("prune", ["at-edm", "tome", "moving-grid"])
def test_encoded_ahead_and_pruned_with_many_text_tokens(sdxl: SDXL, prune: str) -> None:
    prompts, negative = [f"{LONG} (red:1.2)", "a [red] circle"], "x BREAK y BREAK z"
    settings: dict[str, Any] = {"negative": negative, "prune": prune, "steps": 4, "size": (64, 64)}
    ahead = sdxl.encode_ahead(prompts, [negative])
    assert ahead.text.context_length(prompts, sdxl.tokenizer) == 154
    assert ahead.text.context_length([negative], sdxl.tokenizer) == 231
    for ours, theirs in zip(sdxl.generate(prompts, **settings), ahead.generate(prompts, **settings), strict=True):
        error = np.abs(pixels(ours) - pixels(theirs))
        print(f"{prune}: max error {error.max():.2e}, mean {error.mean():.2e}")
        assert error.mean() <= 1e-3


def test_weights_are_shared_under_the_same_names() -> None:
    encoders = random_encoders()
    assert PromptEncoders(encoders).state_dict().keys() == encoders.state_dict().keys()
