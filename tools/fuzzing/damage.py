"""Damages model files at random for ``tools.fuzz``. The same case number and seed give the same case."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Iterable, Iterator
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from safetensors import SafetensorError

from minisdxl.checkpoint.modules import CONFIG_KEY, file_metadata
from tools.fuzzing.forms import CONFIG, Files, Node, bytes_of, file_bytes, forms, tensors_of

COMMAND = 0.02  # share of cases that also run through the sample command
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
DEEP = "deep" * 3  # placeholder for deeply nested lists, until the JSON is text
WORDS = (
    *("v_prediction", "gelu", "quick_gelu", "linear", "F16", "F32", "BF16", "I16", "U8", "F8_E4M3", "F\n16", "F128"),
    *("../model.safetensors", "/etc/passwd", "diffusion_pytorch_model.safetensors", "StableDiffusionPipeline", "..."),
    *(
        "__metadata__",
        "v_pred",
        "ztsnr",
        "edm_mean",
        "model_ema.decay",
        "lora_unet_x.alpha",
        "x" * 5000,
        ".a" * 50_000,
        "\0",
    ),
    *("x.weight_scale", "model.diffusion_model.scaled_fp8", "bundle_emb.x.clip_l", "lora_te_x.alpha", "x.comfy_quant"),
    *("", "x", "\n", "a\u2028b", "\ud800", "日本", "\u202e", "/", "%s", "{}", "control_model.x", "first_stage_model.x"),
)
NUMBERS = (
    *(0, 1, -1, 2, 3, 5, 7, 8, 100, 2**16, 2**31, 2**40, 2**63 - 1, 2**63, 2**64, 10**30, 10**400, -(10**9)),
    *(0.5, -0.0, 0.1, 1e-320, 1e9, 1e300, math.nan, math.inf, -math.inf),
)


def odd(rng: random.Random) -> Any:
    """A value that is wrong in almost every place."""
    others: list[Any] = [None, True, False, [], {}, [[]], [0], [None], {"x": 1}, [1] * 100, [2**62] * 20_000, DEEP]
    return deepcopy(rng.choice(rng.choice((WORDS, NUMBERS, others))))


def nudged(rng: random.Random, value: Any) -> Any:
    """A changed copy of a value: a near value, or one of another type."""
    match value:
        case bool():
            return rng.choice((not value, int(value), str(value), None))
        case int() | float():
            near = (value + 1, value - 1, -value, value * 2, value // 2, value * 10**9, value + rng.randrange(1000))
            return rng.choice((*near, float(value), str(value), [value]))
        case str():
            return rng.choice((value + "x", value[:-1], value.upper(), value + "\n", [value], rng.choice(WORDS)))
        case list():
            changed = (value[::-1], value * 2, value[:-1], [*value, 1], [value], rng.sample(value, len(value)))
            return rng.choice((*changed, *value[:1]))
        case _:
            return odd(rng)


def edited(rng: random.Random, tree: Any) -> Any:
    """A JSON value with one random change."""
    places = list(_places(tree))
    if not places:
        return odd(rng)
    table, key = rng.choice(places)
    match rng.randrange(6):
        case 0:
            table[key] = odd(rng)
        case 1:
            del table[key]
        case 2:
            other, place = rng.choice(places)
            table[key], other[place] = deepcopy(other[place]), deepcopy(table[key])
        case 3 if isinstance(table, dict):
            table[rng.choice((str(odd(rng)), key + "x", key.upper(), rng.choice(list(table))))] = table.pop(key)
        case _:
            table[key] = nudged(rng, table[key])
    return tree


def _places(tree: Any) -> Iterator[tuple[Any, Any]]:
    for key in list(tree) if isinstance(tree, dict) else range(len(tree)) if isinstance(tree, list) else ():
        yield tree, key
        yield from _places(tree[key])


def dump(rng: random.Random, tree: Any) -> bytes:
    """JSON text, sometimes with a field twice."""
    text = json.dumps(tree, ensure_ascii=rng.random() < 0.8)
    if rng.random() < 0.1 and isinstance(tree, dict) and tree:
        key = rng.choice(list(tree))
        text = f"{{{json.dumps(key)}:{json.dumps(rng.choice((tree[key], odd(rng))))},{text[1:]}"
    depth = rng.choice((10, 300, 700, 900, 2000, 100_000))
    return text.replace(f'"{DEEP}"', "[" * depth + "]" * depth).encode("utf-8", "surrogatepass")


def change_values(rng: random.Random, content: bytes) -> bytes:
    """Changes values of a JSON file."""
    try:
        return dump(rng, edited(rng, json.loads(content)))
    except (ValueError, OverflowError, RecursionError):  # damaged before
        return change_bytes(rng, content)


def change_bytes(rng: random.Random, content: bytes) -> bytes:
    """Changes, inserts or removes some bytes."""
    changed = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 10))):
        where, length = rng.randrange(len(changed) + 1), rng.choice((1, 1, 2, 8, 100))
        match rng.randrange(5):
            case 0:
                changed[where : where + 1] = bytes(byte ^ 1 << rng.randrange(8) for byte in changed[where : where + 1])
            case 1:
                added = (rng.randbytes(length), b'"', b"{", b"]", b",", b"1e999", b"null", b"\n")
                changed[where:where] = rng.choice(added)
            case 2:
                del changed[where : where + length]
            case 3:
                changed[where : where + length] = rng.randbytes(length)
            case _:
                changed[where : where + length] = bytes(length)
    return bytes(changed if rng.random() < 0.9 else changed[: rng.randrange(len(changed) + 1)])


def change_length(rng: random.Random, content: bytes) -> bytes:
    """Changes the header length in the first 8 bytes of a safetensors file."""
    length = int.from_bytes(content[:8], "little")
    near = (length + rng.randrange(-16, 17), rng.randrange(2 * length + 1), rng.randrange(2**64))
    far = (0, 1, 2, 8, 99_999_999, 100_000_000, 100_000_001, 2**31, 2**32, 2**63, 2**64 - 1, 1 << rng.randrange(64))
    return (rng.choice(near + far) % 2**64).to_bytes(8, "little") + content[8:]


def split(content: bytes) -> tuple[bytes, bytes]:
    """The header and the body of a safetensors file."""
    stop = 8 + min(int.from_bytes(content[:8], "little"), len(content))
    return content[8:stop], content[stop:]


def change_header(rng: random.Random, content: bytes, change: Callable[[random.Random, bytes], bytes]) -> bytes:
    """Changes the header of a safetensors file, mostly with the right new length."""
    header, body = split(content)
    changed = change(rng, header)
    return (len(changed).to_bytes(8, "little") if rng.random() < 0.9 else content[:8]) + changed + body


def change_entries(rng: random.Random, header: bytes) -> bytes:
    """Changes the header's entry of one tensor, of two, or the file's metadata."""
    try:
        table = json.loads(header)
        name, other = (rng.choice([name for name in table if name != "__metadata__"]) for _ in range(2))
        match rng.randrange(9):
            case 0:
                table[name]["dtype"] = rng.choice(WORDS)
            case 1 | 2 as which:
                key = ("shape", "data_offsets")[which - 1]
                table[name][key] = edited(rng, table[name][key])
            case 3:
                table[name], table[other] = table[other], table[name]
            case 4:
                table[str(odd(rng))] = table.pop(name)
            case 5:
                table["__metadata__"] = odd(rng)
            case 6:
                table[name][str(odd(rng))] = odd(rng)
            case 7:
                for entry in table.values():
                    entry["data_offsets"] = [offset + 8 for offset in entry["data_offsets"]]
            case _:
                edited(rng, table[name])
        return dump(rng, table)
    except (ValueError, TypeError, ArithmeticError, LookupError, AttributeError, RecursionError):  # damaged before
        return change_bytes(rng, header)


def change_tensors(rng: random.Random, content: bytes) -> bytes:
    """Changes tensors or metadata of a safetensors file, which stays readable."""
    try:
        tensors = tensors_of(content)
        metadata = json.loads(split(content)[0]).get("__metadata__") or {}
        name, other = rng.choice(list(tensors)), rng.choice(list(tensors))
        tensor = tensors[name]
        types = [torch.float32, torch.bfloat16, torch.float64, torch.int8, torch.int64, torch.float8_e4m3fn, torch.bool]
        match rng.randrange(9):
            case 0:
                del tensors[name]
            case 1:
                tensors[rng.choice(WORDS)] = tensor
            case 2:
                tensors[name] = tensor.to(rng.choice(types))
            case 3:
                dtype = rng.choice(types)
                tensors = {name: tensor.to(dtype) for name, tensor in tensors.items()}
            case 4:
                turned = tensor.mT if tensor.ndim > 1 else tensor
                shapes = (tensor.flatten(), tensor[None], tensor[..., None, None], tensor.squeeze(), turned)
                tensors[name] = rng.choice(shapes)
            case 5:
                tensors[name], tensors[other] = tensors[other], tensor
            case 6:
                tensors[name] = torch.full_like(tensor, rng.choice((math.nan, math.inf, 1e4, 0)))
            case 7:
                tensors |= dict.fromkeys(rng.sample(("v_pred", "ztsnr", "edm_mean", "edm_std"), 2), torch.zeros(0))
            case _:
                key = rng.choice(("modelspec.prediction_type", "modelspec.predict_key", "format", *WORDS))
                metadata = {**metadata, key: rng.choice(("v", "epsilon", *WORDS))}
        return file_bytes({name: tensor.contiguous() for name, tensor in tensors.items()}, metadata)
    except (ValueError, TypeError, IndexError, AttributeError, RuntimeError, SafetensorError):  # damaged before, or odd
        return change_bytes(rng, content)


def change_config(rng: random.Random, content: bytes) -> bytes:
    """Changes or adds the config in the metadata of a safetensors file, which stays readable."""
    try:
        metadata = json.loads(split(content)[0]).get("__metadata__") or {}
        text = metadata.get(CONFIG_KEY) or file_metadata(CONFIG)[CONFIG_KEY]
        change = change_values if rng.random() < 0.9 else change_bytes
        metadata = {**metadata, CONFIG_KEY: change(rng, text.encode()).decode("utf-8", "replace")}
        return file_bytes(tensors_of(content), metadata)
    except (ValueError, TypeError, AttributeError, RuntimeError, SafetensorError):  # damaged before
        return change_bytes(rng, content)


def change_body(rng: random.Random, content: bytes) -> bytes:
    """Changes the numbers of a safetensors file, and sometimes their count."""
    header, body = split(content)
    changed = bytearray(body)
    for _ in range(rng.choice((1, 10, 1000)) if body else 0):
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    ends = (changed, changed, changed[:-1], changed[: rng.randrange(len(body) + 1)], changed + b"\0", changed * 2)
    return content[:8] + header + rng.choice(ends)


def replaced(rng: random.Random, others: Iterable[bytes | Node]) -> bytes | Node | None:
    """Replaces a whole file by other content or by one of ``others``; ``None`` removes it."""
    contents = (
        b"",
        b"<!DOCTYPE html>",
        b"version https://git-lfs.github.com/spec/v1\n",
        b"PK\3\4",
        b"\x80\2}q\0.",
        b"{}",
    )
    return rng.choice((None, "folder", "pipe", bytes(4096), b"[]", b"null", *contents, *others))


Change = Callable[[random.Random, bytes], bytes]
IN_TENSORS: dict[str, Change] = {
    "length of header": change_length,
    "bytes of header": partial(change_header, change=change_bytes),
    "values of header": partial(change_header, change=change_entries),
    "tensors": change_tensors,
    "config in header": change_config,
    "numbers": change_body,
    "bytes": change_bytes,
}
IN_TEXTS: dict[str, Change] = {"values of JSON": change_values, "bytes of text": change_bytes}


@dataclass(frozen=True)
class Case:
    """A sound model with one damaged file."""

    number: int
    form: str
    path: str  # of the damaged file
    damage: str
    files: Files
    dtype: torch.dtype
    command: bool  # whether the case also runs through the sample command
    mapped: bool  # whether small tensors are mapped into memory, as large ones always are

    def __str__(self) -> str:
        return f"case {self.number}, {self.form} as {self.dtype}, {self.damage} of {self.path}"


def make_case(number: int, seed: int) -> Case:
    """The case with this number and seed; always the same one."""
    rng = random.Random(f"{seed} {number}")
    name = rng.choice(list(forms()))
    form = forms()[name]
    path = rng.choice([path for path in form.files if path.startswith(form.damaged)])
    content: bytes | Node | None = form.files[path]
    damages: list[str] = []
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        changes = IN_TENSORS if path.endswith(".safetensors") else IN_TEXTS
        damage = "whole file" if rng.random() < 0.08 else rng.choice(list(changes))
        damages.append(damage)
        if damage == "whole file":
            # Not by the whole model, from which a VAE or U-Net may be taken.
            content = replaced(rng, [other for place, other in form.files.items() if place != form.weights])
            break
        content = changes[damage](rng, bytes_of(content or b""))
    files = {other: kept for other, kept in form.files.items() if other != path}
    if content is not None:
        files[path] = content
    damage = damages[0] if len(damages) == 1 else "several of these"
    return Case(number, name, path, damage, files, rng.choice(DTYPES), rng.random() < COMMAND, rng.random() < 0.5)
