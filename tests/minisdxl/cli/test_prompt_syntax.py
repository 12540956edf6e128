"""Prompts in the syntax of other programs: a line names what is drawn as words."""

from __future__ import annotations

import warnings

import pytest

from minisdxl.cli.prompt_syntax import check_syntax


def said(*texts: str) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        check_syntax(texts, ["known"])
    return [str(warning.message) for warning in caught]


@pytest.mark.parametrize(
    ("prompt", "named"),
    [
        ("a [red:blue:0.5] cat", "[red:blue:0.5]"),
        ("a [red::5] cat", "[red::5]"),
        ("a [red|blue] cat", "[red|blue]"),
        ("a cat AND a dog :1.2", "AND"),
        ("a cat <lora:add_detail:0.8>", "<lora:add_detail:0.8>"),
        ("a cat, embedding:EasyNegative, red", "embedding:EasyNegative"),
        ("a (embedding:EasyNegative:1.2) cat", "embedding:EasyNegative"),
        ("a {red|blue} cat", "{red|blue}"),
        ("a __color__ cat", "__color__"),
        (r"moon \{cat\}", r"\{, \}"),
    ],
)
def test_syntax_of_web_uis_is_named(prompt: str, named: str) -> None:
    assert said("a plain cat", prompt) == [f"web-UI syntax has no effect and is drawn as words: {named}"]


@pytest.mark.parametrize(
    "prompt",
    [
        "a red cat, big",
        "a cat's break and more",
        "50% off: 1.3 euro",
        "a_b __ c",
        "3 < 4 > 2",
        "ein grünes {Haus}",
        ":-)",
        r"a (red:1.3) [cat] BREAK \(dog\)",
        "a (embedding:Known:1.2) cat",
        "",
    ],
)
def test_other_prompts_are_not(prompt: str) -> None:
    assert not said(prompt)


def test_one_line_for_all_prompts() -> None:
    (line,) = said(*(f"a [red:1.{number}] cat" for number in range(9)), "[red:1.0]", "{" + "x" * 99 + "|}")
    assert line.count("red") == 5
    assert line.endswith(" and 5 more")


def test_a_weight_out_of_range_is_refused() -> None:
    with pytest.raises(ValueError, match="weight of 'a clock, 12' is 30"):
        said("(a clock, 12:30)")
