"""The manual's page of a method: facts of the registry, text of `quantkit.algorithms.pages`, settings of its recipe."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Sequence
from dataclasses import asdict, fields
from typing import Any

from quantkit.algorithms.pages import FIGURES, PAGES, UNQUANTIZED, Figure
from quantkit.algorithms.registry import ALLOCATORS, GRID_CHOICES, METHODS, SOLVERS, TRANSFORMS
from quantkit.recipe import Recipe, resolve

MEMBERS = {"transform": TRANSFORMS, "allocator": ALLOCATORS, "grid": GRID_CHOICES, "solver": SOLVERS}
ALWAYS = ("bits", "group_size", "symmetric")  # settings that every page shows
PROTOCOL = (
    "llama-28m, 32 x 1024 calibration tokens; perplexity over 32 windows of 1024 tokens of held-out documentation "
    "(docs) and of WikiText-2 (wiki), from the packed folder"
)
HEADER = ("settings", "bits, group", "bpw", "docs", "wiki", "other people's code, docs")
_EXAMPLE_BITS = 3


def describe(name: str) -> dict[str, Any]:
    """Everything about a method, as JSON."""
    method, page, recipe = METHODS[name], PAGES[name], resolve(name)
    low, high = method.bits
    bits = method.defaults.get("bits", max(low, min(high, _EXAMPLE_BITS)))
    return {
        "name": name,
        "title": method.title,
        "paper": method.paper,
        "authors": page.authors,
        "summary": method.summary,
        "what": _flowed(page.what),
        "when": _flowed(page.when),
        "cost": _flowed(page.cost),
        "limits": _flowed(page.limits),
        "bits": [low, high],
        "formats": list(method.formats),
        "needs_calibration": recipe.needs_calibration,
        "own_settings": [*ALWAYS, *page.settings],
        "settings": {
            item.name: {"default": getattr(recipe, item.name), "help": item.metadata["help"]}
            | ({"choices": dict(MEMBERS[item.name])} if item.name in MEMBERS else {})
            for item in fields(Recipe)
            if item.name != "method"
        },
        "figures": [asdict(figure) for figure in FIGURES if figure.method == name],
        "example": f"quantkit quantize demo --method {name} --bits {bits}",
    }


def facts(entry: dict[str, Any]) -> list[tuple[str, str]]:
    """Names and values of what fits on a line."""
    return [
        ("paper", entry["paper"]),
        ("authors", entry["authors"]),
        ("bits", width(entry)),
        ("formats", ", ".join(entry["formats"])),
        ("calibration", "needed" if entry["needs_calibration"] else "not needed"),
    ]


def figure_rows(entry: dict[str, Any]) -> list[tuple[str, ...]]:
    """Rows under `HEADER`, the unquantized model first; none where nothing was measured."""
    figures = [Figure(**values) for values in entry["figures"]]
    shown = [UNQUANTIZED, *figures] if figures else []
    return [
        (
            figure.settings or ("as it is" if figure.method else "unquantized"),
            figure.bits,
            f"{figure.bpw:.3f}" if figure.method else f"{figure.bpw:g}",
            f"{figure.docs:.4g}",
            "-" if figure.wiki is None else f"{figure.wiki:.4g}",
            figure.reference,
        )
        for figure in shown
    ]


def markdown(name: str) -> str:
    """The page docs/methods/NAME.md."""
    entry = describe(name)
    lines = [f"# {entry['title']}", "", f"    quantkit quantize MODEL --method {name}", "", _wrapped(entry["what"]), ""]
    lines += [f"- {label}: {_linked(text)}" for label, text in facts(entry) if text != "-"]
    lines += ["", "## When to use it", "", _wrapped(entry["when"]), "", "## Settings", ""]
    own = [(key, entry["settings"][key]) for key in entry["own_settings"]]
    lines += _table(
        ("setting", "default", "meaning"), [(f"`{key}`", value(item["default"]), item["help"]) for key, item in own]
    )
    lines += ["", "`--set SETTING=VALUE`, or a recipe file. [All settings](README.md#settings).", "", "## Figures", ""]
    rows = figure_rows(entry)
    lines += (
        [_wrapped(f"{PROTOCOL}. Hardware, versions, spread: [results](../results.md)."), ""]
        if rows
        else ["None recorded yet.", ""]
    )
    lines += [*_table(HEADER, rows), ""] if rows else []
    lines += ["## Cost", "", _wrapped(entry["cost"]), "", "## Limits", "", _wrapped(entry["limits"]), ""]
    return "\n".join(lines)


def index() -> str:
    """The page docs/methods/README.md: all methods, and all settings with the values that they can take."""
    entries = [describe(name) for name in METHODS]
    rows = [
        (f"[`{entry['name']}`]({entry['name']}.md)", _linked(entry["paper"]), width(entry), entry["summary"])
        for entry in entries
    ]
    lines = ["# Methods", "", "`quantkit methods NAME` shows the same.", ""]
    lines += [*_table(("method", "paper", "bits", "what it is"), rows), "", "## Settings", ""]
    lines += ["The same for all methods; `--set SETTING=VALUE`, or a line of a recipe file (`--recipe FILE`).", ""]
    general = [(item.name, item.default, item.metadata["help"]) for item in fields(Recipe) if item.name != "method"]
    lines += _table(
        ("setting", "default", "meaning"), [(f"`{key}`", value(default), help) for key, default, help in general]
    )
    for role, members in MEMBERS.items():
        lines += ["", f"### {role}", "", *_table(("value", "meaning"), [(f"`{key}`", v) for key, v in members.items()])]
    return "\n".join([*lines, ""])


def width(entry: dict[str, Any]) -> str:
    low, high = entry["bits"]
    return f"{low} to {high}" if low < high else str(low)


def value(default: Any) -> str:
    """As it would be written after ``=``; a dash where nothing is set."""
    if default is None:
        return "-"
    return str(default).lower() if isinstance(default, bool) else str(default)


def _flowed(text: str) -> str:
    return " ".join(text.split())


def _wrapped(text: str) -> str:
    """At most 118 columns; never inside code."""
    whole = re.sub(r"`[^`]*`", lambda code: code[0].replace(" ", "\0"), text)
    return textwrap.fill(whole, 118, break_long_words=False, break_on_hyphens=False).replace("\0", " ")


def _linked(text: str) -> str:
    """arXiv numbers as links."""
    return re.sub(r"arXiv:(\d{4}\.\d{5})", r"[arXiv:\1](https://arxiv.org/abs/\1)", text)


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    escaped = [tuple(cell.replace("|", "\\|") for cell in row) for row in rows]
    lines = [f"| {' | '.join(header)} |", f"|{'---|' * len(header)}"]
    return lines + [f"| {' | '.join(row)} |" for row in escaped]
