"""Recognizes files that are not safetensors (HTML pages, pickles, ...) by their first bytes."""

from __future__ import annotations

import re

# First bytes of files that get renamed to .safetensors, or that a failed download leaves behind.
CONTAINERS = (
    (rb"\s*(?i:<!doctype html|<html|<head|<body)", "an HTML page, such as a sign-in or an error page"),
    (rb"\s*<\?xml", "an XML page, such as an error page"),
    (rb"version https://git-lfs", "a git-lfs pointer: `git lfs pull` fetches the file that it stands for"),
    (rb"PK\x03\x04(?s:.{,90})/data\.pkl", "a PyTorch pickle (.pt or .ckpt): pickles can run code"),
    (rb"PK\x03\x04", "a zip archive"),
    (rb"\x80[\x02-\x05][^\x00]", "a pickle (.pt, .ckpt or .bin): pickles can run code"),
    (rb"GGUF", "a GGUF file of quantized weights"),
    (rb"\x1f\x8b", "a gzip archive"),
    (rb"\x89HDF", "an HDF5 file"),
    (rb"\x89PNG|\xff\xd8\xff|RIFF(?s:.{4})WEBP", "a picture"),
    (rb"\s*[{\[]", "a JSON text, such as a list of files or an error message"),
    (rb"\x00{16}", "all zeros at its beginning, as an unfinished download can be"),
)


def container(head: bytes) -> str | None:
    """The kind of a file that begins with ``head`` and is not safetensors, in words; ``None`` if it is unknown."""
    head = head.removeprefix(b"\xef\xbb\xbf")  # byte order mark of a text
    if not head:
        return "an empty file"
    for pattern, what in CONTAINERS:
        if re.match(pattern, head):
            return what
    line = head.strip().split(b"\n")[0][:60].decode("ascii", errors="replace")
    return f"a text that begins {line!r}" if line and line.isascii() and line.isprintable() else None
