"""Running the command line: in this process, or in one of its own."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from typer.testing import CliRunner

from quantkit.cli.main import app

_ROOT = Path(__file__).parents[1]
_TERMINAL = ("NO_COLOR", "FORCE_COLOR", "COLUMNS", "TTY_COMPATIBLE", "TTY_INTERACTIVE", "GITHUB_ACTIONS")


@dataclass(frozen=True)
class Run:
    """What a command left behind."""

    exit_code: int
    stdout: str
    stderr: str

    @property
    def json(self) -> dict[str, Any]:
        """stdout as one JSON object: anything before or after it fails."""
        content = json.loads(self.stdout)
        assert isinstance(content, dict)
        return content

    @property
    def error(self) -> str:
        """The one line on stderr of a command that failed and printed nothing else."""
        assert self.stdout == ""
        (line,) = self.stderr.splitlines()
        assert line.startswith("error: ")
        return line.removeprefix("error: ")


@dataclass(frozen=True)
class Inputs:
    """A model of two blocks, text, and the flags that calibrate on it in a moment."""

    model: Path
    text: Path

    @property
    def flags(self) -> tuple[str, ...]:
        return ("--calib", str(self.text), "--n-samples", "4", "--seq-len", "32", "--group-size", "32")


class Terminal(io.StringIO):
    """A file that says it is one."""

    def isatty(self) -> bool:
        return True


def quantkit(*arguments: object) -> Run:
    """Run a command in this process; an exception that no user should see fails the test."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
    return Run(result.exit_code, result.stdout, result.stderr)


def environment(**more: str) -> dict[str, str]:
    """This process's environment without what changes the looks, with this checkout on the path, and offline."""
    kept = {name: value for name, value in os.environ.items() if name not in _TERMINAL}
    path = os.pathsep.join(filter(None, [str(_ROOT), kept.get("PYTHONPATH")]))
    return kept | {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "TERM": "xterm", "OMP_NUM_THREADS": "1"} | more


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "quantkit", *(str(argument) for argument in arguments)]


def start(*arguments: object, cwd: Path) -> subprocess.Popen[str]:
    """A command with its output in pipes; Ctrl-C reaches it even where the tests themselves run in the background."""
    return subprocess.Popen(
        command(*arguments),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=cwd,
        env=environment(),
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
