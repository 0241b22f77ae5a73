"""`quantkit methods`: the registry, as a table and as JSON."""

from __future__ import annotations

import dataclasses
import shlex

import pytest
from cli_runs import quantkit

from quantkit.algorithms.registry import METHODS
from quantkit.recipe import Recipe, recipe_from_json


def test_the_table_has_every_method() -> None:
    shown = quantkit("methods")
    assert (shown.exit_code, shown.stderr) == (0, "")
    for name, method in METHODS.items():
        (row,) = (line for line in shown.stdout.splitlines() if line.split()[:1] == [name])
        assert method.paper in row
        assert method.title in row


def test_json_of_all_is_that_of_each() -> None:
    assert quantkit("methods", "--json").json == {
        "methods": [quantkit("methods", name, "--json").json for name in METHODS]
    }


@pytest.mark.parametrize("name", METHODS)
def test_settings_are_the_resolved_recipe(name: str) -> None:
    described = quantkit("methods", name, "--json").json
    settings = {key: setting["default"] for key, setting in described["settings"].items()}
    assert settings.keys() == {item.name for item in dataclasses.fields(Recipe)} - {"method"}
    assert recipe_from_json({"method": name, **settings}) == recipe_from_json(
        {"method": name, **METHODS[name].defaults}
    )
    assert all(setting["help"] for setting in described["settings"].values())
    assert described["needs_calibration"] is (name != "rtn")


@pytest.mark.parametrize("name", METHODS)
def test_one_method_with_its_example(name: str) -> None:
    shown = quantkit("methods", name).stdout
    assert METHODS[name].summary in shown
    assert "damping" in shown
    example = shlex.split(shown.splitlines()[-1].removeprefix("Example: quantkit "))
    low, high = METHODS[name].bits
    assert example[:4] == ["quantize", "demo", "--method", name]
    assert low <= float(example[-1]) <= high


def test_an_unknown_method() -> None:
    done = quantkit("methods", "slm")
    assert done.exit_code == 2
    assert done.error.startswith("unknown method 'slm'; did you mean 'slim'?")
