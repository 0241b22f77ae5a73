"""``quantkit methods``: the table of methods, or one of them with its settings."""

from __future__ import annotations

from dataclasses import fields
from typing import Annotated, Any

import typer

from quantkit.algorithms.registry import ALLOCATORS, GRID_CHOICES, METHODS, SOLVERS, TRANSFORMS
from quantkit.cli.options import Debug, Json
from quantkit.cli.screen import print_json, print_pairs, results, table
from quantkit.errors import RequestError, did_you_mean
from quantkit.recipe import Recipe, resolve

_MEMBERS = {"transform": TRANSFORMS, "allocator": ALLOCATORS, "grid": GRID_CHOICES, "solver": SOLVERS}
_EXAMPLE_BITS = 3

Name = Annotated[str | None, typer.Argument(metavar="[NAME]", help="One method, with its settings and their defaults.")]


def methods(name: Name = None, as_json: Json = False, debug: Debug = False) -> None:
    """Show the methods: papers, widths, settings, storage formats."""
    if name is not None and name not in METHODS:
        raise RequestError(f"unknown method {name!r}; {did_you_mean(name, METHODS)}")
    if as_json:
        print_json(_describe(name) if name else {"methods": [_describe(each) for each in METHODS]})
    elif name is not None:
        _show_one(_describe(name))
    else:
        _show_all([_describe(each) for each in METHODS])


def _describe(name: str) -> dict[str, Any]:
    method, recipe = METHODS[name], resolve(name)
    low, high = method.bits
    bits = method.defaults.get("bits", max(low, min(high, _EXAMPLE_BITS)))
    return {
        "name": name,
        "title": method.title,
        "paper": method.paper,
        "summary": method.summary,
        "bits": [low, high],
        "formats": list(method.formats),
        "needs_calibration": recipe.needs_calibration,
        "settings": {
            item.name: {"default": getattr(recipe, item.name), "help": item.metadata["help"]}
            | ({"choices": dict(_MEMBERS[item.name])} if item.name in _MEMBERS else {})
            for item in fields(Recipe)
            if item.name != "method"
        },
        "example": f"quantkit quantize demo --method {name} --bits {bits}",
    }


def _show_all(described: list[dict[str, Any]]) -> None:
    made = table("method", "bits", "paper", "what it is")
    for entry in described:
        what = f"{entry['title']}. {entry['summary']}"
        made.add_row(entry["name"], _bits(entry), entry["paper"], what)
    results().print(made)
    results().print("\nOne of them with its settings: quantkit methods NAME", soft_wrap=True)


def _show_one(entry: dict[str, Any]) -> None:
    screen = results()
    screen.print(f"{entry['title']} ({entry['name']})", style="bold")
    screen.print(entry["summary"])
    screen.print()
    facts = [("paper", entry["paper"]), ("bits", _bits(entry)), ("formats", ", ".join(entry["formats"]))]
    facts.append(("calibration", "needed" if entry["needs_calibration"] else "not needed"))
    print_pairs(screen, facts)
    screen.print()
    made = table("setting", "default", "meaning (change with --set SETTING=VALUE)")
    for name, setting in entry["settings"].items():
        made.add_row(name, _value(setting["default"]), setting["help"])
        for choice, meaning in setting.get("choices", {}).items():
            made.add_row("", "", f"  {choice}: {meaning}")
    screen.print(made)
    screen.print(f"\nExample: {entry['example']}", soft_wrap=True)


def _bits(entry: dict[str, Any]) -> str:
    low, high = entry["bits"]
    return f"{low} to {high}" if low < high else str(low)


def _value(value: Any) -> str:
    """As it would be written after ``=``; a dash where nothing is set."""
    if value is None:
        return "-"
    return str(value).lower() if isinstance(value, bool) else str(value)
