"""Where results and notes go, how numbers look, and silence for libraries that talk on their own."""

from __future__ import annotations

import json
import logging
import os
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from importlib import import_module
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

LOG_WIDTH = 200  # columns where no terminal says how many there are: names of modules stay whole


def results() -> Console:
    """stdout, for what was asked for."""
    return _console(sys.stdout)


def notes() -> Console:
    """stderr, for progress and remarks."""
    return _console(sys.stderr)


def _console(file: Any) -> Console:
    # Names of files and modules are shown as they are: no markup, no emoji codes, no coloured digits.
    width = None if file.isatty() else LOG_WIDTH
    return Console(file=file, width=width, markup=False, emoji=False, highlight=False)


def note(text: str) -> None:
    """One remark on stderr."""
    notes().print(text, soft_wrap=True)


def busy(text: str) -> None:
    """What is going on, for someone who watches; a log needs no such line."""
    if is_terminal(notes()):
        note(f"{text} ...")


def is_terminal(console: Console) -> bool:
    """Asks the file: FORCE_COLOR makes Rich believe in a terminal where a log file is."""
    return console.file.isatty() and not console.is_dumb_terminal


def show_error(message: str) -> None:
    """``error: ...`` on stderr, always one line."""
    line = " ".join(message.split("\n"))
    notes().print(Text.assemble(("error:", "bold red"), " ", line), soft_wrap=True)


def print_json(content: dict[str, Any]) -> None:
    """One JSON object on stdout."""
    print(json.dumps(content, indent=2))


def table(*columns: str, numbers: tuple[str, ...] = ()) -> Table:
    """An open table; the columns in ``numbers`` are aligned to the right."""
    made = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for column in columns:
        made.add_column(column, justify="right" if column in numbers else "left", overflow="fold")
    return made


def print_pairs(screen: Console, rows: list[tuple[str, str]]) -> None:
    """Names and values in two columns."""
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        screen.print(Text.assemble((name.ljust(width), "bold"), "  ", value), soft_wrap=True)


def size(n_bytes: float) -> str:
    """Decimal units, as disks and download pages count.

    >>> size(999), size(1_500_000), size(13_500_000_000)
    ('999 B', '1.50 MB', '13.5 GB')
    """
    if n_bytes < 1000:
        return f"{n_bytes:.0f} B"
    for unit in ("kB", "MB", "GB", "TB"):
        n_bytes /= 1000
        if n_bytes < 999.5 or unit == "TB":
            break
    return f"{n_bytes:.{2 if n_bytes < 9.995 else 1 if n_bytes < 99.95 else 0}f} {unit}"


def places(n_bytes: Mapping[str, int]) -> str:
    """Where the bytes went, empty places left out.

    >>> places({"quantized": 1_500_000, "embeddings": 999, "head": 0})
    'quantized 1.50 MB, embeddings 999 B'
    """
    return ", ".join(f"{kind} {size(count)}" for kind, count in n_bytes.items() if count)


def duration(seconds: float) -> str:
    """
    >>> duration(3.21), duration(75), duration(7384)
    ('3.2 s', '1:15', '2:03:04')
    """
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Keep transformers' bars, log lines and warnings, and whatever libraries print, away from the user's results.

    Download bars stay where there is a terminal. Everything is put back at the end, for callers inside a process.
    """
    from transformers.utils import logging as transformers

    hub: Any = import_module("huggingface_hub.utils")  # its functions are re-exported implicitly, which mypy refuses
    lm_eval = logging.getLogger("lm_eval")
    verbosity, had_bars = transformers.get_verbosity(), transformers.is_progress_bar_enabled()
    hub_verbosity, lm_eval_level = hub.logging.get_verbosity(), lm_eval.level
    had_download_bars = not hub.are_progress_bars_disabled()
    with warnings.catch_warnings(), redirect_stdout(sys.stderr):
        if not sys.warnoptions:  # python -W and PYTHONWARNINGS still show them
            warnings.simplefilter("ignore")
        transformers.set_verbosity_error()
        hub.logging.set_verbosity_error()
        lm_eval.setLevel(logging.ERROR)
        transformers.disable_progress_bar()  # and the hub's with it
        if had_download_bars and sys.stderr.isatty():
            hub.enable_progress_bars()
        try:
            yield
        finally:
            transformers.set_verbosity(verbosity)
            hub.logging.set_verbosity(hub_verbosity)
            lm_eval.setLevel(lm_eval_level)
            if had_bars:
                transformers.enable_progress_bar()
            if had_download_bars:
                hub.enable_progress_bars()
            else:
                hub.disable_progress_bars()


@contextmanager
def no_bars_in_logs() -> Iterator[None]:
    """Where stderr is no terminal, drop what libraries write to it: lm-eval draws its bars whatever tqdm is told.

    A `Console` that was made before still writes.
    """
    if sys.stderr.isatty():
        yield
        return
    with open(os.devnull, "w") as nowhere, redirect_stderr(nowhere):
        yield
