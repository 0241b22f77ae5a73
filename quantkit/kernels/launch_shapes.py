"""Launch shapes that were measured: shipped for some devices, or found on this machine by ``quantkit bench tune``.

One JSON file per device, shipped ones in ``kernels/tuned/``, the user's in `cache_folder`:

    {"device": "NVIDIA H200", "shapes": [
      {"kernel": "gemv", "bits": 2, "out_features": 14336, "in_features": 4096, "tokens": 1,
       "shape": {"rows": 8, "warps": 2, "tiles": 4}, "microseconds": 7.0, "computed_microseconds": 7.9}]}

A row speaks for all weights of its class: same kernel, width and in_features, out_features within a factor of about
1.2, tokens up to its number. The user's file goes before the shipped one; where neither has a row the kernel's own
choice computes a shape. Nothing is measured here, and nothing at all unless the command is given: what runs inside a
CUDA graph, or in a server, is only looked up.
"""

from __future__ import annotations

import json
import os
import re
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cache, lru_cache
from math import log2
from pathlib import Path
from typing import Any, TypeVar

import torch

from quantkit.errors import FileError

Config = TypeVar("Config")
SHIPPED = Path(__file__).with_name("tuned")
_SETTINGS = ("QUANTKIT_CACHE_DIR", "XDG_CACHE_HOME", "HOME")
_TOKENS = (1, 2, 4, 8, 16, 32, 64)  # classes: up to so many


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """What a launch shape is for: a kernel, and the weight and the number of tokens that it multiplies."""

    kernel: str
    bits: int
    out_features: int
    in_features: int
    tokens: int = 1

    def key(self) -> tuple[str, int, int, int, int]:
        """The class: out_features by half powers of two, tokens by the next larger of `_TOKENS`."""
        tokens = next((most for most in _TOKENS if self.tokens <= most), self.tokens)
        return self.kernel, self.bits, round(2 * log2(self.out_features)), self.in_features, tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One line of a file: the fastest shape that was found, its time, and that of the shape that is computed."""

    subject: Subject
    shape: Mapping[str, int | None]
    microseconds: float
    computed_microseconds: float


def measured_config(kind: type[Config], subject: Subject, device_name: str, shipped: Path = SHIPPED) -> Config | None:
    """The launch shape measured for a subject's class on such a device, or None.

    A file of the user that cannot be used is named in a warning, and passed over.

    Args:
        kind: dataclass of the kernel's launch shapes; the fields of a row are its arguments.
        subject: what to look for.
        device_name: of the device.
        shipped: folder of the files that come second.
    """
    settings = tuple(map(os.environ.get, _SETTINGS))
    return _looked_up(kind, subject, device_name, shipped, settings)  # type: ignore[arg-type]  # a class has a hash


def remember(rows: list[Row], device_name: str) -> Path:
    """Add rows to the user's file, in place of those of the same class; returns the file.

    Raises:
        FileError: it cannot be written.
    """
    file = cache_folder() / _file_name(device_name)
    _forget()
    known = _rows(file) | {row.subject.key(): row for row in rows}
    shapes = [
        asdict(row.subject)
        | {"shape": dict(row.shape), "microseconds": row.microseconds}
        | {"computed_microseconds": row.computed_microseconds}
        for _, row in sorted(known.items())
    ]
    lines = ",\n  ".join(json.dumps(shape) for shape in shapes)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary = file.with_suffix(f".{os.getpid()}")
        temporary.write_text(f'{{"device": {json.dumps(device_name)}, "shapes": [\n  {lines}\n]}}\n')
        temporary.replace(file)
    except OSError as error:
        raise FileError(f"{file}: cannot be written ({error.strerror}); set QUANTKIT_CACHE_DIR to a folder") from error
    _forget()
    return file


@lru_cache(maxsize=4096)  # every product asks, and paths take longer to build than a small product runs
def _looked_up(
    kind: type[Config], subject: Subject, device_name: str, shipped: Path, settings: tuple[str | None, ...]
) -> Config | None:
    """`measured_config` under these ``settings`` of the environment, on which `cache_folder` depends."""
    for folder in (cache_folder(), shipped):
        file = folder / _file_name(device_name)
        row = _rows(file).get(subject.key())
        if row is not None:
            try:
                return kind(**row.shape)
            except TypeError:
                _pass_over(file, f"a shape of {subject.kernel} has other fields than this version knows")
    return None


def _forget() -> None:
    _rows.cache_clear()
    _looked_up.cache_clear()


def cache_folder() -> Path:
    """QUANTKIT_CACHE_DIR, else ``quantkit`` in XDG_CACHE_HOME, else in ``~/.cache``."""
    own = os.environ.get("QUANTKIT_CACHE_DIR")
    return Path(own) if own else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "quantkit"


def _file_name(device_name: str) -> str:
    """
    >>> _file_name("NVIDIA H200")
    'nvidia_h200.json'
    """
    return re.sub(r"[^a-z0-9]+", "_", device_name.lower()).strip("_") + ".json"


@cache
def device_name(device: torch.device) -> str:
    """Of a CUDA device."""
    return torch.cuda.get_device_name(device)


@cache
def _rows(file: Path) -> dict[tuple[str, int, int, int, int], Row]:
    """What a file says, by class; nothing if there is none, or none that can be used."""
    try:
        rows = [_row(entry) for entry in json.loads(file.read_text())["shapes"]]
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        _pass_over(file, f"{type(error).__name__}: {error}")
        return {}
    return {row.subject.key(): row for row in rows}


def _row(entry: dict[str, Any]) -> Row:
    """Raises ValueError, KeyError or TypeError if the entry is none."""
    numbers = ("bits", "out_features", "in_features", "tokens")
    subject = Subject(kernel=str(entry["kernel"]), **{name: entry[name] for name in numbers})
    values = [*(entry[name] for name in numbers), *(value for value in entry["shape"].values() if value is not None)]
    if not all(isinstance(value, bool) or (isinstance(value, int) and value > 0) for value in values):
        raise ValueError(f"a number that is not a positive integer in {json.dumps(entry)}")
    times = {name: float(entry[name]) for name in ("microseconds", "computed_microseconds")}
    return Row(subject=subject, shape=entry["shape"], **times)


def _pass_over(file: Path, reason: str) -> None:
    warnings.warn(f"{file} is not used ({reason}); delete it, or measure again with: quantkit bench tune", stacklevel=2)
