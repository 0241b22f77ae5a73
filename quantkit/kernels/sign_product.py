"""One row of x times packed signs in one launch, x made ready inside (sign_product_triton.py).

Its weights are on their way before x is there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from quantkit.formats.grouped_int import GroupedIntSpec
from quantkit.kernels.launch import early_launch
from quantkit.kernels.planar import planar_segments
from quantkit.kernels.planar_matmul import triton_kernels
from quantkit.kernels.ready_row import Source

MAX_COPIES = 3  # of unequally many rows
_WARP_WORDS = 32  # 1024 columns
_MAX_WARPS = 16
_REGISTERS = 128
_MOST_ROWS = 32  # of a program
_FEW_ROWS, _SHORT_ROW = 4096, 96  # rows, and words of 16 bits, below which programs of 16 rows are faster
_FEW_WARPS = 4  # likewise where columns have scales


@dataclass(frozen=True, slots=True, kw_only=True)
class SignProductConfig:
    """Shape of one launch: tiles of 16 * ``tiles`` rows; ``warps`` share the columns."""

    tiles: int
    warps: int


def has_sign_product(spec: GroupedIntSpec) -> bool:
    """Whether the kernel takes the weight."""
    return spec.n_groups == 1 or spec.group_size % (2 * planar_segments(spec)[0].plane_width) == 0


def takes_source(spec: GroupedIntSpec, kind: str, n_columns: int) -> bool:
    """Whether the kernel makes the row itself: a norm's program has all columns at once, and no row is padded."""
    return kind == "row" or (n_columns % 8 == 0 and (kind == "gated" or _blocks(spec) <= _MAX_WARPS))


def takes_copies(starts: Sequence[int]) -> bool:
    """Whether parts of the rows that start there may take rows of x of their own."""
    return len(starts) < MAX_COPIES and not any(start % _MOST_ROWS for start in starts)


def _blocks(spec: GroupedIntSpec) -> int:
    """Of 1024 columns, that a row has."""
    return -(-planar_segments(spec)[0].row_words // (2 * _WARP_WORDS))


def choose_sign_product(spec: GroupedIntSpec, scaled: bool) -> SignProductConfig:
    """The launch shape for a weight whose columns are ``scaled`` or not, as measured on an H200 (docs/log.md)."""
    warps = min(_MAX_WARPS, 1 << (_blocks(spec) - 1).bit_length())
    few = spec.out_features <= _FEW_ROWS and planar_segments(spec)[0].row_words <= _SHORT_ROW
    return SignProductConfig(tiles=1 if few or (scaled and warps <= _FEW_WARPS) else 2, warps=warps)


def sign_product(
    source: Source,
    spec: GroupedIntSpec,
    words: Tensor,
    scales: Tensor,
    columns: Tensor | None,
    bias: Tensor | None,
    dtype: torch.dtype,
    starts: Sequence[int] = (),
) -> tuple[Tensor, Tensor]:
    """Signs times one row, or each of a few, on a GPU.

    Args:
        source: the row; if there are ``starts``, several one after the other.
        spec: a weight for which `has_sign_product` holds. Its scales do not count.
        words: planar words of it.
        scales: of rows, any float dtype, ``[out]``; with several groups ``[groups, out]``.
        columns: float16 ``[copies, in]``, scales of columns, each for equally many rows; or None.
        bias: ``[out]`` of any float dtype, or None.
        dtype: of the result; sums are float32. x is taken in 16 bits relative to the largest of 1024 columns.
        starts: first rows of the weight that take the second row of x, and the third; without ``columns``.

    Returns:
        The product, and x + update of a norm (otherwise x).
    """
    config = choose_sign_product(spec, columns is not None)
    out = torch.empty(len(source.x), spec.out_features, dtype=dtype, device=words.device)
    residual = source.x if source.update is None else torch.empty_like(source.x)
    grid, arguments = product_launch(source, spec, words, scales, columns, bias, out, residual, config, starts)
    with torch.cuda.device(words.device):  # Triton launches on the current device
        kernels = triton_kernels("sign_product_triton")
        kernels.sign_product_kernel[grid](**arguments, ASM=True, **early_launch(words.device))
    return out, residual


def product_launch(
    source: Source,
    spec: GroupedIntSpec,
    words: Tensor,
    scales: Tensor,
    columns: Tensor | None,
    bias: Tensor | None,
    out: Tensor,
    residual: Tensor,
    config: SignProductConfig,
    starts: Sequence[int] = (),
) -> tuple[tuple[int, int], dict[str, Any]]:
    """Grid and arguments of `sign_product_kernel`, all but ASM."""
    segment, n_rows = planar_segments(spec)[0], spec.out_features
    x, update, weight = (None if each is None else _as_words(each) for each in (source.x, source.update, source.weight))
    assert x is not None
    n_columns = 2 * x.shape[-1] // (2 if source.kind == "gated" else 1 + len(starts))
    second, third = (*starts, n_rows, n_rows)[: MAX_COPIES - 1]
    arguments = {
        "x": x,
        "update": x if update is None else update,
        "weight": x if weight is None else weight,
        "residual": x if update is None else residual.view(torch.int32),
        "columns": x if columns is None else columns.view(torch.int32),
        "words": words.view(torch.int32),
        "scales": scales,
        "bias": out if bias is None else bias,
        "y": out,
        "eps": source.eps,
        "n_columns8": n_columns // 8,
        "n_scales16": 0 if columns is None else columns.shape[1] // 16,
        "n_words8": segment.row_words // 16,
        "n_rows": n_rows,
        "span": spec.group_size,
        "each": n_rows if columns is None else n_rows // len(columns),
        "second": second,
        "third": third,
        "scale_stride": scales.stride(0) if spec.n_groups > 1 else 0,
        "stride4": x.shape[-1] // 4,
        "SOURCE": source.kind,
        "HAS_UPDATE": update is not None,
        "SCALED": columns is not None,
        "PATHS": spec.n_groups,
        "WIDTH": segment.plane_width,
        "HAS_BIAS": bias is not None,
        "BF16": source.x.dtype == torch.bfloat16,
        "TILES": config.tiles,
        "WARPS": config.warps,
        "PASSES": -(-_blocks(spec) // config.warps),
        "num_warps": config.warps,
        # left to itself, the compiler passes the operands of half of the products through the same four registers
        "maxnreg": _REGISTERS if columns is None else None,
        "enable_fp_fusion": True,
    }
    return (-(-n_rows // (16 * config.tiles)), len(x)), arguments


def _as_words(x: Tensor) -> Tensor:
    """As int32. Loads are of eight neighbouring values: rows begin on a boundary and end where eight do."""
    if x.shape[-1] % 8:
        x = pad(x, (0, -x.shape[-1] % 8))
    if x.data_ptr() % 16 or not x.is_contiguous():
        x = x.clone(memory_format=torch.contiguous_format)
    return x.view(torch.int32)
