"""A recipe: which transform, allocator, grid and solver, with which settings. A method name is a recipe's short form.

    resolve("slim", {"bits": 2})                                  the paper's combination
    resolve("slim", {"bits": 2, "settings": ["grid=hessian"]})    the same with another grid

Everything is checked (`quantkit.recipe_rules`) before any tensor is read.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import yaml

from quantkit.algorithms.registry import METHODS
from quantkit.errors import FileError, RequestError, did_you_mean, first_line
from quantkit.recipe_rules import BASES, RESTORE_SETTINGS, check

_OPTIONAL: dict[str, type] = {  # may be null
    "bits": float,
    "bpw": float,
    "group_size": int,
    "lo": int,
    "hi": int,
    "image_weight": float,
    "vision_bits": int,
    "train_samples": int,
    "sign_rounds": int,
    "lr": float,
}
_EXPONENT = re.compile(r"[-+]?\d+[eE][-+]?\d+")


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """Resolved settings. Every field can be given as ``--set FIELD=VALUE`` or in a YAML file."""

    method: str = field(default="gptq", metadata={"help": "name the settings started from"})
    bits: float = field(default=4, metadata={"help": "bits per weight, 1 to 8 (the average, for mixed widths)"})
    bpw: float | None = field(default=None, metadata={"help": "stored bits per weight at most, instead of bits"})
    group_size: int | None = field(default=128, metadata={"help": "input columns per scale; 0: one scale per row"})
    symmetric: bool = field(default=False, metadata={"help": "zero fixed at the middle of the grid, not stored"})
    transform: str = field(default="none", metadata={"help": "what is done to the weights before they are quantized"})
    rotate_values: bool = field(
        default=False, metadata={"help": "hadamard: values too, head by head, undone by the output projection"}
    )
    allocator: str = field(default="uniform", metadata={"help": "who gets how many bits"})
    lo: int | None = field(default=None, metadata={"help": "the lower width of an allocator; none: the next below"})
    hi: int | None = field(default=None, metadata={"help": "the higher width of an allocator; none: the next above"})
    granularity: str = field(default="block", metadata={"help": "what an allocator gives widths to: block or linear"})
    tie: bool = field(default=False, metadata={"help": "equal bits for q/k/v, for gate/up, and for all experts"})
    reverse: bool = field(default=False, metadata={"help": "a control: the least important ones get the higher width"})
    entropy: str = field(default="kmeans", metadata={"help": "luq: kmeans, or histogram (cheaper)"})
    two_sided: bool = field(default=False, metadata={"help": "zd: count weights far below the mean too"})
    base: str = field(
        default="", metadata={"help": "the method of each linear, under an allocator over blocks: rtn, refined, slim"}
    )
    grid: str = field(default="auto", metadata={"help": "how scales and zeros are chosen"})
    solver: str = field(default="gptq", metadata={"help": "how codes are chosen"})
    damping: float = field(default=0.01, metadata={"help": "added to diag(H), as a fraction of its mean"})
    act_order: str = field(default="none", metadata={"help": "visit columns by descending diag(H): group or full"})
    correction: float = field(
        default=0.0, metadata={"help": "aim at the float model's outputs: 0 not, 1 all the way, 0.5 recommended"}
    )
    refine: int | str = field(
        default=0,
        metadata={
            "help": "rounds of least-squares scales and coordinate descent after it; littlebit: none, signs, qat"
        },
    )
    embedding_bits: int = field(default=0, metadata={"help": "of the input embedding: 0 (16 bits, as it is), 4 or 8"})
    head_bits: int = field(default=0, metadata={"help": "of the output head: 0, 4 or 8; tied ones need the same"})
    sequential: bool = field(default=False, metadata={"help": "quantize a block in stages, re-reading inputs"})
    criterion: str = field(default="mse", metadata={"help": "sba: mse (Hessian) or kl (the authors')"})
    row_damping: float = field(default=0.3, metadata={"help": "boa: damping across rows; the more, the nearer to gptq"})
    block_v: bool = field(default=True, metadata={"help": "boa: values by their inputs as attention mixes them"})
    v_row_factor: bool = field(default=True, metadata={"help": "boa: values by what the output projection reads"})
    qk_metric: str = field(
        default="outputs", metadata={"help": "boa: errors of queries and keys count in outputs or in logits (paper)"}
    )
    center_keys: bool = field(default=True, metadata={"help": "boa, qk_metric=logits: without each text's mean key"})
    row_order: bool = field(default=True, metadata={"help": "boa: visit the rows of a head by descending importance"})
    joint_rows: bool = field(default=False, metadata={"help": "boa: rows of a block not against each other (turboboa)"})
    late_grids: bool = field(default=True, metadata={"help": "boa: scales fitted on corrected rows; false: beforehand"})
    keep_ratio: float = field(
        default=1.0, metadata={"help": "share of the query and key weights kept as low-rank factors; 1: no factors"}
    )
    factor_all: bool = field(
        default=False,
        metadata={"help": "casp: factors in every block (paper), not only where their bytes are worth it"},
    )
    qk_bits: int = field(default=3, metadata={"help": "of the low-rank factors of queries and keys"})
    tokens: str = field(default="all", metadata={"help": "pictures: tokens that statistics count: all, text or image"})
    image_weight: float | None = field(
        default=None,
        metadata={
            "help": "pictures: what an image token counts, a text token 1; none: all of them as much as all text"
        },
    )
    vision_bits: int | None = field(
        default=None, metadata={"help": "also round vision tower and projector: 8 or 4; none: they stay in 16 bits"}
    )
    restore_steps: int = field(default=100, metadata={"help": "transform=restore: tuning steps, two sequences each"})
    restore_rank: int = field(default=64, metadata={"help": "transform=restore: rank of the adapters"})
    restore_lr: float = field(default=1e-4, metadata={"help": "transform=restore: highest learning rate"})
    salient_bits: int = field(default=4, metadata={"help": "ptq161: width of the salient channels' codes, 2 to 8"})
    salience: str = field(
        default="hessian", metadata={"help": "ptq161: salient channels by hessian, rms or absmax (paper)"}
    )
    compensate: bool = field(default=True, metadata={"help": "ptq161: signs with compensation; false: plain (paper)"})
    block_steps: int = field(
        default=0, metadata={"help": "ptq161: gradient steps on the scales of each block at most; 0: none"}
    )
    block_lr: float = field(default=1e-3, metadata={"help": "ptq161: learning rate of block_steps"})
    block_scales: str = field(
        default="all", metadata={"help": "ptq161: trained are all scales, or those of the binary part (paper)"}
    )
    block_angular: bool = field(default=True, metadata={"help": "ptq161: angles count in the loss of block_steps"})
    paths: int = field(default=2, metadata={"help": "littlebit: 2 with the residual's factors, 1 without"})
    sign_rounds: int | None = field(
        default=None,
        metadata={"help": "littlebit: rounds of refine=signs, 0: Dual-SVID; none: 4, or 1 before training"},
    )
    steps: int = field(default=500, metadata={"help": "refine=qat: optimizer steps at most"})
    batch: int = field(default=8, metadata={"help": "refine=qat: sequences at a time, on each GPU"})
    accumulate: int = field(default=1, metadata={"help": "refine=qat: such batches per step"})
    lr: float | None = field(
        default=None,
        metadata={"help": "refine=qat: highest learning rate, of the signs' latents; none: 4e-4 / bits"},
    )
    intermediate: float = field(default=1.0, metadata={"help": "refine=qat: weight of the blocks' outputs in the loss"})
    also_train: str = field(
        default="norms",
        metadata={"help": "refine=qat: beside signs and scales: none, norms, all (norms, embedding and head)"},
    )
    train_samples: int | None = field(
        default=None, metadata={"help": "refine=qat: training sequences of the calibration text; none: --n-samples"}
    )
    check_every: int = field(default=50, metadata={"help": "refine=qat: steps between held-out losses and checkpoints"})
    patience: int = field(default=5, metadata={"help": "refine=qat: checks without improvement that end it; 0: never"})

    def __post_init__(self) -> None:
        if math.isfinite(self.bits) and self.bits == int(self.bits):
            object.__setattr__(self, "bits", int(self.bits))  # 2.0 is 2, in JSON and in names too
        check(self)

    @property
    def stores_signs(self) -> bool:
        """Weights become sign factors; `bits` are then all that is stored, as `bpw` is."""
        return self.solver == "littlebit"

    @property
    def trains(self) -> bool:
        """A training stage follows the walk over the blocks."""
        return self.refine == "qat"

    @property
    def highest_lr(self) -> float:
        """Of training. The fewer bits, the more of the signs of the start have to turn: see docs/log.md."""
        return 4e-4 / (self.bits if self.bpw is None else self.bpw) if self.lr is None else self.lr

    @property
    def rounds_of_signs(self) -> int:
        """Of the refinement of sign factors; few before training, which overrides most of it."""
        if self.sign_rounds is not None:
            return self.sign_rounds
        return 1 if self.trains else 4

    @property
    def refine_rounds(self) -> int:
        """Of grids and codes; 0 where refine names something else."""
        return self.refine if isinstance(self.refine, int) else 0

    @property
    def mixes_widths(self) -> bool:
        """Blocks or linears get different widths under a budget (inside a linear the width is constant)."""
        return self.allocator not in ("uniform", "sba")

    @property
    def width(self) -> int:
        """The whole number of bits of a linear; of a recipe that mixes widths, take that of `at`."""
        assert self.bits == int(self.bits)
        return int(self.bits)

    def at(self, bits: int, group_size: int | None = -1, keep_ratio: float | None = None) -> Recipe:
        """The recipe of one linear, once an allocator has given it a width.

        Args:
            group_size, keep_ratio: what it gave besides, where it chooses these; left out they stay as they are.
        """
        inner = "sba" if self.base and METHODS[self.base].defaults.get("allocator") == "sba" else "uniform"
        fixed: dict[str, Any] = {"method": "", "base": "", "bpw": None, "lo": None, "hi": None, "reverse": False}
        fixed["factor_all"] = False
        chosen: dict[str, Any] = {} if group_size == -1 else {"group_size": group_size}
        chosen |= {} if keep_ratio is None else {"keep_ratio": keep_ratio}
        return replace(self, bits=bits, allocator=inner, **fixed, **chosen)

    @property
    def chooses_groups(self) -> bool:
        """Each linear is stored in groups of `group_size` or with one scale per row, whichever pays."""
        return self.allocator == "adaptive"

    @property
    def mixes_groups(self) -> bool:
        """Column groups of a linear get different widths."""
        return self.allocator == "sba" or self.base == "slim"

    @property
    def factorizes(self) -> bool:
        """Queries and keys are stored as low-rank factors."""
        return self.keep_ratio < 1

    @property
    def factor_ratios(self) -> tuple[float, ...]:
        """What may be kept of a block's query and key weights: 1 is all of them, as codes."""
        if not self.factorizes or self.allocator != "casp" or self.factor_all:
            return (self.keep_ratio,)
        return (1.0, *(self.keep_ratio * more for more in (1, 2) if self.keep_ratio * more < 1))

    def for_factors(self, group_size: int) -> Recipe:
        """The recipe of one low-rank factor."""
        plain: dict[str, Any] = {"method": "", "base": "", "bpw": None, "lo": None, "hi": None, "reverse": False}
        plain["factor_all"] = False
        sizes: dict[str, Any] = {"bits": self.qk_bits, "group_size": group_size, "keep_ratio": 1.0}
        return replace(self, allocator="uniform", **plain, **sizes)

    @property
    def budget_name(self) -> str:
        """``3 bits``, ``2.5 bits`` or ``2.8 bpw``."""
        return f"{self.bits} bits" if self.bpw is None else f"{self.bpw:g} bpw"

    @property
    def grid_name(self) -> str:
        """The grid with ``auto`` resolved."""
        if self.grid != "auto":
            return self.grid
        return "hessian" if self.bits < 4 and self.solver != "rtn" else "minmax"

    @property
    def weighs_tokens(self) -> bool:
        """It was asked that image and text tokens count differently, so the calibration set must hold pictures."""
        return self.tokens != "all" or self.image_weight not in (None, 1)

    @property
    def needs_calibration(self) -> bool:
        scores = self.allocator not in ("uniform", "zd", "random")  # these need no activations
        if self.stores_signs:
            return self.refine != "none"
        if self.transform == "restore":
            return True
        return (
            self.solver != "rtn" or self.refine_rounds > 0 or scores or self.grid_name == "hessian" or self.factorizes
        )

    def without_transform(self) -> Recipe:
        """Of the first pass of ``transform=restore``."""
        defaults: dict[str, Any] = {item.name: item.default for item in fields(self) if item.name in RESTORE_SETTINGS}
        return replace(self, transform="none", **defaults)

    @property
    def follows_float_model(self) -> bool:
        """The float model's hidden states are kept beside those of the quantized one."""
        return self.correction > 0 or self.block_steps > 0

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | ({} if self.bpw is None else {"bits": None})


def resolve(
    method: str | None = None,
    *,
    bits: float | None = None,
    bpw: float | None = None,
    group_size: int | None = None,
    settings: Sequence[str] = (),
    file: Path | None = None,
) -> Recipe:
    """Method defaults, then the file, then the arguments, then ``settings`` (``"key=value"`` strings).

    Args:
        bits, bpw: the budget, one of the two; None keeps what method or file say.
        group_size: 0 means one group per row; None keeps what method or file say.

    Raises:
        RequestError: an unknown name or setting, a value out of range, a combination that makes no sense.
        FileError: the recipe file cannot be read.
    """
    values = _read_file(file) if file else {}
    given: dict[str, Any] = {"method": method, "bits": bits, "bpw": bpw, "group_size": group_size}
    given = {name: value for name, value in given.items() if value is not None}
    for item in settings:
        key, found, text = item.partition("=")
        if not found:
            raise RequestError(f"--set takes KEY=VALUE, not {item!r}")
        given[key.strip()] = _read_value(item, text)
    for name, other in (("bits", "bpw"), ("bpw", "bits")):
        if given.get(name) is not None:
            values.pop(other, None)  # what the file says about the budget is replaced, in either unit
    values |= given
    if values.get("bits") is not None and values.get("bpw") is not None:
        raise RequestError(
            "the budget is either bits (of the codes, on average) or bpw (of all that is stored), not both"
        )
    name = values.get("method", _default_method(values))
    if not isinstance(name, str) or name not in METHODS:
        raise RequestError(f"unknown method {name!r}; {did_you_mean(str(name), METHODS)}")
    base = METHODS[values["base"]].defaults if values.get("base") in BASES else {}
    inherited = {key: value for key, value in base.items() if key != "allocator"}
    return recipe_from_json({"method": name, **inherited, **METHODS[name].defaults, **values})


def _default_method(values: Mapping[str, Any]) -> str:
    """``refined`` below 4 bits, where it pays; plain GPTQ from there on, and for who chooses a solver himself."""
    budget = values.get("bits", values.get("bpw"))
    low = isinstance(budget, int | float) and budget < 4
    return "refined" if low and "solver" not in values else "gptq"


def recipe_from_json(values: Mapping[str, Any]) -> Recipe:
    """A recipe from plain values; unknown keys and wrong types raise `RequestError` by name."""
    known = {item.name: item for item in fields(Recipe)}
    checked: dict[str, Any] = {}
    for key, value in values.items():
        if key not in known:
            raise RequestError(f"unknown setting {key!r}; {did_you_mean(str(key), known)}")
        checked[key] = _convert(key, value, known[key].default)
    if checked.get("group_size", 128) == 0:
        checked["group_size"] = None
    return Recipe(**checked)


def _convert(key: str, value: Any, default: Any) -> Any:
    """Accept what YAML makes of a value; refuse another type."""
    if value is None and key in _OPTIONAL:
        return default if key == "bits" else None
    if key == "refine" and isinstance(value, str):
        return value
    wanted = _OPTIONAL.get(key, type(default))
    if wanted is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if wanted is float and isinstance(value, str) and _EXPONENT.fullmatch(value):
        return float(value)  # 1e-3: YAML 1.1 takes a number without a point for text
    if type(value) is not wanted:
        raise RequestError(f"setting {key} takes {_article(wanted)}, not {value!r}")
    return value


def _article(wanted: type) -> str:
    return {bool: "true or false", int: "a whole number", float: "a number"}.get(wanted, "a name")


def _read_value(item: str, text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise RequestError(f"--set {item!r}: the value is not valid YAML; put it in quotes") from error


def _read_file(path: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise FileError(f"cannot read recipe {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise FileError(f"recipe {path} is not a text file: {error.reason} at byte {error.start}") from error
    except yaml.YAMLError as error:
        raise FileError(f"recipe {path} is not valid YAML: {first_line(error)}") from error
    if not isinstance(values, dict):
        raise FileError(f"recipe {path} must be a mapping of settings, such as 'method: gptq'")
    return values
