"""Quantization runs that end badly, each in a process of its own, forked from this one: ``python killed_runs.py``.

Reads one job per line of standard input and answers each with one line of JSON:

    {"source", "output", "text", "options"}    the run, as in `quantized_models.small_run`
    + "signal": S, "after_block": K            the process sends itself S when block K is done
    + "file_size_limit": BYTES                 no file may grow larger: writing fails as on a full disk
    + "kill_before": N                         kill -9 before change number N of the file system around the output
    + "touching": NAME                         counting only the changes of paths that begin with this one

    {"status": what waitpid says, "said": what the run returned, or why it ended}
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from quantized_models import small_run

from quantkit.pipeline import Listener

WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
CHANGES = ("os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.truncate")


class SignalAfter(Listener):
    def __init__(self, signum: int, block: int) -> None:
        self.signum, self.block = signum, block

    def block_done(self, index: int, seconds: float) -> None:
        if index == self.block:
            os.kill(os.getpid(), self.signum)


def carry_out(job: dict[str, Any], answer: int) -> None:
    """The run, in a process of its own; ``answer`` is the file descriptor for what there is to say."""
    if "file_size_limit" in job:
        resource.setrlimit(resource.RLIMIT_FSIZE, (job["file_size_limit"], resource.RLIM_INFINITY))
    if "kill_before" in job:
        touching = job.get("touching", str(Path(job["output"]).parent))
        kill_before(job["kill_before"], touching, answer)
    listener = SignalAfter(job["signal"], job["after_block"]) if "signal" in job else None
    paths = (Path(job[key]) for key in ("source", "output", "text"))
    try:
        result = small_run(*paths, listener=listener, **job["options"])
        said = f"resumed {result.resumed_blocks}"
    except BaseException as error:  # whatever ends a run: the caller compares
        said = f"{type(error).__name__}: {error}"
    os.write(answer, said.encode())


def kill_before(number: int, touching: str, answer: int) -> None:
    """Die before the given change, counted from 0, of a path that begins with ``touching``."""
    seen = 0

    def watch(event: str, args: tuple[Any, ...]) -> None:
        nonlocal seen
        writes = event == "open" and isinstance(args[2], int) and args[2] & WRITING
        if (event in CHANGES or writes) and any(str(path).startswith(touching) for path in args[:2]):
            if seen == number:
                os.write(answer, f"{event} {Path(os.fsdecode(args[0])).name}".encode())
                os.kill(os.getpid(), signal.SIGKILL)
            seen += 1

    sys.addaudithook(watch)


def forked(job: dict[str, Any]) -> dict[str, Any]:
    read_end, write_end = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            carry_out(job, write_end)
        finally:
            os._exit(0)
    os.close(write_end)
    with open(read_end, encoding="utf-8") as pipe:
        said = pipe.read()
    return {"status": os.waitpid(child, 0)[1], "said": said}


if __name__ == "__main__":
    torch.set_num_threads(1)  # no thread may be running when the process forks
    for line in sys.stdin:
        sys.stdout.write(json.dumps(forked(json.loads(line))) + "\n")
        sys.stdout.flush()
