"""The safetensors container against the safetensors library, and what happens with files that are damaged."""

from __future__ import annotations

import json
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from minisdxl.checkpoint.errors import CheckpointError
from minisdxl.checkpoint.tensorfile import FLOATS, TensorFile, open_tensors, write_tensors

DTYPES = pytest.mark.parametrize("dtype", list(FLOATS.values()), ids=str)


def some_tensors(dtype: torch.dtype) -> dict[str, Tensor]:
    """Of every rank, one of them empty, one of them not contiguous."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"c.weight": (3, 5), "a": (), "b.weight": (2, 3, 4, 1), "empty": (0, 7), "d": (9,)}
    tensors = {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}
    return {**tensors, "transposed": torch.randn(4, 6, generator=generator).to(dtype).T}


def write(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str], dtype: torch.dtype) -> None:
    """Writes tensors, all of them as ``dtype``."""
    specs = {name: (dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    write_tensors(path, specs, tensors.values(), metadata)


def raw_file(path: Path, header: Any, data: bytes = b"") -> Path:
    """A file with any header, right or wrong."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def read_all(file: TensorFile) -> dict[str, Tensor]:
    """All tensors of a file, in their own dtypes."""
    tensors = {name: torch.empty(entry.shape, dtype=FLOATS[entry.dtype]) for name, entry in file.entries.items()}
    file.read_into(tensors)
    return tensors


def refusal(path: Path) -> str:
    """The one line with which a file is refused; it names the file."""
    with pytest.raises(CheckpointError) as caught:
        open_tensors(path)
    message = str(caught.value)
    assert str(path) in message
    assert "\n" not in message
    return message


@DTYPES
def test_the_library_reads_what_is_written_here(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = some_tensors(dtype)
    path = tmp_path / "ours.safetensors"
    write(path, tensors, {"a": "b", "quote": '"ü"'}, dtype)
    theirs = load_file(path)
    assert theirs.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert theirs[name].dtype == dtype
        torch.testing.assert_close(theirs[name], tensor, rtol=0, atol=0)
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"a": "b", "quote": '"ü"'}
    assert open_tensors(path).header_bytes % 8 == 0


@DTYPES
def test_what_the_library_writes_is_read_here(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = {name: tensor.contiguous() for name, tensor in some_tensors(dtype).items()}
    path = tmp_path / "theirs.safetensors"
    save_file(tensors, path, {"a": "b"})
    file = open_tensors(path)
    ours = read_all(file)
    assert file.metadata == {"a": "b"}
    assert ours.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert ours[name].dtype == dtype
        assert file.entries[name].shape == tuple(tensor.shape)
        torch.testing.assert_close(ours[name], tensor, rtol=0, atol=0)


def test_tensors_are_converted_as_they_are_written(tmp_path: Path) -> None:
    path = tmp_path / "half.safetensors"
    write(path, {"a": torch.tensor([1.0 + 2**-11, 1e-9, -3.0])}, {}, torch.float16)
    assert load_file(path)["a"].tolist() == [1.0, 0.0, -3.0]
    with pytest.raises(ValueError, match=r"a cannot be written as torch.int8, expected one of"):
        write(path, {"a": torch.ones(1)}, {}, torch.int8)


def test_tensors_longer_than_the_buffer_are_converted_as_they_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "long.safetensors"
    numbers = torch.randn(101, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    save_file({"a": numbers, "b": numbers.half(), "c": numbers.float()}, path)
    for size in (8, 80, 2**24):
        monkeypatch.setattr("minisdxl.checkpoint.tensorfile.BUFFER", size)
        targets = {"a": torch.empty(101, dtype=torch.bfloat16), "b": torch.empty(1, 101, 1)}
        open_tensors(path).read_into(targets)
        assert torch.equal(targets["a"], numbers.bfloat16())
        assert torch.equal(targets["b"].flatten(), numbers.half().float())


@DTYPES
def test_mapped_tensors_are_those_of_the_library(
    tmp_path: Path, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "mapped.safetensors"
    write(path, some_tensors(dtype), {}, dtype)
    content, file, theirs = path.read_bytes(), open_tensors(path), load_file(path)
    assert not any(file.can_map(name, dtype) for name in file.entries)  # all are small
    monkeypatch.setattr("minisdxl.checkpoint.tensorfile.MAPPED", 1)
    names = [name for name in file.entries if file.can_map(name, dtype)]
    assert set(names) == file.entries.keys() - {"empty"}
    assert not any(file.can_map(name, other) for name in names for other in FLOATS.values() if other != dtype)
    mapped = file.map(names)
    for name in names:
        assert mapped[name].dtype == dtype
        assert mapped[name].untyped_storage().nbytes() == mapped[name].nbytes  # what torch.save would write
        torch.testing.assert_close(mapped[name], theirs[name], rtol=0, atol=0)
    mapped["d"].zero_()
    assert path.read_bytes() == content
    path.unlink()
    torch.testing.assert_close(mapped["c.weight"], theirs["c.weight"], rtol=0, atol=0)
    assert not mapped["d"].any()


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="reads what is mapped from /proc")
def test_a_mapping_ends_with_its_last_tensor(tmp_path: Path) -> None:
    path = tmp_path / "mapped.safetensors"
    save_file({"a": torch.ones(4), "b": torch.ones(5)}, path)
    mapped = open_tensors(path).map(["a", "b"])
    a = mapped.pop("a")
    del mapped
    assert str(path) in Path("/proc/self/maps").read_text()
    assert a.sum() == 4
    del a
    assert str(path) not in Path("/proc/self/maps").read_text()


def test_what_is_not_aligned_is_not_mapped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("minisdxl.checkpoint.tensorfile.MAPPED", 1)
    header = {"a": {"dtype": "F16", "shape": [1], "data_offsets": [0, 2]}, "b": {**F32, "data_offsets": [2, 10]}}
    text = json.dumps(header).encode()
    file = open_tensors(raw_file(tmp_path / "a.safetensors", text + b" " * (-len(text) % 8), bytes(10)))
    assert file.can_map("a", torch.float16)
    assert not file.can_map("b", torch.float32)


def test_a_file_that_shrank_or_went_is_not_mapped(tmp_path: Path) -> None:
    path = tmp_path / "shrinks.safetensors"
    write(path, {"a": torch.ones(4), "b": torch.ones(50_000)}, {}, torch.float32)
    file = open_tensors(path)
    os.truncate(path, 10_000)
    assert file.map(["a"])["a"].tolist() == [1, 1, 1, 1]
    with pytest.raises(CheckpointError, match=r"cannot map .*shrinks.safetensors: .* smaller than"):
        file.map(["a", "b"])
    path.unlink()
    with pytest.raises(CheckpointError, match=r"cannot map .*shrinks.safetensors: .*No such file"):
        file.map(["a"])


def test_targets_of_another_size_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"a": torch.ones(3), "b": torch.ones(3, dtype=torch.int8)}, path)
    for target in ({"a": torch.empty(2)}, {"b": torch.empty(3)}):
        with pytest.raises(ValueError, match="its target is"):
            open_tensors(path).read_into(target)


def test_other_dtypes_have_entries_too(tmp_path: Path) -> None:
    path = tmp_path / "other.safetensors"
    save_file({"a": torch.ones(3, dtype=torch.int8), "b": torch.ones(2, dtype=torch.float8_e4m3fn)}, path)
    assert {name: entry.dtype for name, entry in open_tensors(path).entries.items()} == {"a": "I8", "b": "F8_E4M3"}


def test_truncated_anywhere_is_refused(tmp_path: Path) -> None:
    whole = tmp_path / "whole.safetensors"
    write(whole, some_tensors(torch.float32), {}, torch.float32)
    content = whole.read_bytes()
    header = open_tensors(whole).header_bytes
    path = tmp_path / "cut.safetensors"
    for size in sorted({*range(12), header - 1, header, header + 1, *range(12, len(content), 17), len(content) - 1}):
        path.write_bytes(content[:size])
        message = refusal(path)
        if size == 0:
            assert "an empty file" in message
        elif size <= 8:
            assert "of an unknown kind" in message
        elif size < header:
            assert f"the last {header - size} bytes of its header are missing" in message
        else:
            assert f"{size} of {len(content)} bytes, {len(content) - size} are missing" in message


def test_too_long_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "long.safetensors"
    write(path, {"a": torch.ones(4)}, {}, torch.float32)
    with path.open("ab") as file:
        file.write(bytes(17))
    assert "17 more than" in refusal(path)


F32 = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
DAMAGED_HEADERS: dict[str, tuple[Any, str]] = {
    "not JSON": (b"{not JSON}", "Expecting property name"),
    "not UTF-8": (b'{"\xff": 1}', "utf-8"),
    "UTF-16": ('{"a": 1}'.encode("utf-16-le"), "damaged"),
    "deep": (b'{"a":' + b"[" * 200_000, "recursion"),
    "huge number": (b'{"a":{"dtype":"F32","shape":[' + b"9" * 5000 + b'],"data_offsets":[0,8]}}', "digits"),
    "large number": ({"a": {**F32, "shape": [2**63]}}, "no usable"),
    "name with line break": ({"a\nb": F32}, "tensor name 'a\\nb' is not printable"),
    "name twice": (b'{"a":%b,"a":%b}' % ((json.dumps(F32).encode(),) * 2), "'a' is there 2 times"),
    "field twice": (b'{"a":{"dtype":"F32","dtype":"F16","shape":[2],"data_offsets":[0,8]}}', "'dtype' is there 2"),
    "overlap": ({"a": F32, "b": {**F32, "data_offsets": [4, 12]}}, "tensor b begins at byte 4, expected 8"),
    "same place": ({"a": F32, "b": F32}, "tensor b begins at byte 0, expected 8"),
    "hole": ({"a": F32, "b": {**F32, "data_offsets": [12, 20]}}, "tensor b begins at byte 12, expected 8"),
    "hole at the beginning": ({"a": {**F32, "data_offsets": [4, 12]}}, "begins at byte 4, expected 0"),
    "backwards": ({"a": {**F32, "data_offsets": [8, 0]}}, "no usable"),
    "negative offset": ({"a": {**F32, "data_offsets": [-8, 0]}}, "no usable"),
    "negative shape": ({"a": {**F32, "shape": [-1, -2]}}, "no usable"),
    "truth value": ({"a": {**F32, "shape": [True, 2]}}, "no usable"),
    "fraction": ({"a": {**F32, "shape": [2.0]}}, "no usable"),
    "three offsets": ({"a": {**F32, "data_offsets": [0, 8, 8]}}, "no usable"),
    "no dtype": ({"a": {"shape": [2], "data_offsets": [0, 8]}}, "no usable"),
    "not an entry": ({"a": 3}, "no usable"),
    "shape and bytes differ": ({"a": {**F32, "shape": [3]}}, "tensor a has 8 bytes for F32 of shape [3]"),
    "astronomic shape": ({"a": {**F32, "shape": [2**62, 2**62]}}, "tensor a has 8 bytes"),
    "unknown dtype": ({"a": {**F32, "dtype": "F\n32"}}, "tensor a has the unknown dtype 'F\\n32'"),
    "unused dtype of another size": ({"a": {**F32, "dtype": "I64"}}, "tensor a has 8 bytes for I64 of shape [2]"),
    "more fields": ({"a": {**F32, "b": 1}}, "no usable"),
    "too many dimensions": ({"a": {**F32, "shape": [2**62] * 20_000}}, "no usable"),
    "name with line break twice": (b'{"a\\nb":1,"a\\nb":2}', "'a\\nb' is there 2 times"),
    "not a number": (b'{"a":NaN}', "NaN is no number"),
    "metadata another empty thing": ({"__metadata__": [], "a": F32}, "__metadata__ is not a table of strings"),
    "metadata not a table": ({"__metadata__": ["a"], "a": F32}, "__metadata__ is not a table of strings"),
    "metadata not strings": ({"__metadata__": {"a": 1}, "a": F32}, "__metadata__ is not a table of strings"),
}


@pytest.mark.parametrize("damage", DAMAGED_HEADERS)
def test_a_damaged_header_is_refused(tmp_path: Path, damage: str) -> None:
    header, expected = DAMAGED_HEADERS[damage]
    message = refusal(raw_file(tmp_path / "damaged.safetensors", header, bytes(20)))
    assert "damaged header" in message
    assert expected in message


def test_absurd_header_lengths_are_refused_without_reading_them(tmp_path: Path) -> None:
    path = tmp_path / "bomb.safetensors"
    for length in (2**60, 2**64 - 1, 100_000_001):
        path.write_bytes(length.to_bytes(8, "little") + b'{"a":1}')
        assert "of an unknown kind" in refusal(path)
    path.write_bytes((99_999_999).to_bytes(8, "little") + b'{"a":1}')
    assert "truncated" in refusal(path)


def test_what_is_not_a_file_is_refused(tmp_path: Path) -> None:
    assert "does not exist" in refusal(tmp_path / "nothing.safetensors")
    assert "is a folder" in refusal(tmp_path)
    pipe = tmp_path / "pipe.safetensors"
    os.mkfifo(pipe)
    assert "is not a file" in refusal(pipe)


def test_a_file_that_shrinks_while_it_is_read_is_an_error_and_not_a_crash(tmp_path: Path) -> None:
    path = tmp_path / "shrinks.safetensors"
    write(path, {"a": torch.ones(4), "b": torch.ones(50_000)}, {}, torch.float32)
    file = open_tensors(path)
    os.truncate(path, 10_000)
    with pytest.raises(CheckpointError, match="ended within b"):
        read_all(file)
    path.unlink()
    with pytest.raises(CheckpointError, match=r"cannot read .*: No such file"):
        read_all(file)


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Lets this process write files of at most ``size`` bytes: like a full disk, in the middle of a write."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("before", [None, b"before"], ids=["new", "existing"])
def test_a_full_disk_leaves_nothing_behind(tmp_path: Path, before: bytes | None) -> None:
    path = tmp_path / "big.safetensors"
    if before is not None:
        path.write_bytes(before)
    tensors = {str(i): torch.ones(10_000) for i in range(20)}
    with largest_file(300_000), pytest.raises(CheckpointError, match=r"cannot write .*big.safetensors: File too large"):
        write(path, tensors, {}, torch.float32)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == ({path.name: before} if before else {})


def test_a_failure_in_the_middle_leaves_nothing_behind(tmp_path: Path) -> None:
    def interrupted() -> Iterator[Tensor]:
        yield torch.ones(3)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_tensors(tmp_path / "a.safetensors", dict.fromkeys("ab", (torch.float32, (3,))), interrupted(), {})
    assert not list(tmp_path.iterdir())


def test_tensors_other_than_announced_are_not_written(tmp_path: Path) -> None:
    specs = {"a": (torch.float32, (3,)), "b": (torch.float16, (2, 2))}
    for tensors in ([torch.ones(3)], [torch.ones(3), torch.ones(4)], [torch.ones(3), torch.ones(2, 2), torch.ones(1)]):
        with pytest.raises(ValueError, match=r"zip\(\)|b to be written is \[4\], expected \[2, 2\]"):
            write_tensors(tmp_path / "a.safetensors", specs, tensors, {})
    assert not list(tmp_path.iterdir())


def test_each_tensor_has_its_own_dtype(tmp_path: Path) -> None:
    specs = {"a": (torch.float32, (3,)), "b": (torch.bfloat16, (2, 2))}
    write_tensors(tmp_path / "a.safetensors", specs, [torch.ones(3), torch.ones(2, 2)], {})
    assert {name: tensor.dtype for name, tensor in load_file(tmp_path / "a.safetensors").items()} == {
        "a": torch.float32,
        "b": torch.bfloat16,
    }


@pytest.mark.parametrize("buffer", [4, 40, 400, 2**24])
def test_targets_may_have_any_strides(tmp_path: Path, buffer: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("minisdxl.checkpoint.tensorfile.BUFFER", buffer)
    numbers = torch.randn(5, 7, 3, 2, generator=torch.Generator().manual_seed(0))
    save_file({"a": numbers, "b": numbers[:1].clone(), "c": numbers[0, :, :, 0].clone()}, tmp_path / "a.safetensors")
    targets = {
        "a": torch.zeros(7, 5, 3, 2).transpose(0, 1),
        "b": torch.zeros(1, 7, 3, 2).contiguous(memory_format=torch.channels_last),
        "c": torch.zeros(3, 7, dtype=torch.float64).T,
    }
    open_tensors(tmp_path / "a.safetensors").read_into(targets)
    assert torch.equal(targets["a"], numbers)
    assert torch.equal(targets["b"], numbers[:1])
    assert torch.equal(targets["c"], numbers[0, :, :, 0].double())


def test_no_folder_to_write_to_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"cannot write .*: No such file or directory"):
        write(tmp_path / "nowhere" / "a.safetensors", {"a": torch.ones(1)}, {}, torch.float32)
    with pytest.raises(CheckpointError, match=r"cannot write .*is a folder"):
        write(tmp_path, {"a": torch.ones(1)}, {}, torch.float32)
