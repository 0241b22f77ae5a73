"""Every storage format's kernel by the format's name, with the form in which a device holds the weight."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from quantkit.formats import grouped_int as grouped_int_format
from quantkit.formats import low_rank as low_rank_format
from quantkit.formats import sign_factors as sign_factors_format
from quantkit.formats import sign_salient as sign_salient_format
from quantkit.formats.spec import Spec
from quantkit.kernels import grouped_int, low_rank, planar, sign_factors, sign_planar, sign_salient

Tensors = dict[str, Tensor]


@dataclass(frozen=True, slots=True)
class Kernel:
    """How to compute with one format; ``to_planar`` and ``from_planar`` are exact inverses of each other."""

    matmul: Callable[[Tensor, Any, Tensors, Tensor | None], Tensor]  # takes the stored tensors or the planar ones
    is_planar: Callable[[Any], bool]  # whether a spec has a planar form, which CUDA kernels read
    to_planar: Callable[[Any, Tensors], Tensors]
    from_planar: Callable[[Any, Tensors], Tensors]
    by_columns: Callable[[Any], list[str]]  # stored tensors that a CPU holds column after column (column_sums.py)


KERNELS: dict[str, Kernel] = {
    grouped_int_format.NAME: Kernel(
        grouped_int.matmul, planar.is_planar, planar.to_planar, planar.from_planar, grouped_int.codes_by_columns
    ),
    sign_salient_format.NAME: Kernel(
        sign_salient.matmul,
        sign_planar.has_planar_form,
        sign_planar.salient_to_planar,
        sign_planar.salient_from_planar,
        sign_salient.codes_by_columns,
    ),
    sign_factors_format.NAME: Kernel(
        sign_factors.matmul,
        sign_planar.always,
        sign_planar.factors_to_planar,
        sign_planar.factors_from_planar,
        sign_factors.codes_by_columns,
    ),
    low_rank_format.NAME: Kernel(
        low_rank.matmul, low_rank.is_planar, low_rank.to_planar, low_rank.from_planar, low_rank.codes_by_columns
    ),
}


def kernel_of(spec: Spec) -> Kernel:
    return KERNELS[spec.format]
