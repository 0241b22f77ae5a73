"""The manual's pages of methods: one for each line of the registry, equal to docs/methods, with figures that exist."""

from __future__ import annotations

import importlib.util
import re
from dataclasses import fields
from pathlib import Path
from types import ModuleType

import pytest
from cli_runs import quantkit

from quantkit.algorithms.pages import FIGURES, PAGES, UNQUANTIZED
from quantkit.algorithms.registry import METHODS
from quantkit.cli.pages import describe, markdown
from quantkit.recipe import Recipe

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("method_pages", REPOSITORY / "scripts" / "method_pages.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_method_has_a_page() -> None:
    """A method needs its text in quantkit/algorithms/pages.py; see CONTRIBUTING.md."""
    assert set(PAGES) == set(METHODS)


def test_the_pages_in_docs_are_up_to_date(script: ModuleType) -> None:
    """Else: python scripts/method_pages.py"""
    assert script.outdated(REPOSITORY / "docs" / "methods") == []


def test_pages_that_are_old_missing_or_left_over(script: ModuleType, tmp_path: Path) -> None:
    for name, content in script.pages().items():
        (tmp_path / name).write_text(content)
    assert script.outdated(tmp_path) == []
    (tmp_path / "gptq.md").write_text("# GPTQ\n")
    (tmp_path / "awq.md").write_text("# gone\n")
    (tmp_path / "README.md").unlink()
    assert script.outdated(tmp_path) == ["README.md", "awq.md", "gptq.md"]


@pytest.mark.parametrize("name", METHODS)
def test_settings_of_a_page_are_settings_of_recipes(name: str) -> None:
    own = describe(name)["own_settings"]
    assert set(own) <= {item.name for item in fields(Recipe)}
    assert len(own) == len(set(own))
    chosen = set(METHODS[name].defaults) - {"solver", "allocator"}
    assert chosen <= set(own), "a setting that the method chooses is not on its page"


@pytest.mark.parametrize("name", METHODS)
def test_the_terminal_shows_what_the_page_says(name: str) -> None:
    shown = " ".join(quantkit("methods", name).stdout.split())
    page = " ".join(markdown(name).split())
    unlinked = re.sub(r"\[(arXiv:[\d.]+)\]\(\S+?\)", r"\1", page)
    entry = describe(name)
    for key in ("what", "when", "cost", "limits", "authors"):
        assert len(entry[key]) > 10
        assert entry[key] in shown
        assert entry[key] in unlinked
    for figure in entry["figures"]:
        assert f"{figure['bpw']:.3f}" in shown
        assert f"| {figure['docs']:.4g} |" in page
    if METHODS[name].paper != "-":
        assert f"[{METHODS[name].paper}](https://arxiv.org/abs/{METHODS[name].paper.removeprefix('arXiv:')})" in page


def test_a_line_never_breaks_inside_code() -> None:
    for name in METHODS:
        prose = [line for line in markdown(name).splitlines() if not line.startswith(("|", "- authors"))]
        assert all(line.count("`") % 2 == 0 for line in prose)
        assert max(map(len, prose)) <= 120


def test_figures_are_those_of_the_documents() -> None:
    """Each number stands in a document that says how it was measured."""
    documents = [REPOSITORY / "README.md", *(REPOSITORY / "docs").glob("*.md")]
    known = set(re.findall(r"\d+\.\d+", " ".join(path.read_text(encoding="utf-8") for path in documents)))
    known |= {number.rstrip("0") for number in known}
    for figure in (UNQUANTIZED, *FIGURES):
        assert figure.method in ("", *METHODS)
        for number in (figure.docs, figure.wiki):
            assert number is None or str(number) in known, f"{number} of {figure.method} is in no document"
