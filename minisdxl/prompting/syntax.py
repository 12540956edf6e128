"""The web UIs' prompt syntax: weights in brackets, escapes and ``BREAK``.

``(word)`` has weight 1.1, ``(word:1.3)`` 1.3, ``[word]`` 1 / 1.1. Brackets nest, and their weights are multiplied. A
backslash takes the meaning from a bracket or another backslash. ``BREAK`` ends a chunk. The syntax is AUTOMATIC1111's
(https://github.com/AUTOMATIC1111/stable-diffusion-webui/wiki/Features).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple

ROUND, SQUARE = 1.1, 1 / 1.1
HEAVIEST = 10.0  # of either sign; weights above about 2 distort pictures already

_SIGNS = re.compile(
    r"""
    \\[()\[\]\\]
    | [()\[\]]
    | :\s*(?P<weight>[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+))\s*\)
    | \bBREAK\b
    """,
    re.VERBOSE,
)


class Fragment(NamedTuple):
    """A part of a prompt, all of one weight."""

    text: str
    weight: float = 1.0


@dataclass
class _Piece:
    text: str
    weight: float = 1.0
    kind: str = "text"  # or "bracket", which has been matched and is no text; or "break"


def parse(prompt: str) -> list[list[Fragment]]:
    """The fragments of a prompt, in the sections that ``BREAK`` separates.

    A bracket without its partner is text: unlike in the web UIs, ``:-(`` does not weigh the rest of the prompt. A
    prompt without syntax is one fragment of weight 1. Raises ``ValueError`` for a weight beyond ``HEAVIEST``.
    """
    pieces = _pieces(prompt)
    sections = []
    for is_break, section in groupby(pieces, key=lambda piece: piece.kind == "break"):
        # A bracket is a border: (red)(blue) are two words.
        runs = [list(run) for is_text, run in groupby(section, key=lambda piece: piece.kind == "text") if is_text]
        fragments = [Fragment("".join(piece.text for piece in run), run[0].weight) for run in runs]
        if not is_break:
            sections.append([fragment for fragment in fragments if fragment.text.strip()])
    for fragment in (fragment for section in sections for fragment in section):
        if not abs(fragment.weight) <= HEAVIEST:
            raise ValueError(
                f"prompt weight of {fragment.text[:40]!r} is {fragment.weight:g}, expected {-HEAVIEST:g} to "
                rf"{HEAVIEST:g}; write \( and \) for brackets that are part of the text"
            )
    return [section for section in sections if section] or [[]]


def _pieces(prompt: str) -> list[_Piece]:
    pieces: list[_Piece] = []
    opened: list[int] = []  # indices of brackets that are not closed yet

    def close(bracket: str, weight: float) -> bool:
        """Gives what follows the last such bracket its weight. Brackets opened within it turn out to be text."""
        while any(pieces[index].text == bracket for index in opened):
            start = opened.pop()
            if pieces[start].text == bracket:
                for piece in pieces[start:]:
                    piece.weight *= weight
                pieces[start].kind = "bracket"
                return True
        return False

    end = 0
    for sign in _SIGNS.finditer(prompt):
        pieces.append(_Piece(prompt[end : sign.start()]))
        end, text = sign.end(), sign[0]
        if text in ("(", "["):
            opened.append(len(pieces))
            pieces.append(_Piece(text))
        elif text == "BREAK":
            pieces.append(_Piece(text, kind="break"))
        elif text.startswith("\\"):
            pieces.append(_Piece(text[1:]))
        else:
            weight = SQUARE if text == "]" else ROUND if text == ")" else float(sign["weight"])
            closed = close("[" if text == "]" else "(", weight)
            pieces.append(_Piece(text, kind="bracket" if closed else "text"))
    return [piece for piece in [*pieces, _Piece(prompt[end:])] if piece.text]
