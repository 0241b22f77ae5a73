"""Whole files or no files: atomic writes, JSON, and what a full disk or a missing file says."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from quantkit.errors import FileError

_MIB = 1 << 20


@contextmanager
def replace_file(path: Path, n_bytes: int) -> Iterator[BinaryIO]:
    """Open a temporary sibling of ``path`` for writing; fsync and rename it into place when the block ends well.

    Args:
        path: the file that appears whole, or not at all.
        n_bytes: what the caller still has to write in this folder, this file included (for the disk-full message).

    Raises:
        FileError: disk full, no permission, no such folder; the temporary file is removed.
    """
    temporary = path.with_name(f".{path.name}.tmp")  # a fixed name: what a killed run leaves is overwritten
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except BaseException as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise _write_error(path, n_bytes, error) from error
        raise


def _sync_folder(folder: Path) -> None:
    """A rename survives a power cut only once its folder is on disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _write_error(path: Path, n_bytes: int, error: OSError) -> FileError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        short = n_bytes - shutil.disk_usage(path.parent).free
        n_mib = max(1, -(-short // _MIB)) if short > 0 else max(1, -(-n_bytes // _MIB))  # a quota hides the shortfall
        return FileError(f"disk is full while writing {path}; free {n_mib} MiB and run the same command again")
    return FileError(f"cannot write {path}: {error.strerror}")


def write_json(path: Path, content: Any) -> None:
    """Write ``content`` atomically, with sorted keys: equal contents are equal bytes."""
    data = (json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()
    with replace_file(path, len(data)) as file:
        file.write(data)


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in ``path``. Raises `FileError` for a missing file, broken JSON, or another JSON type."""
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise FileError(f"{path}: no such file") from None
    except OSError as error:
        raise FileError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise FileError(f"{path}: not valid JSON ({error}); the file is damaged") from error
    if not isinstance(content, dict):
        raise FileError(f"{path}: expected a JSON object, found {type(content).__name__}")
    return content
