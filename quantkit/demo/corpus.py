"""Text that every CPython carries: the training, calibration and evaluation data of the demo model.

Three kinds of document are read from the running interpreter's standard library, without importing the modules:

    topic     a page of the language reference, as ``help("while")`` shows it (``pydoc_data``)
    page      one module's docstrings with the signatures they belong to, as ``help("textwrap")`` would show them
    source    one module's source, cut between definitions into pieces of a few kilobytes (held-out modules: whole)

Held-out modules (``HELD_OUT``) are evaluation text. Neither they nor their tests are in the training text, in any
form. The list holds pure-Python modules that 3.11, 3.12 and 3.13 have in the same place, so that a model trained with
one version is evaluated fairly with another.

Order. Training documents are ordered by a hash of their name, so that the first few dozen kilobytes (what a
calibration reads) already mix topics, pages and sources of many modules. Packages that some distributions leave out
(``test``, ``tkinter``, ...) come after everything else: where they are missing, the beginning stays as it is.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import re
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from quantkit.errors import FileError, RequestError, did_you_mean

Split = Literal["train", "heldout"]

HELD_OUT = (
    "bdb",
    "calendar",
    "cmd",
    "colorsys",
    "configparser",
    "csv",
    "difflib",
    "fnmatch",
    "fractions",
    "graphlib",
    "heapq",
    "imaplib",
    "ipaddress",
    "plistlib",
    "sched",
    "selectors",
    "shlex",
    "statistics",
    "textwrap",
    "trace",
    "uuid",
)

# Not part of the standard library, or not text: installed packages, build products, and modules that are one table.
_SKIPPED_FOLDERS = frozenset({"site-packages", "dist-packages", "__pycache__", "lib-dynload", "_bundled"})
_SKIPPED_MODULES = re.compile(
    r"encodings\.(?!aliases)|pydoc_data|stringprep|html\.entities|_sysconfig|config-|sitecustomize|usercustomize"
    r"|lib2to3\.tests\.data|test\.test_lib2to3\.data"
)
# Left out by some distributions (Debian, conda, embedded Windows), hence last in the order.
_OPTIONAL = frozenset(
    {"test", "tests", "idlelib", "tkinter", "turtle", "turtledemo", "lib2to3", "distutils", "ensurepip", "venv"}
)
_PIECE_CHARS = 4000  # a source is cut at the first definition after this many characters
_MIN_MODULES = 100  # a CPython with sources has several hundred; fewer means that only bytecode is installed
_CUT = re.compile(r"\n\n(?=(?: {4})?(?:@|def |class |async def ))")
# A definition and its docstring. A signature ends at the first colon that ends a line. A regular expression and not
# `ast`: ten times as fast on ten megabytes, and silent about invalid escapes in sources of older versions.
_DOCSTRING = re.compile(
    r"^(?P<indent>[ \t]*)(?P<signature>(?:async def|def|class) (?:(?!:[ \t]*\n).)*):[ \t]*\n"
    r'[ \t]*[rRuU]?(?P<quote>"""|\'\'\')(?P<doc>.*?)(?P=quote)',
    re.MULTILINE | re.DOTALL,
)
_MODULE_DOCSTRING = re.compile(
    r'(?:[ \t]*(?:#[^\n]*)?\n)*[rRuU]?(?P<quote>"""|\'\'\')(?P<doc>.*?)(?P=quote)', re.DOTALL
)


@dataclass(frozen=True, slots=True)
class Document:
    """One document: its kind (topic, page, source), the topic's or module's name, and the text."""

    kind: Literal["topic", "page", "source"]
    name: str
    text: str


def documents(split: Split) -> list[str]:
    """The texts of a split, in a fixed order: the same interpreter gives the same list every time.

    Args:
        split: "train" (also the calibration set ``builtin``) or "heldout" (also the evaluation text ``builtin``).

    Returns:
        The documents. Each ends in one newline and holds no NUL; none is empty.

    Raises:
        RequestError: an unknown split.
        FileError: this Python is installed without the sources of its standard library.
    """
    return [document.text for document in named_documents(split)]


def named_documents(split: Split) -> list[Document]:
    """Like `documents`, with the kind and the name of each: what is needed to split by module."""
    if split not in ("train", "heldout"):
        raise RequestError(f"unknown split {split!r} of the demo corpus; {did_you_mean(split, ['train', 'heldout'])}")
    folder = Path(sysconfig.get_paths()["stdlib"])
    sources = _module_sources(folder)
    if len(sources) < _MIN_MODULES:
        raise FileError(
            f"{folder}: found the source of {len(sources)} standard library modules, the demo corpus needs at least "
            f"{_MIN_MODULES}; use a Python installed with its sources, or name a text file instead"
        )
    return _held_out(sources) if split == "heldout" else _train(sources)


def _train(sources: dict[str, str]) -> list[Document]:
    keyed: list[tuple[bool, str, Document]] = []
    for name, text in _topics():
        keyed.append((False, _order(f"topic {name}"), Document("topic", name, text)))
    for name, source in sources.items():
        if _is_held_out(name):
            continue
        optional = not _OPTIONAL.isdisjoint(name.split("."))
        if not optional and (page := _page(name, source)):
            keyed.append((optional, _order(f"page {name}"), Document("page", name, page)))
        for index, piece in enumerate(_pieces(source)):
            keyed.append((optional, _order(f"source {name} {index}"), Document("source", name, piece)))
    keyed.sort(key=lambda item: item[:2])
    return [document for _, _, document in keyed]


def _held_out(sources: dict[str, str]) -> list[Document]:
    """All pages, then all sources: a docstring never stands a few lines above its own copy."""
    chosen = [name for root in HELD_OUT for name in sources if name == root or name.startswith(f"{root}.")]
    pages = [Document("page", name, page) for name in chosen if (page := _page(name, sources[name]))]
    return pages + [Document("source", name, sources[name]) for name in chosen]


def _is_held_out(name: str) -> bool:
    """Held out: the module, everything below it, and its tests (``test.test_csv``), which quote it."""
    parts = name.split(".")
    return parts[0] in HELD_OUT or any(part.startswith("test_") and part[5:] in HELD_OUT for part in parts)


def _order(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


def _module_sources(folder: Path) -> dict[str, str]:
    """Module name -> source text, sorted by name. Files that are not UTF-8 (some tests) are left out."""
    found: dict[str, str] = {}
    for path in folder.rglob("*.py"):
        parts = path.relative_to(folder).with_suffix("").parts
        if not _SKIPPED_FOLDERS.isdisjoint(parts):
            continue
        name = ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)
        if _SKIPPED_MODULES.match(name):
            continue
        text = _read(path)
        if text:
            found[name] = text
    return dict(sorted(found.items()))


def _read(path: Path) -> str:
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except (UnicodeDecodeError, OSError):
        return ""
    return "" if "\0" in text else _clean(text)


def _clean(text: str) -> str:
    stripped = text.replace("\r\n", "\n").strip("\n")
    return stripped + "\n" if stripped.strip() else ""


def _topics() -> Iterator[tuple[str, str]]:
    try:  # a module that holds nothing but a dict; some distributions ship pydoc without it
        topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    except ImportError:
        return
    for name, text in sorted(topics.items()):
        if cleaned := _clean(text):
            yield name, cleaned


def _page(name: str, source: str) -> str:
    """The module's docstrings as one page, or "" where it has none."""
    module_doc = _MODULE_DOCSTRING.match(source)
    entries = [inspect.cleandoc(module_doc["doc"])] if module_doc else []
    for found in _DOCSTRING.finditer(source):
        indent = " " * len(found["indent"].expandtabs(4))
        signature = " ".join(found["signature"].split())
        body = [f"    {line}" if line else "" for line in inspect.cleandoc(found["doc"]).splitlines()]
        entries.append("\n".join((indent + line).rstrip() for line in [signature, *body]))
    return _clean(f"Help on module {name}:\n\n" + "\n\n".join(entries)) if entries else ""


def _pieces(source: str) -> Iterator[str]:
    """Cut between definitions, so that a piece starts where a reader could start."""
    start = 0
    for cut in _CUT.finditer(source):
        if cut.end() - start >= _PIECE_CHARS:
            yield _clean(source[start : cut.start()])
            start = cut.end()
    if rest := _clean(source[start:]):
        yield rest
