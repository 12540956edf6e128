"""JSON fields of a model, with validation of every value that is read."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minisdxl.checkpoint.errors import CheckpointError
from minisdxl.config import ModelConfig

LARGEST = 50_000_000  # bytes; more than any config or list of shards has
NOISE_LEVELS = 100_000  # more than any model is trained at


@dataclass(frozen=True)
class Fields:
    """A JSON object in a file. All methods raise ``CheckpointError`` for a wrong value."""

    path: Path
    values: dict[str, Any]

    @classmethod
    def read(cls, path: Path) -> Fields:
        """Reads a file."""
        if path.exists() and not path.is_file():  # such as a pipe, on which reading would wait
            raise CheckpointError(f"{path} is not a file; expected one in a diffusers folder")
        try:
            size = path.stat().st_size
            values = json.loads(path.read_text(encoding="utf-8")) if size <= LARGEST else None
        except OSError as error:
            raise CheckpointError(f"cannot read {path}: {error.strerror}; expected it in a diffusers folder") from error
        except (ValueError, RecursionError) as error:
            raise CheckpointError(f"{path} is not JSON: {error}") from error
        if not isinstance(values, dict):
            raise CheckpointError(f"{path} holds no JSON object of at most {LARGEST:,} bytes")
        return cls(path, values)

    def integer(self, key: str, default: int | None = None) -> int:
        """A number of things, 1 or more."""
        value = self.values.get(key, default)
        if type(value) is not int or value < 1:
            raise self.error(key, "a whole number, 1 or more")
        return value

    def integers(self, key: str, length: int | None = None, default: int | None = None) -> list[int]:
        """A list of numbers of things; one number stands for ``length`` equal ones."""
        value: Any = self.values.get(key, default)
        if length is not None and type(value) is int:
            value = [value] * length
        whole = isinstance(value, list) and value and all(type(item) is int and item >= 1 for item in value)
        if not whole or length not in (None, len(value)):
            raise self.error(key, f"a list of {length or 'some'} whole numbers, each 1 or more")
        return list(value)

    def number(self, key: str, default: float) -> float:
        """A number."""
        value = self.values.get(key, default)
        if not _is_number(value):
            raise self.error(key, "a finite number")
        return float(value)

    def numbers(self, key: str, length: int) -> tuple[float, ...]:
        """A list of ``length`` numbers, or none for ``null``."""
        values = self.values.get(key)
        if values is None:
            return ()
        if not isinstance(values, list) or len(values) != length or not all(map(_is_number, values)):
            raise self.error(key, f"a list of {length} finite numbers, or null")
        return tuple(map(float, values))

    def multipliers(self, key: str) -> tuple[int, tuple[int, ...]]:
        """The first of the numbers, and all as multiples of it."""
        values = self.integers(key)
        if any(value % values[0] for value in values):
            raise self.error(key, f"multiples of {values[0]}")
        return values[0], tuple(value // values[0] for value in values)

    def check(self, expected: Mapping[str, object], needed: tuple[str, ...] = ()) -> None:
        """Compares fields with the right values. A missing field is right unless it is needed."""
        for key, value in expected.items():
            if self.values.get(key, None if key in needed else value) != value:
                raise self.error(key, repr(value))

    def error(self, key: str, expected: str) -> CheckpointError:
        """The error for a wrong field."""
        found = f"{key} is {repr(self.values[key])[:100]}" if key in self.values else f"{key} is missing"
        return CheckpointError(f"{self.path} does not describe an SDXL model: {found}, expected {expected}")


def check_values(config: ModelConfig) -> None:
    """Refuses a config in which something is of a wrong type, or out of range. Raises ``ValueError`` naming it."""
    for name, value in _numbers("", config.to_dict()):
        field = name.rpartition(".")[2]
        if field in ("name", "activation", "sampling", "prune", "prediction"):
            right = isinstance(value, str) and value.isprintable()
        elif field in ("beta_start", "beta_end"):
            right = _is_number(value) and 0 < value < 1
        elif field in ("scale_factor", "cfg", "shift"):
            right = _is_number(value)
        elif field in ("sigma_min", "sigma_max"):
            right = value is None or _is_number(value)
        elif field in ("latents_mean", "latents_std"):
            right = isinstance(value, tuple) and all(map(_is_number, value))
        elif field == "zero_terminal_snr":
            right = type(value) is bool
        elif field == "steps":
            right = type(value) is int and 1 <= value <= NOISE_LEVELS
        elif field == "multipliers":
            right = bool(value) and all(type(number) is int and number >= 1 for number in value)
        elif name == "text[0].projection" and not config.refines:
            right = value is None
        else:
            right = field in ("buckets", "prune_notes", "scores") or (type(value) is int and value >= 0)
        if not right:
            raise ValueError(f"{name} is {repr(value)[:100]}, a value of another kind or size than it should be")
    for index, text in enumerate(config.text):
        special, last = (text.start_token, text.end_token), (text.vocabulary - 2, text.vocabulary - 1)
        if special != last:
            raise ValueError(f"text[{index}] has start and end tokens {special}, expected the vocabulary's last {last}")
        if text.pad_token >= text.vocabulary:
            raise ValueError(f"text[{index}].pad_token is {text.pad_token}, expected less than {text.vocabulary}")


def differences(found: ModelConfig, expected: ModelConfig) -> list[str]:
    """Each number of two configs that differs, in words."""
    ours, theirs = dict(_numbers("", found.to_dict())), dict(_numbers("", expected.to_dict()))
    names = [name for name in ours | theirs if ours.get(name) != theirs.get(name)]
    return [f"{name} is {ours.get(name)}, expected {theirs.get(name)}" for name in names]


def _numbers(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    """The path and value of everything in nested tables and lists of tables."""
    if isinstance(value, dict) and value:
        for key, item in value.items():
            yield from _numbers(f"{name}.{key}".lstrip("."), item)
    elif isinstance(value, list | tuple) and any(isinstance(item, dict) for item in value):
        for index, item in enumerate(value):
            yield from _numbers(f"{name}[{index}]", item)
    else:
        yield name, value


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < 1e300  # false for no number (NaN) too
