"""The exception for files that cannot be used."""

from __future__ import annotations


class CheckpointError(ValueError):
    """A file that cannot be used; one line that names it, says what it is, and what would be right."""
