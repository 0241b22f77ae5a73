"""Errors, signals and streams, in processes of their own where that matters."""

from __future__ import annotations

import errno
import json
import os
import pty
import re
import signal
import subprocess
from pathlib import Path

import pytest
import torch
from cli_runs import Inputs, command, environment, quantkit, start
from tiny_models import tiny_model

from quantkit.cli.main import _explain


@pytest.mark.slow
def test_streams_of_a_run(inputs: Inputs, tmp_path: Path) -> None:
    """Nothing but the object on stdout, nothing but our lines on stderr: no library speaks."""
    with start("quantize", inputs.model, *inputs.flags, "-o", "out", "--json", cwd=tmp_path) as process:
        stdout, stderr = process.communicate(timeout=300)
    assert process.returncode == 0
    assert json.loads(stdout)["output"] == "out"
    assert [line.partition(":")[0] for line in stderr.splitlines()] == ["gptq, 4 bits", "block 1/2", "block 2/2"]


@pytest.mark.slow
def test_ctrl_c_says_how_to_resume(tmp_path: Path) -> None:
    model = tiny_model("llama", tmp_path, num_hidden_layers=48)
    arguments = ("quantize", model, "--method", "rtn", "--group-size", 32, "-o", tmp_path / "out", "--json")
    with start(*arguments, cwd=tmp_path) as process:
        assert process.stderr is not None
        seen = iter(process.stderr.readline, "")
        assert any(line.startswith("block 1/48: ") for line in seen)
        process.send_signal(signal.SIGINT)
        stdout, stderr = process.communicate(timeout=300)
    assert process.returncode == 130
    assert stdout == ""
    last = stderr.splitlines()[-1]
    found = re.fullmatch(r"interrupted: (\d+) of 48 blocks are finished; run the same command again to resume", last)
    assert found
    assert "Traceback" not in stderr
    resumed = quantkit(*arguments)
    assert resumed.exit_code == 0
    assert resumed.json["resumed_blocks"] == int(found[1])


@pytest.mark.parametrize("text", [True, False])
def test_a_reader_that_leaves_and_a_full_disk(text: bool, tmp_path: Path) -> None:
    flags = [] if text else ["--json"]
    read, write = os.pipe()
    os.close(read)
    gone = subprocess.run(
        command("methods", *flags), stdout=write, stderr=subprocess.PIPE, env=environment(), cwd=tmp_path
    )
    os.close(write)
    assert gone.returncode == 1
    assert gone.stderr == b""
    if Path("/dev/full").exists():
        with open("/dev/full", "w") as full:
            done = subprocess.run(
                command("methods", *flags), stdout=full, stderr=subprocess.PIPE, env=environment(), cwd=tmp_path
            )
        assert done.returncode == 1
        assert done.stderr == b"error: disk is full; free some space and run the same command again\n"


def _on_a_terminal(folder: Path, *arguments: str, **more: str) -> bytes:
    leader, follower = pty.openpty()
    subprocess.run(
        command(*arguments), stdout=follower, stderr=follower, env=environment(**more), cwd=folder, check=False
    )
    os.close(follower)
    shown = os.read(leader, 1 << 16)
    os.close(leader)
    return shown


def test_colour_on_a_terminal_only_and_not_with_no_color(tmp_path: Path) -> None:
    message = b"bits must be 1 to 8, not 9"
    arguments = ("quantize", "demo", "--bits", "9")
    assert _on_a_terminal(tmp_path, *arguments).startswith(b"\x1b[1;31merror:\x1b[0m " + message)
    plain = _on_a_terminal(tmp_path, *arguments, NO_COLOR="1")
    assert b"[1;31m" not in plain
    assert message in plain
    piped = subprocess.run(command(*arguments), capture_output=True, env=environment(), cwd=tmp_path)
    assert (piped.returncode, piped.stdout, piped.stderr) == (2, b"", b"error: " + message + b"\n")


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    done = quantkit("inspect", tmp_path / "nowhere", "--debug")
    assert done.exit_code == 1
    assert done.stderr.startswith("Traceback (most recent call last)")
    assert done.stderr.splitlines()[-1] == f"error: no folder {tmp_path / 'nowhere'}"


def test_names_are_shown_as_they_are(tmp_path: Path) -> None:
    """Neither markup nor emoji codes, and a line break does not make two lines."""
    assert quantkit("inspect", tmp_path / "[bold]a:smile:\nb").error == f"no folder {tmp_path}/[bold]a:smile: b"


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "/out/a"), "disk is full while writing /out/a; free some"),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), "disk is full; free some space and run the same command again"),
        (PermissionError(errno.EACCES, "Permission denied", "/out"), "/out: Permission denied"),
        (ConnectionError("no route\nand more"), "no route"),
        (OSError(), "OSError"),
        (MemoryError(), "out of memory; use a shorter --seq-len"),
        (torch.OutOfMemoryError("CUDA out of memory"), "out of memory; use a shorter --seq-len"),
    ],
)
def test_errors_of_the_machine_are_one_line(error: Exception, line: str) -> None:
    explained = _explain(error)
    assert explained is not None
    assert explained.startswith(line)
    assert "\n" not in explained


def test_a_bug_keeps_its_traceback() -> None:
    assert _explain(ZeroDivisionError("division by zero")) is None


def test_libraries_are_quiet_only_meanwhile(packed: Path) -> None:
    import huggingface_hub.utils as hub
    from transformers.utils import logging

    before = (logging.get_verbosity(), logging.is_progress_bar_enabled(), hub.are_progress_bars_disabled())
    assert quantkit("generate", packed, "--prompt", "a", "--max-new-tokens", 1, "--json").exit_code == 0
    after = (logging.get_verbosity(), logging.is_progress_bar_enabled(), hub.are_progress_bars_disabled())
    assert after == before
