"""Files of tensors: what is written can be read by others, and every kind of damage has a name."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from quantkit.errors import FileError
from quantkit.formats.checkpoint import (
    find_tensors,
    read_header,
    read_tensor,
    write_model,
    write_tensors,
)
from quantkit.formats.files import read_json
from quantkit.formats.safetensors_io import DTYPES


def sample_tensors() -> dict[str, torch.Tensor]:
    """One tensor of every dtype, with odd sizes, a scalar, an empty one and a non-contiguous one."""
    generator = torch.Generator().manual_seed(0)
    tensors = {name: torch.randint(0, 2, (3,), generator=generator).to(dtype) for name, dtype in DTYPES.items()}
    tensors["scalar"] = torch.tensor(3.5)
    tensors["empty"] = torch.empty(0, dtype=torch.float16)
    tensors["no rows"] = torch.empty(0, 5)
    tensors["transposed"] = torch.arange(6).reshape(2, 3).t()
    tensors["name with ünicode/and.dots"] = torch.arange(5, dtype=torch.uint8)
    return tensors


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    flat = (x.contiguous().reshape(-1).view(torch.uint8) for x in (a, b))
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(*flat)


def test_file_equals_that_of_the_safetensors_package(tmp_path: Path) -> None:
    tensors = {name: tensor.contiguous() for name, tensor in sample_tensors().items()}
    write_tensors(tmp_path / "ours", tensors)
    safetensors.torch.save_file(tensors, tmp_path / "theirs", metadata={"format": "pt"})
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_tensors_come_back_bit_for_bit(tmp_path: Path) -> None:
    tensors = sample_tensors()
    write_tensors(tmp_path / "file", tensors)
    header = read_header(tmp_path / "file")
    assert set(header) == set(tensors)
    for name, tensor in tensors.items():
        assert same(read_tensor(header[name]), tensor), name


def test_order_of_the_tensors_does_not_change_the_bytes(tmp_path: Path) -> None:
    tensors = sample_tensors()
    write_tensors(tmp_path / "a", tensors)
    write_tensors(tmp_path / "b", dict(reversed(tensors.items())))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_no_temporary_file_remains(tmp_path: Path) -> None:
    write_tensors(tmp_path / "file", sample_tensors())
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_what_a_killed_run_left_is_overwritten(tmp_path: Path) -> None:
    (tmp_path / ".file.tmp").write_bytes(b"half a file")
    write_tensors(tmp_path / "file", sample_tensors())
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_one_shard_is_a_plain_file(tmp_path: Path) -> None:
    write_tensors(tmp_path / "source", sample_tensors())
    refs = list(read_header(tmp_path / "source").values())
    assert write_model(tmp_path, refs, max_shard_bytes=1 << 30) == [tmp_path / "model.safetensors"]
    assert (tmp_path / "model.safetensors").read_bytes() == (tmp_path / "source").read_bytes()


def test_shards_hold_consecutive_tensors_and_an_index(tmp_path: Path) -> None:
    tensors = {f"block.{i}": torch.full((10,), i, dtype=torch.int32) for i in range(5)}
    tensors["large"] = torch.zeros(100)
    write_tensors(tmp_path / "source", tensors)
    header = read_header(tmp_path / "source")
    refs = [dataclasses.replace(header[name], name=f"model.{name}") for name in tensors]
    written = write_model(tmp_path, refs, max_shard_bytes=80)
    names = [f"model-{i:05d}-of-00004.safetensors" for i in (1, 2, 3, 4)]
    assert [path.name for path in written] == [*names, "model.safetensors.index.json"]
    index = read_json(written[-1])
    assert index["metadata"] == {"total_size": 5 * 40 + 400}
    assert index["weight_map"]["model.block.2"] == names[1]
    assert index["weight_map"]["model.large"] == names[3]
    found = find_tensors(tmp_path)
    assert set(found) == {f"model.{name}" for name in tensors}
    assert all(same(read_tensor(found[f"model.{name}"]), tensor) for name, tensor in tensors.items())
    theirs = safetensors.torch.load_file(written[1])
    assert torch.equal(theirs["model.block.3"], tensors["block.3"])


def test_a_name_given_twice_is_refused(tmp_path: Path) -> None:
    write_tensors(tmp_path / "source", {"a": torch.zeros(1)})
    ref = read_header(tmp_path / "source")["a"]
    with pytest.raises(FileError, match="tensor a would be written twice"):
        write_model(tmp_path, [ref, ref], max_shard_bytes=1 << 30)


def test_a_source_that_shrank_is_named(tmp_path: Path) -> None:
    write_tensors(tmp_path / "source", {"a": torch.zeros(8)})
    ref = read_header(tmp_path / "source")["a"]
    (tmp_path / "source").write_bytes(b"short")
    with pytest.raises(FileError, match="source: truncated inside tensor a"):
        read_tensor(ref)
    with pytest.raises(FileError, match="source: truncated inside tensor a"):
        write_model(tmp_path, [ref], max_shard_bytes=1 << 30)
    (tmp_path / "source").unlink()
    with pytest.raises(FileError, match="source: tensor a cannot be read: No such file"):
        read_tensor(ref)
    with pytest.raises(FileError, match="source: tensor a cannot be read: No such file"):
        write_model(tmp_path, [ref], max_shard_bytes=1 << 30)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_full_disk_says_how_much_to_free(tmp_path: Path) -> None:
    """The temporary file is a link to a device that is always full."""
    write_tensors(tmp_path / "source", {"a": torch.zeros(3 << 18)})
    ref = read_header(tmp_path / "source")["a"]
    (tmp_path / ".model.safetensors.tmp").symlink_to("/dev/full")
    with pytest.raises(
        FileError, match=r"disk is full while writing .*model\.safetensors; free 4 MiB and run the same"
    ):
        write_model(tmp_path, [ref, dataclasses.replace(ref, name="b", n_bytes=4, shape=(1,))], 1 << 30)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


def test_folder_that_is_not_there_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(FileError, match=r"cannot write .*none/file: No such file"):
        write_tensors(tmp_path / "none" / "file", sample_tensors())


# Damaged headers


def with_header(path: Path, edit: Callable[[dict[str, Any]], object], data: bytes | None = None) -> Path:
    """Rewrite the JSON header of a file with two float32 tensors a [2] and b [3]."""
    write_tensors(path, {"a": torch.zeros(2), "b": torch.ones(3)})
    content = path.read_bytes()
    n_header = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + n_header])
    edit(header)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + (content[8 + n_header :] if data is None else data))
    return path


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda h: h["a"].update(dtype="F4"), "tensor a: dtype 'F4' is not supported; supported: BOOL, "),
        (lambda h: h["a"].update(dtype=7), "tensor a: dtype 7 is not supported"),
        (lambda h: h["a"].update(shape=[3]), r"tensor a: F32 \[3\] needs 12 bytes, its data_offsets hold 8"),
        (lambda h: h["a"].update(shape=[-2]), r"tensor a: shape \[-2\] or data_offsets .* make no sense"),
        (lambda h: h["a"].update(shape=[True, 2]), "tensor a: shape .* make no sense"),
        (lambda h: h["a"].update(shape=2), "tensor a: shape 2 or data_offsets .* make no sense"),
        (lambda h: h["a"].update(shape=[1 << 62, 1 << 62]), "tensor a: .* needs .* bytes"),
        (lambda h: h["a"].update(data_offsets=[8, 0]), "tensor a: .* make no sense"),
        (lambda h: h["a"].update(data_offsets=[0]), "tensor a: .* make no sense"),
        (lambda h: h["a"].update(data_offsets=[0.0, 8.0]), "tensor a: .* make no sense"),
        (lambda h: h["a"].pop("shape"), "tensor a: expected the fields dtype, shape, data_offsets"),
        (lambda h: h["a"].update(strides=[1]), "tensor a: expected the fields dtype, shape, data_offsets"),
        (lambda h: h.update(a=[1]), "tensor a: expected the fields"),
        (lambda h: h["b"].update(data_offsets=[4, 16]), "tensors a and b overlap by 4 bytes"),
        (lambda h: h["b"].update(data_offsets=[12, 24]), "gap of 4 bytes before tensor b"),
        (lambda h: h.pop("a"), "gap of 8 bytes before tensor b"),
        (lambda h: h.pop("b"), "12 bytes follow the last tensor"),
        (lambda h: h["b"].update(shape=[4], data_offsets=[8, 24]), r"truncated: .* required \(tensor b is cut\)"),
    ],
)
def test_damaged_header_is_named(tmp_path: Path, edit: Callable[[dict[str, Any]], object], message: str) -> None:
    path = with_header(tmp_path / "bad.safetensors", edit)
    with pytest.raises(FileError, match=message) as caught:
        read_header(path)
    assert str(caught.value).startswith(f"{path}: ")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"not a safetensors file, or truncated inside its header \(0 bytes\)"),
        (b"\x01\x02", "truncated inside its header"),
        (b"PK\x03\x04 this is a zip archive, not tensors", "not a safetensors file"),
        ((1 << 60).to_bytes(8, "little") + b"{}", "truncated inside its header"),
        ((2).to_bytes(8, "little") + b"{]", "header is broken"),
        ((2).to_bytes(8, "little") + b"[]", "header is not a JSON object"),
        ((4).to_bytes(8, "little") + b'"\xff\xff"', "header is broken"),
        ((200_000).to_bytes(8, "little") + b"[" * 200_000, "header is broken"),
        ((14).to_bytes(8, "little") + b'{"a":1,"a":2} ', "header is broken .name 'a' appears twice"),
    ],
)
def test_what_is_not_a_safetensors_file(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "bad.safetensors"
    path.write_bytes(content)
    with pytest.raises(FileError, match=message):
        read_header(path)


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileError, match=r"none\.safetensors: no such file"):
        read_header(tmp_path / "none.safetensors")


@pytest.mark.parametrize("keep", [0, 7, 8, 100, -1])
def test_truncation_anywhere_is_noticed(tmp_path: Path, keep: int) -> None:
    path = tmp_path / "file"
    write_tensors(path, sample_tensors())
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(FileError, match="truncated"):
        read_header(path)
