"""The work folder of a run: one safetensors file per finished block, and a journal with one line for each.

    .OUT.quantkit/
        lock                   held by the process that writes here
        run.json               what was asked for; a run with other settings refuses to go on
        journal.jsonl          one line per finished block: file, its SHA-256, seconds, errors of its linears
        block-00003.safetensors

A block's file is complete (temporary file, fsync, rename) before its line is appended, so ``kill -9`` at any moment
loses at most the block in hand. A last line that was cut off is ignored.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from torch import Tensor

from quantkit.errors import FileError, RequestError
from quantkit.formats.files import read_json, write_json
from quantkit.formats.safetensors_io import write_tensors


@dataclass(frozen=True, slots=True)
class FinishedBlock:
    """One line of the journal."""

    index: int
    file: str
    sha256: str
    seconds: float
    modules: dict[str, dict[str, Any]]  # runtime name -> {"spec": ..., "relative_error": ..., "loss": ...}
    errors: dict[str, float]  # of the block's output, by modality; empty without pictures


class Journal:
    """Open or create the work folder beside ``output``; a context manager that holds its lock.

    Args:
        output: the final folder.
        settings: JSON of everything that determines the bytes; compared with that of an unfinished run.
        overwrite: forget an unfinished run and a finished output.

    Raises:
        RequestError: the output exists, an unfinished run had other settings, or another process is at work on it.
        FileError: the folder cannot be written.
    """

    def __init__(self, output: Path, settings: dict[str, Any], *, overwrite: bool) -> None:
        self.output = output
        self.folder = work_folder(output)
        self.finished: list[FinishedBlock] = []
        refuse_existing(output, overwrite)
        self._lock = _lock(self.folder, output)
        try:
            if overwrite:
                _remove_contents(self.folder)
            self._start(settings)
        except BaseException:
            self._lock.close()
            raise

    def _start(self, settings: dict[str, Any]) -> None:
        described = self.folder / "run.json"
        if described.exists():
            _refuse_difference(read_json(described), settings, self.output)
            self.finished = finished_blocks(self.folder)
        else:
            _remove_contents(self.folder)
            write_json(described, settings)

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._lock.close()

    def block_path(self, index: int) -> Path:
        return self.folder / f"block-{index:05d}.safetensors"

    def finish_block(
        self,
        index: int,
        tensors: dict[str, Tensor],
        seconds: float,
        modules: dict[str, dict[str, Any]],
        errors: dict[str, float],
    ) -> None:
        """Write the block's tensors, then its line."""
        path = self.block_path(index)
        write_tensors(path, tensors)
        block = FinishedBlock(index, path.name, _sha256(path), round(seconds, 3), modules, errors)
        fields = {name: getattr(block, name) for name in FinishedBlock.__slots__}
        try:
            with open(self.folder / "journal.jsonl", "a", encoding="utf-8") as file:
                file.write(json.dumps(fields) + "\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise FileError(
                f"cannot write {self.folder}: {error.strerror}; free space and run the same command again"
            ) from error
        self.finished.append(block)

    def replace_block(self, index: int, tensors: dict[str, Tensor], modules: dict[str, dict[str, Any]]) -> None:
        """Put other tensors in a finished block's place, for the final folder; a run that is resumed does it again."""
        path = self.folder / f"trained-{index:05d}.safetensors"
        write_tensors(path, tensors)
        before = self.finished[index]
        self.finished[index] = FinishedBlock(index, path.name, _sha256(path), before.seconds, modules, before.errors)

    def remove(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)


def finished_blocks(folder: Path) -> list[FinishedBlock]:
    """Of a work folder: the finished blocks, up to the first line or file that is not whole; the rest is cut off."""
    path = folder / "journal.jsonl"
    finished: list[FinishedBlock] = []
    good_bytes = 0
    for line in path.read_bytes().splitlines(keepends=True) if path.exists() else []:
        try:
            block = FinishedBlock(**json.loads(line))
        except (ValueError, TypeError):
            break
        file = folder / block.file
        whole = line.endswith(b"\n") and block.index == len(finished) and file.exists()
        if not whole or _sha256(file) != block.sha256:
            break
        finished.append(block)
        good_bytes += len(line)
    if path.exists() and path.stat().st_size != good_bytes:
        os.truncate(path, good_bytes)
    return finished


def work_folder(output: Path) -> Path:
    """The hidden sibling in which an unfinished run lives."""
    whole = Path(os.path.abspath(output))  # "." has a name too
    return whole.parent / f".{whole.name}.quantkit"


def _lock(folder: Path, output: Path) -> TextIO:
    """Create the work folder and lock it; the lock falls with the process, however that ends."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / "lock", "w", encoding="utf-8")  # noqa: SIM115 - open as long as the run
    except OSError as error:
        raise FileError(f"cannot create {folder}: {error.strerror}; choose another folder with -o") from error
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise RequestError(f"{output}: another process is writing it; wait for it, or choose another folder") from None
    except OSError:  # some network file systems have no locks
        pass
    return file


def _remove_contents(folder: Path) -> None:
    """Everything but the lock."""
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        elif path.name != "lock":
            path.unlink(missing_ok=True)


def refuse_existing(output: Path, overwrite: bool) -> None:
    """Raises `RequestError` when the output is there and may not be replaced."""
    if output.is_symlink() or output.is_mount():
        raise RequestError(
            f"output {output} is a link or a mount point, which no folder can replace; give a folder in it"
        )
    if output.exists() and not output.is_dir():
        raise RequestError(f"output {output} is a file; give a folder with -o")
    if not output.exists() or not any(output.iterdir()):
        return
    if not overwrite:
        raise RequestError(f"output {output} exists; choose another folder with -o, or pass --overwrite")
    if not all((output / name).is_file() for name in ("recipe.json", "checksums.json")):
        raise RequestError(
            f"output {output} was not written by quantkit, so --overwrite does not touch it; "
            "choose another folder with -o"
        )


def _refuse_difference(before: dict[str, Any], now: dict[str, Any], output: Path) -> None:
    changed = _differences(before, json.loads(json.dumps(now)), "")
    if changed:
        raise RequestError(
            f"{output}: an unfinished run had other settings ({'; '.join(changed[:4])}); "
            "repeat its settings to resume, or pass --overwrite to start anew"
        )


def _differences(before: Any, now: Any, where: str) -> list[str]:
    if isinstance(before, dict) and isinstance(now, dict):
        keys = sorted(before.keys() | now.keys())
        dotted = f"{where}." if where else ""
        return [line for key in keys for line in _differences(before.get(key), now.get(key), f"{dotted}{key}")]
    return [] if before == now else [f"{where}: {before!r} then, {now!r} now"]


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
