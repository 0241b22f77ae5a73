"""The quantkit folder: what is written can be read by others, and every kind of damage has a name."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from packed_models import edit_config, pack_folder
from tiny_models import tiny_model

from quantkit.errors import FileError
from quantkit.formats.checkpoint import (
    TensorRef,
    find_tensors,
    open_folder,
    read_header,
    read_tensor,
    verify_checksums,
    write_checksums,
    write_model,
    write_tensors,
)
from quantkit.formats.files import read_json, write_json
from quantkit.formats.grouped_int import unpack
from quantkit.formats.safetensors_io import DTYPES

Q_PROJ = "model.layers.0.self_attn.q_proj"


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


# Reading and writing


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


# Quantkit folders


@pytest.fixture(scope="module")
def packed_source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packed")
    return pack_folder(tiny_model("llama", folder), folder, bits=(2, 3)).packed


@pytest.fixture
def packed(packed_source: Path, tmp_path: Path) -> Path:
    """A packed folder to damage."""
    return Path(shutil.copytree(packed_source, tmp_path / "packed"))


def rewrite(folder: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Change the tensors of the folder's only shard; ``edit`` mutates the dict."""
    tensors = {name: read_tensor(ref) for name, ref in find_tensors(folder).items()}
    edit(tensors)
    write_tensors(folder / "model.safetensors", tensors)


def reshard(folder: Path) -> dict[str, Any]:
    """Split the only shard in several; returns the index."""
    whole = folder / "model.safetensors"
    whole.rename(folder / "whole")
    write_model(folder, list(read_header(folder / "whole").values()), max_shard_bytes=100_000)
    (folder / "whole").unlink()
    return read_json(folder / "model.safetensors.index.json")


def test_intact_folder_opens(packed: Path) -> None:
    checkpoint = open_folder(packed)
    assert len(checkpoint.modules) == 2 * 7
    module = checkpoint.modules[Q_PROJ]
    assert (module.name, module.prefix) == (Q_PROJ, Q_PROJ)
    tensors = checkpoint.read_module(Q_PROJ)
    assert list(tensors) == list(module.spec.tensor_layout())
    assert unpack(module.spec, tensors).bits == (2, 3)
    verify_checksums(packed)


def test_sharded_folder_opens(packed: Path) -> None:
    before = open_folder(packed).tensors
    reshard(packed)
    after = open_folder(packed).tensors
    assert len({ref.path for ref in after.values()}) > 1
    assert {ref.name for ref in before.values()} == set(after)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t: t.pop(f"{Q_PROJ}.scales"), f"tensor {Q_PROJ}.scales is missing"),
        (lambda t: t.pop(f"{Q_PROJ}.group_order"), f"tensor {Q_PROJ}.group_order is missing"),
        (lambda t: t.pop(f"{Q_PROJ}.weight"), f"tensor {Q_PROJ}.weight is missing"),
        (
            lambda t: t.update({f"{Q_PROJ}.weight": torch.zeros(64, 64)}),
            rf"tensor {Q_PROJ}.weight is float32 \[64, 64\], its module description requires float16 \[0\]",
        ),
        (
            lambda t: t.update({f"{Q_PROJ}.scales": torch.ones(64, 3, dtype=torch.float16)}),
            rf"tensor {Q_PROJ}.scales is float16 \[64, 3\], its module description requires float16 \[64, 2\]",
        ),
        (
            lambda t: t.update({f"{Q_PROJ}.scales": torch.ones(64, 2, dtype=torch.bfloat16)}),
            rf"tensor {Q_PROJ}.scales is bfloat16 \[64, 2\], its module description requires float16 \[64, 2\]",
        ),
        (
            lambda t: t.update({f"{Q_PROJ}.codes_2b": t[f"{Q_PROJ}.codes_2b"][:, :-1]}),
            rf"tensor {Q_PROJ}.codes_2b is uint8 \[64, 7\], its module description requires uint8 \[64, 8\]",
        ),
        (
            lambda t: t.update({f"{Q_PROJ}.zeros_4b": torch.zeros(1, dtype=torch.uint8)}),
            f"tensor {Q_PROJ}.zeros_4b does not belong to its packed module",
        ),
        (
            lambda t: t.update({f"{Q_PROJ}.bias": torch.zeros(63)}),
            rf"tensor {Q_PROJ}.bias is float32 \[63\], its module description requires float32 \[64\]",
        ),
    ],
)
def test_tensor_that_does_not_fit_its_module(
    packed: Path, edit: Callable[[dict[str, torch.Tensor]], object], message: str
) -> None:
    rewrite(packed, edit)
    with pytest.raises(FileError, match=message):
        open_folder(packed)


def change_module(folder: Path, **fields: Any) -> None:
    config = read_json(folder / "config.json")
    config["quantization_config"]["modules"][Q_PROJ].update(fields)
    write_json(folder / "config.json", config)


SPEC = {"format": "grouped_int", "out_features": 64, "in_features": 64, "group_size": 32, "symmetric": False}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rotation": 1}, r"module model.layers.0.self_attn.q_proj: expected the fields prefix and spec, found"),
        ({"prefix": ""}, "q_proj: prefix must be a name"),
        ({"prefix": 3}, "q_proj: prefix must be a name"),
        ({"spec": []}, "q_proj: prefix must be a name and spec an object"),
        ({"spec": {"format": "codebook"}}, "q_proj: unknown storage format 'codebook'; known: grouped_int"),
        ({"spec": {**SPEC, "segments": [[2, 1], [3, 1]], "act_order": True}}, r"q_proj: .* fields \['act_order'\]"),
        ({"spec": SPEC}, r"q_proj: .*unknown or missing fields \['segments'\]"),
        ({"spec": {**SPEC, "segments": [[2, 1]]}}, "q_proj: grouped_int: inconsistent"),
        ({"spec": {**SPEC, "segments": "23"}}, "q_proj: a field of its spec has the wrong type"),
        ({"spec": {**SPEC, "segments": [[2], [3]]}}, "q_proj: a field of its spec has the wrong type"),
        ({"spec": {**SPEC, "segments": [[2, 2]], "in_features": "64"}}, "q_proj: .*inconsistent"),
        ({"spec": {**SPEC, "segments": [[2, 2]], "out_features": None}}, "q_proj: a field .* wrong type"),
        (
            {"prefix": "model.layers.0.self_attn.k_proj"},
            "q_proj and .*k_proj share the prefix|k_proj and .*q_proj share",
        ),
        ({"prefix": "elsewhere"}, r"tensor elsewhere\.codes_2b is missing"),
    ],
)
def test_module_description_that_cannot_be_right(packed: Path, fields: dict[str, Any], message: str) -> None:
    change_module(packed, **fields)
    with pytest.raises(FileError, match=message):
        open_folder(packed)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"format_version": 2}, r"format_version 2 is newer than this quantkit reads \(1\); update quantkit"),
        ({"format_version": "1"}, "format_version is '1', expected 1"),
        ({"format_version": 0}, "format_version is 0, expected 1"),
        ({"format_version": None}, "format_version is None, expected 1"),
        ({"modules": None}, "no modules; the file is damaged"),
        ({"modules": {}}, "no modules; the file is damaged"),
        ({"modules": [Q_PROJ]}, "no modules; the file is damaged"),
        ({"modules": {Q_PROJ: "grouped_int"}}, f"module {Q_PROJ}: expected the fields prefix and spec"),
        ({"quant_method": "gptq"}, "not a quantkit folder"),
    ],
)
def test_quantization_config_that_cannot_be_read(packed: Path, fields: dict[str, Any], message: str) -> None:
    edit_config(packed, **fields)
    with pytest.raises(FileError, match=message):
        open_folder(packed)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"quantization_config": ', r"config\.json: not valid JSON"),
        (b"\xff\xfe", r"config\.json: not valid JSON"),
        (b"[" * 200_000, r"config\.json: not valid JSON"),
        (b"[1]", r"config\.json: expected a JSON object, found list"),
        (b"{}", "not a quantkit folder"),
    ],
)
def test_broken_config(packed: Path, content: bytes, message: str) -> None:
    (packed / "config.json").write_bytes(content)
    with pytest.raises(FileError, match=message):
        open_folder(packed)


def test_folder_without_its_parts(packed: Path, tmp_path: Path) -> None:
    with pytest.raises(FileError, match=r"no folder .*absent"):
        open_folder(tmp_path / "absent")
    (packed / "model.safetensors").unlink()
    with pytest.raises(FileError, match=r"no weights \(model\.safetensors or model\.safetensors\.index\.json\)"):
        open_folder(packed)
    (packed / "config.json").unlink()
    with pytest.raises(FileError, match=r"config\.json: no such file"):
        open_folder(packed)


def test_shard_that_the_index_lists_is_missing(packed: Path) -> None:
    index = reshard(packed)
    shard = sorted(set(index["weight_map"].values()))[1]
    (packed / shard).unlink()
    with pytest.raises(FileError, match=f"{shard}: no such file, but model.safetensors.index.json lists it"):
        open_folder(packed)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda m: m.update({"extra": min(m.values())}), "tensor extra: .* lists it, the shard has no such tensor"),
        (lambda m: m.pop(f"{Q_PROJ}.scales"), rf"tensor {Q_PROJ}.scales: .* does not list it for this shard"),
        (lambda m: m.update({"extra": "../../etc/x.safetensors"}), "is not a .safetensors file of this folder"),
        (lambda m: m.update({"extra": "model.bin"}), "shard name 'model.bin' is not a .safetensors file"),
        (lambda m: m.update({"extra": 3}), "shard name '3' is not a .safetensors file"),
        (lambda m: m.clear(), "no weight_map"),
    ],
)
def test_index_that_disagrees_with_the_shards(
    packed: Path, edit: Callable[[dict[str, Any]], object], message: str
) -> None:
    index = reshard(packed)
    edit(index["weight_map"])
    write_json(packed / "model.safetensors.index.json", index)
    with pytest.raises(FileError, match=message):
        open_folder(packed)


def flip_bit(ref: TensorRef) -> None:
    content = bytearray(ref.path.read_bytes())
    content[ref.offset] ^= 0x10
    ref.path.write_bytes(bytes(content))


def test_flipped_bit_is_found_by_the_checksum(packed: Path) -> None:
    flip_bit(open_folder(packed).tensors[f"{Q_PROJ}.codes_2b"])
    open_folder(packed)  # codes are valid whatever they are: only the checksum can tell
    with pytest.raises(FileError, match=r"model\.safetensors: SHA-256 differs from checksums\.json"):
        verify_checksums(packed)


def test_damaged_scale_is_found_when_the_module_is_read(packed: Path) -> None:
    def poison(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{Q_PROJ}.scales"][5, 1] = float("nan")

    rewrite(packed, poison)
    checkpoint = open_folder(packed)
    with pytest.raises(FileError, match=f"{Q_PROJ}: scales holds NaN"):
        checkpoint.read_module(Q_PROJ)


def test_checksums_name_what_changed(packed: Path) -> None:
    (packed / ".cache").mkdir()
    (packed / ".cache" / "hidden").write_text("not part of the model")
    write_checksums(packed)
    assert ".cache/hidden" not in read_json(packed / "checksums.json")
    (packed / "added.txt").write_text("a note")
    verify_checksums(packed)
    (packed / "tokenizer.json").unlink()
    with pytest.raises(FileError, match=r"tokenizer\.json: no such file, but checksums\.json lists it"):
        verify_checksums(packed)
    write_json(packed / "checksums.json", {})
    with pytest.raises(FileError, match=r"model\.safetensors: not listed in checksums\.json"):
        verify_checksums(packed)
    write_json(packed / "checksums.json", {"../outside": "0", "model.safetensors": "0"})
    with pytest.raises(FileError, match=r"'\.\./outside' is not inside the folder"):
        verify_checksums(packed)
    (packed / "checksums.json").unlink()
    with pytest.raises(FileError, match=r"packed: no checksums\.json to compare with"):
        verify_checksums(packed)


def test_checksums_are_the_same_for_the_same_files(packed: Path) -> None:
    before = (packed / "checksums.json").read_bytes()
    write_checksums(packed)
    assert (packed / "checksums.json").read_bytes() == before
