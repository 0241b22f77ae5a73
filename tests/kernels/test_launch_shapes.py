"""Measured launch shapes: whose row counts, for which weights, and what a file may not do."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from quantkit.errors import FileError
from quantkit.formats.grouped_int import GroupedIntSpec
from quantkit.kernels import planar_product
from quantkit.kernels.gemv import GemvConfig, choose_gemv, gemv_candidates, is_possible, launch_config
from quantkit.kernels.launch_shapes import SHIPPED, Row, Subject, cache_folder, measured_config, remember
from quantkit.kernels.planar_product import ProductConfig, choose_product, product_candidates, product_subject

NAME = "Imaginary Device (3 GB)"
FILE = "imaginary_device_3_gb.json"


@dataclass(frozen=True, kw_only=True)
class Shape:
    warps: int
    limit: int | None = None


@pytest.fixture(autouse=True)
def user(tmp_path, monkeypatch) -> Path:
    """The user's folder, empty."""
    monkeypatch.setenv("QUANTKIT_CACHE_DIR", str(tmp_path / "user"))
    return tmp_path / "user"


@pytest.fixture
def shipped(tmp_path, monkeypatch, user) -> Path:
    """A shipped folder with two rows."""
    monkeypatch.setenv("QUANTKIT_CACHE_DIR", str(tmp_path / "shipped"))
    remember([row(4), row(2, bits=1)], NAME)
    monkeypatch.setenv("QUANTKIT_CACHE_DIR", str(user))
    return tmp_path / "shipped"


def subject(**changed) -> Subject:
    return Subject(**{"kernel": "gemv", "bits": 2, "out_features": 14336, "in_features": 4096} | changed)


def row(warps: int, **changed) -> Row:
    shape = {"warps": warps, "limit": None}
    return Row(subject=subject(**changed), shape=shape, microseconds=1.5, computed_microseconds=2.0)


def found(shipped: Path = SHIPPED, **changed) -> int | None:
    shape = measured_config(Shape, subject(**changed), NAME, shipped)
    return shape and shape.warps


def test_what_is_remembered_is_found_for_the_same_class():
    assert found() is None
    remember([row(4), row(2, bits=1), row(8, tokens=16)], NAME)
    assert measured_config(Shape, subject(), NAME) == Shape(warps=4)
    assert found(bits=1) == 2
    assert found(tokens=9) == found(tokens=16) == 8
    for other in ({"kernel": "fused"}, {"bits": 3}, {"in_features": 4224}, {"tokens": 17}, {"tokens": 8}):
        assert found(**other) is None


@pytest.mark.parametrize(("out_features", "same"), [(12288, False), (13824, True), (16384, True), (19968, False)])
def test_out_features_count_within_a_factor(out_features, same):
    remember([row(4)], NAME)
    assert (found(out_features=out_features) == 4) == same


def test_later_rows_replace_those_of_their_class_and_leave_others(user):
    remember([row(4), row(2, bits=1)], NAME)
    file = remember([row(8, out_features=16384)], NAME)
    assert file == user / FILE
    assert (found(), found(bits=1)) == (8, 2)
    assert len(json.loads(file.read_text())["shapes"]) == 2


def test_the_users_file_goes_before_the_shipped_one(shipped):
    assert (found(shipped), found(shipped, bits=1)) == (4, 2)
    remember([row(8)], NAME)
    assert (found(shipped), found(shipped, bits=1)) == (8, 2)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{", "JSONDecodeError"),
        ("[]", "TypeError"),
        ('{"device": "x"}', "KeyError: 'shapes'"),
        ('{"shapes": [{"kernel": "gemv"}]}', "KeyError: 'bits'"),
        ("WARPS", "ValueError: a number that is not a positive integer"),
    ],
)
def test_a_file_that_cannot_be_used_is_named_and_passed_over(user, shipped, text, reason):
    user.mkdir()
    text = text.replace("WARPS", (shipped / FILE).read_text().replace('"warps": 4', '"warps": "four"'))
    (user / FILE).write_text(text)
    with pytest.warns(UserWarning, match=rf"{FILE} is not used \({reason}.*\); delete it, or .*quantkit bench tune"):
        assert found(shipped) == 4


def test_a_shape_of_another_version_is_passed_over():
    remember([row(4)], NAME)
    with pytest.warns(UserWarning, match="has other fields than this version knows"):
        assert measured_config(GemvConfig, subject(), NAME) is None


def test_a_folder_that_cannot_be_written(user):
    user.write_text("in the way")
    with pytest.raises(FileError, match=r"cannot be written .*; set QUANTKIT_CACHE_DIR to a folder"):
        remember([row(4)], NAME)


def test_where_the_users_file_lies(monkeypatch, tmp_path):
    assert cache_folder() == tmp_path / "user"
    monkeypatch.delenv("QUANTKIT_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "quantkit"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "quantkit"


def layer(bits: int, out_features: int, in_features: int) -> GroupedIntSpec:
    shape = {"out_features": out_features, "in_features": in_features, "group_size": 128, "symmetric": True}
    return GroupedIntSpec(**shape, segments=((bits, in_features // 128),))


def test_one_row_takes_its_measured_shape_where_it_is_possible():
    spec = layer(2, 14336, 4096)
    times = {"microseconds": 1.0, "computed_microseconds": 1.0}
    assert launch_config(spec, NAME) == choose_gemv(spec)
    remember([Row(subject=subject(), shape={"warps": 1, "rows": 4, "programs": None}, **times)], NAME)
    assert launch_config(spec, NAME) == GemvConfig(warps=1, rows=4)
    remember([Row(subject=subject(), shape={"warps": 1, "rows": 3, "programs": 500}, **times)], NAME)
    assert launch_config(spec, NAME) == choose_gemv(spec)  # tiles of three rows are none that a kernel has


@pytest.mark.parametrize("file", sorted(SHIPPED.glob("*.json")), ids=lambda file: file.stem)
def test_shipped_shapes_are_used(file):
    content = json.loads(file.read_text())
    keys = set()
    for entry in content["shapes"]:
        spec = layer(entry["bits"], entry["out_features"], entry["in_features"])
        if entry["kernel"] == "gemv":
            assert launch_config(spec, content["device"]) == GemvConfig(**entry["shape"])
        else:
            assert entry["kernel"] == "product"
            used = planar_product.launch_config(entry["tokens"], spec, content["device"])
            assert used == ProductConfig(**entry["shape"])
        assert entry["microseconds"] <= entry["computed_microseconds"]
        keys.add(Subject(**{name: entry[name] for name in list(entry)[:5]}).key())
    assert len(keys) == len(content["shapes"])  # no row hides another


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
@pytest.mark.parametrize(("rows", "columns"), [(4096, 4096), (14336, 4096), (4096, 14336), (28672, 8192), (64, 256)])
def test_candidates_are_few_and_possible(bits, rows, columns):
    spec = layer(bits, rows, columns)
    found = gemv_candidates(spec, 132)
    assert len(set(found)) == len(found) <= 80
    assert len({(config.warps, config.rows) for config in found}) <= 8  # each is compiled, programs are only counted
    assert all(is_possible(config, spec) for config in found)
    assert all(config.programs is None or 132 <= config.programs < -(-rows // config.rows) for config in found)
    if rows >= 4096:
        computed = choose_gemv(spec)
        assert (computed.warps, computed.rows) in {(config.warps, config.rows) for config in found}


SHAPES = [(4096, 4096), (14336, 4096), (4096, 14336), (28672, 8192), (64, 256), (192, 256)]


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_computed_shapes_of_few_rows_are_possible(bits, rows, columns):
    for mixed in (False, True):
        spec = layer(bits, rows, columns)
        if mixed:
            spec = replace(spec, segments=tuple(sorted([(bits, columns // 128 - 1), (5 - bits if bits < 5 else 2, 1)])))
        for n_tokens in (1, 2, 8, 9, 16, 17, 32, 33, 64, 65, 128, 1000):
            config = choose_product(n_tokens, spec)
            assert planar_product.is_possible(config, spec)
            assert config.tokens >= min(n_tokens, 32)


@pytest.mark.parametrize("n_tokens", [3, 8, 16, 32, 64, 128])
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_candidates_for_few_rows_are_few_and_possible(bits, n_tokens):
    for rows, columns in SHAPES[:4]:
        found = product_candidates(n_tokens, layer(bits, rows, columns), 132)
        assert 0 < len(set(found)) == len(found) <= 120
        assert all(planar_product.is_possible(config, layer(bits, rows, columns)) for config in found)


def test_few_rows_take_their_measured_shape_where_it_is_possible():
    spec = layer(2, 14336, 4096)
    shape = {"rows": 64, "warps": 4, "tokens": 16, "stages": 2, "splits": 3, "zeros_in_loop": False}
    times = {"microseconds": 1.0, "computed_microseconds": 1.0}
    remember([Row(subject=product_subject(12, spec), shape=shape, **times)], NAME)
    for n_tokens in (9, 12, 16):
        assert planar_product.launch_config(n_tokens, spec, NAME) == ProductConfig(**shape)
    assert planar_product.launch_config(17, spec, NAME) == choose_product(17, spec)
    assert planar_product.launch_config(12, layer(4, 14336, 4096), NAME) == choose_product(12, layer(4, 14336, 4096))
    remember([Row(subject=product_subject(12, spec), shape=shape | {"tokens": 1024}, **times)], NAME)
    assert planar_product.launch_config(12, spec, NAME) == choose_product(12, spec)  # no program has that much memory
