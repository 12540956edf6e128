"""Prompts in the syntax of other programs: a line names what is drawn as words."""

from __future__ import annotations

import warnings

import pytest

from minisdxl.cli.prompt_syntax import warn_of_syntax


def said(*texts: str) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warn_of_syntax(texts)
    return [str(warning.message) for warning in caught]


@pytest.mark.parametrize(
    ("prompt", "named"),
    [
        ("a (red:1.3) cat", "(red:1.3)"),
        ("a (red) cat", "(red)"),
        ("a ((red)) cat", "(red)"),
        ("a [red] cat", "[red]"),
        ("a [red:blue:0.5] cat", "[red:blue:0.5]"),
        ("a cat BREAK a dog", "BREAK"),
        ("a cat AND a dog :1.2", "AND"),
        ("a cat <lora:add_detail:0.8>", "<lora:add_detail:0.8>"),
        ("a cat, embedding:EasyNegative, red", "embedding:EasyNegative"),
        ("a {red|blue} cat", "{red|blue}"),
        ("a __color__ cat", "__color__"),
        (r"moon \(cat\)", r"\(, \)"),
        (r"(a \(red\) cat:1.2)", r"(a \(red\) cat:1.2)"),
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
        "",
    ],
)
def test_plain_prompts_are_not(prompt: str) -> None:
    assert not said(prompt)


def test_one_line_for_all_prompts() -> None:
    (line,) = said(*(f"a (red:1.{number}) cat" for number in range(9)), "(red:1.0)", "(" + "x" * 99 + ")")
    assert line.count("red") == 5
    assert line.endswith(" and 5 more")
