"""docs/format.md is executed: its bytes are written, read, decoded, and compared with its numbers."""

from __future__ import annotations

import json
import re
from math import prod
from pathlib import Path

import pytest
import torch
from packed_models import pack_folder
from tiny_models import tiny_model

from quantkit.formats import storage
from quantkit.formats.checkpoint import check_values, read_header, read_tensor, write_tensors
from quantkit.formats.grouped_int import GroupedIntSpec, unpack
from quantkit.formats.sign_salient import SignSalientSpec

PAGE = (Path(__file__).parents[2] / "docs" / "format.md").read_text()


def block(label: str) -> str:
    found = re.findall(rf"^```{label}\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    assert len(found) == 1, label
    return str(found[0])


@pytest.fixture
def page_file(tmp_path: Path) -> Path:
    """The file that the page shows: header length, header without line breaks, bytes without comments."""
    header = block("json header").replace("\n", "").encode()
    header += b" " * (-len(header) % 8)
    length = bytes.fromhex(re.findall(r"starts with `([0-9a-f ]+)`", PAGE)[0])
    data = b"".join(bytes.fromhex(re.split(r" {3,}", line)[0]) for line in block("hex").splitlines())
    path = tmp_path / "page.safetensors"
    path.write_bytes(length + header + data)
    return path


def test_bytes_decode_to_the_weight_of_the_page(page_file: Path) -> None:
    spec = GroupedIntSpec.from_json(json.loads(block("json spec")))
    tensors = {name.removeprefix("proj."): read_tensor(ref) for name, ref in read_header(page_file).items()}
    tripwire = tensors.pop("weight")
    assert (tripwire.dtype, tuple(tripwire.shape)) == (torch.float16, (0,))
    assert set(tensors) == set(spec.tensor_layout())
    check_values("proj", spec, tensors)
    expected = [[float(number) for number in line.split()] for line in block("text weight").splitlines()]
    assert unpack(spec, tensors).dequantize().tolist() == expected


def test_writer_gives_the_bytes_of_the_page(page_file: Path, tmp_path: Path) -> None:
    tensors = {name: read_tensor(ref) for name, ref in read_header(page_file).items()}
    write_tensors(tmp_path / "again", tensors)
    assert (tmp_path / "again").read_bytes() == page_file.read_bytes()


def test_sizes_on_the_page() -> None:
    spec = GroupedIntSpec.from_json(json.loads(block("json spec")))
    assert (spec.n_bytes, spec.n_weights, spec.bpw) == (30, 12, 20.0)
    usual = GroupedIntSpec(out_features=4096, in_features=4096, group_size=128, segments=((2, 32),), symmetric=False)
    assert f"costs {usual.bpw:.2f} bits per weight at\n2 bits" in PAGE


def test_example_runs(tmp_path: Path) -> None:
    folder = pack_folder(tiny_model("llama", tmp_path), tmp_path).packed
    exec(compile(block("python"), "docs/format.md", "exec"), {"folder": folder})


@pytest.mark.parametrize("name", ["sign_salient", "sign_factors", "low_rank"])
def test_bytes_of_the_other_formats(name: str) -> None:
    """The page's bytes are exactly the layout of its spec, decode to its weight, and are written again."""
    spec = storage.spec_from_json(json.loads(block(f"json {name} spec")))
    data: dict[str, bytes] = {}
    for line in block(f"hex {name}").splitlines():
        key, shown, _ = re.split(r" {3,}", line)
        data[key] = data.get(key, b"") + bytes.fromhex(shown)
    assert [(key, len(value)) for key, value in data.items()] == [
        (key, dtype.itemsize * prod(shape)) for key, (dtype, shape) in spec.tensor_layout().items()
    ]
    tensors = {
        key: torch.frombuffer(bytearray(data[key]), dtype=dtype).reshape(shape)
        for key, (dtype, shape) in spec.tensor_layout().items()
    }
    check_values("proj", spec, tensors)
    weight = storage.unpack(spec, tensors)
    expected = [[float(number) for number in line.split()] for line in block(f"text {name}").splitlines()]
    assert weight.dequantize().tolist() == expected
    assert all(torch.equal(stored, tensors[key]) for key, stored in storage.pack(weight).items())
    assert f"{spec.n_bytes} bytes:" in PAGE


def test_size_of_a_sign_salient_layer_on_the_page() -> None:
    salient = GroupedIntSpec(out_features=4096, in_features=820, group_size=820, segments=((4, 1),), symmetric=False)
    shape = {"out_features": 4096, "in_features": 4096}
    spec = SignSalientSpec(**shape, row_means=True, column_scales=True, salient=salient)
    assert f"takes {spec.bpw:.3f} bits per weight" in PAGE


@pytest.mark.parametrize("name", storage.FORMATS)
def test_every_field_and_tensor_is_on_the_page(name: str) -> None:
    label = "json spec" if name == "grouped_int" else f"json {name} spec"
    spec = storage.spec_from_json(json.loads(block(label)))
    assert f"`{name}`" in PAGE
    for field in spec.to_json():
        assert f"`{field}`" in PAGE
    for tensor in spec.tensor_layout():
        shown = re.sub(r"_\db$", "_{b}b", tensor)
        assert f"`{shown}`" in PAGE


def test_every_field_is_on_the_page() -> None:
    fields = GroupedIntSpec.from_json(json.loads(block("json spec"))).to_json()
    for field in (*fields, "prefix", "spec", "quant_method", "format_version", "modules", "bpw"):
        assert f"`{field}`" in PAGE
