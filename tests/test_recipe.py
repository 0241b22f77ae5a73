"""Recipes: what wins over what, what ``auto`` means, and the message of every refusal."""

from __future__ import annotations

import json
import re
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import law

from quantkit.algorithms.registry import ALLOCATORS, GRID_CHOICES, METHODS, SOLVERS, TRANSFORMS
from quantkit.errors import FileError, QuantkitError, RequestError
from quantkit.recipe import Recipe, recipe_from_json, resolve

METHOD_NAMES = ", ".join(sorted(METHODS))


def written(folder: Path, text: str) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return path


# --- where values come from ---------------------------------------------------------------------------------------


def test_nothing_given_is_gptq_at_four_bits() -> None:
    assert resolve() == resolve("gptq") == Recipe()
    assert (Recipe().bits, Recipe().group_size, Recipe().solver) == (4, 128, "gptq")


@pytest.mark.parametrize(
    ("budget", "settings", "method"),
    [
        ({"bits": 2}, [], "refined"),
        ({"bits": 3}, ["grid=mse"], "refined"),
        ({"bits": 4}, [], "gptq"),
        ({"bits": 2.5}, [], "refined"),
        ({"bits": 2.5}, ["allocator=zd"], "refined"),
        ({"bpw": 2.8}, ["allocator=zd"], "refined"),
        ({}, ["bits=2"], "refined"),
        ({"bits": 2}, ["solver=boa"], "gptq"),
        ({"bits": 2}, ["solver=rtn"], "gptq"),
    ],
)
def test_method_when_none_is_named(budget: dict[str, Any], settings: list[str], method: str) -> None:
    """Below 4 bits the refined recipe; who names a solver gets that solver alone."""
    assert resolve(**budget, settings=settings) == resolve(method, **budget, settings=settings)
    assert resolve(**budget, settings=settings).method == method


def test_file_without_a_method(tmp_path: Path) -> None:
    assert resolve(file=written(tmp_path, "bits: 2\n")).method == "refined"
    assert resolve(file=written(tmp_path, "bits: 2\nsolver: gptq\n")).method == "gptq"
    assert resolve(file=written(tmp_path, "bits: 2\n"), bits=8).method == "gptq"


def test_later_sources_win(tmp_path: Path) -> None:
    """Method defaults, then the file, then the arguments, then --set."""
    file = written(tmp_path, "method: slim\nbits: 5\ngroup_size: 64\ngrid: mse\ndamping: 0.5\n")
    assert resolve("slim").grid == "sqc"
    from_file = resolve(file=file)
    assert (from_file.method, from_file.allocator, from_file.bits) == ("slim", "sba", 5)
    assert (from_file.group_size, from_file.grid, from_file.damping) == (64, "mse", 0.5)
    argued = resolve(file=file, bits=3, group_size=32)
    assert (argued.bits, argued.group_size, argued.grid) == (3, 32, "mse")
    assert resolve(file=file, bits=3, settings=["bits=2", "grid=hessian", "bits=6"]) == replace(
        from_file, bits=6, grid="hessian"
    )
    assert resolve("gptq", file=file).allocator == "uniform"


def test_empty_arguments_keep_what_is_there(tmp_path: Path) -> None:
    file = written(tmp_path, "group_size: 0\n")
    assert resolve(file=file).group_size is None
    assert resolve(file=file, group_size=64).group_size == 64
    assert resolve(group_size=0).group_size is None
    assert resolve(settings=["group_size=null"]).group_size is None
    assert resolve(settings=[" group_size = 64 "]).group_size == 64


@pytest.mark.parametrize(
    ("text", "field", "value"),
    [
        ("symmetric=true", "symmetric", True),
        ("symmetric=yes", "symmetric", True),
        ("sequential=false", "sequential", False),
        ("damping=1", "damping", 1.0),
        ("damping=0.05", "damping", 0.05),
        ("bits=3", "bits", 3),
        ("bits=3.0", "bits", 3),
        ("act_order=none", "act_order", "none"),
        ("grid='mse'", "grid", "mse"),
        ("refine=2", "refine", 2),
        ("correction=0.5", "correction", 0.5),
    ],
)
def test_settings_are_yaml_values(text: str, field: str, value: Any) -> None:
    found = getattr(resolve(settings=[text]), field)
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize("text", ["1e-3", "5E-2"])
def test_exponents_are_numbers(text: str) -> None:
    assert resolve(settings=[f"damping={text}"]).damping == float(text)


def test_budget_of_the_file_is_replaced_in_either_unit(tmp_path: Path) -> None:
    file = written(tmp_path, "method: layerwise\nbpw: 2.8\n")
    assert resolve(file=file).bpw == 2.8
    assert (resolve(file=file, bits=2.5).bpw, resolve(file=file, bits=2.5).bits) == (None, 2.5)
    assert resolve(file=written(tmp_path, "method: layerwise\nbits: 3\n"), bpw=2.6).bpw == 2.6
    assert resolve("layerwise", bpw=2.6).budget_name == "2.6 bpw"
    assert resolve("layerwise", bits=2.5).budget_name == "2.5 bits"


def recipes() -> st.SearchStrategy[Recipe]:
    """Recipes that the checks let through."""

    def attempt(values: dict[str, Any]) -> Recipe | None:
        try:
            return resolve(values.pop("method"), settings=[f"{key}={yaml.safe_dump(v)}" for key, v in values.items()])
        except RequestError:
            return None

    fields_of_any_type = {
        "method": st.sampled_from(sorted(METHODS)),
        "bits": st.sampled_from([1, 2, 2.5, 3, 4, 8]),
        "group_size": st.sampled_from([0, 1, 32, 128, None]),
        "symmetric": st.booleans(),
        "transform": st.sampled_from(sorted(TRANSFORMS)),
        "allocator": st.sampled_from(sorted(ALLOCATORS)),
        "grid": st.sampled_from(sorted(GRID_CHOICES)),
        "solver": st.sampled_from(sorted(SOLVERS)),
        "damping": st.sampled_from([0, 0.01, 1.0, 100.0]),
        "act_order": st.sampled_from(["none", "group", "full"]),
    }
    chosen = st.fixed_dictionaries({"method": fields_of_any_type.pop("method")}, optional=fields_of_any_type)
    return chosen.map(attempt).filter(lambda recipe: recipe is not None)  # type: ignore[return-value]


@settings(law, max_examples=25)
@given(recipes())
def test_recipe_survives_json_and_yaml(recipe: Recipe) -> None:
    assert recipe_from_json(json.loads(json.dumps(recipe.to_json()))) == recipe
    assert recipe_from_json(yaml.safe_load(yaml.safe_dump(recipe.to_json()))) == recipe
    assert set(recipe.to_json()) == {item.name for item in fields(Recipe)}


@settings(law, max_examples=25)
@given(recipes())
def test_recipe_of_one_linear_is_uniform(recipe: Recipe) -> None:
    """What an allocator hands to the solver keeps solver, grid and groups, at a whole width."""
    if recipe.mixes_widths:
        one = recipe.at(3)
        assert (one.allocator, one.width, one.bpw) == ("uniform", 3, None)
        assert not one.mixes_widths
        for name in ("transform", "grid", "solver", "group_size", "symmetric", "damping", "act_order"):
            assert getattr(one, name) == getattr(recipe, name)
    elif recipe.solver not in ("ptq161", "littlebit"):  # which spend averages
        assert recipe.width == recipe.bits


def test_budget_in_stored_bits_survives_json() -> None:
    recipe = resolve("layerwise", bpw=2.8)
    assert recipe.to_json()["bits"] is None
    assert recipe_from_json(recipe.to_json()).to_json() == recipe.to_json()


def test_every_setting_has_a_help_text() -> None:
    assert all(item.metadata["help"] for item in fields(Recipe))


# --- what it means ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"bits": 1}, "hessian"),
        ({"bits": 3}, "hessian"),
        ({"bits": 4}, "minmax"),
        ({"bits": 8}, "minmax"),
        ({"bits": 2, "solver": "rtn"}, "minmax"),
        ({"bits": 2, "solver": "rtn", "grid": "hessian"}, "hessian"),
        ({"bits": 2, "grid": "sqc"}, "sqc"),
        ({"bits": 8, "grid": "mse"}, "mse"),
    ],
)
def test_grid_name(settings: dict[str, Any], expected: str) -> None:
    assert Recipe(**settings).grid_name == expected


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, True),
        ({"solver": "rtn"}, False),
        ({"solver": "rtn", "bits": 2}, False),
        ({"solver": "rtn", "grid": "mse"}, False),
        ({"solver": "rtn", "grid": "hessian"}, True),
        ({"solver": "rtn", "allocator": "sba"}, True),
        ({"solver": "rtn", "allocator": "lim"}, True),
        ({"solver": "rtn", "allocator": "zd"}, False),
        ({"solver": "rtn", "refine": 1}, True),
    ],
)
def test_needs_calibration(settings: dict[str, Any], expected: bool) -> None:
    assert Recipe(**settings).needs_calibration is expected


# --- refusals -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        # unknown names: the nearest one, then all
        ("method=gtpq", f"unknown method 'gtpq'; did you mean 'gptq'? known: {METHOD_NAMES}"),
        ("method=7", f"unknown method 7; known: {METHOD_NAMES}"),
        ("method=null", f"unknown method None; known: {METHOD_NAMES}"),
        ("gridd=mse", "unknown setting 'gridd'; did you mean 'grid'? known: accumulate, act_order, allocator, a"),
        ("=3", "unknown setting ''; known: accumulate, act_order, allocator"),
        ("grid=hesian", "unknown grid 'hesian'; did you mean 'hessian'? known: auto, hessian, minmax, mse, sqc"),
        ("transform=hadamar", "unknown transform 'hadamar'; did you mean 'hadamard'? known: hadamard, none"),
        ("solver=gtpq", "unknown solver 'gtpq'; did you mean 'gptq'? known:"),
        ("allocator=sbaa", "unknown allocator 'sbaa'; did you mean 'sba'? known:"),
        ("act_order=ful", "unknown act_order 'ful'; did you mean 'full'? known: full, group, none"),
        ("criterion=mae", "unknown criterion 'mae'; did you mean 'mse'? known: kl, mse"),
        ("qk_metric=logit", "unknown qk_metric 'logit'; did you mean 'logits'? known: logits, outputs"),
        ("granularity=row", "unknown granularity 'row'; known: block, linear"),
        ("entropy=kmean", "unknown entropy 'kmean'; did you mean 'kmeans'? known: histogram, kmeans"),
        # types
        ("bits=four", "setting bits takes a number, not 'four'"),
        ("bits=true", "setting bits takes a number, not True"),
        ("damping=false", "setting damping takes a number, not False"),
        ("damping=", "setting damping takes a number, not None"),
        ("group_size=64.0", "setting group_size takes a whole number, not 64.0"),
        ("group_size=all", "setting group_size takes a whole number, not 'all'"),
        ("refine=1.5", "setting refine takes a whole number, not 1.5"),
        ("symmetric=1", "setting symmetric takes true or false, not 1"),
        ("symmetric='true'", "setting symmetric takes true or false, not 'true'"),
        ("act_order=off", "setting act_order takes a name, not False"),
        ("grid=[mse]", "setting grid takes a name, not ['mse']"),
        ("damping={a: 1}", "setting damping takes a number, not {'a': 1}"),
        # ranges
        ("bits=0", "bits must be 1 to 8, not 0"),
        ("bits=9", "bits must be 1 to 8, not 9"),
        ("bits=-3", "bits must be 1 to 8, not -3"),
        ("bits=.nan", "bits must be 1 to 8, not nan"),
        ("group_size=-128", "group_size must be positive, or 0 for one group per row, not -128"),
        ("damping=-0.01", "damping is a fraction of mean(diag(H)), 0 to 100, not -0.01"),
        ("damping=101", "damping is a fraction of mean(diag(H)), 0 to 100, not 101"),
        ("damping=.nan", "damping is a fraction of mean(diag(H)), 0 to 100, not nan"),
        ("correction=1.5", "correction is a share of the way, 0 to 1, not 1.5"),
        ("refine=-1", "refine is a number of rounds, 0 to 100, not -1"),
        ("refine=101", "refine is a number of rounds, 0 to 100, not 101"),
        # form
        ("grid", "--set takes KEY=VALUE, not 'grid'"),
        ("bpw=4.5", "--bpw 4.5 needs an allocator: allocator=uniform gives every layer the same whole number"),
        ("bits=4.5", "--bits 4.5 needs an allocator: allocator=uniform gives every layer the same whole number"),
        ("lo=2", "lo is a setting of the allocators lim, zd, luq, casp, error, adaptive and random"),
        ("hi=4", "hi is a setting of the allocators lim, zd, luq, casp, error, adaptive and random"),
        ("reverse=true", "reverse is a setting of the allocators lim, zd, luq, casp, error, adaptive and random"),
    ],
)
def test_refused_settings(setting: str, message: str) -> None:
    with pytest.raises(RequestError, match=f"^{re.escape(message)}"):
        resolve(settings=[setting])


@pytest.mark.parametrize(
    ("method", "settings", "message"),
    [
        ("slim", ["bits=1"], "slim works at 2 to 7 bits, not 1"),
        ("slim", ["bits=8"], "slim works at 2 to 7 bits, not 8"),
        (
            "gptq",
            ["allocator=sba", "bits=1"],
            "allocator=sba mixes bits - 1 and bits + 1: it works at 2 to 7 bits, not 1",
        ),
        (
            "slim",
            ["symmetric=true"],
            "allocator=sba with symmetric grids is not supported: its 1-bit groups need a free",
        ),
        ("slim", ["group_size=0"], "allocator=sba needs groups: its unit is a group of columns; use --group-size 128"),
        ("slim", ["bits=2.5"], "--bits 2.5 needs an allocator: allocator=sba"),
        ("gptq", ["rotate_values=true"], "rotate_values is a part of transform=hadamard; set both"),
        ("rtn", ["act_order=full"], "act_order orders the compensation of errors; solver=rtn compensates none"),
        ("rtn", ["correction=0.5"], "correction changes what a compensating solver aims at; solver=rtn compensates"),
        ("layerwise", ["lo=4", "hi=2"], "lo and hi are widths from 1 to 8, lo below hi, not 4 and 2"),
        ("layerwise", ["lo=3", "hi=3"], "lo and hi are widths from 1 to 8, lo below hi, not 3 and 3"),
        ("layerwise", ["hi=9"], "lo and hi are widths from 1 to 8, lo below hi, not 1 and 9"),
        ("layerwise", ["lo=2", "hi=4", "bits=5"], "an average of 5 bits does not lie between lo=2 and hi=4"),
        (
            "layerwise",
            ["granularity=linear"],
            "allocator=lim scores what enters and leaves whole blocks; with granularity",
        ),
        ("layerwise", ["allocator=error", "reverse=true"], "reverse turns a ranking around; allocator=error weighs"),
        ("ptq161", ["bits=5"], "ptq161 works at 1 to 4 bits, not 5"),
        ("ptq161", ["salient_bits=2", "bits=2.5"], "solver=ptq161 mixes signs and 2-bit channels: 1 to 2 bits on"),
        ("ptq161", ["salient_bits=1"], "salient_bits is a width of 2 to 8 bits, not 1"),
        ("ptq161", ["salient_bits=9"], "salient_bits is a width of 2 to 8 bits, not 9"),
        ("ptq161", ["group_size=128"], "solver=ptq161 has one scale of each kind per row; use --group-size 0"),
        ("ptq161", ["symmetric=true"], "solver=ptq161 needs a free zero for its salient channels; leave symmetric"),
        ("ptq161", ["allocator=lim"], "solver=ptq161 spends its bits on salient channels; give it --bits, and no"),
        ("ptq161", ["bits=null", "bpw=1.7"], "solver=ptq161 spends its bits on salient channels; give it --bits"),
        ("ptq161", ["keep_ratio=0.5"], "solver=ptq161 stores signs, not low-rank factors; leave keep_ratio 1"),
        ("gptq", ["restore_steps=5"], "restore_steps is a setting of transform=restore; set both"),
        ("gptq", ["transform=restore", "restore_steps=0"], "restore_steps must be at least 1, not 0"),
        ("gptq", ["transform=restore", "restore_rank=0"], "restore_rank must be at least 1, not 0"),
        ("gptq", ["transform=restore", "restore_lr=0.0"], "restore_lr is a learning rate above 0, at most 1, not 0"),
        ("ptq161", ["act_order=group"], "solver=ptq161 has an order of its own, salient channels last; leave"),
        ("ptq161", ["block_steps=-1"], "block_steps is a number of steps, 0 or more, not -1"),
        ("ptq161", ["block_lr=0.0"], "block_lr is a learning rate above 0, at most 1, not 0"),
        ("ptq161", ["block_scales=some"], "unknown block_scales 'some'"),
        ("gptq", ["block_steps=10"], "block_steps is a setting of solver=ptq161; use --method ptq161"),
        ("gptq", ["salience=absmax"], "salience is a setting of solver=ptq161; use --method ptq161"),
        ("layerwise", ["bits=3", "bpw=3.2"], "the budget is either bits (of the codes, on average) or bpw"),
    ],
)
def test_refused_combinations(method: str, settings: list[str], message: str) -> None:
    with pytest.raises(RequestError, match=f"^{re.escape(message)}"):
        resolve(method, settings=settings)


@pytest.mark.parametrize("method", ["layerwise", "gptq"])
def test_width_zero_is_refused(method: str) -> None:
    with pytest.raises(RequestError, match="lo"):
        resolve(method, settings=["lo=0"])


@pytest.mark.parametrize("setting", ["grid=[", "grid=a: b: c", "method=[gptq]", "method={}"])
def test_settings_that_yaml_cannot_read_or_name(setting: str) -> None:
    with pytest.raises(RequestError):
        resolve(settings=[setting])


def test_arguments_are_checked_like_settings() -> None:
    with pytest.raises(RequestError, match="unknown method 'slin'; did you mean 'slim'"):
        resolve("slin")
    with pytest.raises(RequestError, match="bits must be 1 to 8, not 16"):
        resolve(bits=16)
    with pytest.raises(RequestError, match="group_size must be positive"):
        resolve(group_size=-1)
    with pytest.raises(RequestError, match="unknown setting 'wbits'"):
        recipe_from_json({"wbits": 4})
    with pytest.raises(RequestError, match="unknown grid 'x'"):
        Recipe(grid="x")


def test_recipes_are_never_mutated() -> None:
    with pytest.raises(AttributeError):
        Recipe().bits = 3  # type: ignore[misc]


# --- files --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "must be a mapping of settings, such as 'method: gptq'"),
        ("- method: gptq", "must be a mapping of settings, such as 'method: gptq'"),
        ("gptq", "must be a mapping of settings, such as 'method: gptq'"),
        ("method: [", "is not valid YAML: while parsing a flow node"),
        ("a: b: c", "is not valid YAML: mapping values are not allowed here"),
        ("method: rtn\n---\nbits: 3\n", "is not valid YAML: expected a single document in the stream"),
    ],
)
def test_refused_files(tmp_path: Path, text: str, message: str) -> None:
    path = written(tmp_path, text)
    with pytest.raises(FileError, match=f"^{re.escape(f'recipe {path} {message}')}") as caught:
        resolve(file=path)
    assert "\n" not in str(caught.value)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    missing = tmp_path / "missing.yaml"
    with pytest.raises(FileError, match=re.escape(f"cannot read recipe {missing}: No such file or directory")):
        resolve(file=missing)
    with pytest.raises(FileError, match=re.escape(f"cannot read recipe {tmp_path}: Is a directory")):
        resolve(file=tmp_path)


def test_settings_of_a_file_are_checked_too(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="unknown setting 'percdamp'; known:"):
        resolve(file=written(tmp_path, "percdamp: 0.01\n"))
    with pytest.raises(RequestError, match="setting bits takes a number, not '4'"):
        resolve(file=written(tmp_path, "bits: '4'\n"))


@pytest.mark.parametrize("content", [b"\xff\xfe\x00", b"4: 3\n", b"method: [gptq]\n"])
def test_files_of_other_things(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_bytes(content)
    with pytest.raises(QuantkitError):
        resolve(file=path)
