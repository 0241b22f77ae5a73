"""``quantkit methods``: the table of methods, or the page of one of them with its settings."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.console import Console

from quantkit.algorithms.registry import METHODS
from quantkit.cli.options import Debug, Json
from quantkit.cli.pages import HEADER, PROTOCOL, describe, facts, figure_rows, value, width
from quantkit.cli.screen import print_json, print_pairs, results, table
from quantkit.errors import RequestError, did_you_mean

Name = Annotated[str | None, typer.Argument(metavar="[NAME]", help="One method, with its settings and their defaults.")]


def methods(name: Name = None, as_json: Json = False, debug: Debug = False) -> None:
    """Show the methods: papers, widths, settings, storage formats, figures."""
    if name is not None and name not in METHODS:
        raise RequestError(f"unknown method {name!r}; {did_you_mean(name, METHODS)}")
    if as_json:
        print_json(describe(name) if name else {"methods": [describe(each) for each in METHODS]})
    elif name is not None:
        _show_one(describe(name))
    else:
        _show_all([describe(each) for each in METHODS])


def _show_all(described: list[dict[str, Any]]) -> None:
    made = table("method", "bits", "paper", "what it is")
    for entry in described:
        what = f"{entry['title']}. {entry['summary']}"
        made.add_row(entry["name"], width(entry), entry["paper"], what)
    results().print(made)
    results().print("\nOne of them with its settings: quantkit methods NAME", soft_wrap=True)


def _show_one(entry: dict[str, Any]) -> None:
    screen = results()
    screen.print(f"{entry['title']} ({entry['name']})", style="bold")
    screen.print(entry["summary"], soft_wrap=True)
    screen.print()
    print_pairs(screen, facts(entry))
    for heading, key in (("What it does", "what"), ("When to use it", "when")):
        _section(screen, heading, entry[key])
    _show_figures(screen, entry)
    for heading, key in (("Cost", "cost"), ("Limits", "limits")):
        _section(screen, heading, entry[key])
    own = entry["own_settings"]
    _show_settings(screen, "setting", {key: entry["settings"][key] for key in own})
    others = {key: item for key, item in entry["settings"].items() if key not in own}
    _show_settings(screen, "further setting", others)
    screen.print(f"\nExample: {entry['example']}", soft_wrap=True)


def _section(screen: Console, heading: str, text: str) -> None:
    screen.print(f"\n{heading}", style="bold")
    screen.print(text)


def _show_figures(screen: Console, entry: dict[str, Any]) -> None:
    rows = figure_rows(entry)
    if not rows:
        return
    _section(screen, "Figures", f"{PROTOCOL}.\n")
    made = table(*HEADER, numbers=("bpw", "docs", "wiki"))
    for row in rows:
        made.add_row(*row)
    screen.print(made)


def _show_settings(screen: Console, heading: str, settings: dict[str, Any]) -> None:
    made = table(heading, "default", "meaning (change with --set SETTING=VALUE)")
    for name, setting in settings.items():
        made.add_row(name, value(setting["default"]), setting["help"])
        for choice, meaning in setting.get("choices", {}).items():
            made.add_row("", "", f"  {choice}: {meaning}")
    screen.print("", made)
