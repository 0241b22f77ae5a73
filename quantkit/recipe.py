"""A recipe: which transform, allocator, grid and solver, with which settings. A method name is a recipe's short form.

    resolve("slim", {"bits": 2})                                  the paper's combination
    resolve("slim", {"bits": 2, "settings": ["grid=hessian"]})    the same with another grid

Everything is checked here, before any tensor is read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from quantkit.algorithms.registry import ALLOCATORS, GRID_CHOICES, METHODS, SOLVERS
from quantkit.errors import FileError, RequestError, did_you_mean

_CHOICES: dict[str, tuple[str, ...]] = {
    "allocator": tuple(ALLOCATORS),
    "grid": tuple(GRID_CHOICES),
    "solver": tuple(SOLVERS),
    "act_order": ("none", "group", "full"),
    "criterion": ("mse", "kl"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """Resolved settings. Every field can be given as ``--set FIELD=VALUE`` or in a YAML file."""

    method: str = field(default="gptq", metadata={"help": "name the settings started from"})
    bits: int = field(default=4, metadata={"help": "bits per weight, 1 to 8 (the average, for mixed widths)"})
    group_size: int | None = field(default=128, metadata={"help": "input columns per scale; 0: one scale per row"})
    symmetric: bool = field(default=False, metadata={"help": "zero fixed at the middle of the grid, not stored"})
    allocator: str = field(default="uniform", metadata={"help": "who gets how many bits"})
    grid: str = field(default="auto", metadata={"help": "how scales and zeros are chosen"})
    solver: str = field(default="gptq", metadata={"help": "how codes are chosen"})
    damping: float = field(default=0.01, metadata={"help": "added to diag(H), as a fraction of its mean"})
    act_order: str = field(default="none", metadata={"help": "visit columns by descending diag(H): group or full"})
    sequential: bool = field(default=False, metadata={"help": "quantize a block in stages, re-reading inputs"})
    criterion: str = field(default="mse", metadata={"help": "sba: mse (Hessian) or kl (the authors')"})

    def __post_init__(self) -> None:
        for name, known in _CHOICES.items():
            value = getattr(self, name)
            if value not in known:
                raise RequestError(f"unknown {name} {value!r}; {did_you_mean(str(value), known)}")
        low, high = METHODS[self.method].bits if self.method in METHODS else (1, 8)
        if not 1 <= self.bits <= 8:
            raise RequestError(f"bits must be 1 to 8, not {self.bits}")
        if not low <= self.bits <= high:
            raise RequestError(f"{self.method} works at {low} to {high} bits, not {self.bits}")
        if self.group_size is not None and self.group_size < 1:
            raise RequestError(f"group_size must be positive, or 0 for one group per row, not {self.group_size}")
        if not 0 <= self.damping <= 100:
            raise RequestError(f"damping is a fraction of mean(diag(H)), 0 to 100, not {self.damping:g}")
        self._check_combination()

    def _check_combination(self) -> None:
        if self.allocator == "sba" and not 2 <= self.bits <= 7:
            raise RequestError(f"allocator=sba mixes bits - 1 and bits + 1: it works at 2 to 7 bits, not {self.bits}")
        if self.allocator == "sba" and self.symmetric:
            raise RequestError("allocator=sba with symmetric grids is not supported: its 1-bit groups need a free zero")
        if self.allocator == "sba" and self.group_size is None:
            raise RequestError("allocator=sba needs groups: its unit is a group of columns; use --group-size 128")
        if self.act_order != "none" and self.solver == "rtn":
            raise RequestError("act_order orders the compensation of errors; solver=rtn compensates none")

    @property
    def grid_name(self) -> str:
        """The grid with ``auto`` resolved."""
        if self.grid != "auto":
            return self.grid
        return "hessian" if self.bits < 4 and self.solver != "rtn" else "minmax"

    @property
    def needs_calibration(self) -> bool:
        return self.solver != "rtn" or self.allocator != "uniform" or self.grid_name == "hessian"

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def resolve(
    method: str | None = None,
    *,
    bits: int | None = None,
    group_size: int | None = None,
    settings: Sequence[str] = (),
    file: Path | None = None,
) -> Recipe:
    """Method defaults, then the file, then the arguments, then ``settings`` (``"key=value"`` strings).

    Args:
        group_size: 0 means one group per row; None keeps what method or file say.

    Raises:
        RequestError: an unknown name or setting, a value out of range, a combination that makes no sense.
        FileError: the recipe file cannot be read.
    """
    values = _read_file(file) if file else {}
    for name, value in (("method", method), ("bits", bits), ("group_size", group_size)):
        if value is not None:
            values[name] = value
    for item in settings:
        key, found, text = item.partition("=")
        if not found:
            raise RequestError(f"--set takes KEY=VALUE, not {item!r}")
        values[key.strip()] = yaml.safe_load(text)
    name = values.get("method", "gptq")
    if name not in METHODS:
        raise RequestError(f"unknown method {name!r}; {did_you_mean(str(name), METHODS)}")
    return recipe_from_json({"method": name, **METHODS[name].defaults, **values})


def recipe_from_json(values: Mapping[str, Any]) -> Recipe:
    """A recipe from plain values; unknown keys and wrong types raise `RequestError` by name."""
    known = {item.name: item for item in fields(Recipe)}
    checked: dict[str, Any] = {}
    for key, value in values.items():
        if key not in known:
            raise RequestError(f"unknown setting {key!r}; {did_you_mean(key, known)}")
        checked[key] = _convert(key, value, known[key].default)
    if checked.get("group_size", 128) == 0:
        checked["group_size"] = None
    return Recipe(**checked)


def _convert(key: str, value: Any, default: Any) -> Any:
    """Accept what YAML makes of a value; refuse another type."""
    if key == "group_size" and value is None:
        return None
    wanted = type(default)
    if wanted is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) is not wanted:
        raise RequestError(f"setting {key} takes {_article(wanted)}, not {value!r}")
    return value


def _article(wanted: type) -> str:
    return {bool: "true or false", int: "a whole number", float: "a number"}.get(wanted, "a name")


def _read_file(path: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise FileError(f"cannot read recipe {path}: {error.strerror}") from error
    except yaml.YAMLError as error:
        raise FileError(f"recipe {path} is not valid YAML: {str(error).splitlines()[0]}") from error
    if not isinstance(values, dict):
        raise FileError(f"recipe {path} must be a mapping of settings, such as 'method: gptq'")
    return values


