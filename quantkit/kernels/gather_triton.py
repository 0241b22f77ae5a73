"""Triton kernel of gather.py. Imported on first use: `import quantkit` does not need Triton."""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call, no-any-return"

from __future__ import annotations

import triton
import triton.language as tl

from quantkit.kernels.decode_step_triton import take_turn


@triton.jit
def gather_kernel(
    values, more, index, scales, bias, out, n, HAS_MORE: tl.constexpr, HAS_SCALES: tl.constexpr,
    HAS_BIAS: tl.constexpr, COLUMNS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """out[j] = (values[index[j]] + more[index[j]]) * scales[j] + bias[j]; 0 for values at negative indices."""
    take_turn(PDL)
    place = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inside = place < n
    source = tl.load(index + place, mask=inside, other=-1)
    there = source >= 0
    value = tl.load(values + source, mask=there, other=0.0).to(tl.float32)
    if HAS_MORE:
        value += tl.load(more + source, mask=there, other=0.0).to(tl.float32)
    if HAS_SCALES:
        value *= tl.load(scales + place, mask=inside, other=0.0)
    if HAS_BIAS:
        value += tl.load(bias + place, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + place, value.to(out.dtype.element_ty), mask=inside)
