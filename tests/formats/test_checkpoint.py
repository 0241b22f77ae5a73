"""The quantkit folder: what it holds, and every kind of damage has a name."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
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

Q_PROJ = "model.layers.0.self_attn.q_proj"


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
