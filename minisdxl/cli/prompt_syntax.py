"""What other programs read in a prompt and this one draws as words: named once, so that nobody waits for its effect."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable

# Syntax of the web UIs: https://github.com/AUTOMATIC1111/stable-diffusion-webui/wiki/Features and its extensions.
SYNTAX = re.compile(
    r"""
    <[a-z]+:[^<>]+>                  # <lora:name:0.8>
    | \\[()\[\]{}]                   # a bracket that is meant literally
    | \((?:\\.|[^()\\])*\)           # (word), (word:1.3)
    | \[(?:\\.|[^\[\]\\])*\]         # [word], [from:to:0.5], [this|that]
    | \{[^{}]*\|[^{}]*\}             # {this|that}
    | \bembedding:[^\s,()\[\]]+      # of ComfyUI
    | \b__[\w/*-]+__\b               # a wildcard
    | \b(?:BREAK|AND)\b
    """,
    re.VERBOSE,
)
SHOWN = 5


def warn_of_syntax(texts: Iterable[str]) -> None:
    """Warns, in one line for all prompts, of syntax that has no effect here."""
    found = dict.fromkeys(match[0] for text in texts for match in SYNTAX.finditer(text))
    if found:
        shown = [syntax if len(syntax) <= 40 else f"{syntax[:37]}..." for syntax in list(found)[:SHOWN]]
        more = f" and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
        warnings.warn(f"web-UI syntax has no effect and is drawn as words: {', '.join(shown)}{more}", stacklevel=2)
