"""One row times packed signs, with integers beside them (sign_rows_triton.py): the launch behind `make_ready`'s.

Its first weights are on their way before the row is ready.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from quantkit.formats.grouped_int import GroupedIntSpec
from quantkit.kernels.gemv import row_threads
from quantkit.kernels.launch import early_launch
from quantkit.kernels.planar import is_paired, padded_rows, planar_segments
from quantkit.kernels.planar_matmul import constant_zero, triton_kernels
from quantkit.kernels.ready_row import SignParts

MAX_COPIES = 3
COPY_ROWS = 32  # of a program, at most
_WIDTHS = (1, 2, 4, 8)
_MANY_ROWS = 64 * 132  # a program of 64 rows for each multiprocessor; two fit
_MAX_WARPS = 16

Tensors = dict[str, Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class SignRowsConfig:
    """Shape of a launch of the product: 16 * ``tiles`` rows for a program."""

    tiles: int
    warps: int


def has_sign_rows(parts: SignParts, starts: Sequence[int] = ()) -> bool:
    """Whether the kernels take these weights, and copies that start at these rows."""
    fits = not any(start % COPY_ROWS for start in starts) and len(starts) < MAX_COPIES
    if parts.integers is None:
        return fits
    segments = planar_segments(parts.integers)
    return fits and is_paired(parts.integers) and len(segments) == 1 and segments[0].bits in _WIDTHS


def choose_sign_rows(parts: SignParts, starts: Sequence[int] = ()) -> SignRowsConfig:
    """The launch shape for weights, as measured on an H200 (docs/log.md)."""
    warps = min(_MAX_WARPS, 1 << (parts.blocks - 1).bit_length())  # one for each block of columns
    if parts.integers is None:
        return SignRowsConfig(tiles=1, warps=max(2, warps))
    one_wave = _MANY_ROWS < parts.signs.out_features <= 2 * _MANY_ROWS and not any(start % 64 for start in starts)
    return SignRowsConfig(tiles=4 if one_wave and warps <= 4 else 2, warps=max(4, warps))


def sign_rows(
    ready: Tensor,
    numbers: Tensor,
    parts: SignParts,
    signs: Tensors,
    integers: Tensors | None,
    bias: Tensor | None,
    out: Tensor,
    starts: Sequence[int] = (),
) -> None:
    """Signs and integers side by side times one row, on a GPU.

    Args:
        ready, numbers: of `make_ready`.
        parts: weights for which `has_sign_rows` holds.
        signs: planar ``words``, ``scales`` [rows] and, if there are, ``means`` [rows], of any float dtype. The scales
            of the specs do not count.
        integers: what `planar.to_planar` made of them, or None.
        bias: ``[out]`` of any float dtype, or None.
        out: ``[1, out]`` of any float dtype, written. Sums are float32; x is taken in 16 bits relative to the largest
            of 1024 columns with signs, or of some 32 that are multiplied by integers.
        starts: first rows of the second copy and the third.
    """
    config = choose_sign_rows(parts, starts)
    grid, arguments = rows_launch(ready, numbers, parts, signs, integers, bias, out, starts, config)
    with torch.cuda.device(out.device):
        sign_rows_kernels().sign_rows_kernel[grid](**arguments, ASM=True, **early_launch(out.device))


def rows_launch(
    ready: Tensor,
    numbers: Tensor,
    parts: SignParts,
    signs: Tensors,
    integers: Tensors | None,
    bias: Tensor | None,
    out: Tensor,
    starts: Sequence[int],
    config: SignRowsConfig,
) -> tuple[tuple[int], dict[str, Any]]:
    """Grid and arguments of `sign_rows_kernel`, all but ASM."""
    n_rows = parts.signs.out_features
    second, third = (*starts, n_rows, n_rows)[: MAX_COPIES - 1]
    arguments = {
        "ready": ready,
        "numbers": numbers,
        "signs": signs["words"].view(torch.int32),
        "sign_scales": signs["scales"],
        "sign_means": signs.get("means", signs["scales"]),
        **_integer_arguments(parts.integers, integers, signs, config),
        "bias": out if bias is None else bias,
        "y": out,
        "second": second,
        "third": third,
        "n_ready": ready.shape[1],
        "n_numbers": numbers.shape[1],
        "n_rows": n_rows,
        "stride2": padded_rows(parts.signs) // 2,
        "n_words8": parts.words8,
        "n_blocks": parts.blocks,
        "HAS_MEANS": "means" in signs,
        "BLOCKS": 1 << (parts.blocks - 1).bit_length(),
        "ONCE": parts.blocks <= config.warps,
        "HAS_BIAS": bias is not None,
        "TILES": config.tiles,
        "WARPS": config.warps,
        "num_warps": config.warps,
        "enable_fp_fusion": True,
    }
    return (-(-n_rows // (16 * config.tiles)),), arguments


def _integer_arguments(
    spec: GroupedIntSpec | None, tensors: Tensors | None, signs: Tensors, config: SignRowsConfig
) -> dict[str, Any]:
    if spec is None or tensors is None:
        nothing = dict.fromkeys(("words", "scales", "zeros"), signs["scales"])
        numbers = {"n_threads": 0, "stride16": 0, "STEPS": 0}
        return nothing | numbers | {"BITS": 0, "WIDTH": 16, "GROUP": 1, "ZERO": 0.0, "HALF": False}
    segment = planar_segments(spec)[0]
    scales = tensors["planar_scales"].flatten().view(torch.int32)
    zeros = tensors.get("planar_zeros")
    half = zeros is not None and zeros.dtype == torch.float16
    if zeros is not None:
        zeros = zeros.flatten().view(torch.int32 if half else torch.int16)
    threads = row_threads(segment)
    return {
        "words": tensors["planar"].view(torch.int32),
        "scales": scales,
        "zeros": scales if zeros is None else zeros,
        "n_threads": threads,
        "stride16": segment.row_words // 16,
        "BITS": segment.bits,
        "WIDTH": segment.plane_width,
        "GROUP": spec.group_size,
        "ZERO": None if zeros is not None else constant_zero(spec, segment),
        "HALF": half,
        "STEPS": -(-threads * config.tiles // (4 * config.warps)),
    }


def sign_rows_kernels() -> Any:
    """The module of the kernels. Raises `RequestError` where Triton is not installed."""
    return triton_kernels("sign_rows_triton")
