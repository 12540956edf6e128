"""Recorded attention against float64 softmax, top weights by sorting, and Algorithm 1 in loops."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from atedm import TokenSet, match_tokens
from atedm.graph import AttentionInputs
from atedm.gwpr import EPSILON
from atedm.merging import Matching, Merging
from minisdxl.inspector import maps
from minisdxl.inspector.groups import Groups, groups_of
from minisdxl.inspector.maps import AttentionMaps, attention_maps
from tests.atedm.reference import algorithm_1, root_mean_square

GRID, HEADS, WIDTH, TEXT = (4, 6), 3, 8, 7
WORDS = [(1,), (2, 3), (5,)]


def inputs(tokens: int, keys: int, seed: int) -> AttentionInputs:
    generator = torch.Generator().manual_seed(seed)
    q, k = (torch.randn(2, HEADS, n, WIDTH, generator=generator) * 1.5 for n in (tokens, keys))
    return AttentionInputs(q, k, WIDTH**-0.5)


def exact(of: AttentionInputs) -> Tensor:
    """The last picture's map (heads, M, N) in float64."""
    logits = of.query[-1].double() @ of.key[-1].double().mT * of.scale
    weights = logits.exp()
    return weights / weights.sum(dim=-1, keepdim=True)


def recorded(groups: Groups | None = None, cross: bool = False) -> tuple[AttentionMaps, Tensor, Tensor]:
    count = GRID[0] * GRID[1]
    keys = count if groups is None else len(groups.places)
    asking = count if groups is None or groups.members is None else keys
    ours, text = inputs(asking, keys, 0), inputs(asking, TEXT, 1)
    return attention_maps(GRID, ours, text, WORDS, groups, cross), exact(ours), exact(text)


def test_rows_and_columns_have_the_largest_weights() -> None:
    found, ours, _ = recorded()
    mean = ours.mean(dim=0)
    for side, top in ((mean, found.rows), (mean.mT, found.columns)):
        expected = torch.argsort(side, dim=1, descending=True)[:, : maps.TOP]
        assert torch.equal(top.positions, expected)
        error = (top.weights - side.gather(1, expected)).abs().max().item()
        print(f"max error {error:.2e}")
        assert error < 1e-6


def test_a_words_map_is_the_attention_to_all_its_tokens() -> None:
    found, _, text = recorded()
    for word, tokens in zip(found.words, WORDS, strict=True):
        expected = sum(text.mean(dim=0)[:, token] for token in tokens)
        assert isinstance(expected, Tensor)
        error = (word.flatten() - expected).abs().max().item()
        print(f"max error {error:.2e}")
        assert error < 1e-6


def test_large_maps_of_words_are_averaged(monkeypatch: pytest.MonkeyPatch) -> None:
    found, _, _ = recorded()
    monkeypatch.setattr(maps, "WORD_SIDE", 3)
    pooled, _, _ = recorded()
    assert pooled.words.shape[1:] == (2, 3)
    error = (pooled.words[0, 1, 2] - found.words[0, 2:, 4:].mean()).abs().item()
    assert error < 1e-7


@pytest.mark.parametrize("cross", [False, True])
def test_scores_after_each_iteration_are_those_of_algorithm_1(cross: bool) -> None:
    found, ours, text = recorded(cross=cross)
    heads = (text if cross else ours).tolist()
    whole = [algorithm_1(head, cross=cross) for head in heads]
    assert found.iterations[-1] == max(iterations for _, iterations in whole)
    for number, scores in zip(found.iterations, found.scores, strict=True):
        after = [algorithm_1(head, cross=cross, limit=number)[0] for head in heads]  # stops earlier if it converges
        expected = root_mean_square(after)
        error = max(abs(a - b) / b for a, b in zip(scores.tolist(), expected, strict=True))
        print(f"{number} iterations: max relative error {error:.2e}")
        assert error < 20 * EPSILON


def test_long_iterations_are_thinned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(maps, "ITERATIONS", 3)
    found, ours, _ = recorded()
    last = max(algorithm_1(head)[1] for head in ours.tolist())
    assert len(found.iterations) == len(found.scores) == 3
    assert found.iterations[0] == 1 and found.iterations[-1] == last


def test_merged_tokens_have_the_attention_of_their_group() -> None:
    values = torch.randn(2, GRID[0] * GRID[1], 5, generator=torch.Generator().manual_seed(2))
    matching = match_tokens(TokenSet(values, GRID), Merging(0.5))
    assert isinstance(matching, Matching)
    found, ours, text = recorded(groups_of(matching))
    groups, stay = matching.source[-1], matching.order[-1, :12]
    mean = ours.mean(dim=0)
    for token in range(24):
        group = int(groups[token])
        best = torch.argsort(mean[group], descending=True)[: maps.TOP]
        assert torch.equal(found.rows.positions[token], stay[best])
        assert math.isclose(float(found.words[0].flatten()[token]), float(text.mean(dim=0)[group, 1]), rel_tol=1e-5)
    for position, group in zip(stay.tolist(), range(12), strict=True):  # a group is shown where its token stayed
        assert int(groups[position]) == group


def test_where_only_keys_are_fewer_the_others_have_no_column() -> None:
    places = torch.tensor([0, 3, 8, 13, 17, 22])
    found, ours, _ = recorded(Groups(places, None))
    mean = ours.mean(dim=0)  # (24, 6)
    assert torch.equal(found.rows.positions, places[torch.argsort(mean, dim=1, descending=True)])
    read = torch.zeros(24, dtype=torch.bool).index_fill(0, places, True)
    assert (found.columns.weights[~read] == 0).all()
    expected = torch.argsort(mean.mT, dim=1, descending=True)[:, : maps.TOP]
    assert torch.equal(found.columns.positions[read], expected)
    error = (found.columns.weights[read] - mean.mT.gather(1, expected)).abs().max().item()
    print(f"max error {error:.2e}")
    assert error < 1e-6
    assert found.iterations == [] and found.scores.shape == (0, 24)  # the map is not square
