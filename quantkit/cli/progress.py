"""A run as it goes on: bars on a terminal, one line per block in a log file. Imports torch; verbs import it late."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn

from quantkit.cli.screen import duration
from quantkit.pipeline import Listener
from quantkit.pipeline.request import ModuleReport

WindowsDone = Callable[[str, int, int], None]  # (text, windows done, windows in all)


class RunProgress(Listener):
    """Counts blocks, and says in lines how far a run is."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.n_blocks = self.n_finished = 0
        self._seconds: list[float] = []  # of the blocks of this run
        self._reports: list[ModuleReport] = []  # of the block in hand

    def started(self, n_blocks: int, n_resumed: int) -> None:
        self.n_blocks, self.n_finished = n_blocks, n_resumed
        if n_resumed:
            self.note(f"resuming: {n_resumed} of {n_blocks} blocks are finished already")

    def block_started(self, index: int, n_linears: int) -> None:
        self._reports = []

    def linear_done(self, report: ModuleReport) -> None:
        self._reports.append(report)

    def block_done(self, index: int, seconds: float) -> None:
        self.n_finished = index + 1
        self._seconds.append(seconds)
        self.show_block(seconds)

    def show_block(self, seconds: float) -> None:
        worst = max(self._reports, key=lambda report: report.relative_error)
        self.note(
            f"block {self.n_finished}/{self.n_blocks}: {len(self._reports)} linears in {duration(seconds)}, "
            f"worst relative error {worst.relative_error:.4f} ({worst.name}), {self.remaining()}"
        )

    def note(self, text: str) -> None:
        self.console.print(text, soft_wrap=True)

    def remaining(self) -> str:
        """The time left, by the mean of this run's blocks."""
        n_left = self.n_blocks - self.n_finished
        if not n_left:
            return "writing the folder"
        if not self._seconds:
            return "estimating the time left"
        return f"{duration(n_left * sum(self._seconds) / len(self._seconds))} left"


class BarProgress(RunProgress):
    """The same as two bars: blocks, and the linears of the block in hand."""

    def __init__(self, console: Console, bars: Progress) -> None:
        super().__init__(console)
        self.bars = bars
        self.blocks = bars.add_task("reading the model", total=None, status="")
        self.linears: TaskID | None = None

    def started(self, n_blocks: int, n_resumed: int) -> None:
        super().started(n_blocks, n_resumed)
        self.bars.update(
            self.blocks, description="blocks", total=n_blocks, completed=n_resumed, status=self.remaining()
        )

    def block_started(self, index: int, n_linears: int) -> None:
        super().block_started(index, n_linears)
        if self.linears is not None:
            self.bars.remove_task(self.linears)
        self.linears = self.bars.add_task("linears", total=n_linears, status="calibrating")

    def linear_done(self, report: ModuleReport) -> None:
        super().linear_done(report)
        assert self.linears is not None
        self.bars.update(self.linears, advance=1, status=f"{report.name}: relative error {report.relative_error:.4f}")

    def show_block(self, seconds: float) -> None:
        self.bars.update(self.blocks, completed=self.n_finished, status=self.remaining())


@contextmanager
def run_progress(console: Console) -> Iterator[RunProgress]:
    """A listener for `quantkit.pipeline.run`."""
    if not _is_terminal(console):
        yield RunProgress(console)
        return
    with _bars(console) as bars:
        yield BarProgress(console, bars)


@contextmanager
def window_progress(console: Console) -> Iterator[WindowsDone]:
    """A callback for `quantkit.evaluation.evaluate`: a bar for each text, or a line at its end."""
    if not _is_terminal(console):
        began = time.perf_counter()

        def say(name: str, done: int, total: int) -> None:
            if done == total:
                console.print(f"{name}: {total} windows, {duration(time.perf_counter() - began)} since the start")

        yield say
        return
    with _bars(console) as bars:
        tasks: dict[str, TaskID] = {}

        def show(name: str, done: int, total: int) -> None:
            if name not in tasks:
                tasks[name] = bars.add_task(name, total=total, status="windows")
            bars.update(tasks[name], completed=done)

        yield show


def _is_terminal(console: Console) -> bool:
    """Asks the file: FORCE_COLOR makes Rich believe in a terminal where a log file is."""
    return console.file.isatty() and not console.is_dumb_terminal


def _bars(console: Console) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[status]}"))
    return Progress(*columns, console=console, transient=True)
