"""What a recipe may say: ranges, and combinations that make sense. All is refused here, before a tensor is read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import TYPE_CHECKING

from quantkit.algorithms.pages import BOA_SETTINGS, TRAINING_SETTINGS
from quantkit.algorithms.registry import ALLOCATORS, GRID_CHOICES, METHODS, REFINEMENTS, SOLVERS, TRANSFORMS
from quantkit.errors import RequestError, did_you_mean

if TYPE_CHECKING:
    from quantkit.recipe import Recipe

_CHOICES: dict[str, tuple[str, ...]] = {
    "transform": tuple(TRANSFORMS),
    "allocator": tuple(ALLOCATORS),
    "granularity": ("block", "linear"),
    "entropy": ("kmeans", "histogram"),
    "grid": tuple(GRID_CHOICES),
    "solver": tuple(SOLVERS),
    "act_order": ("none", "group", "full"),
    "criterion": ("mse", "kl"),
    "qk_metric": ("outputs", "logits"),
    "tokens": ("all", "text", "image"),
    "salience": ("hessian", "rms", "absmax"),
    "block_scales": ("all", "paper"),
    "also_train": ("none", "norms", "all"),
}
BASES = ("gptq", "rtn", "refined", "slim")  # methods without an allocator over blocks, for one linear after the other
_LINEAR_ALLOCATORS = ("zd", "error", "adaptive", "random")  # those that can tell the linears of a block apart
_LITTLEBIT_SETTINGS = ("paths", "sign_rounds", *TRAINING_SETTINGS)
_NOT_LITTLEBIT = (
    "symmetric",
    "allocator",
    "grid",
    "act_order",
    "correction",
    "sequential",
    "group_size",
    "keep_ratio",
)
RESTORE_SETTINGS = ("restore_steps", "restore_rank", "restore_lr")
_PTQ161_SETTINGS = (
    "salient_bits",
    "salience",
    "compensate",
    "block_steps",
    "block_lr",
    "block_scales",
    "block_angular",
)


def check(recipe: Recipe) -> None:
    """Refuse values out of range and combinations that make no sense.

    Raises:
        RequestError: with the reason.
    """
    for name, known in _CHOICES.items():
        value = getattr(recipe, name)
        if value not in known:
            raise RequestError(f"unknown {name} {value!r}; {did_you_mean(str(value), known)}")
    low, high = METHODS[recipe.method].bits if recipe.method in METHODS else (1, 8)
    if not recipe.stores_signs and not 1 <= recipe.bits <= 8:
        below = "; --method littlebit goes below 1" if 0 < recipe.bits < 1 else ""
        raise RequestError(f"bits must be 1 to 8, not {recipe.bits:g}{below}")
    if not low <= recipe.bits <= high:
        raise RequestError(f"{recipe.method} works at {low:g} to {high:g} bits, not {recipe.bits:g}")
    if recipe.group_size is not None and recipe.group_size < 1:
        raise RequestError(f"group_size must be positive, or 0 for one group per row, not {recipe.group_size}")
    for name in ("damping", "row_damping"):
        if not 0 <= (value := getattr(recipe, name)) <= 100:
            raise RequestError(f"{name} is a fraction of mean(diag(H)), 0 to 100, not {value:g}")
    for name in ("embedding_bits", "head_bits"):
        if getattr(recipe, name) not in (0, 4, 8):
            raise RequestError(f"{name} is 0 (16 bits, as it is), 4 or 8, not {getattr(recipe, name)}")
    _check_littlebit(recipe)
    _check_combination(recipe)
    _check_modalities(recipe)
    _check_factors(recipe)
    _check_boa(recipe)
    _check_ptq161(recipe)
    _check_widths(recipe)


def _check_littlebit(recipe: Recipe) -> None:
    if not recipe.stores_signs:
        if isinstance(recipe.refine, str):
            raise RequestError(f"refine is a number of rounds, not {recipe.refine!r}; names go with --method littlebit")
        _refuse_changed(recipe, _LITTLEBIT_SETTINGS, "is a setting of solver=littlebit; use --method littlebit")
        return
    if not isinstance(recipe.refine, str) or recipe.refine not in REFINEMENTS:
        known = ", ".join(REFINEMENTS)
        raise RequestError(f"refine is one of {known} with solver=littlebit, not {recipe.refine!r}")
    for name in _NOT_LITTLEBIT:
        if getattr(recipe, name) != (None if name == "group_size" else recipe.__dataclass_fields__[name].default):
            raise RequestError(f"{name} is about codes on a grid; solver=littlebit stores sign factors")
    if recipe.bpw is not None and not 0.05 <= recipe.bpw <= 2:
        raise RequestError(f"littlebit works at 0.05 to 2 bits, not {recipe.bpw:g}")
    if recipe.paths not in (1, 2):
        raise RequestError(f"paths is 1, or 2 with the residual, not {recipe.paths}")
    if recipe.sign_rounds is not None and not 0 <= recipe.sign_rounds <= 100:
        raise RequestError(f"sign_rounds is a number of rounds, 0 to 100, not {recipe.sign_rounds}")
    _check_training(recipe)


def _check_training(recipe: Recipe) -> None:
    if not recipe.trains:
        _refuse_changed(recipe, TRAINING_SETTINGS, "is a setting of training; add --set refine=qat")
        return
    if recipe.transform != "none":
        raise RequestError(f"transform={recipe.transform} does not go with refine=qat, which trains the model as it is")
    for name in ("steps", "batch", "accumulate", "check_every"):
        if getattr(recipe, name) < 1:
            raise RequestError(f"{name} must be at least 1, not {getattr(recipe, name)}")
    if recipe.train_samples is not None and recipe.train_samples < 2:
        raise RequestError(f"train_samples must be at least 2 (one is held out), not {recipe.train_samples}")
    if recipe.lr is not None and not 0 < recipe.lr <= 1:
        raise RequestError(f"lr is a learning rate above 0, at most 1, not {recipe.lr:g}")
    if recipe.intermediate < 0 or recipe.patience < 0:
        raise RequestError("intermediate and patience cannot be negative")
    if recipe.also_train == "all" and (recipe.embedding_bits or recipe.head_bits):
        raise RequestError(
            "also_train=all trains embedding and head in 16 bits, not 8 or 4: use also_train=norms with embedding_bits"
        )


def _refuse_changed(recipe: Recipe, names: Sequence[str], why: str) -> None:
    for item in fields(recipe):
        if item.name in names and getattr(recipe, item.name) != item.default:
            raise RequestError(f"{item.name} {why}")


def _check_combination(recipe: Recipe) -> None:
    if recipe.allocator == "sba" and not 2 <= recipe.bits <= 7:
        raise RequestError(f"allocator=sba mixes bits - 1 and bits + 1: it works at 2 to 7 bits, not {recipe.bits}")
    if recipe.allocator == "sba" and recipe.symmetric:
        raise RequestError("allocator=sba with symmetric grids is not supported: its 1-bit groups need a free zero")
    if recipe.allocator == "sba" and recipe.group_size is None:
        raise RequestError("allocator=sba needs groups: its unit is a group of columns; use --group-size 128")
    _check_restore(recipe)
    if recipe.rotate_values and recipe.transform != "hadamard":
        raise RequestError("rotate_values is a part of transform=hadamard; set both")
    if recipe.act_order != "none" and recipe.solver == "rtn":
        raise RequestError("act_order orders the compensation of errors; solver=rtn compensates none")
    if not 0 <= recipe.correction <= 1:
        raise RequestError(f"correction is a share of the way, 0 to 1, not {recipe.correction:g}")
    if recipe.correction and recipe.solver == "rtn":
        raise RequestError("correction changes what a compensating solver aims at; solver=rtn compensates nothing")
    if isinstance(recipe.refine, int) and not 0 <= recipe.refine <= 100:
        raise RequestError(f"refine is a number of rounds, 0 to 100, not {recipe.refine}")


def _check_modalities(recipe: Recipe) -> None:
    if recipe.vision_bits not in (None, 4, 8):
        raise RequestError(f"vision_bits must be 8 or 4, or none for 16 bits, not {recipe.vision_bits}")
    if recipe.image_weight is not None and not 0 < recipe.image_weight <= 1000:
        raise RequestError(
            f"image_weight must be above 0 and at most 1000, not {recipe.image_weight:g}; "
            "to leave image tokens out, use tokens=text"
        )
    if not recipe.weighs_tokens:
        return
    if recipe.tokens != "all" and recipe.image_weight is not None:
        raise RequestError(f"image_weight weighs image tokens against text tokens; tokens={recipe.tokens} keeps one")
    if not recipe.needs_calibration:
        raise RequestError("tokens and image_weight choose what statistics count; this recipe gathers none")
    if recipe.solver == "boa":
        raise RequestError("solver=boa looks at whole attention maps; tokens and image_weight do not go with it")


def _check_factors(recipe: Recipe) -> None:
    if not 0 < recipe.keep_ratio <= 1:
        raise RequestError(f"keep_ratio is a share of the weights, above 0 and at most 1, not {recipe.keep_ratio:g}")
    if not 1 <= recipe.qk_bits <= 8:
        raise RequestError(f"qk_bits must be 1 to 8, not {recipe.qk_bits}")
    if recipe.base and not recipe.mixes_widths:
        raise RequestError(f"base is the method below an allocator over blocks; use --method {recipe.base} alone")
    if recipe.base and recipe.base not in BASES:
        raise RequestError(f"base={recipe.base} cannot be combined; {did_you_mean(recipe.base, BASES)}")
    if recipe.base:
        recipe.at(2)  # its own checks
    if recipe.factor_all and not (recipe.factorizes and recipe.allocator == "casp"):
        raise RequestError("factor_all leaves allocator=casp no choice between codes and factors; set keep_ratio too")
    if not recipe.factorizes:
        return
    if recipe.solver == "boa":
        raise RequestError("solver=boa rounds queries and keys head by head; low-rank factors have none, so choose")
    if recipe.granularity == "linear" or recipe.allocator == "error":
        raise RequestError(
            "keep_ratio fixes what queries and keys store; use an allocator over blocks: casp, lim, zd, luq, random"
        )


def _check_boa(recipe: Recipe) -> None:
    if recipe.solver == "boa":
        return
    _refuse_changed(recipe, BOA_SETTINGS, "is a setting of solver=boa; use --method boa")


def _check_restore(recipe: Recipe) -> None:
    if recipe.transform != "restore":
        _refuse_changed(recipe, RESTORE_SETTINGS, "is a setting of transform=restore; set both")
        return
    for name in ("restore_steps", "restore_rank"):
        if getattr(recipe, name) < 1:
            raise RequestError(f"{name} must be at least 1, not {getattr(recipe, name)}")
    if not 0 < recipe.restore_lr <= 1:
        raise RequestError(f"restore_lr is a learning rate above 0, at most 1, not {recipe.restore_lr:g}")


def _check_ptq161(recipe: Recipe) -> None:
    if recipe.solver != "ptq161":
        _refuse_changed(recipe, _PTQ161_SETTINGS, "is a setting of solver=ptq161; use --method ptq161")
        return
    if recipe.allocator != "uniform" or recipe.bpw is not None:
        raise RequestError("solver=ptq161 spends its bits on salient channels; give it --bits, and no allocator")
    if not 2 <= recipe.salient_bits <= 8:
        raise RequestError(f"salient_bits is a width of 2 to 8 bits, not {recipe.salient_bits}")
    if recipe.bits > recipe.salient_bits:
        raise RequestError(
            f"solver=ptq161 mixes signs and {recipe.salient_bits}-bit channels: 1 to {recipe.salient_bits} bits on "
            f"average, not {recipe.bits:g}"
        )
    if recipe.group_size is not None:
        raise RequestError("solver=ptq161 has one scale of each kind per row; use --group-size 0")
    if recipe.symmetric:
        raise RequestError("solver=ptq161 needs a free zero for its salient channels; leave symmetric false")
    if recipe.factorizes:
        raise RequestError("solver=ptq161 stores signs, not low-rank factors; leave keep_ratio 1")
    if recipe.act_order != "none":
        raise RequestError("solver=ptq161 has an order of its own, salient channels last; leave act_order none")
    if not 0 <= recipe.block_steps <= 1_000_000:
        raise RequestError(f"block_steps is a number of steps, 0 or more, not {recipe.block_steps}")
    if not 0 < recipe.block_lr <= 1:
        raise RequestError(f"block_lr is a learning rate above 0, at most 1, not {recipe.block_lr:g}")


def _check_widths(recipe: Recipe) -> None:
    if recipe.solver == "ptq161" or recipe.stores_signs:
        return
    if not recipe.mixes_widths:
        budget = f"--bpw {recipe.bpw:g}" if recipe.bpw is not None else f"--bits {recipe.bits}"
        if recipe.bpw is not None or recipe.bits != int(recipe.bits):
            raise RequestError(
                f"{budget} needs an allocator: allocator={recipe.allocator} gives every layer the same whole number "
                "of bits on average; use --method layerwise, or --set allocator=lim, zd, luq, error or adaptive"
            )
        for name, unset in (("lo", None), ("hi", None), ("reverse", False)):
            if getattr(recipe, name) is not unset:
                raise RequestError(
                    f"{name} is a setting of the allocators lim, zd, luq, casp, error, adaptive and random"
                )
        return
    lo = 1 if recipe.lo is None else recipe.lo
    hi = 8 if recipe.hi is None else recipe.hi
    if not 1 <= lo < hi <= 8:
        raise RequestError(f"lo and hi are widths from 1 to 8, lo below hi, not {lo} and {hi}")
    if recipe.bpw is None and not lo <= recipe.bits <= hi:
        raise RequestError(f"an average of {recipe.bits} bits does not lie between lo={lo} and hi={hi}")
    if recipe.granularity == "linear" and recipe.allocator not in _LINEAR_ALLOCATORS:
        raise RequestError(
            f"allocator={recipe.allocator} scores what enters and leaves whole blocks; "
            f"with granularity=linear use allocator={' or '.join(_LINEAR_ALLOCATORS)}"
        )
    if recipe.reverse and recipe.allocator in ("error", "adaptive", "casp"):
        raise RequestError(
            f"reverse turns a ranking around; allocator={recipe.allocator} weighs losses against bytes instead"
        )
