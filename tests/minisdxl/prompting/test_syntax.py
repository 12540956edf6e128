"""Web-UI syntax: weights by hand, and what holds for every text."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minisdxl.prompting.syntax import HEAVIEST, parse

SIGNS = st.lists(st.sampled_from([*"()[]\\:.+-1 aé\n", "BREAK", ":1.3)", "(("]), max_size=30).map("".join)


@pytest.mark.parametrize(
    ("prompt", "fragments"),
    [
        ("a (red) cat", [("a ", 1), ("red", 1.1), (" cat", 1)]),
        ("a (red:1.3) cat", [("a ", 1), ("red", 1.3), (" cat", 1)]),
        ("a (red: .5 ) cat", [("a ", 1), ("red", 0.5), (" cat", 1)]),
        ("(red:-1)", [("red", -1)]),
        ("a [red] cat", [("a ", 1), ("red", 1 / 1.1), (" cat", 1)]),
        ("((red)) [[cat]]", [("red", 1.21), ("cat", 1 / 1.21)]),
        ("(a (red:2) cat:1.5)", [("a ", 1.5), ("red", 3), (" cat", 1.5)]),
        ("(a [red] cat)", [("a ", 1.1), ("red", 1), (" cat", 1.1)]),
        ("(red)(blue)", [("red", 1.1), ("blue", 1.1)]),
        ("(at 12:30 or 1:2)", [("at 12:30 or 1", 2)]),
        (r"moon \(cat\)", [("moon (cat)", 1)]),
        (r"(a \(red\) cat:1.2)", [("a (red) cat", 1.2)]),
        (r"a \[red\] \\(cat)", [("a [red] \\", 1), ("cat", 1.1)]),
        (r"a\b \n", [(r"a\b \n", 1)]),
        ("a (red) cat :-)", [("a ", 1), ("red", 1.1), (" cat :-)", 1)]),
        (":-( a (red) cat", [(":-( a ", 1), ("red", 1.1), (" cat", 1)]),
        ("a red:1.3) cat", [("a red:1.3) cat", 1)]),
        ("(a [b) c]", [("a [b", 1.1), (" c]", 1)]),
        ("[a:1.3)", [("[a:1.3)", 1)]),
        ("() [ ]", []),
        ("", []),
    ],
)
def test_weights(prompt: str, fragments: list[tuple[str, float]]) -> None:
    (found,) = parse(prompt)
    assert [text for text, _ in found] == [text for text, _ in fragments]
    assert [weight for _, weight in found] == pytest.approx([weight for _, weight in fragments], rel=1e-12)


def test_break_ends_a_section_also_within_brackets() -> None:
    assert parse("a BREAK (b BREAK c:1.2)") == [[("a ", 1)], [(" b "[1:], 1.2)], [(" c", 1.2)]]
    assert parse("BREAK a BREAK BREAK b BREAK") == [[(" a ", 1)], [(" b ", 1)]]
    assert parse("a BREAKFAST, a break") == [[("a BREAKFAST, a break", 1)]]


@given(st.text(st.characters(exclude_characters="()[]\\"), max_size=60))
def test_a_prompt_without_syntax_is_one_fragment(text: str) -> None:
    if "BREAK" not in text:
        assert parse(text) == ([[(text, 1)]] if text.strip() else [[]])


@given(SIGNS)
def test_every_text_can_be_escaped(text: str) -> None:
    if "BREAK" not in text:
        assert parse(re.sub(r"([()\[\]\\])", r"\\\1", text)) == ([[(text, 1)]] if text.strip() else [[]])


@given(SIGNS)
def test_every_text_is_read_or_refused_in_a_line(text: str) -> None:
    try:
        sections = parse(text)
    except ValueError as error:
        assert re.match(r"prompt weight of .* is .*, expected -10 to 10", str(error), re.DOTALL)
        return
    assert all(abs(weight) <= HEAVIEST for section in sections for _, weight in section)
    letters = [sign for section in sections for words, _ in section for sign in words if sign in "aé"]
    assert letters == [sign for sign in text if sign in "aé"]


@pytest.mark.parametrize("prompt", ["a clock (12:30)", "(a:-11)", "(" * 30 + "a" + ")" * 30, f"(a:{'9' * 400})"])
def test_a_weight_out_of_range_is_refused(prompt: str) -> None:
    with pytest.raises(ValueError, match=r"prompt weight of '(12|a)' is .*, expected -10 to 10; write \\\( and \\\)"):
        parse(prompt)
