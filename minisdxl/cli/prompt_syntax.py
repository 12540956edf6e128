"""What other programs read in a prompt and this one draws as words: named once, so that nobody waits for its effect."""

from __future__ import annotations

import re
import warnings
from collections.abc import Collection, Sequence

from minisdxl.prompting.syntax import parse

# Syntax of the web UIs: https://github.com/AUTOMATIC1111/stable-diffusion-webui/wiki/Features and its extensions.
SYNTAX = re.compile(
    r"""
    <[a-z]+:[^<>]+>                              # <lora:name:0.8>
    | \\[{}]                                     # a brace that is meant literally
    | \[[^\[\]]*:\s*[0-9.]+\s*\]                 # [from:to:0.5]
    | \[[^\[\]]*\|[^\[\]]*\]                     # [this|that]
    | \{[^{}]*\|[^{}]*\}                         # {this|that}
    | \bembedding:(?P<embedding>[^\s,:()\[\]]+)  # of ComfyUI
    | \b__[\w/*-]+__\b                           # a wildcard
    | \bAND\b
    """,
    re.VERBOSE,
)
SHOWN = 5


def check_syntax(texts: Sequence[str], embeddings: Collection[str]) -> None:
    """Warns, in one line for all prompts, of syntax that has no effect here.

    ``embeddings`` are the names, in lower case, of those that are loaded. Raises ``ValueError`` as
    :func:`minisdxl.prompting.syntax.parse`.
    """
    for text in texts:
        parse(text)
    matches = [match for text in texts for match in SYNTAX.finditer(text)]
    found = dict.fromkeys(match[0] for match in matches if (match["embedding"] or "").lower() not in embeddings)
    if found:
        shown = [syntax if len(syntax) <= 40 else f"{syntax[:37]}..." for syntax in list(found)[:SHOWN]]
        more = f" and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
        warnings.warn(f"web-UI syntax has no effect and is drawn as words: {', '.join(shown)}{more}", stacklevel=2)
