"""A run as it goes on: bars on a terminal, one line per block in a log file. Imports torch; verbs import it late."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn
from rich.table import Column

from quantkit.cli.screen import duration, is_terminal
from quantkit.pipeline import Listener
from quantkit.pipeline.request import ModuleReport

WindowsDone = Callable[[str, int, int], None]  # (text, windows done, windows in all)


class RunProgress(Listener):
    """Counts blocks and says in lines how far a run is. A context manager: leaving it takes down what is on screen."""

    def __init__(self, console: Console, title: str) -> None:
        self.console, self.title = console, title
        self.n_blocks = self.n_finished = 0
        self.n_steps = self.n_kept = 0  # of a training stage
        self._seconds: list[float] = []  # of the blocks of this run
        self._reports: list[ModuleReport] = []  # of the block in hand

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *raised: object) -> None:
        pass

    def started(self, n_blocks: int, n_resumed: int) -> None:
        self.n_blocks, self.n_finished = n_blocks, n_resumed
        self.note(self.title)
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

    def training_started(self, n_steps: int) -> None:
        self.n_steps = n_steps
        self.note(f"all {self.n_blocks} blocks are packed; training for {n_steps} steps at most")

    def trained(self, step: int, n_steps: int, loss: float, held_out_loss: float) -> None:
        self.n_kept = step
        self.show_loss(step, n_steps, loss, held_out_loss)

    def show_loss(self, step: int, n_steps: int, loss: float, held_out_loss: float) -> None:
        self.note(f"step {step}/{n_steps}: loss {loss:.4f}, held out {held_out_loss:.4f}")

    def note(self, text: str) -> None:
        self.console.print(text, soft_wrap=True)

    def remaining(self) -> str:
        """The time left, by the mean of this run's blocks."""
        n_left = self.n_blocks - self.n_finished
        if not n_left:
            return "writing the folder"
        if not self._seconds:
            return "calibrating"
        return f"{duration(n_left * sum(self._seconds) / len(self._seconds))} left"


class BarProgress(RunProgress):
    """The same as two bars: blocks, and the linears of the block in hand."""

    def __init__(self, console: Console, title: str) -> None:
        super().__init__(console, title)
        self.bars = _bars(console)
        self.tasks: dict[str, TaskID] = {}

    def __exit__(self, *raised: object) -> None:
        self.bars.stop()

    def started(self, n_blocks: int, n_resumed: int) -> None:
        super().started(n_blocks, n_resumed)
        for name, total in (("blocks", n_blocks), ("linears", 0)):
            self.tasks[name] = self.bars.add_task(name, total=total, status="")
        self.bars.update(self.tasks["blocks"], completed=n_resumed, status=self.remaining())
        self.bars.start()  # only now: a download before it shows bars of its own

    def block_started(self, index: int, n_linears: int) -> None:
        super().block_started(index, n_linears)
        self.bars.update(self.tasks["linears"], total=n_linears, completed=0, status="calibrating")

    def linear_done(self, report: ModuleReport) -> None:
        super().linear_done(report)
        name = re.sub(r"^.*?\.\d+\.", "", report.name)  # the block's number is on the other bar
        self.bars.update(self.tasks["linears"], advance=1, status=f"{name} error {report.relative_error:.4f}")

    def scales_trained(self, step: int, n_steps: int, loss: float) -> None:
        status = f"training scales, step {step}/{n_steps}, loss {loss:.4f}"
        self.bars.update(self.tasks["linears"], status=status)

    def training_started(self, n_steps: int) -> None:
        super().training_started(n_steps)
        for name in ("blocks", "linears"):
            self.bars.remove_task(self.tasks.pop(name))
        self.tasks["steps"] = self.bars.add_task("steps", total=n_steps, status="training")

    def show_loss(self, step: int, n_steps: int, loss: float, held_out_loss: float) -> None:
        status = f"loss {loss:.4f}, held out {held_out_loss:.4f}"
        self.bars.update(self.tasks["steps"], completed=step, status=status)

    def show_block(self, seconds: float) -> None:
        self.bars.update(self.tasks["blocks"], completed=self.n_finished, status=self.remaining())


def run_progress(console: Console, title: str) -> RunProgress:
    """A listener for `quantkit.pipeline.run`; ``title`` is said when the run begins."""
    return BarProgress(console, title) if is_terminal(console) else RunProgress(console, title)


@contextmanager
def window_progress(console: Console) -> Iterator[WindowsDone]:
    """A callback for `quantkit.evaluation.evaluate`: a bar for each text, or a line at its end."""
    if not is_terminal(console):
        began = time.perf_counter()

        def say(name: str, done: int, total: int) -> None:
            if done == total:
                console.print(f"{name}: {total} windows, {duration(time.perf_counter() - began)} since the start")

        yield say
        return
    bars = _bars(console)

    def show(name: str, done: int, total: int) -> None:
        if not bars.tasks:
            bars.add_task(name, total=total, status="windows")
            bars.start()
        bars.update(bars.task_ids[0], completed=done)
        if done == total:  # nothing of ours is on screen while tasks draw their own bars
            bars.stop()
            bars.remove_task(bars.task_ids[0])

    try:
        yield show
    finally:
        bars.stop()


def _bars(console: Console) -> Progress:
    status = TextColumn("{task.fields[status]}", table_column=Column(no_wrap=True, ratio=1))
    columns = (TextColumn("{task.description:7}"), BarColumn(24), MofNCompleteColumn(), status)
    return Progress(*columns, console=console, transient=True, expand=True)
